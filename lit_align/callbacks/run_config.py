"""The configuration of a run: written to its folder, to TensorBoard, and into its checkpoints."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from torch.utils.tensorboard.summary import hparams

from lit_align.callbacks.files import writes
from lit_align.callbacks.histograms import tensorboards
from lit_align.files import write_new
from lit_align.folder import run_folder


class RunConfig(Callback):
    """Writes the whole configuration to ``config.yaml``; that of a resumed run stands beside the first.

    Checkpoints hold the settings, so that a resume with other settings can say what changes. TensorBoard
    gets the configuration as text, and at the end of a fit as hyper-parameters beside the newest held-out
    metrics, so that its HParams tab compares runs.

    Args:
        text: The configuration, as YAML.
        settings: What decides the result, by dotted name (see :func:`flat`).

    Attributes:
        began: Whether the models are loaded and the work has begun.
        file: Name of the file that the newest command wrote, which its result names.
    """

    def __init__(self, text: str, settings: Mapping[str, Any]) -> None:
        self.text = text
        self.settings = dict(settings)
        self.began = False
        self.file: str | None = None
        self._written = False

    def put(self, folder: Path) -> None:
        """Write the configuration of a fit at once, so that a run that is killed while it loads has one."""
        self.file = write_new(folder / "config.yaml", self.text).name
        self._written = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, "config.yaml")

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._write(trainer, "config-validate.yaml")

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, "config-test.yaml")

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._write(trainer, "config-predict.yaml")

    def _write(self, trainer: Trainer, name: str) -> None:
        self.began = True
        if not writes(trainer):
            return
        if not self._written:
            self.file = write_new(run_folder(trainer) / name, self.text).name
        self._written = False  # a Trainer may be used again
        for writer in tensorboards(trainer):
            writer.add_text("config", "    " + self.text.replace("\n", "\n    "), 0)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        final = {f"val/{name}": float(values.nanmean()) for name, values in pl_module.standing.items()}
        known = {name: value for name, value in final.items() if math.isfinite(value)}
        simple = {n: v if isinstance(v, bool | int | float) else str(v) for n, v in self.settings.items()}
        for writer in tensorboards(trainer):
            # The values are those of the curves, so no scalar is written a second time.
            for summary in hparams(simple, known):
                writer.file_writer.add_summary(summary)

    def state_dict(self) -> dict[str, Any]:
        return {"settings": self.settings}


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names, without the words that only say how classes are built.

    A class is named by its last name. Lists become text, so that values can be compared and shown.
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix if name in ("init_args", "class_path") else f"{prefix}.{name}".lstrip(".")
        if name == "class_path":
            value = value.rpartition(".")[2]
        if isinstance(value, Mapping) and value:
            found |= flat(value, path)
        else:
            found[path] = json.dumps(value) if isinstance(value, list | Mapping) else value
    return found
