"""Rewards with a closed form and a gradient: quick to compute, easy to see, easy to over-optimise."""

from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.rewards.base import Reward


class Redness(Reward):
    """Mean over pixels of ``R - (G + B) / 2``: -1 for cyan, 0 for grey, 1 for pure red."""

    differentiable = True
    scope = "sample"

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return red - (green + blue) / 2


class Brightness(Reward):
    """Mean luma of the stored pixels (weights of ITU-R BT.601, those of JPEG): 0 for black, 1 for white."""

    differentiable = True
    scope = "sample"

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        red, green, blue = images.mean(dim=(2, 3)).unbind(dim=1)
        return 0.299 * red + 0.587 * green + 0.114 * blue


class ColourFraction(Reward):
    """Soft share of pixels that have a colour: mean of ``1 / (1 + d² / width²)``.

    ``d`` is the RGB distance of a pixel to the colour. 1 when every pixel is exactly that colour. The tail is
    heavy on purpose: a pixel of another colour still has a gradient.

    Args:
        colour: A CSS name (``red``), ``#rrggbb`` or ``rgb(r,g,b)``.
        width: Distance at which a pixel counts half; black and white are √3 apart.

    Raises:
        ConfigError: The colour cannot be read, or the width is not positive.
    """

    differentiable = True
    scope = "sample"
    target: Tensor

    def __init__(self, colour: str, width: float = 0.25) -> None:
        super().__init__()
        if not width > 0:
            raise ConfigError(f"ColourFraction: width is {width}; give a positive distance, such as 0.25.")
        try:
            rgb = ImageColor.getrgb(colour)[:3]
        except ValueError as error:
            raise ConfigError(
                f"ColourFraction: cannot read the colour {colour!r}; "
                "give a CSS name such as 'red', or '#rrggbb'."
            ) from error
        self.width = width
        self.register_buffer("target", torch.tensor(rgb).view(1, 3, 1, 1) / 255, persistent=False)

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        distance2 = (images - self.target).square().sum(dim=1)
        return (1 / (1 + distance2 / self.width**2)).mean(dim=(1, 2))
