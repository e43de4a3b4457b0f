"""What the models that look at images share: soft images, and their folders."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lit_align.shapes.recipe.images import MEAN, STD, as_images, frame_half
from lit_align.shapes.recipe.pipeline import half, replace_folder, tidy
from lit_align.shapes.world import IMAGE_SIDE, Scene, render

NUM_IMAGES = 1_000_000
"""Training images are numbered up to here, and drawn when they are needed: none is kept."""


def images_of(scenes: Sequence[Scene]) -> Tensor:
    """Images ``(B, 3, 64, 64)`` float32 in [0, 1]."""
    return as_images(np.stack([render(scene) for scene in scenes]))


def soften(images: Tensor, generator: torch.Generator) -> Tensor:
    """Make renders look as if they came out of a sampler: soft, blotchy, noisy, their colours a little off.

    Half of them get a frame first. Every image gets its own strength of each, from nothing upwards.

    Args:
        images: ``(B, 3, 64, 64)`` in [0, 1].
        generator: On the CPU.
    """
    count = len(images)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    def normal(side: int) -> Tensor:
        return torch.randn(count, 3, side, side, generator=generator)

    images = soft = frame_half(images, generator)
    for _ in range(2):
        soft = F.avg_pool2d(F.pad(soft, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, soft, uniform(1, 1, 1))
    blotches = F.interpolate(
        normal(IMAGE_SIDE // 4), IMAGE_SIDE, mode="bilinear"
    )  # a latent's pixel is 4 wide
    images = images + 0.06 * uniform(1, 1, 1) * blotches + 0.04 * uniform(1, 1, 1) * normal(IMAGE_SIDE)
    gain, shift = 1 + 0.3 * (uniform(3, 1, 1) - 0.5), 0.1 * (uniform(3, 1, 1) - 0.5)
    return (images * gain + shift).clamp(0, 1)


def save_seer(folder: Path, model: PreTrainedModel, processor: str) -> None:
    """Write a model in float16, to be loaded in float32, with what its processor needs to know.

    Args:
        folder: Replaced as a whole.
        model: Stays as it is.
        processor: Name of transformers' image processor for this model.
    """
    statistics = {"do_normalize": True, "image_mean": MEAN, "image_std": STD}
    pixels = {"do_rescale": True, "rescale_factor": 1 / 255, "do_resize": False, "do_pad": False}
    size = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    preprocessing = {"image_processor_type": processor, **statistics, **pixels, "size": size}

    def write(fresh: Path) -> None:
        half(model).save_pretrained(fresh)
        tidy(fresh / "config.json")
        (fresh / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n", "utf-8")

    replace_folder(folder, write)
