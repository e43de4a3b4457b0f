"""One rule for numbers that are not finite, in all methods: skip, count, report, and end after a limit.

- An image without a finite score (NaN, infinite, or of a chain that is not finite) has no part in an update,
  neither in the reward nor in a penalty. ``train/unscored`` is the share of such images.
- An update whose gradient is not finite, and the updates of a rollout batch in which no image has a score,
  are skipped: weights, moments and momentum stay as they are.
- After :data:`LIMIT` of either in a row the run ends. The error carries what was skipped; the command line
  writes it to ``non_finite.json`` in the run's folder.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.methods.hooks import check_hooks

LIMIT = 10
"""Skipped updates, or rollout batches without a score, in a row, after which a run is given up. In 16-mixed a
few at the start are normal, until the loss scale is found."""

REMEDY = (
    "the weights are those from before; lower the learning rate, or use precision bf16-mixed or 32-true, "
    "and resume from checkpoints/best.ckpt, or start anew if there is none"
)


@dataclass(frozen=True)
class Skipped:
    """One thing that was skipped.

    Attributes:
        reason: Why.
        images: Of the run when it was skipped.
        step: Optimizer steps of the run then.
        losses: Of the parts of an update on this rank.
        rows: What it was to learn from on this rank: image number, prompt and scores.
    """

    reason: str
    images: int
    step: int
    losses: list[float]
    rows: list[dict[str, Any]]


class NotFinite(ConfigError):
    """Too much in a row was skipped.

    Args:
        message: For the user.
        skipped: What, for each of the newest :data:`LIMIT` from each rank.
    """

    def __init__(self, message: str, skipped: list[list[Skipped]]) -> None:
        super().__init__(message)
        self.skipped = skipped

    def __reduce__(self) -> Any:  # exceptions of other processes come with their message alone
        return type(self), (str(self), self.skipped)


def check_weights(weights: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Refuse weights of a checkpoint from which nothing can go on.

    Args:
        weights: By name.
        shapes: What they must be.

    Raises:
        ConfigError: One is of another shape, or holds numbers that are not finite.
    """
    for name, weight in weights.items():
        if not isinstance(weight, Tensor) or list(weight.shape) != shapes.get(name):
            raise ConfigError(
                f"ckpt_path: {name} in the checkpoint has another shape than it declares; give another"
            )
        if not bool(weight.isfinite().all()):
            raise ConfigError(
                f"ckpt_path: {name} in the checkpoint holds numbers that are not finite: the run had gone "
                "wrong when it was written; give an earlier one, such as best.ckpt beside it"
            )


class SkippingModule(LightningModule):
    """Counts what is skipped, and remembers what it was to learn from."""

    images: int
    _skipped: int
    _unscored: int
    _told: bool = False
    _losses: list[Tensor]
    _rows: list[dict[str, Any]]
    _recent: "deque[Skipped]"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_hooks(cls)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order; every rank must call it."""
        if self.trainer.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Refuse a method that counts no images: its curves, checkpoints and results would all be at 0.

        Raises:
            ConfigError: It is one.
        """
        if not self.images:
            raise ConfigError(
                f"{type(self).__name__}.training_step has counted no image of its rollout batch; let it end "
                "with self.log_rollout_batch(...)"
            )

    def remember(self, index: Tensor, prompts: list[str], scores: Mapping[str, Tensor]) -> None:
        """Keep what the coming updates learn from, for the case that they are skipped.

        Args:
            index: Numbers of the images (or rows of the pairs), ``(B,)``.
            prompts: ``B``.
            scores: What the rewards report, ``(B,)`` each on the CPU.
        """
        columns = {name: values.tolist() for name, values in scores.items()}
        for place, number in enumerate(index.tolist()):
            row = {"image": number, "prompt": prompts[place]}
            self._rows.append(row | {name: values[place] for name, values in columns.items()})

    def count_update(self, norm: Tensor) -> bool:
        """Whether an update is made: its gradient's norm is finite; the same on all ranks."""
        if norm.isfinite():
            self._skipped = 0
            return True
        self._skipped += 1
        reason = f"the norm of an update's gradient is {norm.item()}"
        self._skip(reason, [float(loss) for loss in self._losses])
        rank_zero_warn(f"{reason}: it was skipped, number {self._skipped} in a row, of fewer than {LIMIT}")
        if self._skipped >= LIMIT:
            self._give_up(f"the last {self._skipped} updates had gradients that are not finite")
        return False

    def count_scores(self, unscored: Tensor) -> None:
        """Count the images without a score of one rollout batch of all ranks, and forget its images."""
        count = int(unscored.sum())
        if count == len(unscored) > 0:
            self._unscored += 1
            reason = f"none of the {count} images of a rollout batch has a score"
            self._skip(reason, [])
            rank_zero_warn(
                f"{reason}: it was skipped, number {self._unscored} in a row, of fewer than {LIMIT}"
            )
            if self._unscored >= LIMIT:
                self._give_up(f"no image of the last {self._unscored} rollout batches has a finite score")
        else:
            if count and not self._told:
                self._told = True
                rank_zero_warn(
                    f"{count} of {len(unscored)} images of a rollout batch have no score (none, NaN or "
                    "infinite): they have no part in updates; train/unscored is their share"
                )
            self._unscored = 0
        self._rows = []

    def _skip(self, reason: str, losses: list[float]) -> None:
        self._recent.append(Skipped(reason, self.images, self.trainer.global_step, losses, list(self._rows)))

    def _give_up(self, what: str) -> None:
        raise NotFinite(f"{what} and were skipped; {REMEDY}", self.gather(list(self._recent)))
