"""What a gain is worth: as a share of a way, and with several tasks at the same time."""

import math
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.harness import markdown as md
from tests.benchmarks.harness.plan import Plan

Result = dict[str, Any]
"""A cell's JSON."""
Metrics = dict[str, dict[str, float | None]]
"""What one test found, by the metric's name."""

CLEAR = 2.0
"""Standard errors of a gain from which shares of it are given."""


def values_of(metric: dict[str, float | None], *names: str) -> list[float]:
    """JSON's null is what has no value."""
    return [math.nan if (value := metric[name]) is None else value for name in names]


def deviation(metric: dict[str, float | None]) -> float:
    """A change in standard errors; infinite where the error is 0, NaN where a metric has no value."""
    difference, error = values_of(metric, "difference", "standard_error")
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def metric_text(metric: dict[str, float | None]) -> str:
    """Before, after, and the difference with its standard error."""
    before, after, difference, error = values_of(metric, "before", "after", "difference", "standard_error")
    by = f"{deviation(metric):+.1f} s.e."
    return f"{before:.3f} -> {after:.3f} ({difference:+.3f} ± {error:.3f}, {by})"


def shares(plan: Plan, config: str, results: Sequence[Result]) -> list[str]:
    """Markdown: which share of the way to its bounds a configuration went, in every test."""
    rows = []
    for metric, bounds in plan.towards.get(config, {}).items():
        for test, bound in bounds.items():
            found = {result["seed"]: metrics_of(result, test).get(metric) for result in results}
            went = [f"{seed}: {_share(one, bound)}" for seed, one in found.items() if one is not None]
            if went:
                rows.append([metric, f"{bound:g}", test, ", ".join(went)])
    if not rows:
        return []
    header = ["metric", "bound", "test", "seed: share of the way"]
    return ["", "From the pretrained model's score towards a bound:", "", *md.table(header, rows)]


def _share(metric: dict[str, float | None], bound: float) -> str:
    before, difference, error = values_of(metric, "before", "difference", "standard_error")
    if (way := bound - before) == 0:
        return "there from the beginning"
    return f"{difference / way:.0%} ± {abs(error / way):.0%}"


def metrics_of(result: Result, test: str) -> Metrics:
    """The metrics of a further test, by its name, or of the cell's own; empty where it has none."""
    own: Metrics = result["test"] if test == "test" else result["also"].get(test, {})
    return own


def side_by_side(plan: Plan, results: Sequence[Result]) -> list[str]:
    """Markdown: every configuration on every task, and what the joint one keeps of each single gain."""
    asked = plan.side_by_side
    if asked is None:
        return []
    tests = {(one["config"], one["seed"]): metrics_of(one, asked.test) or one["test"] for one in results}
    configs, names = [*asked.metrics, asked.joint], list(asked.metrics.values())
    whole = [seed for seed in plan.seeds if {(config, seed) for config in configs} <= set(tests)]
    if not whole:
        return []
    rows = [
        ["pretrained", *(_mean([tests[asked.joint, s][name]["before"] for s in whole]) for name in names)]
    ]
    for config in configs:
        gains = [_gain([tests[config, seed][name] for seed in whole]) for name in names]
        rows.append([config, *gains])
    kept = []
    for seed in whole:
        pairs = [
            (tests[config, seed][name], tests[asked.joint, seed][name])
            for config, name in asked.metrics.items()
        ]
        kept.append([str(seed), *(_kept(single, joint) for single, joint in pairs)])
    return [
        "",
        "## All tasks side by side",
        "",
        f"Means over seeds {', '.join(map(str, whole))}, each on the same prompts and noise; difference to",
        "the pretrained model, ± the standard error of the mean if the seeds' own errors are independent.",
        "",
        *md.table(["trained on", *names], rows),
        "",
        f"Share of the gain of training on a task alone that {asked.joint} keeps:",
        "",
        *md.table(["seed", *names], kept),
    ]


def _kept(single: dict[str, float | None], joint: dict[str, float | None]) -> str:
    """The joint gain as a share of the single one, where that is clear enough to be shared."""
    gain, error = values_of(single, "difference", "standard_error")
    if not gain > CLEAR * error:
        return "no clear gain alone"
    return f"{values_of(joint, 'difference')[0] / gain:.0%}"


def _mean(values: Sequence[float | None]) -> str:
    known = [math.nan if value is None else value for value in values]
    return f"{sum(known) / len(known):.3f}"


def _gain(metrics: Sequence[dict[str, float | None]]) -> str:
    found = [values_of(metric, "difference", "standard_error") for metric in metrics]
    error = math.sqrt(sum(error**2 for _, error in found)) / len(found)
    change = sum(difference for difference, _ in found) / len(found)
    return f"{_mean([metric['after'] for metric in metrics])} ({change:+.3f} ± {error:.3f})"
