"""Stable Diffusion XL, and every other pipeline folder of that format, such as SDXL-Turbo."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from lit_align.backbones.autoencoder import STATISTICS
from lit_align.backbones.pipeline import DiffusersBackbone
from lit_align.tokens import Counts, count_tokens

TIME_IDS = 6
"""Height and width before the crop, top and left of the crop, height and width after it."""


class StableDiffusionXLBackbone(DiffusersBackbone):
    """A ``StableDiffusionXLPipeline`` with named weight sets of its UNet.

    Beside the states of both text encoders the UNet gets the pooled prompt and, as *time ids*, the size
    that the image had before it was cropped, the corner of the crop, and the size that it has: here the
    backbone's size, nothing, and the backbone's size, as in the pipeline.
    """

    pipeline_class = StableDiffusionXLPipeline
    denoiser = "unet"
    without: ClassVar[dict[str, Any]] = {
        "feature_extractor": None,
        "image_encoder": None,
        "add_watermarker": False,
    }
    no_input_for = (
        "class_embed_type",
        "num_class_embeds",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    )

    @property
    def unet(self) -> nn.Module:
        """The UNet that holds the policy."""
        return self.network

    def prompt_tokens(self, prompt: str) -> Counts:
        both = (self.pipeline.tokenizer, self.pipeline.tokenizer_2)
        return [(count_tokens(one, prompt), one.model_max_length) for one in both if one is not None]

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False
        )
        ids = torch.tensor([*self.size, 0, 0, *self.size], device=self.device)  # whole, so never rounded
        return {
            "encoder_hidden_states": states,
            "text_embeds": pooled,
            "time_ids": ids.expand(len(prompts), -1),
        }

    def negative(self, empty: dict[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt, or zeros where the pipeline says so, as that of SDXL does."""
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return {name: value if name == "time_ids" else 0 * value for name, value in empty.items()}

    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        del guidance  # this family is guided by two predictions
        told = {name: cond[name] for name in ("text_embeds", "time_ids")}
        prediction: Tensor = network(
            x, t, cond["encoder_hidden_states"], added_cond_kwargs=told, return_dict=False
        )[0]
        return prediction

    def blocks(self, network: Any) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def asks_more(self, config: Mapping[str, Any]) -> list[str]:
        """Refuse a refiner, whose time ids have an aesthetic score in the place of the size."""
        width = config.get("addition_time_embed_dim") or 0
        pooled = self.pipeline.text_encoder_2.config.projection_dim
        wanted = config.get("projection_class_embeddings_input_dim")
        if config.get("addition_embed_type") != "text_time" or wanted == pooled + TIME_IDS * width:
            return []
        return [f"projection_class_embeddings_input_dim {wanted} for {TIME_IDS} time ids, as a refiner"]

    def normalise(self, z: Tensor) -> Tensor:
        mean, std = self._statistics(z)
        return super().normalise((z - mean) / std)

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return super().denormalise(latents) * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels, of autoencoders that say them; else 0 and 1."""
        config: Any = self.vae.config
        mean, std = (config.get(name) or [neutral] for name, neutral in zip(STATISTICS, (0, 1), strict=True))
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)
