"""How far a run is: a bar on a terminal, a line per rollout batch anywhere else."""

import math
import time
from datetime import timedelta
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeRemainingColumn

from lit_align.callbacks.trouble import validations
from lit_align.data import Batch


class ProgressBar(RichProgressBar):
    """Lightning's bar, with epochs counted from 1, and removed before the run's last lines."""

    def _get_train_description(self, current_epoch: int) -> str:
        return _epoch(self.trainer)

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn]:
        return [TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()]

    def get_metrics(self, trainer: Trainer, pl_module: Any) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop_progress()

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_test_end(trainer, pl_module)
        self._stop_progress()

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_predict_end(trainer, pl_module)
        self._stop_progress()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            self._stop_progress()


class Clock:
    """How long batches and validations take, and so how long the fit still takes."""

    def __init__(self) -> None:
        self._batches: list[float] = []
        self._validations: list[float] = []
        self._began = {"batch": 0.0, "validation": 0.0}

    def start(self, what: str) -> None:
        """A batch or a validation begins."""
        self._began[what] = time.monotonic()

    def stop(self, what: str) -> float:
        """A batch or a validation ends; returns its seconds."""
        seconds = time.monotonic() - self._began[what]
        (self._batches if what == "batch" else self._validations).append(seconds)
        return seconds

    def left(self, trainer: Trainer, batch_idx: int) -> float | None:
        """Seconds that the fit still takes, if all goes on as before; None where it has no known end."""
        if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.num_training_batches == math.inf:
            return None
        epochs, each = trainer.max_epochs - trainer.current_epoch, trainer.num_training_batches
        batches = epochs * each - batch_idx - 1
        # One may follow the batch that has just ended.
        measured = math.ceil(validations(trainer) * (batches + 1) / (trainer.max_epochs * each))
        return batches * _mean(self._batches) + measured * _mean(self._validations)


class ProgressLines(Callback):
    """Prints a line per rollout batch and validation where the Trainer has no bar: in files, jobs and CI."""

    def __init__(self) -> None:
        self._clock = Clock()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._clock.start("batch")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._clock.stop("batch")
        metrics, told = trainer.callback_metrics, [_epoch(trainer)]
        told.append(f"batch {batch_idx + 1}/{_count(trainer.num_training_batches)}")
        name = "reward" if "train/reward" in metrics else "loss"  # of methods on pairs
        if f"train/{name}" in metrics:
            told.append(f"{name} {float(metrics[f'train/{name}']):.4f}")
        if "perf/images_per_second" in metrics:
            told.append(f"{float(metrics['perf/images_per_second']):.1f} images/s")
        if (left := self._clock.left(trainer, batch_idx)) is not None:
            told.append(f"{timedelta(seconds=round(left))} left")
        self._say(trainer, *told)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._clock.start("validation")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        seconds = self._clock.stop("validation")
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        means = {name: float(values.nanmean()) for name, values in pl_module.latest.items()}
        told = [f"{name} {means[name]:.4f}" for name in ("reward", "truth", "kl") if name in means]
        took = str(timedelta(seconds=round(seconds)))
        self._say(trainer, f"validation after {pl_module.images} images", *told, took)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._say(trainer, f"test batch {batch_idx + 1}/{_count(sum(trainer.num_test_batches))}")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._say(trainer, f"predict batch {batch_idx + 1}/{_count(sum(trainer.num_predict_batches))}")

    def _say(self, trainer: Trainer, *told: str) -> None:
        if trainer.is_global_zero and trainer.progress_bar_callback is None:
            print("  ".join(told), flush=True)


def _mean(seconds: list[float]) -> float:
    return sum(seconds) / len(seconds) if seconds else 0.0


def _count(number: float | None) -> str:
    return "?" if number is None or number < 0 or number == math.inf else str(int(number))


def _epoch(trainer: Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1}/{_count(trainer.max_epochs)}"
