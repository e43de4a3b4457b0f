"""How far a run is: a bar on a terminal, a line per rollout batch anywhere else."""

import math
import time
from datetime import timedelta
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from lit_align.data import Batch


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
        """It ends; its seconds."""
        seconds = time.monotonic() - self._began[what]
        (self._batches if what == "batch" else self._validations).append(seconds)
        return seconds

    def left(self, trainer: Trainer, batch_idx: int) -> float | None:
        """Seconds that the fit still takes, if all goes on as before; None where it has no known end."""
        if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.num_training_batches == math.inf:
            return None
        epochs = trainer.max_epochs - trainer.current_epoch
        batches = epochs * trainer.num_training_batches - batch_idx - 1
        every = trainer.check_val_every_n_epoch or 1
        validations = trainer.max_epochs // every - trainer.current_epoch // every
        return batches * _mean(self._batches) + validations * _mean(self._validations)


def describe(trainer: Trainer, batch_idx: int, clock: Clock) -> list[str]:
    """What is said of the newest batch: reward (or loss, of methods on pairs), speed, and the time left."""
    metrics, told = trainer.callback_metrics, []
    name = "reward" if "train/reward" in metrics else "loss"
    if f"train/{name}" in metrics:
        told.append(f"{name} {float(metrics[f'train/{name}']):.4f}")
    if "perf/images_per_second" in metrics:
        told.append(f"{float(metrics['perf/images_per_second']):.1f} images/s")
    if (left := clock.left(trainer, batch_idx)) is not None:
        told.append(f"{timedelta(seconds=round(left))} left")
    return told


def epoch(trainer: Trainer) -> str:
    """Which epoch it is, counted from 1."""
    return f"epoch {trainer.current_epoch + 1}/{_count(trainer.max_epochs)}"


class ProgressBar(LightningBar):
    """A bar for the epoch, with the newest batch beside it, and one for each validation, test and predict.

    Args:
        console: Where it is drawn; the terminal if not given.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console
        self._clock = Clock()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _begin(self, name: str, label: str, total: float) -> None:
        if not self._enabled:
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[told]}"), console=self._console)
            self._bar.start()
        self._finish(name)
        self._tasks[name] = self._bar.add_task(label, total=None if total == math.inf else total, told="")

    def _update(self, name: str, completed: int, told: str = "") -> None:
        if self._bar is not None and name in self._tasks:
            self._bar.update(self._tasks[name], completed=completed, told=told)

    def _finish(self, name: str) -> None:
        if self._bar is not None and name in self._tasks:
            self._bar.remove_task(self._tasks.pop(name))

    def _stop(self) -> None:
        if self._bar is not None:
            for name in list(self._tasks):
                self._finish(name)
            self._bar.stop()
            self._bar = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._begin("fit", epoch(trainer), trainer.num_training_batches)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._clock.start("batch")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._clock.stop("batch")
        self._update("fit", batch_idx + 1, "  ".join(describe(trainer, batch_idx, self._clock)))

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._clock.start("validation")
        self._begin("validation", "validation", sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update("validation", batch_idx + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._clock.stop("validation")
        self._finish("validation")
        if trainer.state.fn == "validate":
            self._stop()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._begin("test", "test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update("test", batch_idx + 1)

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._begin("predict", "predict", sum(trainer.num_predict_batches))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update("predict", batch_idx + 1)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()


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
        number = f"batch {batch_idx + 1}/{_count(trainer.num_training_batches)}"
        self._say(trainer, epoch(trainer), number, *describe(trainer, batch_idx, self._clock))

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
