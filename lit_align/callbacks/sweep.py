"""Files of a sweep over weights: a table, a summary, a plot of the front, and images along the weights."""

import csv
import io
import json
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from rich.table import Table

from lit_align.callbacks.console import show
from lit_align.callbacks.files import finite, writes
from lit_align.callbacks.grid import image_grid, uint8
from lit_align.callbacks.histograms import tensorboards
from lit_align.callbacks.images import png
from lit_align.files import rename_new, write
from lit_align.folder import run_folder
from lit_align.methods import MSDDAModule
from lit_align.methods.msdda.sweep import BASE, EXPERT, FUSED, Front, Volume
from lit_align.shapes import WEIGHTS_HASH


class SweepReport(Callback):
    """Writes ``sweep/``: ``sweep.csv``, ``sweep.json``, ``front.png`` (with matplotlib) and ``strip.png``."""

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not isinstance(pl_module, MSDDAModule) or pl_module.front is None or not writes(trainer):
            return
        front = pl_module.front
        draft = run_folder(trainer) / f".sweep.{os.getpid()}.draft"
        rows, volumes = front.rows(), front.volumes()
        write(draft / "sweep.csv", _csv(rows))
        write(draft / "sweep.json", json.dumps(self._summary(front, rows, volumes, pl_module.seed), indent=1))
        folder = rename_new(draft, run_folder(trainer) / "sweep")  # whatever becomes of the images
        images = {"strip": strip(front)} if front.prompts else {}
        images |= {"front": drawn} if (drawn := plot(front)) else {}
        for name, image in images.items():
            write(folder / f"{name}.png", png(image))
            for writer in tensorboards(trainer):
                writer.add_image(f"sweep/{name}", np.asarray(image), pl_module.images, dataformats="HWC")
        _show(front, rows, volumes, folder)

    def _summary(
        self,
        front: Front,
        rows: Sequence[dict[str, Any]],
        volumes: dict[str, Volume],
        seed: int,
    ) -> dict[str, Any]:
        reference, units = front.reference()
        points = [{n: None if value != value else value for n, value in row.items()} for row in rows]
        others = {name: volume for name, volume in volumes.items() if name != FUSED}
        return {
            "shapes_weights": WEIGHTS_HASH,
            "seed": seed,
            "images": len(front.measured[0].groups),
            "objectives": front.objectives,
            "hypervolume": finite({name: volume.value for name, volume in volumes.items()}),
            "hypervolume_error": finite({name: volume.error for name, volume in volumes.items()}),
            "hypervolume_lead": finite({name: volume.lead for name, volume in others.items()}),
            "hypervolume_lead_error": finite({name: volume.lead_error for name, volume in others.items()}),
            "hypervolume_reference": front.merits(reference).tolist(),
            "hypervolume_units": [None if unit != unit else unit for unit in units.tolist()],
            "points": points,
        }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text, names = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, list(names))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def strip(front: Front) -> Image.Image:
    """The same prompts and noise in each row: the base, then the fused policy along the weights."""
    shown = [m for m in front.measured if m.point.method == BASE]
    shown += sorted(
        (m for m in front.measured if m.point.method in (EXPERT, FUSED)),
        key=lambda m: [weight for _, weight in m.point.weights],
        reverse=True,
    )
    labels = []
    for m in shown[1:]:
        parts = [f"{n} {w:.2g}" for n, w in m.point.weights if w]
        labels.append("\n".join([EXPERT, *parts] if m.point.method == EXPERT else parts))
    images = uint8(torch.stack([m.images for m in shown], dim=1))  # (images, columns, 3, H, W)
    captions = [label for prompt in front.prompts for label in (f"{BASE}: {prompt}", *labels)]
    return image_grid([[image] for image in images.flatten(0, 1)], captions, columns=len(shown), side=112)


def plot(front: Front) -> Image.Image | None:
    """Mean rewards of all methods, a panel for each pair of objectives; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        rank_zero_warn(
            "sweep: front.png needs matplotlib (pip install matplotlib); the metrics are in sweep.csv"
        )
        return None
    pairs = list(combinations(range(len(front.objectives)), 2))
    figure = Figure(figsize=(5 * max(len(pairs), 1) + 1.5, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for panel, (i, j) in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), panel + 1)
        for method, points in front.methods().items():
            points = sorted(points, key=lambda m: [weight for _, weight in m.point.weights])  # along the way
            means = torch.stack([front.means(point) for point in points])[:, (i, j)]
            line = "-" if len(front.objectives) == 2 and len(means) > 1 and method != EXPERT else ""
            corner = method in (BASE, EXPERT)
            axes.plot(
                means[:, 0],
                means[:, 1],
                marker="*" if method == BASE else "D" if method == EXPERT else "o",
                markersize=11 if method == BASE else 6,
                linestyle=line,
                color="black" if corner else None,
                zorder=3 if corner else 2,
                label=method,
            )
        axes.set_xlabel(front.objectives[i])
        axes.set_ylabel(front.objectives[j])
        axes.grid(alpha=0.3)
    if pairs:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    canvas.draw()  # now it is known where points lie
    for axes, (i, j) in zip(figure.axes, pairs, strict=True):
        _name_weights(axes, front, i, j)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _name_weights(axes: Any, front: Front, i: int, j: int) -> None:
    """Write its weights beside each fused point, where they do not cover those of another."""
    taken: list[np.ndarray] = []
    for one in front.methods().get(FUSED, []):
        x, y = front.means(one)[[i, j]].tolist()
        place = axes.transData.transform((x, y))
        if np.isfinite(place).all() and all((np.abs(place - other) > (55, 11)).any() for other in taken):
            weights = "/".join(f"{weight:.2g}" for _, weight in one.point.weights)
            axes.annotate(weights, (x, y), textcoords="offset points", xytext=(5, -9), fontsize=7)
            taken.append(place)


def _show(front: Front, rows: Sequence[dict[str, Any]], volumes: dict[str, Volume], folder: Path) -> None:
    table = Table(title="sweep: the same prompts and noise at all weights")
    headers = ("method", "weights", *front.objectives, "truth", "KL", "gain", "s/image", "front")
    for header in headers:
        left = header in ("method", "weights")
        table.add_column(
            header, justify="left" if left else "right", no_wrap=header not in ("method", "front")
        )
    for row in rows:
        weights = " ".join(f"{row[f'weight/{n}']:g}" for n in front.objectives) if "gain" in row else ""
        gain = f"{row['gain']:+.3f} ± {row['gain/se']:.3f}" if "gain" in row else ""
        rewards = [f"{row[f'reward/{name}']:.3f}" for name in front.objectives]
        others = [f"{row[n]:.{digits}f}" if n in row else "" for n, digits in (("truth", 3), ("kl", 1))]
        mark = "x" if row["front"] else ""
        table.add_row(row["method"], weights, *rewards, *others, gain, f"{row['seconds']:.3f}", mark)
    show(table)
    shown = ", ".join(f"{name} {v.value:.3f} ± {v.error:.3f}" for name, v in volumes.items())
    show(f"hypervolume  {shown}")
    show(f"sweep        {folder}")
