"""Fits that record what they see, are killed, and are compared with whole ones."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer

from lit_align.data import Batch, PairBatch


class Recorder(LightningModule):
    """Records what it sees and takes one optimiser step a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = []
        self.validated = 0

    def training_step(self, batch: Batch | PairBatch, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, tuple(batch.prompts), tuple(batch.index.tolist())))
        target = batch.winners.mean((0, 2, 3)) if isinstance(batch, PairBatch) else batch.index.float().mean()
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(((self.weight - target) ** 2).sum())
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += len(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        return batch.index.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Crash(Callback):
    """Raises at the start of a batch, as a killed process would end."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


def fit(folder: Path, data: LightningDataModule, *callbacks: Callback, **settings: Any) -> Recorder:
    """A fit with a checkpoint after every step; ``ckpt_path`` is one to go on from."""
    recorder, ckpt_path = Recorder(), settings.pop("ckpt_path", None)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), *callbacks],
        **settings,
    )
    crashes = any(isinstance(callback, Crash) for callback in callbacks)
    with pytest.raises(RuntimeError, match=r"^killed$") if crashes else nullcontext():
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return recorder
