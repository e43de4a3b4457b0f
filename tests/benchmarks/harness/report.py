"""What a plan's cells say together: verdicts, and a table of the test split."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from lit_align.comparison import Comparison, compare
from tests.benchmarks.harness import markdown as md
from tests.benchmarks.harness.gains import Metrics, Result, shares, side_by_side, values_of
from tests.benchmarks.harness.plan import Plan
from tests.benchmarks.harness.sweeps import IMAGES, sweeps

PAIRS = 256
"""(prompt, noise) pairs that a claim needs."""
RISE, FALL = 3.0, 2.0
"""Standard errors: the reward must rise by the first, reward and truth not fall by more than the second."""
KL = "KL to the pretrained model, nats an image"


def deviation(metric: dict[str, float | None]) -> float:
    """A change in standard errors; infinite where the error is 0, NaN where a metric has no value."""
    difference, error = values_of(metric, "difference", "standard_error")
    if error == 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / error


def verdict(results: Sequence[Result], seeds: Sequence[int]) -> str:
    """Whether a configuration has done what it is for, on the test split.

    It *passes* if in every seed the trained reward rises by at least 3 standard errors and the truth, where
    it is known, does not fall by more than 2. It *fails* if in some seed the reward or the truth falls by
    more than 2. Anything else, a missing seed or too few pairs among it, is *inconclusive*.

    Args:
        results: Those of one configuration.
        seeds: All that the plan wants.
    """
    missing = sorted(set(seeds) - {result["seed"] for result in results})
    doubts = [f"seed {seed} has no result" for seed in missing]
    doubts += [doubt for result in results for doubt in _doubts(result)]
    if fails := [fall for result in results for fall in _falls(result)]:
        return f"**fails**: {'; '.join(fails)}"
    if doubts:
        return f"**inconclusive**: {'; '.join(doubts)}"
    rises = ", ".join(f"{deviation(result['test']['reward']):.1f}" for result in results)
    return f"**passes** in {len(seeds)} of {len(seeds)} seeds: the reward rose by {rises} s.e."


def _falls(result: Result) -> list[str]:
    changes = {n: deviation(result["test"][n]) for n in ("reward", "truth") if n in result["test"]}
    return [f"seed {result['seed']}: {n} fell by {-by:.1f} s.e." for n, by in changes.items() if by < -FALL]


def _doubts(result: Result) -> list[str]:
    seed, metrics = f"seed {result['seed']}", result["test"]
    if "reward" not in metrics:
        return [f"{seed}: no reward was measured"]
    doubts = []
    # Written so that a metric without a value is in doubt.
    if not (by := deviation(metrics["reward"])) >= RISE:
        doubts.append(f"{seed}: reward changed by {by:+.1f} s.e., +{RISE:g} are needed")
    if "truth" in metrics and math.isnan(deviation(metrics["truth"])):
        doubts.append(f"{seed}: the truth has no value")
    counted = [metrics[name]["num_pairs"] for name in ("reward", "truth") if name in metrics]
    if min(counted) < PAIRS:
        doubts.append(f"{seed}: {min(counted)} pairs, {PAIRS} are needed")
    return doubts


def metric_text(metric: dict[str, float | None]) -> str:
    """Before, after, and the difference with its standard error."""
    before, after, difference, error = values_of(metric, "before", "after", "difference", "standard_error")
    by = f"{deviation(metric):+.1f} s.e."
    return f"{before:.3f} -> {after:.3f} ({difference:+.3f} ± {error:.3f}, {by})"


def _kl_text(metric: dict[str, float | None]) -> str:
    """The KL starts at 0: how many standard errors away it is says nothing."""
    after, error = values_of(metric, "after", "standard_error")
    return f"{after:.2f} ± {error:.2f}"


def columns(tests: Sequence[Metrics]) -> list[str]:
    """Names of the metrics in the table's order: what is claimed first, what it cost last."""
    measured = dict.fromkeys(name for test in tests for name in test)
    unscored = [test["unscored"] for test in tests if "unscored" in test]
    if all(metric["before"] == metric["after"] == 0 for metric in unscored):
        measured.pop("unscored", None)
    if "truth" in measured:
        measured.pop("reward/truth", None)
    first, last = ("reward", "truth"), ("diversity",)
    middle = [name for name in measured if name not in (*first, *last, "kl")]
    return [n for n in first if n in measured] + middle + [n for n in last if n in measured]


def table(results: Sequence[Result]) -> list[str]:
    """Markdown rows, a seed each, of one configuration's metrics on the test split."""
    names = columns([result["test"] for result in results])
    header = ["seed", *names, KL, "images", "reward queries", "minutes"]
    rows = []
    for result in results:
        metrics = _metrics(result["test"], names)
        kl = _kl_text(result["test"]["kl"]) if "kl" in result["test"] else ""
        minutes = f"{sum(result['seconds'].values()) / 60:.1f}"
        counts = [f"{result['images']:,}", f"{result['reward_queries']:,}", minutes]
        rows.append([str(result["seed"]), *metrics, kl, *counts])
    return md.table(header, rows)


