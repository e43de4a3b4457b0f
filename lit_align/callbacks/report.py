"""What a run says of itself: its configuration, the spread of its rewards, and a summary at its end."""

import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_align.callbacks.folder import finite, global_batch, run_folder, unused, write, writes
from lit_align.comparison import Comparison, compare
from lit_align.data import Batch
from lit_align.methods import AlignmentModule
from lit_align.shapes import WEIGHTS_HASH


class RewardHistograms(Callback):
    """Shows the spread of every reward in TensorBoard, of each rollout batch and of each validation."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._show(trainer, "train", pl_module.collected)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._show(trainer, "val", pl_module.latest)

    def _show(self, trainer: Trainer, stage: str, metrics: dict[str, Tensor]) -> None:
        if not writes(trainer) or not isinstance(trainer.logger, TensorBoardLogger):
            return
        for name, values in metrics.items():
            values = values[values.isfinite()]
            if name.startswith("reward") and len(values):
                trainer.logger.experiment.add_histogram(
                    f"{stage}_histogram/{name}", values, global_batch(trainer)
                )


class RunSummary(Callback):
    """Says at the end of a fit or a test how the held-out metrics changed, and where everything lies."""

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._report(trainer, pl_module, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        # Not the file of the test proper, whose prompts were never used.
        seen = getattr(trainer.datamodule, "test_split", "test") == "train"  # type: ignore[attr-defined]
        self._report(trainer, pl_module, "test_train" if seen else "test")

    def _report(self, trainer: Trainer, module: AlignmentModule, split: str) -> None:
        if not writes(trainer):
            return
        groups = module.prompt_groups
        found = {
            name: compare(before, module.latest[name], groups)
            for name, before in module.baseline.items()
            if name in module.latest and len(before) == len(groups)
        }
        if not found:
            return
        folder = run_folder(trainer)
        result = {
            "split": split,
            "shapes_weights": WEIGHTS_HASH,
            "images": module.images,
            "reward_queries": module.reward_queries,
            "metrics": {name: finite(asdict(comparison)) for name, comparison in found.items()},
        }
        write(folder / f"{split}.json", json.dumps(result, indent=2))
        write(folder / f"{split}.csv", _rows({"prompt": groups} | module.latest))
        self._print(found, folder, split)

    def _print(self, found: dict[str, Comparison], folder: Path, split: str) -> None:
        pairs = next(iter(found.values())).num_pairs
        table = Table(title=f"{split}: {pairs} images, same prompts and noise")
        for header in ("", "before", "after", "difference ± standard error", "better"):
            table.add_column(header, justify="right" if header else "left", no_wrap=not header)
        for name, c in found.items():
            if name == "unscored" and c.before == c.after == 0:
                continue
            change = f"{c.difference:+.4f} ± {c.standard_error:.4f}"
            wins = f"{c.win_rate:.0%} ± {c.win_rate_error:.0%}"
            table.add_row(name, f"{c.before:.4f}", f"{c.after:.4f}", change, wins)
        console = Console()
        console.print(table)
        for part in ("checkpoints/last.ckpt", "adapter", "images", f"{split}.json"):
            if (folder / part).exists():
                console.print(f"{part.split('/')[0]:<12} {folder / part}", soft_wrap=True, highlight=False)
        console.print(f"{'curves':<12} tensorboard --logdir {folder}", soft_wrap=True, highlight=False)


def _rows(columns: dict[str, Tensor]) -> str:
    """A line for each image, in an order that two runs with the same data and seed share."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(
        [[f"{x:.6g}" for x in row] for row in zip(*(c.tolist() for c in columns.values()), strict=True)]
    )
    return text.getvalue()


class RunConfig(SaveConfigCallback):
    """Writes the whole configuration to ``config.yaml``; a resumed run's stands beside the first.

    TensorBoard gets it as text, and at the end of a fit as hyper-parameters with the final held-out metrics
    (``final/<name>``), so that its HParams tab compares runs.
    """

    def __init__(self, parser: Any, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = run_folder(trainer)
        name = "config.yaml" if stage == "fit" else f"config-{TrainerFn(stage).value}.yaml"
        text = self.parser.dump(self.config, skip_none=False)
        write(unused(folder / name), text)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not writes(trainer) or not isinstance(trainer.logger, TensorBoardLogger) or not pl_module.latest:
            return
        config = json.loads(self.parser.dump(self.config, format="json"))
        parts = {name: config[name] for name in ("seed_everything", "model", "data")}
        final = {f"final/{name}": float(values.nanmean()) for name, values in pl_module.latest.items()}
        known = {name: value for name, value in final.items() if math.isfinite(value)}
        trainer.logger.log_hyperparams(_flat(parts), known, global_batch(trainer))


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names, without the words that only say how classes are built."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = prefix if name in ("init_args", "class_path") else f"{prefix}.{name}".lstrip(".")
        if name == "class_path":
            value = value.rpartition(".")[2]
        flat |= _flat(value, path) if isinstance(value, dict) else {path: value}
    return flat
