"""Learning curves and image grids of a plan."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a benchmark has no screen

import matplotlib.pyplot as plt

from tests.benchmarks.harness.baselines import Baselines, each
from tests.benchmarks.harness.gains import Result
from tests.benchmarks.harness.plan import ROOT, Plan
from tests.benchmarks.harness.sweeps import IMAGES

COLOURS = plt.get_cmap("tab20")
"""A colour for each configuration of a plan, by its number."""


Curve = list[tuple[float, float]]

LINES = {True: (0, (2, 2)), False: (0, (6, 2))}
"""Dashes of a pretrained model: short without guidance, long with the best one."""


def plot_curves(
    plan: Plan,
    results: Sequence[Result],
    path: Path,
    baselines: Mapping[str, Baselines] = MappingProxyType({}),
) -> None:
    """Reward and truth on the validation split against images seen.

    A configuration has a colour, a seed a line. What a longer run has taken further is seen in that one.
    Dashed are the pretrained models, on the same validation prompts.
    """
    configs = _shown(plan, results)
    names = [name for name in ("val/reward", "val/truth") if any(name in r["curves"] for r in results)]
    size = (5.2 * len(names) + 3.2, 3.6)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for number, config in enumerate(configs):
            curves = [r["curves"][name] for r in results if r["config"] == config and name in r["curves"]]
            for which, points in enumerate(curves):
                label = None if which else f"{config}: {len(curves)} seed{'s' * (len(curves) > 1)}"
                images, values = zip(*points, strict=True)
                axis.plot(images, values, color=COLOURS(number), lw=1, marker="o", ms=3, label=label)
        _dash(axis, configs, baselines, name.removeprefix("val/"))
        axis.set(xlabel="images seen", ylabel=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    _finish(figure, axes[0], path)


def plot_frontier(
    plan: Plan, results: Sequence[Result], path: Path, baselines: Mapping[str, Baselines]
) -> bool:
    """Truth on the validation split against the rise of the trained reward, and against the distance.

    Rewards of configurations have different scales, so that a rise is in standard deviations of the
    pretrained model's images; the KL is comparable where the sampler is the same. Chains without a density
    have a drift instead. A curve is the mean of a configuration's seeds, from validation to validation; a dot
    is its end.

    Returns:
        Whether there was a truth to show.
    """
    configs = _shown(plan, results)
    of = {config: [result for result in results if result["config"] == config] for config in configs}
    sides = {
        "rise of the trained reward, standard deviations of the base's images": {
            config: frontier(own, baselines.get(config)) for config, own in of.items()
        },
        "KL to the pretrained model, nats an image": {c: by_distance(own, "kl") for c, own in of.items()},
        "drift from the pretrained model": {c: by_distance(own, "drift") for c, own in of.items()},
    }
    sides = {label: curves for label, curves in sides.items() if any(curves.values())}
    if not sides:
        return False
    size = (5.2 * len(sides) + 3.2, 4.6)
    figure, axes = plt.subplots(1, len(sides), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axis, (label, curves) in zip(axes[0], sides.items(), strict=True):
        for number, (config, curve) in enumerate(curves.items()):
            if curve:
                x, y = zip(*curve, strict=True)
                axis.plot(x, y, color=COLOURS(number), lw=1.3, marker="o", ms=2.5, label=config)
                axis.plot(x[-1], y[-1], color=COLOURS(number), marker="o", ms=7)
        _dash(axis, configs, baselines, "truth")
        axis.set(xlabel=label, ylabel="val/truth")
        axis.grid(alpha=0.3)
    _finish(figure, axes[0], path)
    return True


def frontier(results: Sequence[Result], baselines: Baselines | None) -> Curve:
    """``(rise of the reward, truth)`` at each validation; empty where the unit of the rise is not known."""
    unit = baselines.deviation.get("reward") if baselines else None
    points = _mean_curves(results, "val/reward", "val/truth")
    return [((reward - points[0][0]) / unit, truth) for reward, truth in points] if unit else []


def by_distance(results: Sequence[Result], distance: str) -> Curve:
    """``(distance, truth)`` at each validation; empty where the chains do not have this distance."""
    return _mean_curves(results, f"val/{distance}", "val/truth")


def _mean_curves(results: Sequence[Result], x: str, y: str) -> Curve:
    """Two curves against each other, each the mean of the seeds, where all of them have a point."""
    if not results or not all({x, y} <= set(result["curves"]) for result in results):
        return []
    curves = [[dict(result["curves"][name]) for result in results] for name in (x, y)]
    common = set.intersection(*(set(curve) for kind in curves for curve in kind))
    means = [[sum(c[images] for c in kind) / len(kind) for images in sorted(common)] for kind in curves]
    return list(zip(*means, strict=True))


def _shown(plan: Plan, results: Sequence[Result]) -> list[str]:
    there = {result["config"] for result in results}
    within = {shorter for longer, shorter in plan.continues.items() if longer in there}
    return [name for name in plan.configs if name not in within]


def _dash(axis: Any, configs: Sequence[str], baselines: Mapping[str, Baselines], name: str) -> None:
    """The pretrained models on the validation split: grey, or as the first that starts there."""
    models = each(baselines.values())
    for one in models:
        shown = [config for config in configs if config in one.configs]
        if not shown:
            continue
        colour = "0.35" if len(models) == 1 else COLOURS(configs.index(shown[0]))
        of = "" if len(models) == 1 else f" ({shown[0]}{', ...' if len(shown) > 1 else ''})"
        for guidance, means in one.validation.items():
            if name in means:
                dashes, label = LINES[guidance == 1], one.label(guidance) + of
                axis.axhline(means[name], color=colour, lw=1, ls=dashes, label=label)


def _finish(figure: Any, axes: Sequence[Any], path: Path) -> None:
    """One legend beside all axes, and the file."""
    entries = {}
    for axis in axes:
        entries |= {label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", frameon=False, fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def copy_images(plan: Plan, results: Sequence[dict[str, Any]], out: Path) -> None:
    """Of each configuration's last seed: grids before the first update and at the end, and the sweep's."""
    for config, result in {result["config"]: result for result in results}.items():
        grids = sorted((ROOT / result["run"] / "images").glob("validation_*.png"))
        if grids:  # the run's folder may be gone; then the copies stay what they are
            shutil.copyfile(grids[0], out / plan.name / f"{config}_before.png")
            shutil.copyfile(grids[-1], out / plan.name / f"{config}_after.png")
        for kind in IMAGES:
            if (image := ROOT / result["run"] / "sweep" / f"{kind}.png").exists():
                shutil.copyfile(image, out / plan.name / f"{config}_{kind}.png")
