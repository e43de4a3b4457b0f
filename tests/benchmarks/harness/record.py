"""What is kept of a finished cell: metrics, curves, and all that is needed to make them again."""

import csv
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

from lit_align.files import write
from lit_align.shapes import WEIGHTS_HASH
from tests.benchmarks.harness.plan import ROOT, Cell

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
    return result if result["fingerprint"] == cell.fingerprint(WEIGHTS_HASH) else None


def keep_images(cell: Cell, run: Path, out: Path) -> None:
    """Keep the metrics of each test image, without those of the pretrained model, beside the result."""
    header, *rows = csv.reader((run / "test.csv").read_text().splitlines())
    kept = [place for place, name in enumerate(header) if not name.startswith("base/")]
    lines = [",".join(row[place] for place in kept) for row in (header, *rows)]
    write(result_path(cell, out).with_suffix(".csv"), "\n".join(lines) + "\n")


def images(cell: Cell, out: Path) -> dict[str, list[float]]:
    """What :func:`keep_images` kept: a column for each metric, a row for each image."""
    with result_path(cell, out).with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def record(cell: Cell, run: Path, fingerprint: str, stages: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The result of a cell.

    Args:
        cell: The cell.
        run: Folder of its run.
        fingerprint: Of the cell, when it began.
        stages: Of each, its commands and seconds.
    """
    validation, test = (json.loads((run / f"{split}.json").read_text()) for split in ("validation", "test"))
    also = {name: json.loads((run / f"{name}.json").read_text())["metrics"] for name in cell.also}
    sweep = run / "sweep" / "sweep.json"
    swept = {"sweep": json.loads(sweep.read_text())} if sweep.exists() else {}
    return swept | {
        "plan": cell.plan,
        "cell": cell.name,
        "config": cell.config,
        "seed": cell.seed,
        "fingerprint": fingerprint,
        "commands": [given for stage in stages.values() for given in stage["commands"]],
        "shapes_weights": WEIGHTS_HASH,
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items()},
        "images": validation["images"],
        "reward_queries": validation["reward_queries"],
        "run": os.path.relpath(run, ROOT),
        "validation": validation["metrics"],
        "test": test["metrics"],
        "also": also,
        "curves": curves(run),
    }


def commit() -> str | None:
    """The commit of the repository, with ``-dirty`` where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else None


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Curves of a run against the images it had seen, which is the step of its events.

    Args:
        run: Folder with TensorBoard events, of one process or of several that resumed each other.

    Returns:
        For each ``val/...``, and ``train/reward`` and its parts, the points ``(images, value)``.
    """
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in sorted(events.Tags()["scalars"]) if _is_kept(name)]
    return {name: _by_images(events.Scalars(name)) for name in names}


def _is_kept(name: str) -> bool:
    return name == "train/reward" or name.startswith(("train/reward/", "val/"))


def _by_images(points: Sequence[ScalarEvent]) -> list[tuple[int, float]]:
    """A rollout batch that was interrupted and done again has its point twice: the later one stands."""
    return sorted({point.step: point.value for point in points}.items())
