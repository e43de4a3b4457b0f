"""Prompts and preference data, and the one batch that carries them."""

from lit_align.data.batch import Batch
from lit_align.data.prompts import PromptDataModule
from lit_align.data.shapes import ShapesPrompts, ShapesPromptSet
from lit_align.data.sources import (
    CSVPrompts,
    HubPrompts,
    JSONLPrompts,
    ParquetPrompts,
    PromptSource,
    TablePrompts,
    TextPrompts,
)

__all__ = [
    "Batch",
    "CSVPrompts",
    "HubPrompts",
    "JSONLPrompts",
    "ParquetPrompts",
    "PromptDataModule",
    "PromptSource",
    "ShapesPromptSet",
    "ShapesPrompts",
    "TablePrompts",
    "TextPrompts",
]
