"""How a run writes: whole files or none, readable by whom the user's umask says."""

import math
import os
from collections.abc import Callable
from pathlib import Path

from lightning import Trainer


def writes(trainer: Trainer) -> bool:
    """Whether this rank writes files; a ``fast_dev_run`` leaves none."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def unused(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file so that a reader sees the old one or the whole new one, at any moment.

    Args:
        path: The file.
        fill: Writes the content to the path that it is given, which is in the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    try:
        fill(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())  # renamed before it is on disk, it could be empty after a power cut
        follow_umask(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, text: str) -> None:
    """Write a text so that a reader sees all of it or none."""
    replace_file(path, lambda draft: draft.write_text(text))


def follow_umask(path: Path) -> None:
    """Give a file, or all files below a folder, the mode of new files; some libraries make them private."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: what has no value is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
