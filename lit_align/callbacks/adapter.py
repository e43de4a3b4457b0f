"""What a run hands on: the trained weights, for diffusers."""

import shutil
from typing import Any

from lightning import Callback, Trainer

from lit_align.callbacks.files import follow_umask
from lit_align.folder import run_folder
from lit_align.methods import AlignmentModule


class AdapterExport(Callback):
    """Writes the trained weights to ``adapter/``, for diffusers, after each validation and at the end."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and pl_module.images:
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
        follow_umask(draft)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
