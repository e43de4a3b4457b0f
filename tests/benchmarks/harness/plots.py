"""Learning curves and image grids of a plan."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: a benchmark has no screen

import matplotlib.pyplot as plt

from tests.benchmarks.harness.plan import ROOT, Plan
from tests.benchmarks.harness.sweeps import IMAGES


def plot_curves(plan: Plan, results: Sequence[dict[str, Any]], path: Path) -> None:
    """Reward and truth on the validation split against images seen.

    A configuration has a colour, a seed a line. What a longer run has taken further is seen in that one.
    """
    there = {result["config"] for result in results}
    within = {shorter for longer, shorter in plan.continues.items() if longer in there}
    names = [name for name in ("val/reward", "val/truth") if any(name in r["curves"] for r in results)]
    size = (5.2 * len(names), 3.6)
    figure, axes = plt.subplots(1, len(names), figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names, strict=True):
        for number, config in enumerate(name for name in plan.configs if name not in within):
            curves = [r["curves"][name] for r in results if r["config"] == config and name in r["curves"]]
            for which, points in enumerate(curves):
                label = None if which else f"{config}: {len(curves)} seed{'s' * (len(curves) > 1)}"
                images, values = zip(*points, strict=True)
                axis.plot(images, values, color=f"C{number}", lw=1, marker="o", ms=3, label=label)
        axis.set(xlabel="images seen", ylabel=name)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
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
