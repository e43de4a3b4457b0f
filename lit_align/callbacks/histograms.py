"""Histograms of the rewards, in TensorBoard."""

from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lit_align.callbacks.files import writes
from lit_align.data import Batch


def tensorboards(trainer: Trainer) -> list[Any]:
    """The writers of all TensorBoard loggers; none on ranks that write nothing."""
    if not writes(trainer):
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class RewardHistograms(Callback):
    """Writes a histogram of every reward to TensorBoard, for each rollout batch and each validation."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._show(trainer, "train", pl_module.collected, pl_module.images)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._show(trainer, "val", pl_module.latest, pl_module.images)

    def _show(self, trainer: Trainer, stage: str, metrics: dict[str, Tensor], images: int) -> None:
        for writer in tensorboards(trainer):
            for name, values in metrics.items():
                values = values[values.abs() < 1e20]  # where the bins end; NaN is not
                if name.startswith("reward") and len(values):
                    writer.add_histogram(f"{stage}_histogram/{name}", values, images)
