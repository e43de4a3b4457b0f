"""What a run can go on from, and what it hands on: checkpoints and adapters."""

import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from lit_align.callbacks.folder import run_folder
from lit_align.data import Batch
from lit_align.methods import AlignmentModule


class BatchCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` at the end of rollout batches: an interrupt loses at most one batch.

    The first is written before the first rollout batch, after its validation.

    The last rollout batch of an epoch counts as ended when the epoch's validation is done, so that a run that
    is killed in its validation repeats it.

    Args:
        every: Rollout batches between two checkpoints; the end of an epoch always gets one.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every

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
        if trainer.state.fn == "fit":
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = run_folder(trainer) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(trainer.strategy.broadcast(path), False)  # not the weights alone


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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best score also where the run's folder is now written differently, or was moved."""

        def here(path: str) -> str:
            return str(Path(self.dirpath or "") / Path(path).name) if path else path

        paths = {name: here(state_dict[name]) for name in ("best_model_path", "kth_best_model_path")}
        scores = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": scores})


class AdapterExport(Callback):
    """Writes the trained weights to ``adapter/``, for diffusers, after each validation and at the end."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and pl_module.images:
            self._export(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, module: AlignmentModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not trainer.is_global_zero:
            module.export(None)  # its shards
            return
        folder = run_folder(trainer) / "adapter"
        draft, old = folder.with_name(".adapter.draft"), folder.with_name(".adapter.old")
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        module.export(draft)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
