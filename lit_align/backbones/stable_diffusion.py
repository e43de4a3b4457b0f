"""Stable Diffusion 1.x and 2.x, and every other pipeline folder of that format, such as the bundled one."""

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from lit_align.backbones.pipeline import DiffusersBackbone
from lit_align.shapes.world import is_shapes_vocabulary


class StableDiffusionBackbone(DiffusersBackbone):
    """A ``StableDiffusionPipeline`` with named weight sets of its UNet."""

    pipeline_class = StableDiffusionPipeline
    denoiser = "unet"
    without: ClassVar[dict[str, Any]] = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    no_input_for = (
        "class_embed_type",
        "num_class_embeds",
        "addition_embed_type",
        "encoder_hid_dim",
        "encoder_hid_dim_type",
        "time_cond_proj_dim",
    )

    @property
    def is_shapes(self) -> bool:
        return is_shapes_vocabulary(self.pipeline.tokenizer.get_vocab())

    @property
    def unet(self) -> nn.Module:
        """The UNet that holds the policy."""
        return self.network

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, 1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": states}

    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        del guidance  # this family is guided by two predictions
        prediction: Tensor = network(x, t, return_dict=False, **cond)[0]
        return prediction

    def blocks(self, network: Any) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]
