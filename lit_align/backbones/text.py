"""Text encoders: where they are while nothing is encoded, what they cut, and whether their tokenizer fits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from lit_align.errors import ConfigError
from lit_align.pretrained import has_words, misfit
from lit_align.tokens import count_tokens, warn_of_cut

if TYPE_CHECKING:
    from lit_align.backbones.pipeline import DiffusersBackbone

LONGEST = 10**6
"""Tokens; where nothing says how many a text may have, transformers says 10^30."""


class TextEncoding:
    """Encodes prompts, each by itself: a row of a batch is rounded differently in another batch.

    Autocast is off: what is remembered must not depend on who asked first, and in float16 T5 overflows.

    Args:
        backbone: Whose prompts.
        away: Its text encoders that wait on the CPU.
    """

    def __init__(self, backbone: "DiffusersBackbone", away: Sequence[nn.Module]) -> None:
        self._backbone, self._away = backbone, away
        self._told = False

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Tensors of one row for each prompt."""
        self._told = self._told or warn_of_cut(
            "the text encoder", self._backbone.prompt_tokens, [p for p in prompts if p]
        )
        device = self._backbone.device
        exact = torch.autocast(device.type, enabled=False)
        with present(self._away, device), without_a_line_each(), exact:
            made = [self._backbone.embed([prompt]) for prompt in prompts]
        if not all(isinstance(one, dict) and {len(value) for value in one.values()} == {1} for one in made):
            raise ConfigError(
                f"{type(self._backbone).__name__}.embed must return a dict of tensors with a row for each "
                "prompt (it is given one at once), and none for the empty prompt"
            )
        return made


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


def check_tokenizer(folder: str, part: str, tokenizer: PreTrainedTokenizerBase, encoder: Any) -> None:
    """Refuse a tokenizer that is not the one of its text encoder.

    Args:
        folder: What the user wrote.
        part: Its name in the pipeline.
        tokenizer: Where its files were left behind, all prompts are alike to it, or of any length.
        encoder: The text encoder that reads its tokens; None where a pipeline has none.

    Raises:
        ConfigError: It has no words, no length, or tokens which the encoder does not know.
    """
    lost = None if has_words(tokenizer) else "words"
    if isinstance(tokenizer, CLIPTokenizer) and tokenizer.model_max_length > LONGEST:
        lost = lost or "length, which is in tokenizer_config.json"
    if lost:
        raise ConfigError(
            f"pretrained: the {part} of {folder!r} has no {lost}; copy or download all of its files"
        )
    if encoder is not None and (wrong := misfit(tokenizer, encoder)):
        raise ConfigError(f"pretrained: the {part} of {folder!r} has {wrong}; give the one of the same model")
