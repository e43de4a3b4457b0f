"""What the folder of a run says: its settings, its newest test, its images and its curves."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lit_align.errors import ConfigError
from lit_align.files import read_rows
from lit_align.report.curves import Curves, read_curves

DISTANCES = ("kl", "drift")
"""Metrics that say how far the policy is from the pretrained model."""


@dataclass(frozen=True)
class Shown:
    """An image of the pretrained model and of the policy for the same prompt and noise.

    Attributes:
        prompt: Their prompt.
        before: File of the pretrained model's.
        after: File of the policy's.
        scores: By name, of the pretrained model and of the policy; None where there is none.
    """

    prompt: str
    before: Path
    after: Path
    scores: dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Run:
    """A run that was tested, or at least validated.

    Attributes:
        folder: Its folder.
        config: Its configuration, as nested mappings; empty where there is none.
        text: The same as YAML.
        result: File of its newest test, or else of its validation.
        metrics: By name: ``before``, ``after``, ``difference``, ``standard_error``, ``win_rate`` and so on.
        images: That it was trained on.
        split: ``test`` or ``validation``.
        shown: Images that were kept of the test.
        curves: By tag.
    """

    folder: Path
    config: dict[str, Any]
    text: str
    result: Path
    metrics: dict[str, dict[str, float | None]]
    images: int
    split: str
    shown: list[Shown] = field(default_factory=list)
    curves: Curves = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of its method's class."""
        model = self.config.get("model") or {}
        return str(model.get("class_path", "model")).rpartition(".")[2].removesuffix("Module")

    @property
    def name(self) -> str:
        """How it is called beside others."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def compared(self) -> bool:
        """Whether the pretrained model was measured on the same prompts and noise."""
        return any("before" in metric for metric in self.metrics.values())


def result_of(folder: Path) -> Path:
    """The file of the newest test of a run, or else of its newest validation.

    Raises:
        ConfigError: There is neither.
    """
    tests = [path for path in folder.glob("test*.json") if re.fullmatch(r"test(-\d+)?\.json", path.name)]
    numbers = {path: int(path.stem.partition("-")[2] or 1) for path in tests}
    if tests:
        return max(tests, key=lambda path: numbers[path])
    if (found := folder / "validation.json").is_file():
        return found
    raise ConfigError(
        f"report: {folder} has neither test.json nor validation.json; give the folder of a run, such as "
        "logs/ddpo/version_0, that was trained or tested"
    )


def read_run(folder: Path, result: Path | None = None) -> Run:
    """Read the folder of a run.

    Args:
        folder: The folder.
        result: The test that is meant; the newest if not given.

    Raises:
        ConfigError: It holds no result, or one that cannot be read.
    """
    result = result or result_of(folder)
    try:
        found = json.loads(result.read_text())
        metrics, images, split = found["metrics"], int(found["images"]), str(found["split"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"report: {result} cannot be read; run test again") from None
    config = folder / "config.yaml"
    text = config.read_text() if config.is_file() else ""
    return Run(
        folder,
        yaml.safe_load(text) or {},
        text,
        result,
        metrics,
        images,
        split,
        _shown(result),
        read_curves(folder),
    )


def images_folder(result: Path) -> Path:
    """Where the images of a test lie, beside its result."""
    return result.with_name(f"{result.stem}_images")


def _shown(result: Path) -> list[Shown]:
    """The images that were kept, with their scores out of the table of the test."""
    folder = images_folder(result)
    if not (folder / "metadata.jsonl").is_file():
        return []
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    scores = read_rows(result.with_suffix(".csv"))
    shown = []
    for row in rows:
        measured = scores[row["index"]] if row["index"] < len(scores) else {}
        names = [name for name in measured if f"base/{name}" in measured and name not in DISTANCES]
        pairs = {name: (_number(measured[f"base/{name}"]), _number(measured[name])) for name in names}
        shown.append(Shown(row["prompt"], folder / row["before"], folder / row["after"], pairs))
    return shown


def _number(text: str) -> float | None:
    """A number of a table; None if it is none."""
    value = float(text)
    return value if value == value else None
