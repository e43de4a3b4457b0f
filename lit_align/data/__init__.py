"""Prompts and preference data, and the one batch that carries them."""

from lit_align.data.animals import Animals
from lit_align.data.batch import Batch, PairBatch
from lit_align.data.captioned import CaptionedImages, HubImages, ShapesRenders
from lit_align.data.objects import ObjectPairs
from lit_align.data.pair_files import PickaPicFiles, PickaPicHub, ShapesPick
from lit_align.data.pair_folder import FolderPairs
from lit_align.data.pairs import PairSource, PickaPicPrompts
from lit_align.data.pickapic import PickaPicDataModule
from lit_align.data.prompts import PromptDataModule
from lit_align.data.shapes import ShapesPrompts, ShapesPromptSet
from lit_align.data.sources import (
    CSVPrompts,
    HubPrompts,
    JSONLPrompts,
    JSONPrompts,
    ParquetPrompts,
    PromptSource,
    TablePrompts,
    TextPrompts,
    TSVPrompts,
)
from lit_align.data.tasks import MultiTaskDataModule, TaskPrompts

__all__ = [
    "Animals",
    "Batch",
    "CSVPrompts",
    "CaptionedImages",
    "FolderPairs",
    "HubImages",
    "HubPrompts",
    "JSONLPrompts",
    "JSONPrompts",
    "MultiTaskDataModule",
    "ObjectPairs",
    "PairBatch",
    "PairSource",
    "ParquetPrompts",
    "PickaPicDataModule",
    "PickaPicFiles",
    "PickaPicHub",
    "PickaPicPrompts",
    "PromptDataModule",
    "PromptSource",
    "ShapesPick",
    "ShapesPromptSet",
    "ShapesPrompts",
    "ShapesRenders",
    "TSVPrompts",
    "TablePrompts",
    "TaskPrompts",
    "TextPrompts",
]
