"""FLUX.2-klein."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lit_align.backbones.text import count_chat
from lit_align.backbones.transformer import TransformerBackbone, grid, pack, unpack
from lit_align.errors import ConfigError
from lit_align.tokens import Counts

WORDS = 512
"""Tokens of a prompt that the pipeline reads, those of the chat around it included: its default."""


class Flux2KleinBackbone(TransformerBackbone):
    """A ``Flux2KleinPipeline``: base models, which take guidance, and distilled ones, which do not."""

    pipeline_class = Flux2KleinPipeline

    @property
    def input_channels(self) -> int:
        return 4 * self.latent_shape[0]

    def prompt_tokens(self, prompt: str) -> Counts:
        return [(count_chat(self.pipeline.tokenizer, prompt, enable_thinking=False), WORDS)]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        # The pipeline's own are layers 9, 18 and 27 of Qwen3's 36.
        layers = self.pipeline.text_encoder.config.num_hidden_layers
        states, _ = self.pipeline.encode_prompt(
            list(prompts),
            self.device,
            max_sequence_length=WORDS,
            text_encoder_out_layers=[round(share * layers) for share in (0.25, 0.5, 0.75)],
        )
        return {"encoder_hidden_states": states}

    def negative(self, empty: dict[str, Tensor]) -> dict[str, Tensor] | None:
        return None if self.pipeline.config.is_distilled else empty

    def check_guidance(self, scale: float, setting: str = "sampling.guidance") -> None:
        if self.pipeline.config.is_distilled and scale != 1.0:
            raise ConfigError(
                f"{setting}: {scale} has no effect on this model, which is distilled; set it to 1"
            )
        super().check_guidance(scale, setting)

    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        if self.pipeline.config.is_distilled:
            self.check_guidance(guidance)
        image, states = grid(x), cond["encoder_hidden_states"]
        # Four numbers place a token: image, row, column, word.
        words = torch.arange(states.shape[1], device=x.device, dtype=image.dtype)[:, None]
        zeros = torch.zeros_like(image[:, :1])
        velocity: Tensor = network(
            pack(x),
            timestep=t / 1000,
            encoder_hidden_states=states,
            txt_ids=torch.cat([words.new_zeros(len(words), 3), words], dim=1),
            img_ids=torch.cat([zeros, image, zeros], dim=1),
            guidance=None,
            return_dict=False,
        )[0]
        return unpack(velocity, x)

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = self._statistics()
        return pixel_shuffle((pixel_unshuffle(z, 2) - mean) / std, 2)

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics()
        return pixel_shuffle(pixel_unshuffle(latents, 2) * std + mean, 2)

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and std of each element of a 2 x 2 patch, ``(1, 4 C, 1, 1)``."""
        vae: Any = self.vae
        variance = vae.bn.running_var + vae.config.batch_norm_eps
        return vae.bn.running_mean.view(1, -1, 1, 1), variance.sqrt().view(1, -1, 1, 1)

    def mu(self, num_steps: int) -> float:
        return compute_empirical_mu(self.tokens, num_steps)

    @classmethod
    def adapted(cls, network: Any) -> list[str]:
        # As in diffusers' train_dreambooth_lora_flux2_klein.py. Without their number the last would also be
        # lists of layers in the other blocks.
        blocks = range(len(network.single_transformer_blocks))
        ends = [f"single_transformer_blocks.{block}.attn.to_out" for block in blocks]
        return [*super().adapted(network), "to_qkv_mlp_proj", *ends]
