"""What is kept of a finished cell: metrics, curves, and all that is needed to make them again."""

import csv
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from lit_align.files import write
from tests.benchmarks.harness.plan import ROOT, TRAINS, Cell

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft")


def result_path(cell: Cell, out: Path) -> Path:
    """Where the result of a cell lies."""
    return out / cell.plan / f"{cell.name}.json"


def stored(cell: Cell, out: Path) -> dict[str, Any] | None:
    """The result of a cell, if it is there and of what the cell is now."""
    path = result_path(cell, out)
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return result if result["fingerprint"] == cell.fingerprint() else None


def run_of(cell: Cell, stage: str) -> str:
    """The folder, in that of the cell, where a stage of it writes."""
    return "version_0" if cell.steps == TRAINS else stage


BASE = ("base/reward", "base/truth")
"""What is kept of the pretrained model's images, of which a mean over seeds needs each."""


def keep_images(cell: Cell, folder: Path, out: Path) -> None:
    """Keep the metrics of each test image beside the result, and of the pretrained model's the main ones."""
    if "test" not in cell.steps:
        return
    test = folder / run_of(cell, "test") / "test.csv"
    header, *rows = csv.reader(test.read_text().splitlines())
    kept = [place for place, name in enumerate(header) if name in BASE or not name.startswith("base/")]
    lines = [",".join(row[place] for place in kept) for row in (header, *rows)]
    write(result_path(cell, out).with_suffix(".csv"), "\n".join(lines) + "\n")


def images(cell: Cell, out: Path) -> dict[str, list[float]]:
    """What :func:`keep_images` kept; empty of results that were made before it did."""
    path = result_path(cell, out).with_suffix(".csv")
    return read_images(path) if path.exists() else {}


def read_images(path: Path) -> dict[str, list[float]]:
    """A table of images: a column for each metric, a row for each image."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def record(cell: Cell, folder: Path, fingerprint: str, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The result of a cell.

    Args:
        cell: The cell.
        folder: Its own, with its runs.
        fingerprint: Of the cell, when it began.
        stages: Of each, its commands, seconds and CPU seconds.
    """
    computed = {name: stage.get("cpu") for name, stage in stages.items()}
    origin = {
        "plan": cell.plan,
        "cell": cell.name,
        "config": cell.config,
        "seed": cell.seed,
        "fingerprint": fingerprint,
        "commands": [given for stage in stages.values() for given in stage["commands"]],
        "shapes_weights": cell.weights,
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
        "cpu_seconds": {name: round(cpu, 1) for name, cpu in computed.items() if cpu is not None},
    }
    return origin | (_trained(cell, folder) if cell.steps == TRAINS else _pretrained(cell, folder))


def _trained(cell: Cell, folder: Path) -> dict[str, Any]:
    run = folder / run_of(cell, "fit")
    validation, test = (json.loads((run / f"{split}.json").read_text()) for split in ("validation", "test"))
    also = {name: json.loads((run / f"{name}.json").read_text())["metrics"] for name in cell.also}
    sweep = run / "sweep" / "sweep.json"
    swept = {"sweep": json.loads(sweep.read_text())} if sweep.exists() else {}
    return swept | {
        "images": test["images"],
        "reward_queries": test["reward_queries"],
        "run": os.path.relpath(run, ROOT),
        "validation": validation["metrics"],
        "test": test["metrics"],
        "also": also,
        "curves": curves(run, "train/reward", "val"),
    }


def _pretrained(cell: Cell, folder: Path) -> dict[str, Any]:
    """Means on the validation split, with the standard deviation of the images."""
    found = folder / run_of(cell, "validate") / "validate.json"
    means, columns = json.loads(found.read_text())["metrics"], read_images(found.with_suffix(".csv"))
    for name, metric in means.items():
        values = [value for value in columns.get(name, []) if math.isfinite(value)]
        metric["deviation"] = statistics.stdev(values) if len(values) > 1 else None
    return {"validation": means}


def commit() -> str | None:
    """The commit of the repository, with ``-dirty`` where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def curves(run: Path, *kept: str) -> dict[str, list[tuple[int, float]]]:
    """Curves of a run against the images it had seen, which is the step of its events.

    Args:
        run: Folder with TensorBoard events, of one process or of several that resumed each other.
        kept: Names of those that are returned; ``val`` is all of ``val/...``, and so is each with its parts.

    Returns:
        For each the points ``(images, value)``.
    """
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [n for n in sorted(events.Tags()["scalars"]) if any(f"{n}/".startswith(f"{k}/") for k in kept)]
    return {name: _by_images(events.Scalars(name)) for name in names}


def _by_images(points: Sequence[ScalarEvent]) -> list[tuple[int, float]]:
    """A rollout batch that was interrupted and done again has its point twice: the later one stands."""
    return sorted({point.step: point.value for point in points}.items())
