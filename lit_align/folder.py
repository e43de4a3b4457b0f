"""Where a run writes: one folder of its own, whatever the logger, and one run at a time."""

import fcntl
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_align.errors import ConfigError
from lit_align.files import writing

OF_FIT = ("checkpoints", "images", "adapter", "pool")
"""Folders of a run that only fit writes to."""

TOP_OF_FIT = ("config.yaml", "validation.json", "validation.csv", "metrics.csv")
"""Files beside them that fit writes; a test that runs at the same time has others."""


def claim(runs: Path) -> Path:
    """Make and return the next folder ``version_N`` of ``runs``; two processes never get the same.

    Raises:
        ConfigError: It cannot be made.
    """
    with writing(runs):
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


def check_local(runs: Path) -> None:
    """Refuse an address: its files would lie in a folder of that name here.

    Raises:
        ConfigError: It is one.
    """
    if runs.parts and re.fullmatch(r"[a-z][a-z0-9+.-]+:", runs.parts[0]):
        raise ConfigError(
            f"{runs} is an address, and a run writes to a folder of this machine; give one, which may be a "
            "mounted one, or copy the run when it is over"
        )


class Hold:
    """The right to train in a folder, which one process has at a time; it ends with the process.

    It is a POSIX record lock on ``.lock`` in the folder: a worker that outlives its run does not keep it.
    Where the file system has no locks nothing is held, and nobody refused.
    """

    def __init__(self) -> None:
        self._place: Path | None = None
        self._file = self._process = -1

    def take(self, folder: Path) -> bool:
        """Whether the folder is this process's, or its parent's, now; False if another process has it."""
        place = (folder / ".lock").absolute()
        if place == self._place:
            return True
        self.leave()
        with writing(place):
            folder.mkdir(parents=True, exist_ok=True)
            while True:
                file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    os.close(file)
                    return False
                except OSError:
                    pass  # no locks here
                self._place, self._file, self._process = place, file, os.getpid()
                if place.exists() and os.path.samestat(os.fstat(file), place.stat()):
                    return True
                self.leave()  # whoever had it has just deleted it: that of a new one counts

    def leave(self) -> None:
        """Let others have the folder."""
        if self._place is not None and self._process == os.getpid():
            if self._place.exists() and os.path.samestat(os.fstat(self._file), self._place.stat()):
                self._place.unlink()
            os.close(self._file)
        self._place, self._process = None, -1


class RunFolder(Callback):
    """Decides where a run writes, and tells all ranks; it stands first among the callbacks.

    Args:
        path: The folder. If not given, that of the first TensorBoard or CSV logger; without one, the next
            ``logs/<method>/version_N`` in the Trainer's ``default_root_dir``. A ``fast_dev_run`` gets a
            temporary folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = self._given = path
        self._trainer: Trainer | None = None
        self._hold = Hold()
        self._temporary: TemporaryDirectory[str] | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Choose the folder.

        Raises:
            ConfigError: Another process trains there.
        """
        if self._trainer not in (None, trainer):  # another run, which must not write over that of the first
            self.path = self._given
        self._trainer = trainer
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._temporary = TemporaryDirectory()
            self.path = Path(self._temporary.name)
        elif trainer.is_global_zero:
            if self.path is None:
                self.path = self._choose(trainer, type(pl_module).__name__, stage)
            if stage == "fit":
                self.hold(self.path)
                _clear(self.path)
        self.path = trainer.strategy.broadcast(self.path)

    def hold(self, path: Path) -> None:
        """Keep other processes from training in the folder until this run ends.

        Raises:
            ConfigError: One does.
        """
        if not self._hold.take(path):
            raise ConfigError(
                f"{path} is the folder of a run that another process is training; wait until it ends, or "
                "start a new run without --ckpt_path"
            )

    def _choose(self, trainer: Trainer, method: str, stage: str) -> Path:
        logged = _logged(trainer)
        if logged is None:
            check_local(Path(trainer.default_root_dir))
            return claim(Path(trainer.default_root_dir) / "logs" / method.removesuffix("Module").lower())
        check_local(logged)
        if stage == "fit" and not self._hold.take(logged):
            # Lightning numbers runs by what it sees: two that start at once get the same number.
            logged = claim(logged.parent)
            _renumber(trainer, logged)
        return logged

    def release(self) -> None:
        """Let other processes train there."""
        self._hold.leave()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.release()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.release()


def _renumber(trainer: Trainer, folder: Path) -> None:
    """Let the loggers that number runs, and have written nothing yet, write to another folder."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.close()
                for file in Path(logger.log_dir).glob(f"events.out.tfevents.*.{os.getpid()}.*"):
                    file.unlink()
            logger._version, logger._experiment = folder.name, None


def _clear(run: Path) -> None:
    """Delete what a killed process was writing."""
    patterns = (".*.draft", ".tmp*")  # ours, and those of safetensors beside them
    drafts = [draft for name in OF_FIT for pattern in patterns for draft in (run / name).rglob(pattern)]
    for draft in drafts + [draft for name in TOP_OF_FIT for draft in run.glob(f".{name}.*.draft")]:
        draft.unlink(missing_ok=True)


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
