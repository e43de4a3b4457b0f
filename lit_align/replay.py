"""Stored chains, replayed: the step of a policy at stored states, and the step that was taken then.

Shapes: ``B`` images, ``T`` steps, ``N`` (image, step) pairs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_align.backbones import DenoisingPolicy
from lit_align.gaussian import GaussianStep
from lit_align.randomness import generator
from lit_align.rollout import Trajectory


@dataclass(frozen=True)
class Pairs:
    """Some (image, step) pairs of a rollout batch: what is replayed in one backward pass.

    Attributes:
        rows: Which image of the rank's batch, ``(N,)``.
        steps: Which step ``k``, ``(N,)``.
    """

    rows: Tensor
    steps: Tensor

    def split(self, size: int) -> list["Pairs"]:
        """Micro-batches of at most ``size`` pairs."""
        return [Pairs(*part) for part in zip(self.rows.split(size), self.steps.split(size), strict=True)]


def draw_pairs(index: Tensor, steps: Tensor, count: int, seed: int, epoch: int) -> Pairs:
    """Some steps of each image, at random: a function of the image's number, not of its batch or rank.

    Args:
        index: Global numbers of the rank's images, ``(B,)``.
        steps: The steps to draw from.
        count: Steps of each image.
        seed: The run's seed.
        epoch: Another one draws anew.

    Returns:
        ``B * count`` pairs, images in order.
    """
    draws = [generator(seed, "steps", i, epoch) for i in index.tolist()]
    chosen = [steps[torch.randperm(len(steps), generator=draw)][:count] for draw in draws]
    return Pairs(torch.arange(len(index)).repeat_interleave(count), torch.cat(chosen))


@dataclass(frozen=True)
class Replay:
    """A policy at the states of stored chains.

    Attributes:
        policy: Any weight set, for the rank's images.
        trajectory: Their chains, where the policy computes or on the CPU.
    """

    policy: DenoisingPolicy
    trajectory: Trajectory

    def step(self, pairs: Pairs) -> tuple[GaussianStep, GaussianStep, Tensor]:
        """The policy's step, the step when the chain was sampled, and the state that was drawn then."""
        now = self.policy[pairs.rows](self.states(pairs), pairs.steps)
        then = GaussianStep(self.trajectory.means[pairs.steps, pairs.rows].to(now.mean.device), now.std)
        return now, then, self.trajectory.states[pairs.steps + 1, pairs.rows].to(now.mean.device)

    def states(self, pairs: Pairs) -> Tensor:
        """The states before the steps, where the policy computes, ``(N, ...)``."""
        return self.trajectory.states[pairs.steps, pairs.rows].to(self.policy.cond.device)

    @torch.no_grad()
    def moved(self, pairs: Pairs, size: int) -> Tensor:
        """KL of the policy that sampled to this one, in nats, ``(N,)`` on the CPU; ``size`` pairs at once."""
        steps = (self.step(some) for some in pairs.split(size))
        return torch.cat([then.kl(now).cpu() for now, then, _ in steps])
