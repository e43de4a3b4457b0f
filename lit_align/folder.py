"""Where a run writes: one folder of its own, whatever the logger."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def claim(runs: Path) -> Path:
    """Make and return the next folder ``version_N`` of ``runs``; two processes never get the same."""
    runs.mkdir(parents=True, exist_ok=True)
    taken = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
    number = max((int(name) for name in taken if name.isdecimal()), default=-1) + 1
    while True:
        folder = runs / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another process was faster
            number += 1
        else:
            return folder


class RunFolder(Callback):
    """Decides where a run writes, and tells all ranks; it stands first among the callbacks.

    Args:
        path: The folder. If not given, that of the first TensorBoard or CSV logger; without one, the next
            ``logs/<method>/version_N`` in the Trainer's ``default_root_dir``. A ``fast_dev_run`` gets a
            temporary folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._temporary: TemporaryDirectory[str] | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._temporary = TemporaryDirectory()
            self.path = Path(self._temporary.name)
        elif self.path is None and trainer.is_global_zero:
            method = type(pl_module).__name__.removesuffix("Module").lower()
            self.path = _logged(trainer) or claim(Path(trainer.default_root_dir) / "logs" / method)
        self.path = trainer.strategy.broadcast(self.path)


def run_folder(trainer: Trainer) -> Path:
    """The run's folder; no collective call, so that one rank may ask alone.

    Of a Trainer without :class:`RunFolder` it is that of the first TensorBoard or CSV logger, or, without
    one, ``default_root_dir`` itself.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunFolder) and callback.path is not None:
            return callback.path
    return _logged(trainer) or Path(trainer.default_root_dir)


def _logged(trainer: Trainer) -> Path | None:
    """The folder of the first logger that numbers runs."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            return Path(logger.log_dir)
    return None
