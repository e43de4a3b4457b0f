"""FLUX.1."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from lit_align.backbones.transformer import TransformerBackbone, grid, pack, unpack
from lit_align.tokens import Counts, count_tokens

WORDS = 512
"""Tokens of a prompt that T5 reads: the pipeline's default."""


class FluxBackbone(TransformerBackbone):
    """A ``FluxPipeline``: guidance-distilled as FLUX.1-dev, or not, as FLUX.1-schnell.

    A distilled model gets the scale of guidance as an input; others are guided by two predictions, as by the
    pipeline's ``true_cfg_scale``, unless the scale is 1.
    """

    pipeline_class = FluxPipeline
    without: ClassVar[dict[str, Any]] = {"image_encoder": None, "feature_extractor": None}

    @property
    def told_guidance(self) -> bool:
        config: Any = self.pipeline.transformer.config
        return bool(config.guidance_embeds)

    @property
    def input_channels(self) -> int:
        return 4 * self.latent_shape[0]

    def prompt_tokens(self, prompt: str) -> Counts:
        """Of T5; CLIP, which reads 77, only makes the pooled prompt."""
        return [(count_tokens(self.pipeline.tokenizer_2, prompt), WORDS)]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, self.device, max_sequence_length=WORDS
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def negative(self, empty: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return None if self.told_guidance else empty

    def pipeline_options(self, guidance: float) -> dict[str, Any]:
        if self.told_guidance:
            return {"guidance_scale": guidance}
        # The pipeline makes two predictions only where there is a negative prompt.
        return {} if guidance == 1.0 else {"true_cfg_scale": guidance, "negative_prompt": ""}

    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        image = grid(x)
        velocity: Tensor = network(
            pack(x),
            timestep=t / 1000,
            guidance=torch.full((len(x),), guidance, device=x.device) if self.told_guidance else None,
            txt_ids=image.new_zeros(cond["encoder_hidden_states"].shape[1], 3),
            img_ids=torch.cat([torch.zeros_like(image[:, :1]), image], dim=1),
            return_dict=False,
            **cond,
        )[0]
        return unpack(velocity, x)

    @classmethod
    def adapted(cls, network: Any) -> list[str]:
        # Attention and feed-forward layers of both streams, as in diffusers' train_dreambooth_lora_flux.py.
        of_prompt = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
        forward = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
        return [*super().adapted(network), *of_prompt, *forward]
