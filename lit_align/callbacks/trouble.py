"""Whether held-out images have become worse for certain: paired differences, clustered by prompt.

A run is validated many times, always with the same prompts and noise, and each time compared with the best
validation so far. Chance alone makes some of these comparisons look bad. So the level is that of the whole
run: the ``N (N + 1) / 2`` pairs of a validation and an earlier one share it (Bonferroni), which holds however
the best is chosen and however validations depend on each other. A rise of the trained reward is compared at
the level of one comparison: the guard asks for several in a row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from lightning import Trainer
from torch import Tensor

from lit_align.comparison import DISTANCES, compare, spread

LESS_DIVERSE = 0.1
"""Share of the best validation's diversity that may be lost."""

OTHER_LOOK = 0.5
"""By how much saturation and fine texture may move, in standard deviations over the images of the best
validation: a medium effect (Cohen 1988, section 2.2)."""

TRAINED = "reward"
"""The weighted sum of rewards, as a validation names it."""

UNKNOWN = 100
"""Validations that are assumed for a run without a known end."""

FEWEST = 8
"""Prompts below which a standard error is a guess, and nothing is certain."""


@dataclass(frozen=True)
class Bound:
    """How far a metric may move from the best validation.

    Attributes:
        name: Of the metric.
        side: -1: it must not fall; 1: it must not rise; 0: neither.
        slack: How far it may move without trouble, in the metric's units.
        level: Probability that a comparison of equals is called certain.
    """

    name: str
    side: int
    slack: float
    level: float


@dataclass(frozen=True)
class Change:
    """How a metric has changed since the best validation.

    Attributes:
        name: Of the metric.
        before: Its mean then.
        after: Its mean now, of the same images.
        difference: ``after - before``.
        standard_error: Of the difference.
        evidence: Standard errors beyond what is allowed, as a share of those that make it certain; 0 or less
            where the change is allowed or unknown.
    """

    name: str
    before: float
    after: float
    difference: float
    standard_error: float
    evidence: float

    @property
    def certain(self) -> bool:
        """Whether it is trouble."""
        return self.evidence >= 1

    def __str__(self) -> str:
        verb = "fell" if self.difference < 0 else "rose"
        size = f"{abs(self.difference):.4f} ± {self.standard_error:.4f}"
        return f"{self.name} {verb} by {size} ({self.before:.4f} -> {self.after:.4f})"


def bounds(
    best: Mapping[str, Tensor],
    rewards: Sequence[str],
    validations: int,
    false_alarms: float,
    max_distance: float | None,
) -> list[Bound]:
    """How far each watched metric may move.

    Args:
        best: What the best validation measured, ``(N,)`` each.
        rewards: Names of the held-out rewards in it.
        validations: Of the run, after the first.
        false_alarms: Probability that chance alone makes a held-out reward's fall certain, once in a whole
            run. What has slack is further from that.
        max_distance: Mean ``kl``, or ``drift``, that is allowed; any if not given.
    """
    pairs = validations * (validations + 1) / 2
    found = [Bound(name, -1, 0.0, false_alarms / pairs / len(rewards)) for name in rewards]
    level = false_alarms / pairs
    found.append(Bound("diversity", -1, LESS_DIVERSE * _mean(best["diversity"]), level))
    found += [
        Bound(name, 0, OTHER_LOOK * spread(best[name]), level) for name in ("saturation", "high_frequency")
    ]
    limit = math.inf if max_distance is None else max_distance
    found += [Bound(name, 1, limit, level) for name in DISTANCES if name in best]
    if trains(best, rewards):
        found.append(Bound(TRAINED, 1, 0.0, false_alarms))  # not shared: several in a row make it certain
    return found


def trains(measured: Mapping[str, Tensor], rewards: Sequence[str]) -> bool:
    """Whether a validation has rewards that are not held out."""
    return any(name.startswith("reward/") and name not in rewards for name in measured)


def since(best: Mapping[str, Tensor], name: str) -> Tensor:
    """What a metric is compared with, ``(N,)``: a distance with that of the pretrained model."""
    return torch.zeros_like(best[name]) if name in DISTANCES else best[name]


def changed(bound: Bound, before: Tensor, after: Tensor, groups: Tensor) -> Change:
    """Compare two validations.

    Args:
        bound: What is allowed.
        before: The metric of each image in the better validation, ``(N,)``; NaN where there is none.
        after: The same now.
        groups: ``(N,)``, the prompt of each image.
    """
    found = compare(before, after, groups)
    moved = abs(found.difference) if bound.side == 0 else bound.side * found.difference
    prompts = len(groups[before.isfinite() & after.isfinite()].unique())
    evidence = 0.0
    if prompts >= FEWEST and moved > bound.slack:
        sides = 2 if bound.side == 0 else 1
        needed = NormalDist().inv_cdf(1 - bound.level / sides)
        error = found.standard_error
        t = (moved - bound.slack) / error if error else math.inf
        evidence = normal_of(t, prompts - 1) / needed
    return Change(bound.name, found.before, found.after, found.difference, found.standard_error, evidence)


def normal_of(t: float, freedom: int) -> float:
    """The normal deviate with the tail of Student's ``t``, to 0.02 where it matters (Wallace 1959)."""
    factor = (8 * freedom + 1) / (8 * freedom + 3)
    return math.copysign(factor * math.sqrt(freedom * math.log1p(t * t / freedom)), t)


def _mean(values: Tensor) -> float:
    return float(values.double().nanmean())


def validations(trainer: Trainer) -> int:
    """Number of validations of a fit, without the one before its first update."""
    epochs, batches, each = trainer.max_epochs, trainer.num_training_batches, trainer.val_check_batch
    if epochs is None or epochs < 0 or math.isinf(batches):
        return UNKNOWN
    if (every := trainer.check_val_every_n_epoch) is None:  # counted over the ends of epochs
        return max(1, int(epochs * batches // (each or 1)))
    in_epoch = 1 if each is None or math.isinf(each) else max(1, int(batches // each))
    return max(1, epochs // every * in_epoch)
