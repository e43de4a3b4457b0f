"""The one optimisation path of all methods: micro-batches, ranks, clipping, schedules, skipped updates."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_align.backbones import whole
from lit_align.errors import ConfigError, check_positive
from lit_align.methods.metrics import Loss, Metrics, is_loss, pooled
from lit_align.methods.skipped import SkippingModule

Made = TypeVar("Made")

EXAMPLES = {
    "optimizer": "partial(torch.optim.AdamW, lr=1e-4)",
    "lr_scheduler": "partial(torch.optim.lr_scheduler.LinearLR, total_iters=100)",
}
"""How the two are given in Python."""


@dataclass
class Optimisation:
    """How the trained weights are updated.

    Args:
        optimizer: Of the trained weights.
        lr_scheduler: Stepped once per update.
        clip_norm: Largest norm of the gradient. DDPO's table D.5: 1.
        micro_batch: Items in one backward pass: (image, step) pairs, images or pairs of images, as the method
            says. Bounds memory and changes no result.

    Raises:
        ConfigError: A value is not positive.
    """

    optimizer: OptimizerCallable = torch.optim.AdamW
    lr_scheduler: LRSchedulerCallable | None = None
    clip_norm: float = 1.0
    micro_batch: int = 8

    def __post_init__(self) -> None:
        check_positive(
            {"optimisation.clip_norm": self.clip_norm, "optimisation.micro_batch": self.micro_batch}
        )
        for name, example in EXAMPLES.items():
            given = getattr(self, name)
            if not callable(given) and (given is not None or name == "optimizer"):
                raise ConfigError(
                    f"optimisation.{name}: a {type(given).__name__} makes none; give what makes it in the "
                    f"fit, as {example}"
                )


class OptimisedModule(SkippingModule):
    """Makes updates by hand, so that every method accumulates, clips and skips in the same way.

    Attributes:
        gradient_norm: Of the newest update, before it was clipped.
        lr: Learning rate of the newest update; None before it, or where the optimizer has none.
        rate_factor: Factor on the learning rate of all updates to come, beside what a schedule makes of it.
    """

    optimisation: Optimisation
    gradient_norm: Tensor
    lr: float | None
    rate_factor: float

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """What is trained; each group's gradient is clipped by itself."""
        return [[p for p in self.parameters() if p.requires_grad]]

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of the configuration; a method that changes it overrides this."""
        return _made("optimizer", torch.optim.Optimizer, self.optimisation.optimizer, groups)

    def configure_optimizers(self) -> Any:
        """The optimizer and its schedule.

        Raises:
            ConfigError: They cannot be stepped once per update.
        """
        groups = [{"params": group} for group in self.parameter_groups()]
        optimizer = self.make_optimizer(groups)
        for rate in (group["lr"] for group in optimizer.param_groups):
            if rate is not None and not math.isfinite(rate):
                raise ConfigError(f"optimisation.optimizer: lr is {float(rate)}; give a finite number")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError(
                "optimisation.optimizer: LBFGS evaluates a loss several times in a step, and an update here "
                "has one gradient; use AdamW or another first-order optimizer"
            )
        if self.device_mesh is not None:
            # When a sharded optimizer is saved, torch finds out what its state looks like by a step without
            # gradients, if it has made none. Adam would count it, so it is done here and set back.
            get_optimizer_state_dict(self, optimizer)
            for state in optimizer.state.values():
                if "step" in state:
                    state["step"].zero_()
        if self.optimisation.lr_scheduler is None:
            return optimizer
        scheduler = _made("lr_scheduler", LRScheduler, self.optimisation.lr_scheduler, optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "optimisation.lr_scheduler: ReduceLROnPlateau waits for a validation metric, and a schedule "
                "is stepped once per update here; use one that needs no metric, such as LinearLR"
            )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def check_optimizers(self) -> None:
        """Refuse what a class that overrides :meth:`configure_optimizers` gives, if it cannot be stepped.

        Raises:
            ConfigError: It is not one optimizer, with at most one schedule that needs no metric.
        """
        scheduler = self.lr_schedulers()
        if isinstance(self.optimizers(), list) or isinstance(scheduler, list | ReduceLROnPlateau):
            raise ConfigError(
                f"{type(self).__name__}.configure_optimizers: an update steps one optimizer, and at most one "
                "schedule, which needs no metric; return these, or override make_optimizer alone"
            )

    def update(self, losses: Sequence[Loss], scale: float = 1.0) -> Metrics:
        """One optimizer step on the sum of the losses.

        Each is computed and differentiated in turn, so that memory is that of one. Over several ranks
        gradients are averaged, once, at the last loss; every rank must bring the same number of losses.

        Args:
            losses: Parts of the loss.
            scale: Factor on the learning rate of this step alone.

        Returns:
            What the losses measured, and ``grad_norm``.
        """
        if not isinstance(losses, Sequence) or not all(map(callable, losses)):
            raise TypeError("update takes a list of functions, each of which returns (loss, metrics)")
        measured, self._losses = [], []
        for i, compute in enumerate(losses):
            strategy, more = self.trainer.strategy, i < len(losses) - 1
            accumulates = more and isinstance(strategy, ParallelStrategy)
            with strategy.block_backward_sync() if accumulates else nullcontext():  # type: ignore[attr-defined]
                computed = compute()
                if not is_loss(computed):
                    raise TypeError(
                        "a loss returns (loss, metrics): a scalar with a gradient, a dict of tensors (N,)"
                    )
                loss, metrics = computed
                self.manual_backward(loss)
            measured.append(metrics)
            self._losses.append(loss.detach())
        self._step(scale)
        return pooled(measured) | {"grad_norm": self.gradient_norm.detach()[None]}

    def _step(self, scale: float) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer), "one optimizer a method"
        rates = [group["lr"] for group in optimizer.param_groups]
        if (scale := scale * self.rate_factor) != 1:
            self._scale_rates(optimizer, scale)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer.optimizer, "_step_supports_amp_scaling", False):
            # Lightning leaves it to a fused optimizer's own step, and gradients are clipped before that.
            scaler.unscale_(optimizer.optimizer)
        used = optimizer.param_groups[0]["lr"]
        self.lr = None if used is None else float(used)  # a schedule changes a tensor where it is
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if isinstance(scheduler, LRScheduler):
            try:
                scheduler.step()
            except ValueError as error:  # OneCycleLR counts its steps
                raise ConfigError(
                    f"optimisation.lr_scheduler: {error}; it is stepped once per update: make it as long as "
                    "the run"
                ) from error

    def _scale_rates(self, optimizer: LightningOptimizer, scale: float) -> None:
        for group in optimizer.param_groups:
            if group["lr"] is None:
                raise ConfigError(
                    f"optimisation.optimizer: kl_target or a task's weight scales this step by {scale:g}, "
                    "but the optimizer has no learning rate; give it one (lr)"
                )
            group["lr"] = group["lr"] * scale  # not in place: a rate may be a tensor, which is restored

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and drop an update that is not finite; here fp16 gradients are unscaled and ranks agree."""
        groups = [group["params"] for group in optimizer.param_groups]
        norms = [nn.utils.clip_grad_norm_(group, self.optimisation.clip_norm) for group in groups]
        self.gradient_norm = torch.stack([whole(norm) for norm in norms]).max()
        if not self.count_update(self.gradient_norm):
            optimizer.zero_grad()  # sets gradients to None, which the optimizer passes over


def _made(name: str, kind: type[Made], make: Callable[[Any], Made], given: Any) -> Made:
    """What a setting makes of the weights, or of the optimizer.

    Raises:
        ConfigError: Nothing, or something else.
    """
    try:
        made = make(given)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:  # what torch says of a rate or a decay that cannot work
        raise ConfigError(f"optimisation.{name}: {error}; give other settings") from error
    if not isinstance(made, kind):
        raise ConfigError(
            f"optimisation.{name}: it makes a {type(made).__name__}, and no {kind.__name__}; give "
            f"{EXAMPLES[name]}"
        )
    return made
