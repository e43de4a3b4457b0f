"""Which predictions of a chain a gradient goes through: windows, single steps, one shot, the last step again.

Shapes: ``T`` steps, in sampling order.
"""

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lit_align.errors import ConfigError


class Truncation(ABC):
    """Which predictions of a chain the gradient goes through; drawn anew for every image.

    The paper draws once a rollout, and its code once (or once a step) for a micro-batch of images. Here
    every image has a draw of its own, so that an update averages over windows and does not depend on how
    images were dealt to micro-batches and ranks.

    Attributes:
        one_shot: Whether the image is the clean state that the attached prediction implies, instead of the
            end of the chain.
        copies: How often the last step is taken again, each time from the finished image, noised anew.
    """

    one_shot: ClassVar[bool] = False
    copies: int = 0

    @abstractmethod
    def attached(self, num_steps: int, draw: torch.Generator) -> Tensor:
        """``(T,)`` bool, with at least one step: an image without a gradient would be wasted.

        Raises:
            ConfigError: The settings do not fit this number of steps.
        """


class Window(Truncation, ABC):
    """The last ``K`` steps are attached; truncation biases the gradient towards what late steps decide."""

    @abstractmethod
    def length(self, num_steps: int, draw: torch.Generator) -> int:
        """``K``, from 1 to ``num_steps``."""

    def attached(self, num_steps: int, draw: torch.Generator) -> Tensor:
        return torch.arange(num_steps) >= num_steps - self.length(num_steps, draw)


class NoTruncation(Window):
    """The whole chain: the exact gradient; in the paper it collapses to one image within two epochs."""

    def length(self, num_steps: int, draw: torch.Generator) -> int:
        return num_steps


class FixedWindow(Window):
    """Always the same number of steps: DRaFT-K.

    Args:
        steps: ``K``. DRaFT's practical choice is 1.
    """

    def __init__(self, steps: int = 1) -> None:
        self.steps = steps

    def length(self, num_steps: int, draw: torch.Generator) -> int:
        _check("FixedWindow's steps", self.steps, num_steps)
        return self.steps


class LowVariance(Window):
    """DRaFT-LV: the last step, and the same step again from ``m`` re-noised copies of the finished image.

    A copy is the image, without its gradient, at the noise level where the last step begins. Its own last
    step, decoding and reward give one more gradient for a small part of a chain's cost. The update takes the
    mean over the chain's end and its copies, where DRaFT's algorithm 1 takes the sum: Adam hides the factor.
    Where noising an image leads back to the distribution that the last step met, the expectation is that of
    ``FixedWindow(1)``, with less variance.

    Args:
        copies: ``m``; 2 in the paper. Each is one more reward query an image.

    Raises:
        ConfigError: No copies: that is ``FixedWindow(1)``.
    """

    def __init__(self, copies: int = 2) -> None:
        if copies < 1:
            raise ConfigError(
                f"LowVariance: copies is {copies}; give at least 1, or FixedWindow with steps 1 for none"
            )
        self.copies = copies

    def length(self, num_steps: int, draw: torch.Generator) -> int:
        return 1


class UniformWindow(Window):
    """A uniform number of steps: AlignProp's randomised truncation, which its human study preferred.

    Args:
        low: Smallest ``K``. The paper begins at 0, which is an image without a gradient.
        high: Largest ``K``; all steps if not given, as in the paper.
    """

    def __init__(self, low: int = 1, high: int | None = None) -> None:
        self.low = low
        self.high = high

    def length(self, num_steps: int, draw: torch.Generator) -> int:
        high = num_steps if self.high is None else self.high
        _check("UniformWindow's high", high, num_steps)
        _check("UniformWindow's low", self.low, high)
        return int(torch.randint(self.low, high + 1, (), generator=draw))


class GaussianWindow(Window):
    """A normal number of steps, rounded up, drawn again until it is one of 1 to ``T``.

    Args:
        mean: 8 of 50 steps in the released code (branch trl_main: the first attached step is N(42, 5)).
        std: 5 in the same code.
    """

    def __init__(self, mean: float = 8.0, std: float = 5.0) -> None:
        if not std >= 0:
            raise ConfigError(f"GaussianWindow: std {std} must not be negative")
        self.mean = mean
        self.std = std

    def length(self, num_steps: int, draw: torch.Generator) -> int:
        _check("GaussianWindow's mean", self.mean, num_steps)  # so that few draws are rejected
        while True:
            steps = math.ceil(self.mean + self.std * float(torch.randn((), generator=draw)))
            if 1 <= steps <= num_steps:
                return steps


class PerStep(Truncation):
    """Each step is attached or not by a draw of its own, step ``k`` with probability ``(k + 1) / (T + 1)``.

    The rule of the released code (branch main) and of TRL's AlignPropTrainer. A step has the same chance as
    with a uniform window, but a detached step in the middle takes its Jacobian from all that precede it. The
    last step is always attached; with 50 steps that adds 1/51 to its chance.
    """

    def attached(self, num_steps: int, draw: torch.Generator) -> Tensor:
        thresholds = torch.randint(0, num_steps + 1, (num_steps,), generator=draw)
        chosen = torch.arange(num_steps) >= thresholds
        chosen[-1] = True
        return chosen


class OneShot(Truncation):
    """ReFL: the chain stops at a random late step, whose prediction gives the clean image at once.

    Args:
        low: Latest step, counted from the end: 1 is the last.
        high: Earliest step, counted in the same way. ReFL: 1 to 10 of 40.
    """

    one_shot: ClassVar[bool] = True

    def __init__(self, low: int = 1, high: int = 10) -> None:
        self.low = low
        self.high = high

    def attached(self, num_steps: int, draw: torch.Generator) -> Tensor:
        _check("OneShot's high", self.high, num_steps)
        _check("OneShot's low", self.low, self.high)
        from_end = int(torch.randint(self.low, self.high + 1, (), generator=draw))
        return torch.arange(num_steps) == num_steps - from_end


def _check(name: str, value: float, highest: int) -> None:
    if not 1 <= value <= highest:
        raise ConfigError(f"truncation: {name} is {value}; here it can be 1 to {highest} steps")
