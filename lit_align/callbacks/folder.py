"""Where a run writes, and how: whole files or none."""

import math
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> Path:
    """Where a run writes: the logger's folder, or without a logger ``lit_align`` in ``default_root_dir``.

    Unlike ``Trainer.log_dir`` this is no collective call, so that one rank may ask alone.
    """
    if isinstance(trainer.logger, TensorBoardLogger | CSVLogger):
        return Path(trainer.logger.log_dir)
    return Path(trainer.default_root_dir) / "lit_align"


def writes(trainer: Trainer) -> bool:
    """Whether this rank writes files; a ``fast_dev_run`` leaves none."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def global_batch(trainer: Trainer) -> int:
    """Number of the newest rollout batch: TensorBoard's step axis, as Lightning has it for scalars."""
    return max(trainer.fit_loop.total_batch_idx, 0)


def unused(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def finite(metrics: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: what has no value is null."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}
