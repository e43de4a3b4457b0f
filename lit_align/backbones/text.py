"""Text encoders: where they are while nothing is encoded, and what is said of prompts that they cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers.utils import logging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn


class Encoder(Protocol):
    """What encodes prompts."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def tokenizers(self) -> list[Any]:
        """Those that cut long prompts."""

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by name, with a row for each prompt."""


class TextEncoding:
    """Encodes prompts, each by itself: a row of a batch is rounded differently in another batch.

    Args:
        encoder: A backbone.
        away: Its text encoders that wait on the CPU.
    """

    def __init__(self, encoder: Encoder, away: Sequence[nn.Module]) -> None:
        self._encoder, self._away = encoder, away
        self._told = False

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Tensors of one row for each prompt."""
        self._told = self._told or warn_of_cut(self._encoder.tokenizers, [p for p in prompts if p])
        with present(self._away, self._encoder.device), without_a_line_each():
            return [self._encoder.embed([prompt]) for prompt in prompts]


@contextmanager
def without_a_line_each() -> Iterator[None]:
    """Silence diffusers, which tells of every prompt that is cut; :func:`warn_of_cut` tells it once."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def present(encoders: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Text encoders on a device while prompts are encoded, on the CPU before and after."""
    for encoder in encoders:
        encoder.to(device)
    try:
        yield
    finally:
        for encoder in encoders:
            encoder.to("cpu")


def cut(tokenizers: Sequence[Any], prompts: Sequence[str]) -> list[str]:
    """The prompts of which a tokenizer drops the end."""
    found = []
    for prompt in prompts:
        lengths = ((len(t(prompt, verbose=False).input_ids), t.model_max_length) for t in tokenizers)
        if any(length > limit for length, limit in lengths):
            found.append(prompt)
    return found


def warn_of_cut(tokenizers: Sequence[Any], prompts: Sequence[str]) -> bool:
    """Warn if some prompts are longer than the text encoders read; returns whether it did."""
    found = cut(tokenizers, prompts)
    if not found:
        return False
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    rank_zero_warn(
        f"{len(found)} of the first {len(prompts)} prompts are longer than the {limit} tokens that the text "
        f"encoder reads, and are cut, such as {found[0][:60]!r}; of later ones nothing is said"
    )
    return True
