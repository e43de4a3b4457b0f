"""Prompts, for the methods that sample their own images: sources, index, splits, loaders, data modules."""

from lit_align.data.prompts.animals import Animals
from lit_align.data.prompts.hub import HubPrompts
from lit_align.data.prompts.module import PromptDataModule
from lit_align.data.prompts.objects import ObjectPairs
from lit_align.data.prompts.shapes import ShapesPrompts, ShapesPromptSet
from lit_align.data.prompts.sources import (
    CSVPrompts,
    JSONLPrompts,
    JSONPrompts,
    ParquetPrompts,
    PromptSource,
    TablePrompts,
    TextPrompts,
    TSVPrompts,
)
from lit_align.data.prompts.tasks import MultiTaskDataModule, TaskPrompts

__all__ = [
    "Animals",
    "CSVPrompts",
    "HubPrompts",
    "JSONLPrompts",
    "JSONPrompts",
    "MultiTaskDataModule",
    "ObjectPairs",
    "ParquetPrompts",
    "PromptDataModule",
    "PromptSource",
    "ShapesPromptSet",
    "ShapesPrompts",
    "TSVPrompts",
    "TablePrompts",
    "TaskPrompts",
    "TextPrompts",
]
