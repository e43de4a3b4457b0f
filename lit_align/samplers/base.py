"""What every sampler is: a schedule, the timesteps of its steps, and one step as a Gaussian."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.samplers.schedule import NoiseSchedule


class Sampler(ABC):
    """Turns predictions into Gaussian steps.

    ``k`` is a step index in sampling order, ``t`` a timestep value of the network.

    Attributes:
        schedule: The noise levels that the network was trained on.
        num_steps: Number of steps ``T``.
        timesteps: ``(T,)``, on the CPU: the ``t`` of each ``k``, decreasing. Whole or real numbers.
        stochastic: ``(T,)`` bool, on the CPU: whether step ``k`` draws noise; only such steps have a
            log-probability.
        keeps_forward_process: Whether a step with the *right* prediction draws from the posterior of the
            forward process, so that the states of a chain made of such steps have its marginals.
        noise_option: The argument that says how much noise steps draw.
        published_noise: What it may be set to.
        noise: Its value.
        may_be_noisy: ``(T,)`` bool: the steps to which it applies.
    """

    noise_option: ClassVar[str] = "eta"
    published_noise: ClassVar[str] = "1"

    schedule: NoiseSchedule
    num_steps: int
    timesteps: Tensor
    stochastic: Tensor
    noise: float = 0.0
    may_be_noisy: Tensor
    keeps_forward_process: bool = True

    @property
    def no_noise(self) -> str:
        """The message where a method needs noise and there is none: why there is none, and the remedy."""
        option, place = self.noise_option, "set sampler.init_args."
        if not self.noise:
            return f"{option} is 0, which has no density; {place}{option} to {self.published_noise}"
        if not self.may_be_noisy.any():
            return f"noisy_steps has none of the steps; {place}noisy_steps to null, all of them"
        if self.may_be_noisy[:-1].any():
            few = f"{option} is {self.noise:g}, too little for a density in float32"
            return f"{few}; {place}{option} to {self.published_noise}"
        if self.num_steps == 1:
            return f"num_steps is 1, and the last step draws none; {place}num_steps to 2 or more"
        return (
            f"noisy_steps has only the last step, which draws none; {place}noisy_steps to null, all of them"
        )

    @abstractmethod
    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        """The Gaussian of the state after step ``k``.

        Args:
            x: ``(B, ...)`` state before the step.
            prediction: ``(B, ...)`` the network's output at ``x``, after guidance.
            k: Step index; or ``(B,)`` long (best on the CPU, where the tables are), so that a batch may mix
                steps.
        """


def check_sampler(name: str, sampler: Sampler) -> None:
    """Refuse a sampler of the user's that is not what :class:`Sampler` says.

    Args:
        name: Of the setting, for messages.
        sampler: With its schedule.

    Raises:
        ConfigError: It is not.
    """
    kind, count = type(sampler).__name__, getattr(sampler, "num_steps", None)
    for table in ("timesteps", "stochastic"):
        if getattr(getattr(sampler, table, None), "shape", None) != (count,):
            raise ConfigError(
                f"{name}: {kind}.{table} must be a tensor with one entry for each of its num_steps ({count})"
            )
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for k, noisy in enumerate(sampler.stochastic.tolist()):
        step = sampler.step(zero, zero, k)
        if not isinstance(step, GaussianStep) or (noisy and not step.std.all()):
            raise ConfigError(
                f"{name}: {kind}.step(x, prediction, {k}) must return a GaussianStep, with a std above 0 "
                "where stochastic is true"
            )
