"""What can be had of the pretrained model without training, beside which all training is reported."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_align.comparison import Comparison, compare
from tests.benchmarks.harness.gains import values_of
from tests.benchmarks.harness.plan import Plan
from tests.benchmarks.harness.pretrained import TUNING_SEED, Pretrained, best_guidance, distinct
from tests.benchmarks.harness.record import images, stored

Columns = Mapping[str, Sequence[float]]
"""Metrics of images: a column for each, a row for each image."""

PLAIN = "pretrained, no guidance"
"""How the pretrained model itself is called in tables and plots."""

DISTANCES = ("kl", "drift")
"""Columns that are 0 with any guidance: a pretrained model is measured against itself with the same one."""

OF_SEVERAL = ("prompt", "diversity", *DISTANCES)
"""Columns that say nothing of an image that is chosen for itself."""


@dataclass(frozen=True)
class Baselines:
    """What was measured of one pretrained model.

    Attributes:
        configs: The plan's configurations that start from it.
        tuned: For each candidate for the guidance, the mean on the validation split by which one is chosen.
        by: The metric of these.
        guidance: The chosen one; None where none was.
        validation: Means on the validation split, over the seeds: by guidance, then metric.
        deviation: Standard deviation of the images' metrics there, without guidance.
        tests: Test images by guidance, then seed.
        of_sets: Whether a trained reward scores sets of images: then there is no best of N.
    """

    configs: tuple[str, ...]
    tuned: dict[float, float]
    by: str
    guidance: float | None
    validation: dict[float, dict[str, float]]
    deviation: dict[str, float]
    tests: dict[float, dict[int, Columns]]
    of_sets: bool = False

    def label(self, guidance: float) -> str:
        """How the pretrained model with a guidance is called."""
        return PLAIN if guidance == 1 else f"pretrained, best guidance ({guidance:g})"

    def rows(self) -> dict[str, dict[str, Comparison]]:
        """Rows of a table of the test split: the model itself, with guidance, and the best of N images.

        That of the model itself compares with 0; the others with the model itself.
        """
        if not (plain := self.tests.get(1.0)):
            return {}
        found = {self.label(1.0): {name: _mean(plain, name) for name in _names(plain)}}
        best = self.guidance
        if best is not None and best != 1 and (guided := self.tests.get(best)):
            both = [seed for seed in plain if seed in guided]
            pairs = [(plain[seed], guided[seed]) for seed in both]
            names = [name for name in _names(plain) if name in _names(guided)] if pairs else []
            names = [name for name in names if name not in DISTANCES]
            label = f"{self.label(best)}: twice the cost a step"
            found[label] = {name: pooled(pairs, name) for name in names}
        chosen = [best_of(columns) for columns in plain.values()]
        if not self.of_sets and all(count > 1 for count, _, _ in chosen):
            label = f"pretrained, best of {chosen[0][0]} by the trained reward: {chosen[0][0]} images for one"
            pairs = [(mean, top) for _, mean, top in chosen]
            found[label] = {name: pooled(pairs, name) for name in _names(plain) if name not in OF_SEVERAL}
        return found

    def told(self) -> str:
        """How the guidance was chosen."""
        if self.guidance is None:
            return "No guidance was chosen yet."
        if len(self.tuned) == 1:
            return f"Guidance {self.guidance:g} alone was measured."
        values = ", ".join(f"{guidance:g}: {value:.3f}" for guidance, value in self.tuned.items())
        chosen = f"Guidance {self.guidance:g} has the highest {self.by} on the validation split"
        return f"{chosen}, seed {TUNING_SEED} ({values})."


def measured(plan: Plan, models: Mapping[str, Pretrained], out: Path) -> dict[str, Baselines]:
    """For each configuration with a pretrained model, what was measured of that so far."""
    found = {}
    for model in distinct(models.values()):
        configs = tuple(config for config, one in models.items() if one.key == model.key)
        found |= dict.fromkeys(configs, _measured(plan, model, configs, out))
    return found


def _measured(plan: Plan, model: Pretrained, configs: tuple[str, ...], out: Path) -> Baselines:
    tuned = model.tuned(plan, out)
    by = "truth" if all("truth" in metrics for metrics in tuned.values()) else "reward"
    validation: dict[float, dict[str, float]] = {}
    deviation: dict[str, float] = {}
    tests: dict[float, dict[int, Columns]] = {}
    guidance = best_guidance(tuned)
    for scale in dict.fromkeys([1.0] if guidance is None else [1.0, guidance]):
        cells = [model.cell(scale, seed) for seed in plan.seeds]
        results = [(cell, result) for cell in cells if (result := stored(cell, out))]
        metrics = [result["validation"] for _, result in results]
        tests[scale] = {cell.seed: columns for cell, _ in results if (columns := images(cell, out))}
        validation[scale] = average([{n: m["mean"] for n, m in one.items()} for one in metrics])
        if scale == 1:
            deviation = average([{n: m["deviation"] for n, m in one.items()} for one in metrics])
    means = {scale: values_of(metrics[by], "mean")[0] for scale, metrics in tuned.items()}
    return Baselines(configs, means, by, guidance, validation, deviation, tests, model.of_sets())


def average(found: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each value that all have."""
    means = {}
    for name in found[0] if found else ():
        known = [value for one in found if (value := one.get(name)) is not None]
        if len(known) == len(found):
            means[name] = sum(known) / len(found)
    return means


def each(baselines: Iterable[Baselines]) -> list[Baselines]:
    """Each once, in order."""
    return list({one.configs: one for one in baselines}.values())


def pooled(pairs: Sequence[tuple[Columns, Columns]], name: str, before: str = "") -> Comparison:
    """Two models on the images of all seeds, which share their prompts: errors are clustered by these.

    Args:
        pairs: Of each seed, the images of the first and of the second model.
        name: Of the metric.
        before: Its name in the first, if that is another.
    """
    first, second, groups = (
        torch.cat([torch.tensor(one[place][column], dtype=torch.float64) for one in pairs])
        for place, column in ((0, before or name), (1, name), (1, "prompt"))
    )
    return compare(first, second, groups)


def best_of(columns: Columns) -> tuple[int, Columns, Columns]:
    """Of each prompt the image with the highest trained reward.

    Returns:
        N, the most images that a prompt has; for each prompt the means of its images, and what the chosen one
        has. A prompt of whose images one has no reward is left out.
    """
    table = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    means: dict[str, list[float]] = {name: [] for name in table}
    chosen: dict[str, list[float]] = {name: [] for name in table}
    count = 0
    for prompt in table["prompt"].unique():
        rows = table["prompt"] == prompt
        count = max(count, int(rows.sum()))
        reward: Tensor = table["reward"][rows]
        if reward.isnan().any():
            continue
        for name, values in table.items():
            means[name].append(values[rows].mean().item())
            chosen[name].append(values[rows][reward.argmax()].item())
    return count, means, chosen


def _names(tests: Mapping[int, Columns]) -> list[str]:
    """Metrics that the images of all seeds have."""
    first, *others = tests.values()
    kept = [name for name in first if not name.startswith("base/") and name != "prompt"]
    return [name for name in kept if all(name in other for other in others)]


def _mean(tests: Mapping[int, Columns], name: str) -> Comparison:
    nothing = [{name: [0.0] * len(columns[name])} for columns in tests.values()]
    return pooled(list(zip(nothing, tests.values(), strict=True)), name)
