"""The command line: ``python -m lit_align {fit,validate,test,predict} --config configs/<method>.yaml``."""

import difflib
import importlib
import inspect
import re
import signal
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, Namespace
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lit_align.advantages
import lit_align.backbones
import lit_align.data
import lit_align.methods.alignprop.truncation
import lit_align.rewards
import lit_align.samplers
from lit_align.callbacks import (
    AdapterExport,
    BatchCheckpoint,
    BestCheckpoint,
    ImageGrids,
    ImageWriter,
    RewardHistograms,
    RunConfig,
    RunSummary,
    SweepReport,
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
        elif config.ckpt_path and not Path(config.ckpt_path).exists():
            raise ConfigError(f"ckpt_path: there is no {config.ckpt_path}; give a checkpoint, or 'last'")
        if config.ckpt_path and Path(config.ckpt_path).parent.name == "checkpoints" and _numbers_runs(logger):
            run = Path(config.ckpt_path).absolute().parent.parent
            logger.init_args.save_dir, logger.init_args.name = str(run.parent.parent), run.parent.name
            logger.init_args.version = run.name
        if self.subcommand == "predict":
            config.return_predictions = False  # they are on disk; kept, they would fill the memory
        if self.subcommand != "fit" and not config.ckpt_path:
            rank_zero_warn(
                "no --ckpt_path: this is the pretrained model; --ckpt_path last takes the newest run"
            )
        self.trainer_defaults["callbacks"] = _callbacks(config.trainer)


def _numbers_runs(logger: Any) -> bool:
    """Whether the logger is one that writes to save_dir/name/version."""
    names = ("TensorBoardLogger", "CSVLogger")
    return isinstance(logger, Namespace) and logger.class_path.rpartition(".")[2] in names


def _run_folders(logger: Any) -> Path:
    """The folder that holds the runs of this method."""
    if not _numbers_runs(logger):
        raise ConfigError(
            "ckpt_path: 'last' needs a TensorBoardLogger or CSVLogger; give a checkpoint's path"
        )
    return Path(logger.init_args.save_dir) / logger.init_args.name


def _last_checkpoint(runs: Path) -> Path:
    """The newest checkpoint, whole, of the newest run that has one."""
    found = [
        path
        for path in runs.glob("version_[0-9]*/checkpoints/*.ckpt")
        if path.is_dir() or zipfile.is_zipfile(path)
    ]
    if not found:
        raise ConfigError(f"ckpt_path: 'last' finds no checkpoint under {runs}; start without --ckpt_path")

    def age(path: Path) -> tuple[int, float]:
        return int(path.parts[-3].removeprefix("version_")), path.stat().st_mtime

    return max(found, key=age)


def _callbacks(trainer: Any) -> list[Any]:
    """What every run has, but for what the user gives with settings of their own."""
    given = trainer.callbacks or []
    names = {c.class_path.rpartition(".")[2] for c in (given if isinstance(given, list) else [given])}
    callbacks = [ImageGrids(), AdapterExport(), ImageWriter(), RewardHistograms()]
    if trainer.enable_checkpointing is not False:
        callbacks += [BatchCheckpoint(), BestCheckpoint()]
    callbacks += [RunSummary(), SweepReport()]
    return [callback for callback in callbacks if type(callback).__name__ not in names]


def _sentence(error: BaseException) -> str | None:
    """What to tell the user: our own message, whatever is wrapped around it, or the parser's, shortened."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ConfigError):
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    if not isinstance(error, ArgumentError):
        return None
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in str(error).splitlines()]
    told = " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))
    return told + _suggestion(told)


def _suggestion(told: str) -> str:
    """The accepted names that come nearest to one that was refused."""
    if unknown := re.search(r"Expected a dot import path string: (\w+)", told):
        parts = (
            lit_align.advantages,
            lit_align.backbones,
            lit_align.data,
            lit_align.rewards,
            lit_align.samplers,
            lit_align.methods.alignprop.truncation,
        )
        names = [name for part in parts for name in vars(part) if name[0].isupper()]
        near = difflib.get_close_matches(unknown[1], names, n=2)
        return (
            f"; did you mean {' or '.join(near)}?"
            if near
            else "; no class of that name is known: give its import path"
        )
    refused, owners = (
        re.search(r"Option '(\w+)' is not accepted", told),
        re.findall(r"class_path '([\w.]+)'", told),
    )
    if not refused or not owners:
        return ""
    module, _, name = owners[-1].rpartition(".")
    names = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    return f"; accepted: {', '.join(difflib.get_close_matches(refused[1], names, n=2) or names)}"


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if not given.
    """
    # The models are in evaluation mode on purpose; the other warning is Lightning's about its own code.
    warnings.filterwarnings("ignore", "Found .* module.* in eval mode")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec")
    try:
        AlignCLI(
            AlignmentModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=RunConfig,
            seed_everything_default=0,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            args=args,
        )
    except SIGTERMException:  # Lightning would end as if all had been done
        raise SystemExit(128 + signal.SIGTERM) from None
    except (ValueError, ArgumentError) as error:
        if (told := _sentence(error)) is None:
            raise
        print(f"lit_align: {told}", file=sys.stderr)
        raise SystemExit(2) from None
