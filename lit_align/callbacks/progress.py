"""How far a run is: a bar on a terminal, a line per rollout batch anywhere else."""

import math
import time
from datetime import timedelta
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lit_align.data import Batch


class ProgressBar(RichProgressBar):
    """Lightning's bar, with epochs counted from 1 and without the number of the version."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch + 1)

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class ProgressLines(Callback):
    """Prints a line per rollout batch and validation where the Trainer has no bar: in files, jobs and CI.

    It has the epoch, the batch, the mean reward (or the loss, of methods on pairs), images a second, and the
    time that is left if batches and validations go on as they did.
    """

    def __init__(self) -> None:
        self._batches: list[float] = []
        self._validations: list[float] = []
        self._started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._batches.append(time.monotonic() - self._started)
        metrics = trainer.callback_metrics
        told = [f"epoch {trainer.current_epoch + 1}/{_count(trainer.max_epochs)}"]
        told.append(f"batch {batch_idx + 1}/{_count(trainer.num_training_batches)}")
        name = "reward" if "train/reward" in metrics else "loss"
        if f"train/{name}" in metrics:
            told.append(f"{name} {float(metrics[f'train/{name}']):.4f}")
        if "perf/images_per_second" in metrics:
            told.append(f"{float(metrics['perf/images_per_second']):.1f} images/s")
        if (left := self._left(trainer, batch_idx)) is not None:
            told.append(f"{timedelta(seconds=round(left))} left")
        self._say(trainer, told)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        seconds = time.monotonic() - self._started
        self._validations.append(seconds)
        told = [f"validation after {pl_module.images} images"]
        for name in ("reward", "truth", "kl"):
            if name in pl_module.latest:
                told.append(f"{name} {float(pl_module.latest[name].nanmean()):.4f}")
        self._say(trainer, [*told, f"{timedelta(seconds=round(seconds))}"])

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._say(trainer, [f"test batch {batch_idx + 1}/{_count(sum(trainer.num_test_batches))}"])

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._say(trainer, [f"predict batch {batch_idx + 1}/{_count(sum(trainer.num_predict_batches))}"])

    def _left(self, trainer: Trainer, batch_idx: int) -> float | None:
        """Seconds that the fit still takes; None where it has no known end."""
        if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.num_training_batches == math.inf:
            return None
        epochs = trainer.max_epochs - trainer.current_epoch - 1
        batches = epochs * trainer.num_training_batches + trainer.num_training_batches - batch_idx - 1
        every = trainer.check_val_every_n_epoch or 1
        validations = trainer.max_epochs // every - trainer.current_epoch // every
        return batches * _mean(self._batches) + validations * _mean(self._validations)

    def _say(self, trainer: Trainer, told: list[str]) -> None:
        if trainer.is_global_zero and trainer.progress_bar_callback is None:
            print("  ".join(told), flush=True)


def _mean(seconds: list[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0


def _count(number: float | None) -> str:
    return "?" if number is None or number < 0 or number == math.inf else str(int(number))
