"""Text encoders: where they are while nothing is encoded, and what is said of prompts that they cut."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from lit_align.tokens import Counts, count_tokens, warn_of_cut


class Encoder(Protocol):
    """What encodes prompts."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def prompt_tokens(self, prompt: str) -> Counts:
        """How many tokens a prompt has, and how many are read."""

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors by name, with a row for each prompt."""


class TextEncoding:
    """Encodes prompts, each by itself: a row of a batch is rounded differently in another batch.

    Autocast is off: what is remembered must not depend on who asked first, and in float16 T5 overflows.

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
        self._told = self._told or warn_of_cut(
            "the text encoder", self._encoder.prompt_tokens, [p for p in prompts if p]
        )
        device = self._encoder.device
        exact = torch.autocast(device.type, enabled=False)
        with present(self._away, device), without_a_line_each(), exact:
            return [self._encoder.embed([prompt]) for prompt in prompts]


@contextmanager
def without_a_line_each() -> Iterator[None]:
    """Silence diffusers, which warns about every prompt that is cut: we warn once."""
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


def count_chat(tokenizer: Any, prompt: str, enable_thinking: bool) -> int:
    """How many tokens a prompt has as a user's turn of a chat, which is how pipelines ask language models."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
    )
    return count_tokens(tokenizer, text)
