"""Callbacks that keep what happens in a fit, or end it in the middle."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from lit_align.data import Batch
from lit_align.methods.joint import Rollouts


class Killed(Exception):
    """What :class:`Recorder` raises to end a run in the middle."""


class Recorder(Callback):
    """Keeps what happens in a fit, batch by batch and update by update.

    Args:
        crash: Raise :class:`Killed` in this batch, counted from 1; 0 for never.
        after: Updates that are made in that batch before.

    Attributes:
        gradients: Before each update, not yet clipped, of each trained parameter.
        reached: Names of the parameters that had a gradient in an update.
        logged: What the Trainer has logged after each batch, by name.
        index: Numbers of this rank's images (or rows of its pairs) of each batch.
        validated: What each validation measured, by name, ``(N,)`` each.
        at: Number of images at each validation.
        weights: Of each trained parameter, at the end.
    """

    KEPT = ("gradients", "logged", "index", "validated", "at", "weights")

    def __init__(self, crash: int = 0, after: int = 0) -> None:
        self.crash, self.after = crash, after
        self.made = 0  # updates in this batch
        self.gradients: list[list[Tensor]] = []
        self.reached: set[str] = set()
        self.logged: list[dict[str, float]] = []
        self.index: list[list[int]] = []
        self.validated: list[dict[str, Tensor]] = []
        self.at: list[int] = []
        self.weights: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if (len(self.logged) + 1, self.made) == (self.crash, self.after):
            raise Killed
        self.made += 1
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.reached |= {name for name, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.made = 0
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        parts = batch if isinstance(batch, list) else [batch]
        self.index.append([i for part in parts for i in part.index.tolist()])

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.validated.append(dict(pl_module.latest))
        self.at.append(pl_module.images)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.weights = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]
        if trainer.world_size > 1 and trainer.is_global_zero:  # a process that ends before fit() returns
            folder = Path(trainer.default_root_dir)
            folder.mkdir(exist_ok=True)
            torch.save({name: getattr(self, name) for name in self.KEPT}, folder / "recorded.pt")

    def read(self, folder: Path) -> None:
        """Take over what the first of several processes has recorded."""
        for name, value in torch.load(folder / "recorded.pt", weights_only=True).items():
            setattr(self, name, value)


class Collected(Callback):
    """Keeps of every rollout batch of a DDPO run its task, its advantages, and the updates made before it."""

    def __init__(self) -> None:
        self.advantages: list[tuple[str, Tensor]] = []
        self.sampled_at: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        collect = pl_module.collect

        def recording(batch: Batch) -> Rollouts:
            rollouts: Rollouts = collect(batch)
            self.advantages.append((rollouts.batch.task, rollouts.advantages.clone()))
            self.sampled_at.append(rollouts.sampled_at)
            return rollouts

        pl_module.collect = recording
