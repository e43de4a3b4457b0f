"""A sweep over the weights of several objectives: what is measured at each, and the front that it makes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_align.comparison import compare, spread
from lit_align.errors import ConfigError
from lit_align.methods.msdda.baselines import Baseline, Soup
from lit_align.methods.msdda.pareto import hypervolume, pareto_front, simplex_grid

Weights = tuple[tuple[str, float], ...]
"""(objective, weight) pairs."""

RESAMPLES = 200
"""Bootstrap resamples of the prompts, for the error of a hypervolume."""

BASE, EXPERT, FUSED, RANDOM, JOINT = "base", "expert", "MSDDA", "one random expert", "joint training"


@dataclass
class Sweep:
    """What ``test`` sweeps, all with the same prompts and noise.

    Args:
        grid: Weights are the multiples of ``1 / grid`` on the simplex of the objectives; 2 gives the experts
            and the even mixtures of two.
        points: These weights as well, such as ``{preference: 0.8, aesthetic: 0.2}``.
        baselines: Measured at the same weights. The pretrained model and the experts always are.
        images: Rows of the strip of images along the weights: one of each of the first prompts.

    Raises:
        ConfigError: Two baselines have one name, or there is no such grid.
    """

    grid: int = 4
    points: list[dict[str, float]] = field(default_factory=list)
    baselines: list[Baseline] = field(default_factory=lambda: [Soup()])
    images: int = 4

    def __post_init__(self) -> None:
        names = [BASE, EXPERT, FUSED, RANDOM, JOINT, *(baseline.name for baseline in self.baselines)]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"sweep.baselines: two are called {min(twice)!r}; give one another name")
        if self.grid < 1:
            raise ConfigError(f"sweep.grid: {self.grid} must be at least 1")
        if self.images < 0:
            raise ConfigError(f"sweep.images: {self.images} must not be negative; 0 shows none")

    def weights(self, names: Sequence[str]) -> list[dict[str, float]]:
        """All weights, from all on the first objective to all on the last."""
        given = [{name: point.get(name, 0.0) for name in names} for point in self.points]
        known = {tuple(point.values()): point for point in simplex_grid(names, self.grid) + given}
        return [known[key] for key in sorted(known, reverse=True)]


@dataclass(frozen=True)
class Point:
    """One policy of a sweep: a method at some weights. Hashable: measurements are collected by point.

    Attributes:
        method: ``base``, ``expert``, ``MSDDA`` (or ``one random expert``, where that is what is sampled),
            ``joint training``, or a baseline's name.
        weights: Empty for the base.
    """

    method: str
    weights: Weights = ()


@dataclass(frozen=True)
class Measured:
    """What was found at a point.

    Attributes:
        point: The policy.
        metrics: Each ``(N,)`` by image: the rewards as the bank names them, truth, diversity, KL.
        groups: ``(N,)`` prompt numbers.
        seconds: Per image, sampling alone.
        images: The first images, ``(n, 3, H, W)``.
    """

    point: Point
    metrics: dict[str, Tensor]
    groups: Tensor
    seconds: float
    images: Tensor


@dataclass(frozen=True)
class Volume:
    """A method's hypervolume; NaN where it is not defined.

    Attributes:
        value: In units of the base's standard deviations; the base alone is 1.
        error: Standard error of ``value``.
        lead: MSDDA's volume minus this one.
        lead_error: Standard error of ``lead``, on the same prompts.
    """

    value: float
    error: float
    lead: float
    lead_error: float


@dataclass(frozen=True)
class Front:
    """A whole sweep.

    Attributes:
        objectives: Their names.
        measured: All points, base first.
        scales: Of the objectives, by which rewards are multiplied in the mixed reward. Of a penalty it is
            negative: less of it is better, on the front and in volumes.
        ends: For each method the weights at which it equals an expert, whose measurement is used.
        prompts: Of the images that are shown.
    """

    objectives: tuple[str, ...]
    measured: list[Measured]
    scales: dict[str, float]
    ends: Mapping[str, Sequence[Weights]] = field(default_factory=dict)
    prompts: list[str] = field(default_factory=list)

    def means(self, measured: Measured) -> Tensor:
        """Mean reward by objective, ``(m,)`` float64."""
        parts = [measured.metrics[f"reward/{name}"].double() for name in self.objectives]
        return torch.stack([part[part.isfinite()].mean() for part in parts])

    def methods(self) -> dict[str, list[Measured]]:
        """The points of each method, and the experts that it equals at some weights."""
        found: dict[str, list[Measured]] = {}
        for one in self.measured:
            found.setdefault(one.point.method, []).append(one)
        experts = {one.point.weights: one for one in found.get(EXPERT, [])}
        return {
            method: [*points, *(experts[weights] for weights in self.ends.get(method, ()))]
            for method, points in found.items()
        }

    def merits(self, means: Tensor) -> Tensor:
        """Means ``(..., m)`` so that higher is better: the sign of penalties is changed."""
        return means * means.new_tensor([math.copysign(1, self.scales[name]) for name in self.objectives])

    def reference(self) -> tuple[Tensor, Tensor]:
        """The reference point of hypervolumes, as merits, and their units, NaN where the base does not vary.

        It is the base less one standard deviation.
        """
        base = self.measured[0]
        parts = [base.metrics[f"reward/{name}"].double() for name in self.objectives]
        units = torch.stack([part[part.isfinite()].std() for part in parts])
        units = units.where(units > 0, torch.nan)  # what does not vary has no unit
        return self.merits(self.means(base)) - units, units

    def hypervolumes(self) -> dict[str, float]:
        """Of each method, in units of the base's standard deviations; the base alone is 1."""
        reference, units = self.reference()
        return {
            method: _volume((self.merits(torch.stack([self.means(p) for p in points])) - reference) / units)
            for method, points in self.methods().items()
        }

    def resampled_hypervolumes(self) -> dict[str, Tensor]:
        """Hypervolumes with prompts drawn again with replacement, ``(RESAMPLES,)`` for each method.

        All methods get the same draws, so the spread of a difference is that of a paired comparison (the
        bootstrap, Efron 1979, clustered by prompt). The reference point stays. NaN where some objective has
        no score in the draw; one prompt alone says nothing of the spread, and all are NaN.
        """
        prompts, which = self.measured[0].groups.unique(return_inverse=True)
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randint(len(prompts), (RESAMPLES, len(prompts)), generator=draw)
        times = torch.zeros(RESAMPLES, len(prompts), dtype=torch.float64)
        times = times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))[:, which]
        if len(prompts) < 2:
            times *= torch.nan
        (reference, units), found = self.reference(), {}
        for method, points in self.methods().items():
            means = torch.stack([self._weighted_means(point, times) for point in points], dim=1)
            gains = (self.merits(means) - reference) / units
            found[method] = torch.tensor([_volume(one) for one in gains], dtype=torch.float64)
        return found

    def _weighted_means(self, measured: Measured, times: Tensor) -> Tensor:
        """Mean rewards ``(R, m)`` where image ``i`` counts ``times[:, i]`` times, ``(R, N)``."""
        parts = [measured.metrics[f"reward/{name}"].double() for name in self.objectives]
        scored = [part.isfinite() for part in parts]
        means = [
            times @ torch.where(known, part, 0.0) / (times @ known.double())
            for part, known in zip(parts, scored, strict=True)
        ]
        return torch.stack(means, dim=1)

    def volumes(self) -> dict[str, Volume]:
        """The hypervolume of each method, with its standard error."""
        values, again = self.hypervolumes(), self.resampled_hypervolumes()
        fused, drawn = values.get(FUSED, math.nan), again.get(FUSED, torch.full((RESAMPLES,), math.nan))
        return {
            method: Volume(value, spread(again[method]), fused - value, spread(drawn - again[method]))
            for method, value in values.items()
        }

    def rows(self) -> list[dict[str, str | float | bool]]:
        """A row for each point: means, standard errors by prompt, and whether it is on the front.

        ``gain`` is the paired difference of the mixed reward to the base, ``lead`` that of MSDDA at the same
        weights to this method.
        """
        fused = {one.point.weights: one for one in self.methods().get(FUSED, [])}
        merits = self.merits(torch.stack([self.means(one) for one in self.measured]))
        on_front = (pareto_front(merits) & merits.isfinite().all(1)).tolist()
        rows: list[dict[str, str | float | bool]] = []
        for one, front in zip(self.measured, on_front, strict=True):
            weights = dict(one.point.weights)
            row: dict[str, str | float | bool] = {"method": one.point.method}
            row |= {f"weight/{name}": weights.get(name, math.nan) for name in self.objectives}
            for name, values in one.metrics.items():
                found = compare(torch.zeros_like(values), values, one.groups)
                row |= {name: found.difference, f"{name}/se": found.standard_error}
            if weights:
                pair = [self._mixed(which, weights) for which in (self.measured[0], one)]
                gain = compare(pair[0], pair[1], one.groups)
                row |= {"gain": gain.difference, "gain/se": gain.standard_error}
            best = fused.get(one.point.weights)
            if weights and best is not None and best is not one:
                lead = compare(self._mixed(one, weights), self._mixed(best, weights), one.groups)
                row |= {"lead": lead.difference, "lead/se": lead.standard_error}
            rows.append(row | {"seconds": one.seconds, "front": front})
        return rows

    def _mixed(self, measured: Measured, weights: Mapping[str, float]) -> Tensor:
        terms = [w * self.scales[n] * measured.metrics[f"reward/{n}"] for n, w in weights.items() if w != 0]
        return torch.stack(terms).sum(0)


def _volume(gains: Tensor) -> float:
    """That of points over the reference point, ``(points, m)``; NaN where one has no score."""
    return math.nan if gains.isnan().any() else hypervolume(gains, torch.zeros_like(gains[0]))
