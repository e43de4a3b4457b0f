"""The one sampling loop: from noise to a latent, keeping what the methods replay."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lit_align.gaussian import Generators, Policy


@dataclass(frozen=True)
class Trajectory:
    """A batch of rollouts of ``T`` steps, in float32 (float64 if it began so).

    Attributes:
        states: ``(T+1, B, ...)``: ``states[0]`` is the noise, ``states[-1]`` the clean latent.
        means: ``(T, B, ...)``: the mean from which ``states[k + 1]`` was drawn.
        log_probs: ``(T, B)`` nats, summed over the latent: of ``states[k + 1]`` as it is stored here, so that
            a replay gives the same number.
    """

    states: Tensor
    means: Tensor
    log_probs: Tensor

    @cached_property
    def finite(self) -> Tensor:
        """``(B,)`` bool on the CPU: the chains that are finite, and were not replaced by zeros (tamed)."""
        own = [part.flatten(2).sum(2).isfinite().all(0) for part in (self.states, self.means)]
        drawn = self.states[0].flatten(1).any(1)  # a chain begins with noise, which is never all 0
        return (own[0] & own[1] & drawn).cpu()

    def tamed(self) -> "Trajectory":
        """The same with zeros in place of chains that are not finite: no NaN reaches a loss or a metric."""
        if bool(self.finite.all()):
            return self
        finite = self.finite.to(self.states.device)
        kept = finite.view(1, -1, *(1,) * (self.states.ndim - 2))
        states, means = (torch.where(kept, part, 0.0) for part in (self.states, self.means))
        return Trajectory(states, means, torch.where(finite, self.log_probs, 0.0))

    def to(self, device: torch.device | str) -> "Trajectory":
        """The same, kept elsewhere."""
        return Trajectory(self.states.to(device), self.means.to(device), self.log_probs.to(device))


def rollout(policy: Policy, x_T: Tensor, num_steps: int, generator: Generators = None) -> Trajectory:
    """Sample ``num_steps`` steps of a policy.

    Gradients are the caller's choice: under ``torch.no_grad()`` nothing is kept, otherwise the whole path is
    differentiable.

    Args:
        policy: ``policy(x, k)`` gives the Gaussian of the state after step ``k``.
        x_T: ``(B, ...)`` initial noise; half precision is promoted to float32.
        num_steps: Number of steps ``T``; ``k`` runs from 0 to ``T - 1``.
        generator: Noise of the steps: see :meth:`lit_align.gaussian.GaussianStep.rsample`.
    """
    assert num_steps >= 1, f"a rollout needs at least one step, got {num_steps}"
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    states, means, log_probs = [x], [], []
    for k in range(num_steps):
        step = policy(x, k)
        x = step.rsample(generator).to(x.dtype)
        states.append(x)
        means.append(step.mean)
        log_probs.append(step.log_prob(x))
    return Trajectory(torch.stack(states), torch.stack(means), torch.stack(log_probs))
