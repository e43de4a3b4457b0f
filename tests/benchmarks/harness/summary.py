"""One table of a plan: what every configuration gained, and what that cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from lit_align.comparison import Comparison
from tests.benchmarks.harness import markdown as md
from tests.benchmarks.harness.baselines import PLAIN, Baselines, Columns, each, pooled
from tests.benchmarks.harness.gains import Metrics, Result, deviation, values_of
from tests.benchmarks.harness.plan import Plan

MINUTES = "CPU-minutes of the fit"

Images = Mapping[tuple[str, int], Columns]
"""For each configuration and seed the metrics of its test images."""

DISTANCES = {"kl": "", "drift": " (drift)"}
"""Of a deterministic chain no KL is known; its drift stands there, with its name."""

HEADER = [
    "configuration",
    "rise of its reward, s.e. in each seed",
    "truth",
    "gain of truth",
    "diversity, share of the base's",
    "KL, nats an image",
    "images",
    "reward queries",
    MINUTES,
    "truth gained per CPU-minute",
]


@dataclass(frozen=True)
class Change:
    """A mean over seeds, before and after, with the standard error of the difference."""

    before: float
    after: float
    difference: float
    error: float


def summary(
    plan: Plan, results: Sequence[Result], images: Images, baselines: Mapping[str, Baselines]
) -> list[str]:
    """Markdown: the pretrained models, then all configurations by truth gained per CPU-minute."""
    models, rows = each(baselines.values()), []
    for one in models:
        of = "" if len(models) == 1 else f" ({_some(one.configs)})"
        rows += [_pretrained(label + of, label, found) for label, found in one.rows().items()]
    trained = []
    for config in plan.configs:
        if own := [result for result in results if result["config"] == config]:
            trained.append(_trained(config, own, images))
    trained.sort(key=lambda found: -found[0])
    return [
        "Means over the seeds, on the test split; errors are of the images of all seeds, clustered by prompt",
        "(where a result has not kept its images, the seeds' errors are taken as independent). They do not",
        "include the variation between training runs. The CPU time of a fit includes its validations.",
        "Configurations may be trained on different rewards, some on the truth itself. The KL is comparable",
        "where the sampler and its noisy steps are the same.",
        "",
        *md.table(HEADER, [*rows, *(row for _, row in trained)]),
    ]


def _some(configs: Sequence[str]) -> str:
    """The first three of some names."""
    rest = len(configs) - 3
    return ", ".join(configs[:3]) + (f" and {rest} more" if rest > 0 else "")


def _pretrained(label: str, kind: str, found: Mapping[str, Comparison]) -> list[str]:
    """A row of a model that was not trained, against itself without guidance."""
    reward, truth, spread = (found.get(name) for name in ("reward", "truth", "diversity"))
    if kind == PLAIN:
        level = f"{truth.after:.3f}" if truth else ""
        return [label, "", level, "", "1.00" if spread else "", "", "", "", "", ""]
    rise = f"{deviation(asdict(reward)):.1f}, seeds pooled" if reward else ""
    change = f"{truth.before:.3f} -> {truth.after:.3f}" if truth else ""
    gain = f"{truth.difference:+.3f} ± {truth.standard_error:.3f}" if truth else ""
    share = f"{spread.after / spread.before:.2f}" if spread and spread.before else ""
    return [label, rise, change, gain, share, "", "", "", "", ""]


def _trained(config: str, results: Sequence[Result], images: Images) -> tuple[float, list[str]]:
    """A row, and what it is sorted by: last, what has no truth or no CPU time."""
    tests: list[Metrics] = [result["test"] for result in results]
    rises = [f"{deviation(test['reward']):.1f}" if "reward" in test else "?" for test in tests]
    truth, spread = change(results, images, "truth"), change(results, images, "diversity")
    minutes = cpu_minutes(results)
    rate = truth.difference / minutes if truth and minutes else -math.inf
    counts = [f"{sum(r[n] for r in results) / len(results):,.0f}" for n in ("images", "reward_queries")]
    return -math.inf if math.isnan(rate) else rate, [
        config,
        ", ".join(rises),
        f"{truth.before:.3f} -> {truth.after:.3f}" if truth else "",
        f"{truth.difference:+.3f} ± {truth.error:.3f}" if truth else "",
        f"{spread.after / spread.before:.2f}" if spread and spread.before else "",
        _distance(tests),
        *counts,
        minutes_text(results),
        f"{rate:+.4f} ± {truth.error / minutes:.4f}" if truth and minutes else "",
    ]


def change(results: Sequence[Result], images: Images, name: str) -> Change | None:
    """A metric over the seeds of a configuration; None where a seed lacks it.

    Where the images' own values are kept, the error is that of all seeds' images, clustered by prompt: seeds
    share their prompts. Where they are not, it takes the seeds for independent.
    """
    if not all(name in result["test"] for result in results):
        return None
    kept = [images.get((result["config"], result["seed"]), {}) for result in results]
    if all(f"base/{name}" in one for one in kept):
        found = pooled([(one, one) for one in kept], name, before=f"base/{name}")
        return Change(found.before, found.after, found.difference, found.standard_error)
    columns = ("before", "after", "difference", "standard_error")
    before, after, by, errors = zip(*(values_of(r["test"][name], *columns) for r in results), strict=True)
    count = len(results)
    error = math.sqrt(sum(error**2 for error in errors)) / count
    return Change(sum(before) / count, sum(after) / count, sum(by) / count, error)


def cpu_minutes(results: Sequence[Result]) -> float | None:
    """Mean CPU time of the fits; None where one was not counted."""
    seconds = [result.get("cpu_seconds", {}).get("fit") for result in results]
    known = [one for one in seconds if one is not None]
    return sum(known) / len(known) / 60 if known and len(known) == len(results) else None


def minutes_text(results: Sequence[Result]) -> str:
    """CPU-minutes of the fits, or their wall time, marked as such."""
    if (minutes := cpu_minutes(results)) is not None:
        return f"{minutes:.1f}"
    walls = [result["seconds"]["fit"] for result in results]
    return f"{sum(walls) / len(walls) / 60:.1f} (wall time)"


def _distance(tests: Sequence[Metrics]) -> str:
    for name, mark in DISTANCES.items():
        if all(name in test for test in tests):
            return f"{sum(values_of(test[name], 'after')[0] for test in tests) / len(tests):.2f}{mark}"
    return ""
