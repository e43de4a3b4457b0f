"""Preferences, for the methods that read pairs of images: sources, loader, data module."""

from lit_align.data.preferences.archives import ArchiveColumns, WebDatasetPairs
from lit_align.data.preferences.columns import PairColumns
from lit_align.data.preferences.folder import FolderPairs
from lit_align.data.preferences.module import PickaPicDataModule
from lit_align.data.preferences.pickapic import PickaPicFiles, PickaPicHub, ShapesPick
from lit_align.data.preferences.source import PairSource, PickaPicPrompts
from lit_align.data.preferences.tables import PreferenceFiles

__all__ = [
    "ArchiveColumns",
    "FolderPairs",
    "PairColumns",
    "PairSource",
    "PickaPicDataModule",
    "PickaPicFiles",
    "PickaPicHub",
    "PickaPicPrompts",
    "PreferenceFiles",
    "ShapesPick",
    "WebDatasetPairs",
]