def _metrics(test: Metrics, names: Sequence[str]) -> list[str]:
    return [metric_text(test[name]) if name in test else "" for name in names]


def further_tests(plan: Plan, results: Sequence[Result]) -> list[str]:
    """Markdown: a table for each further test of one configuration."""
    lines: list[str] = []
    for also, added in plan.also.items():
        tests = {result["seed"]: result["also"][also] for result in results if also in result["also"]}
        if not tests:
            continue
        names = columns(list(tests.values()))
        rows = [
            [str(seed), *_metrics(test, names), _kl_text(test["kl"]) if "kl" in test else ""]
            for seed, test in tests.items()
        ]
        given = " ".join(added)
        lines += ["", f"Tested once more, {also}, `{given}`:", "", *md.table(["seed", *names, KL], rows)]
    return lines


Images = dict[tuple[str, int], dict[str, list[float]]]
"""For each configuration and seed the metrics of its test images."""


def beside(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, Comparison]:
    """Two runs of one seed on the test split, image by image, by every metric that both have."""
    assert first["prompt"] == second["prompt"], "the runs were tested on other prompts"
    groups = torch.tensor(first["prompt"])
    return {
        name: compare(torch.tensor(first[name]), torch.tensor(second[name]), groups)
        for name in second
        if name in first and name not in ("prompt", "truth")
    }


def comparisons(plan: Plan, images: Images) -> list[str]:
    """Markdown: for each pair of configurations, how the second does against the first."""
    lines: list[str] = []
    for first, second in plan.compare:
        both = [seed for seed in plan.seeds if {(first, seed), (second, seed)} <= set(images)]
        found = {seed: beside(images[first, seed], images[second, seed]) for seed in both}
        names = list(dict.fromkeys(name for one in found.values() for name in one))
        rows = [
            [str(seed), *(_against(one[name]) if name in one else "" for name in names)]
            for seed, one in found.items()
        ]
        lines += [
            "",
            f"## {second} against {first}",
            "",
            "Difference, and share of the images in which it is higher.",
            "",
            *md.table(["seed", *names], rows),
        ]
    return lines


def _against(found: Comparison) -> str:
    change = f"{found.difference:+.3f} ± {found.standard_error:.3f}"
    return f"{change}, {found.win_rate:.0%} ± {found.win_rate_error:.0%}"


def markdown(plan: Plan, results: Sequence[Result], images: Images, source: str) -> str:
    """The plan's report.

    Args:
        plan: The plan.
        results: Of its finished cells.
        images: Of its finished cells.
        source: The plan's file, as the command names it.
    """
    lines = [
        f"# {plan.name}",
        "",
        f"Made by `python -m tests.benchmarks.results --plan {source}`. The metrics are of the test",
        "split: prompts never used before, the same noise before and after; difference ± standard error,",
        "clustered by prompt. Minutes are those of the fit and of all tests.",
    ]
    for config in plan.configs:
        lines += ["", *_section(plan, config, [result for result in results if result["config"] == config])]
    lines += [*side_by_side(plan, results), *comparisons(plan, images)]
    return "\n".join([*lines, "", f"![Reward and truth against images seen]({plan.name}.png)"])


def _section(plan: Plan, config: str, results: Sequence[Result]) -> list[str]:
    given = " ".join(plan.cells_of(config)[0].arguments[:-1])
    lines = [f"## {config}", "", f"`{given}`", "", verdict(results, plan.seeds).rstrip(".") + ".", ""]
    if not results:
        return lines[:-1]
    grids = " | ".join(f"![{when}]({plan.name}/{config}_{when}.png)" for when in ("before", "after"))
    images = [f"Validation images of seed {results[-1]['seed']}:", "", "| before | after |", "|---|---|"]
    return [
        *lines,
        *table(results),
        *further_tests(plan, results),
        *shares(plan, config, results),
        *_swept(plan, config, results),
        "",
        _origin(results),
        "",
        *images,
        f"| {grids} |",
    ]


def _swept(plan: Plan, config: str, results: Sequence[Result]) -> list[str]:
    found = [result["sweep"] for result in results if "sweep" in result]
    if not found:
        return []
    images = [f"![{kind}]({plan.name}/{config}_{kind}.png)" for kind in IMAGES]
    shown = ["", f"Front and images of seed {results[-1]['seed']}:", "", *images]
    return ["", *sweeps(found), *shown]


def _origin(results: Sequence[Result]) -> str:
    """What the results were made with; where it is more than one thing, that is worth seeing."""

    def all_of(values: Iterable[Any]) -> str:
        return " and ".join(dict.fromkeys(str(value) for value in values))

    pairs = all_of(result["test"]["reward"]["num_pairs"] for result in results if "reward" in result["test"])
    kinds = {"Shapes weights": "shapes_weights", "commit": "commit", "machine": "machine"}
    found = {kind: all_of(result[key] for result in results) for kind, key in kinds.items()}
    return "; ".join(f"{kind}: {value}" for kind, value in ({"Pairs": pairs} | found).items()) + "."
