"""The loggers of a command, and the folder that they share with everything else that a run writes."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_align.errors import ConfigError
from lit_align.folder import claim

NUMBERING = ("TensorBoardLogger", "CSVLogger")
"""Loggers that write to ``save_dir/name/version``."""


def runs_of(config: Any) -> Path:
    """Where the runs of a configuration are: ``logs/<method>``, whatever the logger.

    Args:
        config: That of the subcommand.
    """
    for logger in _numbering(config.trainer.logger):
        return Path(logger.init_args.save_dir) / (logger.init_args.get("name") or "")
    method = config.model.class_path.rpartition(".")[2].removesuffix("Module").lower()
    return Path(config.trainer.default_root_dir or "logs") / method


def new_folder(config: Any) -> Path | None:
    """A folder for a new run; None where another process makes it, which then tells the others.

    Raises:
        ConfigError: The version that the user gives a logger is taken.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return None
    runs = runs_of(config)
    for logger in _numbering(config.trainer.logger):
        if (version := logger.init_args.get("version")) is not None:
            folder = runs / (version if isinstance(version, str) else f"version_{version}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                raise ConfigError(
                    f"trainer.logger.version: {folder} is another run's; give another version, none for the "
                    f"next number, or --ckpt_path {folder} to go on with that run"
                ) from None
            return folder
    return claim(runs)


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


def keep_metrics(trainer: Trainer) -> None:
    """Let CSV loggers add to the ``metrics.csv`` of a run that goes on, which they would delete."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and trainer.is_global_zero:
            path = Path(logger.log_dir) / "metrics.csv"
            if path.exists():
                kept = path.replace(path.with_name(".metrics.csv.kept"))
                experiment = logger.experiment  # looks for a file to delete
                kept.replace(path)
                with path.open(newline="") as file:
                    experiment.metrics_keys = next(csv.reader(file))


def _numbering(loggers: Any) -> Iterator[Any]:
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, Namespace) and logger.class_path.rpartition(".")[2] in NUMBERING:
            yield logger
