"""Prompts and preference data, and the batches that carry them."""

from lit_align.data import preferences, prompts
from lit_align.data.batch import Batch, PairBatch
from lit_align.data.captioned import CaptionedImages, HubImages, ShapesRenders
from lit_align.data.preferences import *  # noqa: F403
from lit_align.data.prompts import *  # noqa: F403

__all__ = [
    "Batch",
    "CaptionedImages",
    "HubImages",
    "PairBatch",
    "ShapesRenders",
    *preferences.__all__,
    *prompts.__all__,
]
