"""What a reward is: a frozen module that turns images and prompts into one number per image."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lit_align.errors import ConfigError
from lit_align.pretrained import SHAPES
from lit_align.rewards.calling import accepted

Scope = Literal["sample", "group", "batch"]
Domain = Literal["shapes"]


class Reward(nn.Module, ABC):
    """A score of images, higher is better.

    A subclass declares what the methods rely on. For every class of this package a test proves it:

    - ``differentiable``: the score has a useful gradient with respect to the pixels (AlignProp needs one).
    - ``scope``: what an image's score may depend on: the image and its prompt alone (``"sample"``), the
      images of its prompt group (``"group"``), or the whole batch (``"batch"``).
    - ``domain``: ``"shapes"`` where the scores mean nothing outside the Shapes world, because the model was
      trained on Shapes images or a program judges them; None where any image can be scored.
    - ``documented``: the lowest and the highest score to be expected, wide enough for any image of the
      domain; None where nothing is known. The doctor compares.

    A reward is a module so that the trainer moves it between devices; it never learns. Call :meth:`freeze` at
    the end of a constructor that makes parameters (the bank calls it once more).
    """

    differentiable: bool = False
    scope: Scope = "sample"
    domain: Domain | None = None
    documented: tuple[float, float] | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Prepare the module here, so that a constructor without ``super().__init__()`` works too."""
        reward = super().__new__(cls)
        nn.Module.__init__(reward)
        return reward

    def __init__(self) -> None:
        """Nothing is left to do. A second ``nn.Module.__init__`` would forget what was assigned so far."""

    @abstractmethod
    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Score images.

        A subclass may leave out ``groups`` and ``columns``, and may name single columns as parameters.

        Args:
            images: ``(B, 3, H, W)`` float32 in [0, 1].
            prompts: The B prompts.
            groups: ``(B,)`` long, the same number for the images of one prompt group.
            columns: The data's extra columns, a list of B entries each.

        Returns:
            ``(B,)`` float32; NaN means that there is no score for that image. A bank also reads other forms
            (see :func:`lit_align.rewards.calling.as_scores`).
        """

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        """Refuse data that lack a column, before anything is sampled; :meth:`forward` would only then.

        Args:
            columns: The data's columns of some images; a subclass may look at their entries too.

        Raises:
            ConfigError: One is missing that the reward's code names.
        """
        accepted(self.forward, torch.empty(0), [], None, columns)

    def need(self, column: str, columns: Mapping[str, Any] | None, remedy: str) -> None:
        """Refuse data without a column.

        Raises:
            ConfigError: It is missing.
        """
        if column not in (columns or {}):
            raise ConfigError(
                f"{type(self).__name__}: the data has no column '{column}'; its columns: "
                f"{', '.join(columns or {}) or 'none'}. {remedy}"
            )

    def ahead(self, images: Tensor, prompts: list[str], columns: dict[str, list[Any]] | None) -> None:
        """Begin to score images that :meth:`forward` will get soon, in the same order.

        Only rewards that are computed elsewhere do: it is called after each chunk of images that is sampled.
        """

    def shared_out(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores, and what is reported of each image: the same, but for rewards of sets.

        Arguments as in :meth:`forward`.
        """
        given, named = accepted(self.forward, images, prompts, groups, columns)
        scores = self(*given, **named)
        return scores, scores

    def freeze(self) -> Self:
        """Take every parameter out of training and switch to evaluation mode."""
        self.requires_grad_(False)
        return self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: trainers switch modules to training, and dropout would blur scores."""
        return super().train(False)


def domain_of(pretrained: str) -> Domain | None:
    """The domain of a reward with this model: the bundled ones were trained on Shapes images."""
    return "shapes" if pretrained == SHAPES else None


def are_whole(images: Tensor) -> Tensor:
    """Which images ``(B, 3, H, W)`` have only finite pixels, ``(B,)`` bool: the others have no score."""
    # The sum is finite exactly where all pixels are, and much cheaper than a mask of the image's size.
    return images.detach().flatten(1).sum(dim=1).isfinite()


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """8-bit images ``(B, H, W, 3)`` of ``(B, 3, H, W)`` in [0, 1]."""
    rounded = images.detach().clamp(0, 1).mul_(255).round_().to(torch.uint8).cpu()
    return rounded.permute(0, 2, 3, 1).contiguous().numpy()


class BlackBoxReward(Reward):
    """A reward that looks at 8-bit images one by one, without gradient: a subclass writes :meth:`score`."""

    differentiable = False
    scope = "sample"

    @abstractmethod
    def score(self, image: NDArray[np.uint8], prompt: str) -> float | None:
        """Score one image, ``(H, W, 3)`` uint8; None or NaN where there is no score."""

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Round to 8 bits and score one by one; an image with a pixel that is not finite has no score."""
        rows = zip(to_bytes(images), prompts, are_whole(images).tolist(), strict=True)
        scores = [self.score(image, prompt) if whole else None for image, prompt, whole in rows]
        numbers = [self._number(score) for score in scores]
        return torch.tensor(numbers, dtype=torch.float32, device=images.device)

    def _number(self, score: Any) -> float:
        try:
            return float("nan") if score is None else float(score)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{type(self).__name__}.score returned a value of the type {type(score).__name__}; return "
                "one number, or None where there is no score."
            ) from None
