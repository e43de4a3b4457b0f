"""LightningCLI, with what every run of lit_align has."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_align.advantages import Advantages
from lit_align.callbacks import ProgressBar, RunConfig, RunFolder, default_callbacks
from lit_align.callbacks.checkpoints import write_whole
from lit_align.cli.checkpoint import AUTO, Saved, find, find_equal, newest
from lit_align.cli.class_defaults import Parser, use_own_defaults
from lit_align.cli.given import Given
from lit_align.cli.going_on import going_on
from lit_align.cli.loggers import keep_metrics, named_run, new_folder, runs_of, use_folder
from lit_align.cli.preemption import Command, Preemption
from lit_align.cli.settings import settings_of
from lit_align.cli.signals import SIGNALS
from lit_align.cli.trainer_options import REFUSED, check_seed, check_trainer_options
from lit_align.data import CaptionedImages, PairSource, PromptSource
from lit_align.errors import ConfigError, built, tell
from lit_align.rewards import Reward

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's loader in C, if it has one: it takes a tenth of the time."""

WRITTEN = (Advantages, CaptionedImages, PairSource, PromptSource, Reward)
"""Bases of classes that users write: what their constructors raise becomes one sentence."""


class AlignCLI(LightningCLI):
    """LightningCLI with a folder for each run, which a resumed run keeps, and the callbacks of every run."""

    def __init__(self, command: Command, given: Given, **arguments: Any) -> None:
        self.command, self.given = command, given
        self.saved: Saved | None = None
        self.auto = False
        self.folder = RunFolder()
        self.claimed = False
        self.run_config: RunConfig | None = None
        self.earlier: set[Path] = set()  # files of the folder before this command adds its own
        try:
            super().__init__(parser_class=Parser, **arguments)
        except BaseException:
            self._clean_up()
            raise

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, Parser), "parser_class is Parser"
        parser.given = self.given
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        """The parser of a command; without options for all but the given one, as finding them takes time."""
        first = next(iter(self.command.arguments), None)
        if first in self.subcommands() and first != subcommand:
            self._subcommand_method_arguments[subcommand] = []
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for kind in WRITTEN:
            parser.add_instantiator(built, kind, subclasses=True)
        parser.add_argument(
            "--accept_other_base",
            type=bool,
            default=False,
            help="Take a checkpoint, adapters or experts that were trained over other frozen weights.",
        )
        parser.add_argument(
            "--accept_other_data",
            type=bool,
            default=False,
            help="Go on with a run whose prompts or pairs were others.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = self._parsed(parser, args)
        config = self.config[self.config.subcommand]
        use_own_defaults(config, self.given)
        check_seed(config.seed_everything)
        self.auto = config.ckpt_path == AUTO
        if self.auto and self.config.subcommand != "fit":
            raise ConfigError("ckpt_path: auto is for fit alone; give last")
        if config.ckpt_path is not None and not self.auto:
            self.saved = find(config.ckpt_path, runs_of(config), named_run(config))
        config.ckpt_path = None  # Lightning would read all of it, for hyper-parameters that it has not

    def _parsed(self, parser: LightningArgumentParser, arguments: list[str]) -> Namespace:
        """The configuration of a command, from the parser of this command alone where that can be.

        The parser of all commands would fill in every default and check every value a second time. It is
        asked where no command comes first, and where the configuration is printed, which only it does.
        """
        name, *options = arguments or [""]
        printed = any(option.partition("=")[0] == "--print_config" for option in options)
        if name not in self._subcommand_parsers or printed:
            return parser.parse_args(arguments)
        return Namespace({"subcommand": name, name: self._subcommand_parsers[name].parse_args(options)})

    def before_instantiate_classes(self) -> None:
        stage = str(self.subcommand)
        config = self.config[stage]
        check_trainer_options(config.trainer, stage)
        text = self._dump(config)
        now = settings_of(yaml.load(text, Loader=LOADER))
        if self.auto:
            self.saved = find_equal(runs_of(config), now, named_run(config))
        if self.saved is not None:
            config.ckpt_path = str(self.saved.path)
            text = self._dump(config)
        elif self.subcommand != "fit":
            rank_zero_warn(
                "no --ckpt_path: this is the pretrained model, with the adapters or experts that the "
                "configuration names, if any; --ckpt_path last uses the newest run"
            )
        self.run_config = RunConfig(text, now)
        extra: list[Callback] = [self.run_config, Preemption(self.command, self.saved)]
        if self.saved is not None:
            extra += going_on(self.saved, now, config, stage)
        config.weights_only = True
        if "verbose" in config:
            config.verbose = False  # Lightning's table repeats ours
        if self.subcommand == "predict":
            config.return_predictions = False  # they are on disk; kept, they would fill the memory
        self._choose_folder(config)
        # First the folder, then what is new, and last what says that all is written.
        self.trainer_defaults["callbacks"] = [self.folder, *extra, *_callbacks(config.trainer)]

    def _dump(self, config: Any) -> str:
        """The configuration of this command as YAML; it was validated when it was parsed."""
        parser = self._subcommand_parsers[str(self.subcommand)]
        return parser.dump(config, skip_none=False, skip_validation=True)

    def _choose_folder(self, config: Any) -> None:
        if config.trainer.fast_dev_run:
            return
        self.folder.path = self._folder_of_checkpoint()
        if self.folder.path is None:
            self.folder.path = new_folder(config, again=self.auto)
            self.claimed = self.folder.path is not None
        if self.folder.path is not None:
            self.earlier = set(self.folder.path.iterdir())
            self._hold_folder(self.folder.path)
            goes_on = self.saved if self.subcommand == "fit" else None
            use_folder(config, self.folder.path, goes_on.images if goes_on else None)

    def _hold_folder(self, folder: Path) -> None:
        """Let no other process train there, and say at once what is trained there."""
        if self.subcommand != "fit" or rank_zero_only.rank:  # type: ignore[attr-defined]
            return
        self.folder.hold(folder)
        if self.claimed and self.run_config is not None:
            self.run_config.put(folder)

    def _folder_of_checkpoint(self) -> Path | None:
        """Where a checkpoint's run writes; None if there is none, or if its newer weights would be lost."""
        run = self.saved.run if self.saved else None
        if self.saved and run and self.subcommand == "fit":
            newer = newest(run)
            if newer is not None and newer.images > self.saved.images:
                tell(
                    f"{newer.path}, at {newer.images} images, is newer, so this run continues in a new folder"
                )
                return None
        return run

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self.config[self.subcommand].trainer
        if self.folder.path is not None:
            kwargs["default_root_dir"] = str(self.folder.path)
        kwargs["enable_model_summary"] = trainer.enable_model_summary or False
        kwargs["enable_progress_bar"] = _has_bar(trainer)
        try:
            return super().instantiate_trainer(**kwargs)
        except REFUSED as error:
            raise ConfigError(f"trainer: {error}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        config["callbacks"], ours = in_order(given, self.trainer_defaults["callbacks"])
        self.trainer_defaults["callbacks"] = ours
        return super()._instantiate_trainer(config, callbacks)

    def after_instantiate_classes(self) -> None:
        SIGNALS.launcher = self.trainer.strategy.launcher
        self._accept()
        write_whole(self.trainer)
        goes_on = self.saved if self.subcommand == "fit" else None
        keep_metrics(self.trainer, goes_on.images if goes_on else None)

    def _accept(self) -> None:
        """Give the method the options ``accept_other_base`` and ``accept_other_data``."""
        config = self.config[self.subcommand]
        self.model.accept_other_base = config.accept_other_base
        self.model.accept_other_data = config.accept_other_data

    def _clean_up(self) -> None:
        """Leave nothing of a start that failed before anything was computed."""
        folder = self.folder.path
        self.folder.release()
        if folder is None or (self.run_config is not None and self.run_config.began):
            return
        if self.claimed:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in (folder.parent, folder.parent.parent):
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
        else:
            for file in set(folder.glob(f"events.out.tfevents.*.{os.getpid()}.*")) - self.earlier:
                file.unlink()


def _callbacks(trainer: Any) -> list[Callback]:
    """The callbacks of every run, without that of its folder."""
    callbacks = default_callbacks(checkpoints=trainer.enable_checkpointing is not False)[1:]
    if _has_bar(trainer) and not any(map(_is_bar, _names(trainer))):
        callbacks.insert(0, ProgressBar())  # it ends before anything else is printed
    return callbacks


def in_order(given: Sequence[Callback], ours: Sequence[Callback]) -> tuple[list[Callback], list[Callback]]:
    """The user's callbacks and ours; a user's callback of one of our classes replaces ours.

    Their order matters: the report of a test, for example, reads the result that an earlier one has written.
    """
    placed = [next((one for one in given if isinstance(one, type(own))), own) for own in ours]
    return [one for one in given if one not in placed], placed


def _names(trainer: Any) -> set[str]:
    """The names of the classes of the user's callbacks."""
    given = trainer.callbacks or []
    return {c.class_path.rpartition(".")[2] for c in (given if isinstance(given, list) else [given])}


def _is_bar(name: str) -> bool:
    return "ProgressBar" in name


def _has_bar(trainer: Any) -> bool:
    """Whether a progress bar is drawn: if the user says so, or gives one, else on a terminal."""
    if trainer.enable_progress_bar is None:
        return sys.stdout.isatty() or any(map(_is_bar, _names(trainer)))
    return bool(trainer.enable_progress_bar)
