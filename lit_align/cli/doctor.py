"""``python -m lit_align doctor --config ...``: what would go wrong in a fit, found before it."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lit_align.callbacks.console import show
from lit_align.cli.align import AlignCLI
from lit_align.cli.loggers import runs_of
from lit_align.cli.trainer_options import check_trainer_options
from lit_align.doctor import Asked, Finding, Trial, judge, look
from lit_align.doctor.trial import BATCHES
from lit_align.errors import ConfigError, tell

PACKAGE = Path(__file__).parents[1]


class DoctorCLI(AlignCLI):
    """Builds what ``fit`` would build, looks at it, and tries it in small. Nothing is written.

    The process ends with status 1 where something was found.
    """

    def before_instantiate_classes(self) -> None:
        config = self.config["fit"]
        trainer = config.trainer
        check_trainer_options(trainer, "fit")
        self.asked = Asked(
            trainer.max_epochs,
            trainer.max_steps,
            trainer.limit_train_batches,
            trainer.limit_val_batches,
            trainer.check_val_every_n_epoch,
            runs_of(config),
            _processes(trainer),
        )
        self.sharded = not isinstance(trainer.strategy, str) or "fsdp" in trainer.strategy
        if self.saved is not None or self.auto:
            tell("doctor tries the run from its beginning: ckpt_path is not used")
        self.trial, self._temporary = Trial(), TemporaryDirectory()
        self.folder.path = Path(self._temporary.name)
        trainer.max_epochs, trainer.max_steps, trainer.min_epochs = 1, -1, None
        trainer.limit_train_batches, trainer.limit_val_batches = BATCHES, 0
        trainer.devices, trainer.num_nodes, trainer.strategy = 1, 1, "auto"
        trainer.logger, trainer.enable_checkpointing, trainer.callbacks = False, False, None
        trainer.enable_progress_bar = False
        config.weights_only = True
        self.trainer_defaults["callbacks"] = [self.folder, self.trial]

    def after_instantiate_classes(self) -> None:
        """Skip what a run does with its folder: the doctor has none."""
        self._accept()

    def _run_subcommand(self, subcommand: str) -> None:
        findings = list(look(self.model, self.datamodule, self.asked))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                self.trainer.fit(self.model, datamodule=self.datamodule)
            except ConfigError as error:
                findings.append(Finding("refused", "fit", str(error), "change it"))
            except torch.OutOfMemoryError:
                where = "model.optimisation.micro_batch"
                remedy = "lower it, or set backbone.checkpointing to blocks, or backbone.dtype to bfloat16"
                findings.append(Finding("memory", where, "two small rollout batches do not fit", remedy))
            else:
                if self.sharded:  # over more devices than that of the trial
                    self.trial.seen.memory = None
                findings += judge(self.model, self.trial.seen)
        # The trial is short on purpose; and what was found at a look is not told again.
        known = ("the Trainer ends after", *(finding.what for finding in findings))
        findings += [_warned(text) for text in _own(told) if not any(one in text for one in known)]
        self._temporary.cleanup()
        for finding in dict.fromkeys(findings):
            show(str(finding))
        seen = self.trial.seen
        if sum(seen.images):
            each = sum(seen.seconds) / sum(seen.images)
            show(f"in this small trial an image takes {each:.3g} s, updates included")
        if findings:
            raise SystemExit(1)
        show("nothing was found that would make this run fail")


def _processes(trainer: Any) -> int:
    """How many processes the run will have; 1 where a strategy with options of its own decides."""
    if not isinstance(trainer.strategy, str):
        return 1
    devices: Any = trainer.devices
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        devices = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    each = (
        devices
        if isinstance(devices, int)
        else len(str(devices).split(","))
        if isinstance(devices, str)
        else len(devices)
    )
    return each * int(trainer.num_nodes)


def _own(told: Iterable[warnings.WarningMessage]) -> list[str]:
    """The warnings of the package, and not of libraries, which may lie in a folder of its name."""
    return [str(one.message) for one in told if Path(one.filename).is_relative_to(PACKAGE)]


def _warned(text: str) -> Finding:
    """A warning of the package as a finding."""
    if text.startswith("rewards:"):
        return Finding("reward_domain", "model.rewards", *_halves(text.removeprefix("rewards: ")))
    if "never taught" in text or "was not taught" in text:
        return Finding("untaught_words", "data.source", *_halves(text))
    if "advantages are 0" in text:
        return Finding("no_signal", "model.advantages", *_halves(text))
    return Finding("warning", "fit", *_halves(text))


def _halves(text: str) -> tuple[str, str]:
    what, _, remedy = text.partition("; ")
    return what, remedy
