"""The command line: ``python -m lit_align {fit,validate,test,predict} --config configs/<method>.yaml``."""

import sys
import zipfile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning import LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

import lit_align.advantages
import lit_align.backbones
import lit_align.data
import lit_align.rewards
import lit_align.samplers  # noqa: F401  (imported so that YAML may use short class names)
from lit_align.callbacks import (
    AdapterExport,
    CollectionCheckpoint,
    PictureGrids,
    PictureWriter,
    RunConfig,
    RunSummary,
)
from lit_align.errors import ConfigError
from lit_align.methods import AlignmentModule


class AlignCLI(LightningCLI):
    """LightningCLI that keeps a resumed run in its folder and adds the callbacks that every run has."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        logger = config.trainer.logger
        if config.ckpt_path == "last":
            config.ckpt_path = str(_last_checkpoint(_run_folders(logger)))
        if config.ckpt_path and Path(config.ckpt_path).parent.name == "checkpoints" and logger:
            run = Path(config.ckpt_path).absolute().parent.parent
            logger.init_args.update({"save_dir": str(run.parent.parent), "name": run.parent.name, "version": run.name})
        self.trainer_defaults["callbacks"] = _callbacks(config.trainer)


def _run_folders(logger: Any) -> Path:
    """The folder that holds the runs of this method."""
    if not logger or not isinstance(logger.get("init_args"), object) or "save_dir" not in logger.init_args:
        raise ConfigError("ckpt_path: 'last' needs a logger with save_dir and name; give the path of a checkpoint")
    return Path(logger.init_args.save_dir) / logger.init_args.name


def _last_checkpoint(runs: Path) -> Path:
    """The newest checkpoint, whole, of the newest run that has one."""
    found = [path for path in runs.glob("version_*/checkpoints/*.ckpt") if path.is_dir() or zipfile.is_zipfile(path)]
    if not found:
        raise ConfigError(f"ckpt_path: 'last' finds no checkpoint under {runs}; start without --ckpt_path")

    def age(path: Path) -> tuple[int, float]:
        return int(path.parts[-3].removeprefix("version_")), path.stat().st_mtime

    return max(found, key=age)


def _callbacks(trainer: Any) -> list[Any]:
    """What every run has, but for what the user gives with settings of his own."""
    given = {callback.class_path.rpartition(".")[2] for callback in trainer.callbacks or []}
    callbacks = [PictureGrids(), AdapterExport(), PictureWriter()]
    if trainer.enable_checkpointing is not False:
        best = ModelCheckpoint(
            monitor="val/reward", mode="max", filename="best", enable_version_counter=False, save_on_train_epoch_end=False
        )
        callbacks += [CollectionCheckpoint(), best]
    callbacks.append(RunSummary())
    return [callback for callback in callbacks if type(callback).__name__ not in given]


def _user_error(error: BaseException) -> ConfigError | None:
    """Our own message inside what jsonargparse or Lightning wrapped around it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConfigError):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if not given.
    """
    try:
        AlignCLI(
            AlignmentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False},
            args=args,
        )
    except (ConfigError, ArgumentError) as error:
        print(f"lit_align: {_user_error(error) or error}", file=sys.stderr)
        raise SystemExit(2) from None
