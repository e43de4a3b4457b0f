"""Preferences, for the methods that read pairs of images: sources, loader, data module."""

from lit_align.data.preferences.folder import FolderPairs
from lit_align.data.preferences.module import PickaPicDataModule
from lit_align.data.preferences.pickapic import PickaPicFiles, PickaPicHub, ShapesPick
from lit_align.data.preferences.source import PairSource, PickaPicPrompts

__all__ = [
    "FolderPairs",
    "PairSource",
    "PickaPicDataModule",
    "PickaPicFiles",
    "PickaPicHub",
    "PickaPicPrompts",
    "ShapesPick",
]
