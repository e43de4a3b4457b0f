"""Features of images by a frozen vision model, for distances between sets of images."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from lit_align.errors import ConfigError
from lit_align.pretrained import load_part, load_whole, processor_config, shared
from lit_align.rewards.clip import CLIPCosine, resized
from lit_align.shapes import CLIP as SHAPES_CLIP

IMAGES_AT_ONCE = 64


class ImageFeatures(nn.Module):
    """A vector for each image.

    Of a CLIP (that of ``CLIPScore``, ``PickScore`` or an aesthetic head) the unit embedding; of other vision
    models, such as ViT or DINOv2, what they pool, or else their first token.

    Args:
        pretrained: A hub id, a folder with a transformers model that sees images, or ``"shapes"`` for the
            bundled CLIP. Safetensors only.

    Raises:
        ConfigError: The model cannot be loaded, or makes no vectors of images alone.
    """

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        self.pretrained = pretrained
        config: Any = load_part(AutoConfig, pretrained, SHAPES_CLIP)
        self.clip = shared(CLIPCosine, pretrained) if config.model_type == "clip" else None
        self.vision: Any = None
        if self.clip is None:
            self.vision = load_whole(AutoModel.from_pretrained, pretrained, SHAPES_CLIP, "vision model")
            self._prepare(processor_config(pretrained, SHAPES_CLIP), config)
        self.requires_grad_(False).eval()

    def _prepare(self, pixels: dict[str, Any], config: Any) -> None:
        side = pixels.get("crop_size") or pixels.get("size") or getattr(config, "image_size", None)
        if isinstance(side, dict):
            side = side.get("height") or side.get("shortest_edge")
        if self.vision.main_input_name != "pixel_values" or not isinstance(side, int):
            raise ConfigError(
                f"pretrained: {self.pretrained!r} is a {config.model_type}, for which no image vector "
                "is known; give a CLIP, ViT or DINOv2 model"
            )
        self.side = side
        for name in ("image_mean", "image_std"):
            values = torch.tensor(pixels.get(name, [0.5, 0.5, 0.5]), dtype=torch.float32)
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """``(B, F)`` of images ``(B, 3, H, W)`` in [0, 1]."""
        if self.clip is not None:
            return self.clip.embed_images(images)
        return torch.cat([self._pooled(chunk) for chunk in images.split(IMAGES_AT_ONCE)])

    def _pooled(self, images: Tensor) -> Tensor:
        mean, std = self.get_buffer("image_mean"), self.get_buffer("image_std")
        pixels = resized(images.to(mean), [self.side, self.side])
        output = self.vision(pixel_values=(pixels - mean) / std)
        pooled = getattr(output, "pooler_output", None)
        vectors: Tensor = output.last_hidden_state[:, 0] if pooled is None else pooled
        return vectors.flatten(1)
