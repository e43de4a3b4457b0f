"""Export of the trained weights, for diffusers."""

import json
import shutil
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from lit_align.files import follow_umask, replace_folder, write, writing
from lit_align.folder import run_folder
from lit_align.identity import ADAPTER, STAMP, read_stamp, stamp
from lit_align.methods import AlignmentModule


class AdapterExport(Callback):
    """Writes the trained weights to ``adapter/``, for diffusers, after each validation and at the end.

    The metadata of an adapter's file name its run: the base model, how it was sampled, the method, the number
    of images so far. A pipeline of a full fine-tuning has the same in ``lit_align.json``.
    """

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
        draft = folder.with_name(".adapter.draft")
        with writing(folder):
            shutil.rmtree(draft, ignore_errors=True)
            module.export(draft)
            facts = module.identity() | {"images": module.images}
            for file in draft.rglob(ADAPTER):
                stamp(file, facts)
            if (draft / "model_index.json").exists():
                write(draft / STAMP, json.dumps(facts, indent=2))
            follow_umask(draft)
            replace_folder(folder, draft)


def images_of(folder: Path) -> int | None:
    """The images of the run when it wrote its ``adapter/``; None where that does not say."""
    facts = read_stamp(folder) or {}
    return facts.get("images")
