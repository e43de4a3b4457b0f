"""What the folder of a run says: its settings, its newest test, its images and its curves."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_align.comparison import DISTANCES
from lit_align.errors import ConfigError, described
from lit_align.files import numbered, read_config, read_rows
from lit_align.report.curves import Curves, read_curves


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
        fitted: File of the newest configuration of its fit, if it has one.
        tested: File of the configuration of the test, if the result names it.
        result: File of its newest test, or else of its validation.
        metrics: By name: ``before``, ``after``, ``difference``, ``standard_error``, ``win_rate`` and so on.
        images: That it was trained on.
        split: ``test`` or ``validation``.
        measured: What decides the numbers of the result, by name, as texts.
        validated: The same of the newest point of its curves.
        since: Images after which its curves begin; before, held-out images were measured otherwise.
        shown: Images that were kept of the test.
        curves: By tag.
    """

    folder: Path
    fitted: Path | None
    tested: Path | None
    result: Path
    metrics: dict[str, dict[str, float | None]]
    images: int
    split: str
    measured: dict[str, str] = field(default_factory=dict)
    validated: dict[str, str] = field(default_factory=dict)
    since: int = 0
    shown: list[Shown] = field(default_factory=list)
    curves: Curves = field(default_factory=dict)

    @property
    def method(self) -> str:
        """Name of its method's class."""
        config = self.fitted or self.tested
        model = read_config(config).get("model") if config else None
        return str((model or {}).get("class_path", "model")).rpartition(".")[2].removesuffix("Module")

    @property
    def count(self) -> int:
        """Number of images that were measured."""
        counts = (found.get("num_pairs") or found.get("num_images") or 0 for found in self.metrics.values())
        return int(max(counts, default=0))

    @property
    def compared(self) -> bool:
        """Whether the pretrained model was measured on the same prompts and noise."""
        return any("before" in metric for metric in self.metrics.values())


def names_of(runs: Sequence[Run]) -> list[str]:
    """How runs are called beside each other: by the last parts of their paths that tell them apart.

    There are two parts at least, such as ``ddpo/version_0``.
    """
    paths = [Path(os.path.abspath(run.folder)).parts for run in runs]
    length, longest = 2, max(map(len, paths))
    while length < longest and len({path[-length:] for path in paths}) < len(set(paths)):
        length += 1
    return [str(Path(*path[-length:])) for path in paths]


def result_of(folder: Path) -> Path:
    """The file of the newest test of a run, or else of its newest validation.

    Raises:
        ConfigError: There is neither.
    """
    if tests := numbered(folder / "test.json"):
        return tests[-1]
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
        ConfigError: It holds no result, or a file that is not as a run writes it.
    """
    try:
        return _read_run(folder, result or result_of(folder))
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ConfigError(
            f"report: {folder} has a file that is not as its run wrote it ({described(error)}); put it back, "
            "or run test again"
        ) from error


def _read_run(folder: Path, result: Path) -> Run:
    found = _read(result)
    measured = _measured(found)
    config = folder / Path(str(found.get("config"))).name
    since, curves = 0, read_curves(folder)
    try:
        validation = _read(folder / "validation.json")
        validated, since = _measured(validation), int(validation.get("compared_since") or 0)
    except ConfigError:  # there is none: what a test says but for its prompts, which are its own
        validated = {name: fact for name, fact in measured.items() if name != "prompts"}
    return Run(
        folder=folder,
        fitted=next(reversed(numbered(folder / "config.yaml")), None),
        tested=config if found["split"] == "test" and config.is_file() else None,
        result=result,
        metrics=found["metrics"],
        images=int(found["images"]),
        split=found["split"],
        measured=_facts(measured),
        validated=_facts(validated),
        since=since,
        shown=_shown(result),
        curves={
            tag: [point for point in curve if _alike(tag, point, since)] for tag, curve in curves.items()
        },
    )


def _alike(tag: str, point: tuple[float, float], since: int) -> bool:
    """Whether a point of a curve is measured as the newest one is."""
    return not since or not tag.startswith("val/") or point[0] > since


def _read(result: Path) -> dict[str, Any]:
    try:
        found = json.loads(result.read_text("utf-8"))
        values = [value for metric in found["metrics"].values() for value in metric.values()]
        known = all(isinstance(value, int | float | None) for value in [found["images"], *values])
        known = known and isinstance(found["split"], str)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise ConfigError(f"report: {result} cannot be read; run test again")
    return dict(found)


def _measured(found: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its run and, with precedence, of how it was measured."""
    return {**(found.get("run") or {}), **(found.get("measured") or {})}


def _facts(measured: Mapping[str, Any]) -> dict[str, str]:
    """What decides the numbers of held-out images, by name, as texts."""
    facts = {}
    if base := measured.get("base"):
        facts["pretrained model"] = f"{measured.get('model')} {base}"
    if sampler := measured.get("sampler"):
        facts["sampler"] = f"{sampler['class']}, {sampler['steps']} steps, {sampler['chain']}"
    if (guidance := measured.get("guidance")) is not None:
        facts["guidance"] = f"{guidance:g}"
    if size := measured.get("size"):
        facts["size"] = " x ".join(map(str, size))
    if prompts := measured.get("prompts"):
        facts["prompts"] = str(prompts)
    if columns := measured.get("columns"):
        facts["columns of the prompts"] = str(columns)
    if rewards := measured.get("rewards"):
        trained = [f"{name} {kind}" for name, kind in sorted(rewards.items()) if " x " in kind]
        facts["trained rewards"] = ", ".join(trained) or "none"
        facts |= {f"reward/{name}": kind.partition(" x ")[0] for name, kind in rewards.items()}
    return facts


def page_of(result: Path) -> Path:
    """Where the page about a result lies, beside it: that of an earlier test stays."""
    number = result.stem.removeprefix("test") if result.stem.startswith("test") else ""
    return result.with_name(f"report{number}.html")


def images_folder(result: Path) -> Path:
    """Where the images of a test lie, beside its result."""
    return result.with_name(f"{result.stem}_images")


def _shown(result: Path) -> list[Shown]:
    """The images that were kept, with their scores out of the table of the test."""
    folder = images_folder(result)
    if not (folder / "metadata.jsonl").is_file():
        return []
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    scores = read_rows(result.with_suffix(".csv"))
    shown = []
    for row in rows:
        if not all((folder / row[kind]).is_file() for kind in ("before", "after")):
            continue  # deleted to save room
        measured = scores[row["index"]] if row["index"] < len(scores) else {}
        names = [name for name in measured if f"base/{name}" in measured and name not in DISTANCES]
        pairs = {name: (_number(measured[f"base/{name}"]), _number(measured[name])) for name in names}
        shown.append(Shown(row["prompt"], folder / row["before"], folder / row["after"], pairs))
    return shown


def _number(text: str) -> float | None:
    """A number of a table; None if it is none."""
    value = float(text)
    return value if value == value else None
