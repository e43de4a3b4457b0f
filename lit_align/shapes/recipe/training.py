"""What the trained stages share: a budget, a learning rate that follows it, an average of the weights.

A stage that was interrupted goes on from its newest checkpoint when the same command is given again.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

CHECKPOINT = "newest.ckpt"
CHECKPOINT_EVERY = timedelta(minutes=4)


@dataclass(frozen=True)
class Budget:
    """How long a stage trains: until the minutes or the steps are used up, whichever comes first.

    Attributes:
        minutes: CPU-minutes of one process, so that a busy machine takes longer and trains as much.
        steps: Optimizer steps.
    """

    minutes: float
    steps: int = 1_000_000


class Batches:
    """An endless stream of shuffled index batches, a pure function of its seed and the process's rank.

    It remembers its place in checkpoints.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self.drawn = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield ``(batch_size,)`` long tensors; an epoch's remainder is dropped."""
        rank, per_epoch = dist.get_rank() if dist.is_initialized() else 0, self.num_items // self.batch_size
        while True:
            epoch, place = divmod(self.drawn, per_epoch)
            generator = torch.Generator().manual_seed(self.seed + rank + 1_000_003 * epoch)
            order = torch.randperm(self.num_items, generator=generator)
            for batch in order[: per_epoch * self.batch_size].split(self.batch_size)[place:]:
                self.drawn += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        """The number of batches drawn."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind them."""
        self.drawn = state["drawn"]


class Stage(L.LightningModule):
    """A model trained under a budget, with warm-up, linear decay to 0 and a moving average of its weights.

    The learning rate follows the share of the budget that is used up, so that it reaches 0 on a machine of
    any speed.

    Args:
        model: What is trained.
        peak: Highest learning rate; a group of parameters has ``scale`` times it.
        budget: How long to train.
        decay: Of the moving average.
        warmup: Steps of linear warm-up.
        cooling: Share of the budget, at its end, in which the rate falls. Below 1 the rate is constant
            before, so a run can be given a larger budget as long as it has not begun to cool.
    """

    model: Any
    average: Any

    def __init__(
        self,
        model: nn.Module,
        peak: float,
        budget: Budget,
        decay: float,
        warmup: int = 100,
        cooling: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.average = model, copy.deepcopy(model).requires_grad_(False)
        self.peak, self.budget, self.decay, self.warmup = peak, budget, decay, warmup
        self.cooling = cooling
        self.started, self.spent, self.before = time.process_time(), 0.0, 0.0

    def minutes(self) -> float:
        """CPU-minutes trained so far, in this run and those before."""
        return (time.process_time() - self.started) / 60

    def progress(self) -> float:
        """Share of the budget that is used up, 0 to 1; every process takes the first one's word for it."""
        elapsed = self.minutes() / self.budget.minutes
        return float(
            self.trainer.strategy.broadcast(min(1.0, max(elapsed, self.global_step / self.budget.steps)))
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the used minutes."""
        checkpoint["minutes"] = self.minutes()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting."""
        self.before = checkpoint["minutes"]

    def parameter_groups(self) -> list[dict[str, object]]:
        """Parameters, of which AdamW passes over the frozen; ``scale`` multiplies the learning rate."""
        return [{"params": list(self.model.parameters()), "scale": 1.0}]

    def configure_optimizers(self) -> Any:
        """AdamW without weight decay to speak of: the world is endless, so nothing overfits."""
        return torch.optim.AdamW(self.parameter_groups(), lr=self.peak, betas=(0.9, 0.98), weight_decay=1e-3)

    def on_train_start(self) -> None:
        """Start the clock once the data is there, and give every process and every run noise of its own."""
        self.started = time.process_time() - 60 * self.before
        torch.manual_seed(torch.initial_seed() + self.global_rank + 1_000_003 * self.global_step)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set this step's learning rate."""
        self.spent = self.progress()
        left = min(1.0, (1 - self.spent) / self.cooling)
        rate = self.peak * min(1.0, (self.global_step + 1) / self.warmup) * left
        for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
            group["lr"] = rate * group["scale"]

    def on_train_batch_end(self, outputs: object, batch: Tensor, batch_idx: int) -> None:
        """Move the average; stop when the budget is used up."""
        decay = min(self.decay, (1 + self.global_step) / (10 + self.global_step))
        averages, weights = [*self.average.parameters()], [*self.model.parameters()]
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - decay)
        if self.spent >= 1.0:
            self.trainer.should_stop = True


class Saving(L.Callback):
    """Write a checkpoint every so often.

    Lightning's ``ModelCheckpoint`` does not look at ``train_time_interval`` where a module steps its
    optimizers itself.

    Args:
        file: The checkpoint, replaced each time.
        every: Time between two.
    """

    def __init__(self, file: Path, every: timedelta) -> None:
        self.file, self.every = file, every.total_seconds()
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """Save when it is time; the first process says when."""
        if trainer.strategy.broadcast(time.monotonic() - self.last >= self.every):
            part = self.file.with_suffix(".part")
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                part.replace(self.file)
            self.last = time.monotonic()


def fit(
    stage: Stage,
    batches: Batches,
    folder: Path,
    precision: str,
    num_processes: int = 1,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train a stage from its newest checkpoint, if there is one; logs go to ``folder / "log"``.

    Args:
        stage: The module.
        batches: Index batches; the module holds the data.
        folder: The stage's working folder.
        precision: Lightning's precision ("32-true" or "bf16-mixed").
        num_processes: Processes that share the work; each takes whole batches.
        callbacks: Besides the progress bar.
    """
    newest = folder / CHECKPOINT
    trainer = L.Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy="ddp" if num_processes > 1 else "auto",
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        gradient_clip_val=1.0 if stage.automatic_optimization else None,  # such a stage clips by itself
        log_every_n_steps=20,
        logger=CSVLogger(folder, name="", version="log"),
        callbacks=[RichProgressBar(refresh_rate=20), Saving(newest, CHECKPOINT_EVERY), *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(stage, batches, ckpt_path=newest if newest.exists() else None, weights_only=True)
    if stage.global_rank == 0:
        newest.unlink(missing_ok=True)
        print(f"{folder.name}: {stage.global_step} steps in {stage.minutes():.1f} CPU-minutes", flush=True)
