"""The loggers of a command, and the folder that they share with everything else that a run writes."""

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_align.cli.checkpoint import checkpoints_of
from lit_align.errors import ConfigError, tell
from lit_align.files import read_rows, unused, write, writing
from lit_align.folder import Hold, check_local, claim

NUMBERING = ("TensorBoardLogger", "CSVLogger")
"""Loggers that write to ``save_dir/name/version``."""


def runs_of(config: Any) -> Path:
    """Where the runs of a configuration are: ``logs/<method>``, whatever the logger.

    Args:
        config: That of the subcommand.
    """
    method = config.model.class_path.rpartition(".")[2].removesuffix("Module").lower()
    root = config.trainer.default_root_dir
    runs = Path(root or "logs") / method
    if (logger := next(_numbering(config.trainer.logger), None)) is not None:
        if root is not None and Path(root) != Path(logger.init_args.save_dir):
            rank_zero_warn(
                f"trainer.default_root_dir: {root} is passed over, since a run writes where its logger does, "
                f"to {logger.init_args.save_dir}; give --trainer.logger.save_dir {root} in its place"
            )
        runs = Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
    check_local(runs)
    return runs


def named_run(config: Any) -> str | None:
    """The folder in there that the user names by a logger's ``version``; None for one by its number."""
    versions = [logger.init_args.get("version") for logger in _numbering(config.trainer.logger)]
    version = next((version for version in versions if version is not None), None)
    return f"version_{version}" if isinstance(version, int) else version


def new_folder(config: Any, again: bool = False) -> Path | None:
    """A folder for a new run; None where another process makes it, which then tells the others.

    Args:
        config: That of the subcommand.
        again: Whether the same command may start a job again: a folder that the user names, and that the job
            left before its first checkpoint, gets another name.

    Raises:
        ConfigError: The version that the user gives a logger is taken.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return None
    runs = runs_of(config)
    if (named := named_run(config)) is None:
        return claim(runs)
    folder = runs / named
    if again and _is_left(folder):
        aside = unused(folder.with_name(f"{folder.name}-left"))
        folder.rename(aside)
        tell(f"{folder} has no checkpoint to resume from: it is {aside} now, and the run starts anew")
    try:
        with writing(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        raise ConfigError(
            f"trainer.logger.version: {folder} is of another run; give another version, none for the "
            f"next number, or --ckpt_path {folder} to resume that run"
        ) from None
    return folder


def _is_left(folder: Path) -> bool:
    """Whether a run began there that has no checkpoint, and that no process trains."""
    if not (folder / "config.yaml").exists() or checkpoints_of(folder):
        return False
    hold = Hold()
    free = hold.take(folder)
    hold.leave()
    return free


def use_folder(config: Any, folder: Path, images: int | None = None) -> None:
    """Let the loggers that number runs write to a folder; where no logger is chosen, TensorBoard does.

    Args:
        config: That of the subcommand.
        folder: The run's.
        images: Of a fit that goes on: TensorBoard drops the points after it, which come again.
    """
    place = {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}
    if config.trainer.logger in (None, True):
        class_path = "lightning.pytorch.loggers.TensorBoardLogger"
        config.trainer.logger = Namespace(class_path=class_path, init_args=Namespace(**place))
    for logger in _numbering(config.trainer.logger):
        for name, value in place.items():
            logger.init_args[name] = value
        if images is not None and logger.class_path.endswith("TensorBoardLogger"):
            logger.init_args.purge_step = images + 1


class KeptTable(ExperimentWriter):
    """Adds to the ``metrics.csv`` that is there, which Lightning's deletes, and never leaves half of it.

    Args:
        folder: Of the logger.
        images: Of a fit that goes on: the rows after it are dropped, since they come again.
    """

    def __init__(self, folder: str, images: int | None) -> None:
        super().__init__(folder)
        self._path = Path(self.metrics_file_path)
        self._images = images
        self._begun = False

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""

    def save(self) -> None:
        """Write the rows that are in memory."""
        if not self.metrics:
            return
        if not self._begun:
            kept = self._earlier()
        elif not self._path.exists() or set().union(*self.metrics) - set(self.metrics_keys):
            kept = read_rows(self._path)
        else:
            self._append()
            return
        self._record_new_keys()
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self.metrics_keys)
        table.writeheader()
        table.writerows([*kept, *self.metrics])
        write(self._path, text.getvalue())
        self._begun, self.metrics = True, []

    def _append(self) -> None:
        size = self._path.stat().st_size
        with writing(self._path):
            try:
                with self._path.open("a", encoding="utf-8", newline="") as file:
                    csv.DictWriter(file, self.metrics_keys).writerows(self.metrics)
            except OSError:
                os.truncate(self._path, size)  # no half of a row
                raise
        self.metrics = []

    def _earlier(self) -> list[dict[str, Any]]:
        """The rows that are kept of what was there before this process."""
        rows = read_rows(self._path)
        self.metrics_keys = list(rows[0]) if rows else []
        return [row for row in rows if self._images is None or float(row["step"] or 0) <= self._images]


def keep_metrics(trainer: Trainer, images: int | None) -> None:
    """Let CSV loggers add to the ``metrics.csv`` of a run that goes on.

    Args:
        trainer: With its loggers, of which none has written yet.
        images: Of a fit that goes on.
    """
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            logger._experiment = KeptTable(logger.log_dir, images)


def _numbering(loggers: Any) -> Iterator[Any]:
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.class_path.rpartition(".")[2] in NUMBERING:
            yield logger
