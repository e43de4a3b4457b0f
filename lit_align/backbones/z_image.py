"""Z-Image."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn
from torch.nn.functional import pad

from lit_align.backbones.text import count_chat
from lit_align.backbones.transformer import TransformerBackbone
from lit_align.tokens import Counts

WORDS = 512
"""Tokens of a prompt that the pipeline reads, those of the chat around it included."""


class ZImageBackbone(TransformerBackbone):
    """A ``ZImagePipeline``. Its own scale of guidance is ours less 1: 0 is none there."""

    pipeline_class = ZImagePipeline
    no_input_for: ClassVar[tuple[str, ...]] = ("siglip_feat_dim",)

    def prompt_tokens(self, prompt: str) -> Counts:
        return [(count_chat(self.pipeline.tokenizer, prompt, enable_thinking=True), WORDS)]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False, max_sequence_length=WORDS
        )
        return {
            "states": torch.stack([pad(one, (0, 0, 0, WORDS - len(one))) for one in states]),
            "length": torch.tensor([len(one) for one in states], device=self.device),
        }

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale - 1}

    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        del guidance  # this family is guided by two predictions
        words = [one[:length] for one, length in zip(cond["states"], cond["length"].tolist(), strict=True)]
        # The network counts time from noise to images, and predicts the velocity of that direction.
        velocities: list[Tensor] = network(list(x.unsqueeze(2)), 1 - t / 1000, words, return_dict=False)[0]
        return -torch.stack(velocities).squeeze(2)

    def blocks(self, network: Any) -> list[nn.Module]:
        return [*network.noise_refiner, *network.context_refiner, *network.layers]
