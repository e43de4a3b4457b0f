"""A command that takes a checkpoint: what it says, refuses and applies of other settings."""

from datetime import timedelta
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.callbacks import NewSettings
from lit_align.callbacks.adapter import images_of
from lit_align.callbacks.summary import read_report
from lit_align.cli.checkpoint import Saved, newest
from lit_align.cli.settings import changes, check, check_method, told
from lit_align.errors import tell


def going_on(saved: Saved, now: dict[str, Any], config: Any, stage: str) -> list[NewSettings]:
    """Say which checkpoint is taken and what differs; the callbacks apply it.

    Args:
        saved: The checkpoint.
        now: The settings of this command, by dotted name.
        config: The configuration of this command.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigError: The settings do not fit the checkpoint.
        SystemExit: With status 0, where a fit has nothing left to do.
    """
    fit = stage == "fit"
    if fit and saved.settings is not None:
        check_method(saved.settings, now)
    if fit:
        _stop_if_complete(saved, config.trainer)
    tell(f"{'resumes from' if fit else 'uses'} {saved.path}, at {saved.images} images")
    if not fit and not saved.images:
        tell("that is before its first update: the weights are the pretrained ones")
    if saved.settings is None:
        rank_zero_warn("the checkpoint does not say with which settings it was made; none are compared")
        return []
    found = changes(saved.settings, now)
    check(found, saved.settings, now, stage)
    names = [*found.optimizer, *found.measurement, *found.other]
    if not fit:  # another test set is what such a command is for
        names = [name for name in names if name.startswith("model.") and name not in found.optimizer]
    if names:
        tell(f"settings that are not the checkpoint's: {told(names, saved.settings, now)}")
    if found.measurement and fit:
        tell(
            "held-out images are measured differently now, so the pretrained model is measured anew and the "
            "best checkpoint starts anew"
        )
    values = {name.rpartition(".")[2] for name in found.optimizer} if fit else set()
    return [NewSettings(values, bool(found.measurement), told=True)]


def _stop_if_complete(saved: Saved, trainer: Any) -> None:
    """End before anything is loaded."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    if epochs is not None and 0 <= epochs <= saved.epochs:
        option, done = "max_epochs", saved.epochs
    elif 0 <= steps <= saved.steps:
        option, done = "max_steps", saved.steps
    elif trainer.max_time and saved.seconds >= (Timer(trainer.max_time).time_remaining() or 0):
        option, done = "max_time", round(saved.seconds)
    else:
        return
    if _lacks_files(saved):
        tell(f"{saved.run} is complete except for its last files, which are written now")
        return
    unit = {"max_time": "seconds"}.get(option, option.removeprefix("max_"))
    more = str(timedelta(seconds=2 * done)) if option == "max_time" else 2 * done
    tell(f"{saved.run or saved.path} is complete ({done} {unit}); add --trainer.{option} {more} to continue")
    raise SystemExit(0)


def _lacks_files(saved: Saved) -> bool:
    """Whether a run was killed between its last checkpoint and the last files that it leaves."""
    if saved.run is None or (last := newest(saved.run)) is None or last.images != saved.images:
        return False
    report = read_report(saved.run / "validation.json")
    reported = report.get("complete") and report.get("images") == saved.measured
    return images_of(saved.run / "adapter") != saved.images or (saved.measured is not None and not reported)
