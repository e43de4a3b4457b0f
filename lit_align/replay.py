"""Stored chains, replayed: the step of a policy at stored states, and the step that was taken then.

Shapes: ``B`` images, ``T`` steps, ``N`` (image, step) pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_align.backbones import DenoisingPolicy
from lit_align.gaussian import GaussianStep
from lit_align.randomness import generator, normal
from lit_align.rollout import Trajectory

NEARBY = 1e-2
"""How far from a state its roundings are drawn anew, in root mean squares of the state. A bfloat16 has steps
of 0.4 to 0.8 %; 0.1 to 3 % measure the same on Shapes."""


MEASURED = 16
"""One of this many trained pairs is measured after the updates: about 2 % of a rollout batch's work."""


def measured_one_in(rounds: bool, followed: bool = False) -> int:
    """Of how many trained pairs one is measured.

    Args:
        rounds: Whether predictions are below float32: then a pair takes three of them (see Yardstick).
        followed: Whether the learning rate follows the KL: twice as many pairs then.
    """
    return MEASURED // (2 if followed else 1) * (3 if rounds else 1)


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


def draw_few_pairs(
    index: Tensor, firsts: Tensor, steps: Tensor, trained: int, one_in: int, seed: int, epoch: int
) -> Pairs:
    """Some steps of each prompt's first image, at random: the same pairs whatever micro-batch and ranks.

    Args:
        index: Global numbers of the rank's images, ``(B,)``.
        firsts: Which are the first of their prompt, ``(B,)`` bool.
        steps: The steps to draw from.
        trained: Pairs of an image that are trained.
        one_in: One of this many is drawn; at least one for each prompt, and no step twice.
        seed: The run's seed.
        epoch: Another one draws anew.
    """
    rows = firsts.nonzero().flatten()
    count = min(max(trained * len(index) // (one_in * len(rows)), 1), len(steps))
    drawn = draw_pairs(index[rows], steps, count, seed, epoch)
    return Pairs(rows[drawn.rows], drawn.steps)


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
        """The policy's step, the step that sampled the chain, and the state ``x_next`` that it drew."""
        new = self.policy[pairs.rows](self.states(pairs), pairs.steps)
        old = GaussianStep(self.trajectory.means[pairs.steps, pairs.rows].to(new.mean.device), new.std)
        return new, old, self.trajectory.states[pairs.steps + 1, pairs.rows].to(new.mean.device)

    def states(self, pairs: Pairs) -> Tensor:
        """The states before the steps, where the policy computes, ``(N, ...)``."""
        return self.trajectory.states[pairs.steps, pairs.rows].to(self.policy.cond.device)

    @torch.no_grad()
    def moved(self, pairs: Pairs, size: int) -> Tensor:
        """KL of the policy that sampled to this one, in nats, ``(N,)`` on the CPU; ``size`` pairs at once."""
        steps = (self.step(some) for some in pairs.split(size))
        return torch.cat([old.kl(new).cpu() for new, old, _ in steps])


class Moved(NamedTuple):
    """How far a policy has moved at some pairs.

    Attributes:
        kl: KL of the policy that sampled to the one of now, in nats, ``(M,)`` on the CPU, at the pairs whose
            chain is finite. Below float32 an estimate of it, which is right on average and may be negative.
        variance: Variance of each estimate due to rounding, an upper bound: the differences of the movement
            itself between rows of pixels are counted with it. 0 in float32.
    """

    kl: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Yardstick:
    r"""Measures at some pairs how far the coming updates move a policy, in any precision.

    Below float32, weights that change flip roundings all over the network, and a squared difference of
    predictions counts every one as movement: 0.003 to 0.014 nats a step on Shapes in bfloat16, however small
    the step is, and in proportion to the latent's elements. So the difference is taken twice, at a state and
    near it: the movement :math:`d` of the mean is the same and the roundings :math:`n, n'` are others,

    .. math:: E \langle d + n, d + n' \rangle / 2 s^2 = |d|^2 / 2 s^2,

    which is the KL. In float32 the KL is taken as it stands, except on a GPU with TF32: convolutions of
    inputs with 10 bits, on a CPU, made .0015 nats a step .0022 on Shapes, and this estimate .0015.

    Attributes:
        replay: Chains that the policy sampled, before the updates.
        pairs: Where it is measured; the steps have noise.
        size: Pairs at once.
        nearby: States near those of the pairs, and the means of the policy's steps from there before the
            updates, ``(N, ...)`` both; None in float32.
    """

    replay: Replay
    pairs: Pairs
    size: int
    nearby: tuple[Tensor, Tensor] | None

    @classmethod
    @torch.no_grad()
    def of(cls, replay: Replay, pairs: Pairs, size: int, index: Tensor, seed: int) -> "Yardstick":
        """Prepare the measurement; call it before the updates.

        Args:
            replay: Chains that the policy has just sampled.
            pairs: Where to measure.
            size: Pairs at once.
            index: Global numbers of the rank's images, ``(B,)``.
            seed: The run's seed.
        """
        if not replay.policy.backbone.rounds:
            return cls(replay, pairs, size, None)
        places = zip(index[pairs.rows].tolist(), pairs.steps.tolist(), strict=True)
        draws = [generator(seed, "nearby", *place) for place in places]
        states = replay.states(pairs)
        scale = states.square().flatten(1).mean(1).sqrt().view(-1, *(1,) * (states.ndim - 1))
        states = states + NEARBY * scale * normal(states.shape[1:], draws).to(states)
        parts = zip(pairs.split(size), states.split(size), strict=True)
        means = torch.cat([replay.policy[some.rows](x, some.steps).mean for some, x in parts])
        return cls(replay, pairs, size, (states, means))

    @torch.no_grad()
    def read(self) -> Moved:
        """How far the updates have moved the policy."""
        # Taken away afterwards: ranks that share weights must ask for the same number of predictions.
        kept = self.replay.trajectory.finite[self.pairs.rows]
        if self.nearby is None:
            kl = self.replay.moved(self.pairs, self.size)[kept]
            return Moved(kl, torch.zeros_like(kl))
        states, means = (part.split(self.size) for part in self.nearby)
        measured = [*map(self._twice, self.pairs.split(self.size), states, means)]
        kl, variance = (torch.cat(part).cpu() for part in zip(*measured, strict=True))
        return Moved(kl[kept], variance[kept])

    def _twice(self, pairs: Pairs, nearby: Tensor, before: Tensor) -> Moved:
        new, old, _ = self.replay.step(pairs)
        moved = (new.mean - old.mean) / new.std
        again = (self.replay.policy[pairs.rows](nearby, pairs.steps).mean - before) / new.std
        # Of each row of pixels: neighbours may be rounded alike, so that only sums of many are independent.
        rows = 0.5 * (moved * again).sum((1, 3))
        return Moved(rows.sum(1), rows.square().sum(1))
