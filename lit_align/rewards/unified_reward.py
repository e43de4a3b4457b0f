"""Scores that a vision-language model writes: the question, and how the number is read from its answer."""

import math
import re
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype, shared
from lit_align.rewards.base import Reward, are_whole
from lit_align.rewards.templates import UNIFIED_REWARD
from lit_align.rewards.vision_language import VisionLanguage, checked_question

MODEL = "CodeGoat24/UnifiedReward-qwen-7b"
"""Version 1.5 of Wang et al.'s model, of Qwen2.5-VL's form."""

PATTERN = r"Score(?: \(1-5\))?:\s*(-?\d+(?:\.\d+)?)"
"""``Final Score: 4`` of version 1.5, or the three lines ``Alignment Score (1-5): 3.5`` ... of version 2.0."""


class UnifiedReward(Reward):
    """The number that a vision-language model writes: 1 to 5, of several their mean.

    UnifiedReward is that of Wang et al. 2025, arXiv:2503.05236; with another ``question`` and ``pattern``
    any image-text-to-text model of transformers becomes a judge. An answer without a number is no score.
    It has no gradient, since the score is text.

    Args:
        pretrained: A hub id or a folder. Safetensors only.
        question: What is asked; ``{}`` is the prompt. By default the text that UnifiedReward was trained on.
        pattern: A regular expression whose first group is a number of the answer.
        max_new_tokens: Longest answer.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The model cannot be loaded, the question has no ``{}``, or the pattern no group.
    """

    differentiable = False
    scope = "sample"

    def __init__(
        self,
        pretrained: str = MODEL,
        question: str = UNIFIED_REWARD,
        pattern: str = PATTERN,
        max_new_tokens: int = 128,
        dtype: Dtype = "bfloat16",
    ) -> None:
        super().__init__()
        self.question = checked_question(question, "UnifiedReward")
        self.pattern = checked_pattern(pattern)
        self.documented = (1.0, 5.0) if question == UNIFIED_REWARD else None  # as the question asks
        self.max_new_tokens = max_new_tokens
        self.model = shared(VisionLanguage, pretrained, dtype)
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        rows = are_whole(images).nonzero().flatten()
        scores = torch.full((len(images),), torch.nan, device=images.device)
        if len(rows):
            asked = [self.question.replace("{}", prompts[row]) for row in rows.tolist()]
            said = self.model.answers(images[rows], asked, self.max_new_tokens)
            scores[rows] = torch.tensor([number(text, self.pattern) for text in said]).to(scores)
        return scores


def number(text: str, pattern: str) -> float:
    """The mean of the numbers that a pattern finds in an answer; NaN if there is none."""
    found = re.findall(pattern, text, flags=re.IGNORECASE)
    return fmean(map(float, found)) if found else math.nan


def checked_pattern(pattern: str) -> str:
    """A regular expression with one group.

    Raises:
        ConfigError: It is none, or has another number of groups.
    """
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ConfigError(f"pattern: {pattern!r} is not a regular expression ({error}).") from error
    if groups != 1:
        raise ConfigError(f"pattern: {pattern!r} has {groups} groups; put the number, and only it, in one.")
    return pattern
