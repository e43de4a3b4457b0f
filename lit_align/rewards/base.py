"""What a reward is: a frozen module that turns images and prompts into one number per image."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Scope = Literal["sample", "group", "batch"]


class Reward(nn.Module, ABC):
    """A score of images, higher is better.

    A subclass declares two facts, on which the methods rely (and which a test proves for every class of this
    package):

    - ``differentiable``: the score has a useful gradient with respect to the pixels (AlignProp needs one).
    - ``scope``: what an image's score may depend on: the image and its prompt alone (``"sample"``), the
      images of its prompt group (``"group"``), or the whole batch (``"batch"``).

    A reward is a module so that the trainer moves it between devices; it never learns. Call :meth:`freeze` at
    the end of a constructor that makes parameters (the bank calls it once more, for those who forget).
    """

    differentiable: ClassVar[bool]
    scope: ClassVar[Scope]

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Score images.

        Args:
            images: ``(B, 3, H, W)`` float32 in [0, 1].
            prompts: The B prompts.
            groups: ``(B,)`` long, the same number for the images of one prompt group.
            columns: The data's extra columns, a list of B entries each.

        Returns:
            ``(B,)`` float32; NaN means that there is no score for that image.
        """

    def shared_out(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores, and what is reported of each image: for all but rewards of sets the same.

        Arguments as in :meth:`forward`.
        """
        scores = self(images, prompts, groups, columns)
        return scores, scores

    def freeze(self) -> Self:
        """Take every parameter out of training and switch to evaluation mode."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: trainers switch modules to training, and dropout would blur scores."""
        return super().train(False)


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """8-bit images ``(B, H, W, 3)`` of ``(B, 3, H, W)`` in [0, 1]."""
    rounded = images.detach().clamp(0, 1).mul_(255).round_().to(torch.uint8).cpu()
    return rounded.permute(0, 2, 3, 1).contiguous().numpy()


class BlackBoxReward(Reward):
    """A reward that looks at 8-bit images one by one, without gradient: a subclass writes :meth:`score`."""

    differentiable: ClassVar[bool] = False
    scope: ClassVar[Scope] = "sample"

    @abstractmethod
    def score(self, image: NDArray[np.uint8], prompt: str) -> float:
        """Score one image, ``(H, W, 3)`` uint8."""

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Round to 8 bits and score one by one; an image with a pixel that is not finite has no score."""
        # The sum is finite exactly where all pixels are, and much cheaper than a mask of the image's size.
        finite = images.detach().flatten(1).sum(dim=1).isfinite().tolist()
        scores = [
            self.score(image, prompt) if ok else float("nan")
            for image, prompt, ok in zip(to_bytes(images), prompts, finite, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32, device=images.device)
