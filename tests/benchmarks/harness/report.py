"""What a plan's cells say together: verdicts, and a table of the test split."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import torch

from lit_align.callbacks.files import finite
from lit_align.comparison import Comparison, compare
from tests.benchmarks.harness import markdown as md
from tests.benchmarks.harness.baselines import PLAIN, Baselines, each
from tests.benchmarks.harness.gains import (
    Metrics,
    Result,
    deviation,
    metric_text,
    shares,
    side_by_side,
    values_of,
)
from tests.benchmarks.harness.plan import Plan
from tests.benchmarks.harness.record import BASE
from tests.benchmarks.harness.summary import MINUTES, Images, minutes_text, summary
from tests.benchmarks.harness.sweeps import IMAGES, sweeps

PAIRS = 256
"""(prompt, noise) pairs that a claim needs."""
RISE, FALL = 3.0, 2.0
"""Standard errors: the reward must rise by the first, reward and truth not fall by more than the second."""
KL = "KL to the pretrained model, nats an image"


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


def table(results: Sequence[Result], baselines: Baselines | None = None) -> list[str]:
    """Markdown: the pretrained model, then a row for each seed, of one configuration on the test split."""
    names = columns([result["test"] for result in results])
    header = ["seed", *names, KL, "images", "reward queries", MINUTES]
    rows = []
    for label, found in baselines.rows().items() if baselines else ():
        cells = [baseline_text(found[name], label) if name in found else "" for name in names]
        rows.append([label, *cells, "", "", "", ""])
    for result in results:
        metrics = _metrics(result["test"], names)
        kl = _kl_text(result["test"]["kl"]) if "kl" in result["test"] else ""
        counts = [f"{result['images']:,}", f"{result['reward_queries']:,}", minutes_text([result])]
        rows.append([str(result["seed"]), *metrics, kl, *counts])
    return md.table(header, rows)


def baseline_text(found: Comparison, label: str) -> str:
    """The mean of the pretrained model itself, or what another way to sample it changes."""
    if label == PLAIN:
        return f"{found.after:.3f} ± {found.standard_error:.3f}"
    return metric_text(finite(asdict(found)))


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


def beside(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, Comparison]:
    """Two runs of one seed on the test split, image by image, by every metric that both have."""
    assert first["prompt"] == second["prompt"], "the runs were tested on other prompts"
    groups = torch.tensor(first["prompt"])
    return {
        name: compare(torch.tensor(first[name]), torch.tensor(second[name]), groups)
        for name in second
        if name in first and name not in ("prompt", "truth", *BASE)
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


def markdown(
    plan: Plan,
    results: Sequence[Result],
    images: Images,
    source: str,
    baselines: Mapping[str, Baselines] = MappingProxyType({}),
    frontier: bool = False,
) -> str:
    """The plan's report.

    Args:
        plan: The plan.
        results: Of its finished cells.
        images: Of its finished cells.
        source: The plan's file, as the command names it.
        baselines: Of its configurations, what was measured of the pretrained model.
        frontier: Whether there is a plot of truth against reward.
    """
    lines = [
        f"# {plan.name}",
        "",
        f"Made by `python -m tests.benchmarks.results --plan {source}`. The metrics are of the test",
        "split: prompts never used before, the same noise before and after; difference ± standard error,",
        "clustered by prompt. CPU-minutes are those of the fit; where they were not counted, its wall time",
        "stands for them.",
        *_of_pretrained(plan, baselines),
        "",
        "## Summary",
        "",
        *summary(plan, results, images, baselines),
    ]
    if frontier:
        lines += ["", f"![Truth against reward and KL, as runs go on]({plan.name}_frontier.png)"]
    for config in plan.configs:
        own = [result for result in results if result["config"] == config]
        lines += ["", *_section(plan, config, own, baselines.get(config))]
    compared = {key: found for key, found in images.items() if found}  # of older results none are kept
    lines += [*side_by_side(plan, results), *comparisons(plan, compared)]
    return "\n".join([*lines, "", f"![Reward and truth against images seen]({plan.name}.png)"])


def _of_pretrained(plan: Plan, baselines: Mapping[str, Baselines]) -> list[str]:
    """How the pretrained models were measured, or why they were not."""
    if not plan.guidances:
        return ["", f"The pretrained model is not measured for itself: {plan.because.rstrip('.')}."]
    lines = []
    for one in each(baselines.values()):
        lines += ["", f"Pretrained model of {', '.join(one.configs)}: {one.told()}"]
    if lacking := [config for config in plan.configs if config not in baselines]:
        lines += ["", f"The pretrained model of {', '.join(lacking)} is not measured for itself."]
    return lines


def _section(plan: Plan, config: str, results: Sequence[Result], baselines: Baselines | None) -> list[str]:
    given = " ".join(plan.cells_of(config)[0].arguments[:-1])
    lines = [f"## {config}", "", f"`{given}`", "", verdict(results, plan.seeds).rstrip(".") + ".", ""]
    if not results:
        return lines[:-1]
    grids = " | ".join(f"![{when}]({plan.name}/{config}_{when}.png)" for when in ("before", "after"))
    images = [f"Validation images of seed {results[-1]['seed']}:", "", "| before | after |", "|---|---|"]
    return [
        *lines,
        *table(results, baselines),
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
