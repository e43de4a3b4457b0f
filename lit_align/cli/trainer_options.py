"""Options of the Trainer that cannot work, refused before any model is loaded."""

from collections.abc import Iterator
from pkgutil import resolve_name
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import max_seed_value

from lit_align.errors import ConfigError
from lit_align.folder import RunFolder
from lit_align.methods.strategies import check_callbacks, check_trainer

REFUSED = (ValueError, TypeError, RuntimeError, MisconfigurationException)
"""What Trainer raises where its options cannot work together."""

LENGTHS = {
    "fit": ("max_epochs", "max_steps", "limit_train_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}
"""Options that say how much a command does."""


MADE = ("callbacks", "logger", "plugins", "profiler")
"""Options that are objects, which are not made to find out whether the others can work together."""

OFF = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
"""What a Trainer would make that is only looked at."""


def check_seed(seed: int | bool | None) -> None:
    """Refuse a seed that numpy does not take.

    Raises:
        ConfigError: It is negative or too large.
    """
    if seed is not None and not 0 <= seed <= max_seed_value:
        raise ConfigError(f"seed_everything: {seed} is not a seed; give 0 to {max_seed_value}")


def check_trainer_options(config: Any, stage: str) -> None:
    """Refuse what cannot work.

    Args:
        config: The section ``trainer``.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigError: With what to change.
    """
    if config.accumulate_grad_batches not in (None, 1):
        raise ConfigError(
            f"trainer.accumulate_grad_batches: {config.accumulate_grad_batches} does nothing here, since "
            "methods make their updates themselves; set model.optimisation.micro_batch to bound memory, and "
            "data.prompts_per_batch for more images in an update"
        )
    if config.gradient_clip_val:
        raise ConfigError(
            f"trainer.gradient_clip_val: {config.gradient_clip_val} does nothing here, since methods make "
            "their updates themselves; set model.optimisation.clip_norm"
        )
    _check_lengths(config, stage)
    kinds = list(_classes(config.callbacks))
    if any(issubclass(kind, RunFolder) for kind in kinds):
        raise ConfigError(
            "trainer.callbacks: RunFolder is for Python; on the command line the logger's save_dir, name and "
            "version are the folder of a run"
        )
    if stage == "fit":
        check_callbacks(kinds)
    if config.barebones:
        raise ConfigError(
            "trainer.barebones: true switches off the output and the files of a run; set it to false, and "
            "trainer.logger and trainer.enable_checkpointing as you want them"
        )
    if isinstance(config.strategy, str):
        options = {name: value for name, value in vars(config).items() if name not in MADE}
        options |= dict.fromkeys(OFF, False)
        try:
            check_trainer(Trainer(**options))
        except ConfigError:
            raise
        except REFUSED as error:
            raise ConfigError(f"trainer: {error}") from None


def _classes(callbacks: Any) -> Iterator[type]:
    """The classes of the callbacks that a configuration names."""
    for callback in callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []:
        kind = resolve_name(callback.class_path)
        if isinstance(kind, type):  # and no function that makes one, which the Trainer's check meets
            yield kind


def _check_lengths(config: Any, stage: str) -> None:
    """Refuse a command that would do nothing, lengths that contradict, and intervals that are none."""
    for name in LENGTHS[stage]:
        if config[name] == 0 and not config.fast_dev_run:
            raise ConfigError(f"trainer.{name}: 0 leaves nothing to do for {stage}; give 1 or more")
    if stage != "fit":
        return
    for unit in ("epochs", "steps"):
        least, most = config[f"min_{unit}"], config[f"max_{unit}"]
        if least is not None and most is not None and 0 <= most < least:
            raise ConfigError(
                f"trainer.min_{unit}: {least} is more than max_{unit}, with which a fit ends; give at most "
                f"{most}"
            )
    if (every := config.log_every_n_steps) is not None and every < 0:
        raise ConfigError(
            f"trainer.log_every_n_steps: {every} is not an interval; give 1, or 0 for no curves"
        )
    for name, least in (("val_check_interval", 0.0), ("check_val_every_n_epoch", 0)):
        value = config[name]
        if isinstance(value, int | float) and value <= least:
            raise ConfigError(
                f"trainer.{name}: {value} is not an interval; give more than 0, or set "
                "trainer.limit_val_batches to 0 for no validation"
            )
    every, batches = config.val_check_interval, config.limit_train_batches
    by_epoch = isinstance(every, int) and isinstance(batches, int) and config.check_val_every_n_epoch
    if by_epoch and every > batches:
        raise ConfigError(
            f"trainer.val_check_interval: {every} is never reached in an epoch of "
            f"trainer.limit_train_batches {batches}; give at most {batches}, or set "
            "trainer.check_val_every_n_epoch to null, which counts across epochs"
        )
