"""What a run can go on from: ``checkpoints/last.ckpt`` and ``checkpoints/best.ckpt``."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_align.callbacks.files import replace_file, unused, writes
from lit_align.data import Batch
from lit_align.folder import run_folder


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the old one and replaces that when the new one is on disk.

    Lightning writes it in the system's temporary folder first; where that is on another file system, a
    killed run is left with half a file.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            replace_file(Path(path), lambda draft: torch.save(checkpoint, draft))


def write_whole(trainer: Trainer) -> None:
    """Let the Trainer write its checkpoints so, unless it was given another way."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


class BatchCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` at the end of rollout batches: an interrupt loses at most one batch.

    The first is written before the first rollout batch, after its validation.

    The last rollout batch of an epoch counts as ended when the epoch's validation is done, so that a run that
    is killed in its validation repeats it. It stands after :class:`BestCheckpoint`, whose newest score is
    part of the checkpoint.

    Args:
        every: Rollout batches between two checkpoints; the end of an epoch always gets one.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        write_whole(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for logger in trainer.loggers:  # what is in the checkpoint is on disk in the curves, too
            logger.save()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        every = trainer.check_val_every_n_epoch
        validates = trainer.enable_validation and every and (trainer.current_epoch + 1) % every == 0
        if last and validates:
            return  # saved when the validation is done
        if last or (trainer.fit_loop.total_batch_idx + 1) % self.every == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(run_folder(trainer) / "checkpoints" / "last.ckpt", False)  # not weights alone


class BestCheckpoint(ModelCheckpoint):
    """Keeps ``checkpoints/best.ckpt``, of the validation with the highest ``val/reward``."""

    def __init__(self) -> None:
        super().__init__(
            monitor="val/reward",
            mode="max",
            filename="best",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.dirpath = str(run_folder(trainer) / "checkpoints")
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Pass over a validation without any score, which would be the best if it is the first."""
        reward = trainer.callback_metrics.get("val/reward")
        if reward is None or bool(reward.isfinite()):
            super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best score also where the run's folder is now written differently, or was moved."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": scores})
        if not Path(self.best_model_path).is_file():  # it stayed in another folder
            self._forget_score()

    def forget(self, trainer: Trainer, images: int) -> None:
        """Drop the best score, which is of another measurement; its checkpoint is kept under another name.

        Args:
            trainer: The Trainer of the run.
            images: Of the run so far; they name the file.
        """
        self._forget_score()
        best = Path(self.dirpath or "") / "best.ckpt"
        if writes(trainer) and best.exists():
            best.rename(unused(best.with_name(f"best_{images:08d}.ckpt")))

    def _forget_score(self) -> None:
        self.best_k_models, self.best_model_path, self.kth_best_model_path = {}, "", ""
        self.best_model_score = self.current_score = None


def checkpoint_callbacks() -> list[Callback]:
    """The checkpoints of every run, in the order in which they must be written."""
    return [BestCheckpoint(), BatchCheckpoint()]
