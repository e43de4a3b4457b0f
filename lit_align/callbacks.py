"""What a run leaves behind: checkpoints, adapters, picture grids, predictions, and a summary at its end."""

import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lit_align.data import Batch
from lit_align.evaluation import Comparison, compare
from lit_align.methods import AlignmentModule


def run_folder(trainer: Trainer) -> Path:
    """Where a run writes: the logger's folder, or without a logger ``lit_align`` in ``default_root_dir``.

    Unlike ``Trainer.log_dir`` this is no collective call, so that one rank may ask alone.
    """
    if isinstance(trainer.logger, TensorBoardLogger | CSVLogger):
        return Path(trainer.logger.log_dir)
    return Path(trainer.default_root_dir) / "lit_align"


def _writes(trainer: Trainer) -> bool:
    """Whether this rank writes files; a ``fast_dev_run`` leaves none."""
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]


def _unused(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist yet."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def _finite(figures: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN: what has no value is null."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _uint8(images: Tensor) -> np.ndarray:
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def picture_grid(images: Tensor, prompts: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """Pictures in rows, each with its prompt below.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        prompts: ``N`` prompts; long ones are cut.
        columns: Pictures in a row.
        side: Width of a picture in the grid, in pixels.
    """
    text_height = 40
    rows = -(-len(prompts) // columns)
    grid = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (pixels, prompt) in enumerate(zip(_uint8(images), prompts, strict=True)):
        x, y = i % columns * (side + 8) + 4, i // columns * (side + text_height) + 4
        picture = Image.fromarray(pixels)
        height = round(side * picture.height / picture.width)
        grid.paste(picture.resize((side, height), Image.Resampling.BICUBIC).crop((0, 0, side, side)), (x, y))
        lines = textwrap.wrap(prompt, width=side // 6, max_lines=3, placeholder=" ...")
        draw.multiline_text((x, y + side + 1), "\n".join(lines), fill="black", spacing=1, font_size=10)
    return grid


class CollectionCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` at the end of collections: an interrupt loses at most the one in hand.

    The last collection of an epoch counts as ended when the epoch's validation is done, so that a run that is
    killed in its validation repeats it.

    Args:
        every: Collections between two checkpoints; the end of an epoch always gets one.
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
        if trainer.state.fn == "fit" and pl_module.images:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = run_folder(trainer) / "checkpoints" / "last.ckpt"
            trainer.save_checkpoint(trainer.strategy.broadcast(path))


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
        if not _writes(trainer):
            return
        folder = run_folder(trainer) / "adapter"
        draft, old = folder.with_name(".adapter.draft"), folder.with_name(".adapter.old")
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=True)
        module.backbone.save_weights(draft)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


class PictureGrids(Callback):
    """Shows the first validation pictures, always of the same prompts and noise.

    They go to TensorBoard, and as PNG files to ``pictures/``.

    Args:
        count: Pictures in a grid, from the first rank.
    """

    def __init__(self, count: int = 32) -> None:
        self.count = count
        self._images: list[Tensor] = []
        self._prompts: list[str] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = self.count - len(self._prompts)
        if wanted > 0 and trainer.is_global_zero:
            self._images.append(outputs[:wanted].cpu())
            self._prompts.extend(batch.prompts[:wanted])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not self._prompts or not _writes(trainer):
            return
        grid = picture_grid(torch.cat(self._images), self._prompts)
        self._images, self._prompts = [], []
        folder = run_folder(trainer) / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"validation_{pl_module.images:08d}.png")
        if isinstance(trainer.logger, TensorBoardLogger):
            pixels = np.asarray(grid)
            trainer.logger.experiment.add_image("validation", pixels, trainer.global_step, dataformats="HWC")


class RunSummary(Callback):
    """Says at the end of a fit or a test how the held-out figures changed, and where everything lies."""

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._report(trainer, pl_module, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: AlignmentModule, split: str) -> None:
        if not _writes(trainer):
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
            "images": module.images,
            "reward_queries": module.reward_queries,
            "figures": {name: _finite(asdict(comparison)) for name, comparison in found.items()},
        }
        _write(folder / f"{split}.json", json.dumps(result, indent=2))
        self._print(found, folder, split)

    def _print(self, found: dict[str, Comparison], folder: Path, split: str) -> None:
        pairs = next(iter(found.values())).num_pairs
        table = Table(title=f"{split}: {pairs} pictures, same prompts and noise")
        for header in ("", "before", "after", "difference ± standard error", "better"):
            table.add_column(header, justify="right" if header else "left")
        for name, c in found.items():
            change = f"{c.difference:+.4f} ± {c.standard_error:.4f}"
            table.add_row(name, f"{c.before:.4f}", f"{c.after:.4f}", change, f"{c.win_rate:.0%}")
        console = Console()
        console.print(table)
        for part in ("checkpoints/last.ckpt", "adapter", "pictures", f"{split}.json"):
            if (folder / part).exists():
                console.print(f"{part.split('/')[0]:<12} {folder / part}", soft_wrap=True, highlight=False)
        console.print(f"{'curves':<12} tensorboard --logdir {folder}", soft_wrap=True, highlight=False)


class PictureWriter(Callback):
    """``predict`` writes PNG files, and ``metadata.jsonl`` with each one's prompt, seed and rewards."""

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._folder = _unused(run_folder(trainer) / "predictions")
        self._folder = trainer.strategy.broadcast(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        images, scores = outputs
        rows = []
        for i, pixels in enumerate(_uint8(images)):
            number = int(batch.index[i])
            row = {
                "file_name": f"{number:06d}.png",
                "prompt": batch.prompts[i],
                "seed": pl_module.seed,
                "index": number,
            }
            Image.fromarray(pixels).save(self._folder / str(row["file_name"]))
            rows.append(row | _finite({name: float(values[i]) for name, values in scores.items()}))
        ranks = pl_module.gather(rows)
        if trainer.is_global_zero:
            with (self._folder / "metadata.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for rank in ranks for row in rank)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            Console().print(f"pictures     {self._folder}", soft_wrap=True, highlight=False)


class RunConfig(SaveConfigCallback):
    """Writes the whole configuration to ``config.yaml``; a resumed run's stands beside the first."""

    def __init__(self, parser: Any, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        folder = run_folder(trainer)
        name = "config.yaml" if stage == "fit" else f"config-{stage}.yaml"
        text = self.parser.dump(self.config, skip_none=False)
        _write(_unused(folder / name), text)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))
