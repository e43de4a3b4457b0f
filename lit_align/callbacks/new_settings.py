"""A run that resumes with other settings than its checkpoint was written with."""

from collections.abc import Collection
from typing import Any

from lightning import Callback, Trainer

from lit_align.errors import ConfigError, tell


class NewSettings(Callback):
    """Applies to a resumed run what would otherwise come from its checkpoint.

    Args:
        optimizer: Names of the optimizer's settings that have new values, such as ``lr``.
        measurement: Whether held-out images are now measured differently. Then what was measured before
            cannot be compared: the pretrained model is measured anew, and the best score starts anew.
        told: Whether all settings that differ were already reported.
    """

    def __init__(
        self, optimizer: Collection[str] = (), measurement: bool = False, told: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.measurement = measurement
        self.told = told
        self._wanted: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.changes_told = self.told and self.measurement

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Keep the optimizer's settings as configured; the checkpoint's are restored after this."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if missing := [name for name in self.optimizer if any(name not in group for group in groups)]:
            raise ConfigError(
                f"ckpt_path: the optimizer's {missing[0]} cannot change when a run resumes; set it back, "
                "or start a new run"
            )
        self._wanted = [{name: group[name] for name in self.optimizer} for group in groups]
        for group, wanted in zip(groups, self._wanted, strict=True):
            if "lr" in wanted:  # a schedule has changed it already, and keeps what was configured
                wanted["lr"] = group.get("initial_lr", group["lr"])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, wanted in zip(groups, self._wanted, strict=True):
            group.update({name: value for name, value in wanted.items() if name != "lr"})
            if "lr" in wanted:
                _set_rate(group, wanted["lr"])
        if "lr" in self.optimizer:
            for config in trainer.lr_scheduler_configs:
                _tell_schedule(config.scheduler)
            if (factor := getattr(pl_module, "rate_factor", 1.0)) != 1:
                tell(
                    f"a guard has lowered the rate of this run: steps are made with {factor:g} of the new one"
                )
        if self.measurement:
            pl_module.forget_baseline()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate" and self.measurement:
            pl_module.forget_baseline()


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    """Set a new learning rate; a schedule's factor on the old one applies to the new one."""
    old = group.get("initial_lr", group["lr"])
    scale = group["lr"] / old if old and rate is not None else 1.0
    group["lr"] = rate if scale == 1.0 else rate * scale
    if "initial_lr" in group:
        group["initial_lr"] = rate


def _tell_schedule(scheduler: Any) -> None:
    """Give a schedule, and the schedules that it contains, the rates of its optimizer."""
    for one in [scheduler, *getattr(scheduler, "_schedulers", [])]:
        one.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
        one._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]
