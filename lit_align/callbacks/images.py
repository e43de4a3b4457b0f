"""Images of a run: grids of the held-out prompts, and what ``predict`` writes."""

import json
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor

from lit_align.callbacks.folder import finite, global_batch, run_folder, unused, writes
from lit_align.data import Batch


def _uint8(images: Tensor) -> np.ndarray:
    return (images.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()


def image_grid(images: Tensor, prompts: Sequence[str], columns: int = 8, side: int = 128) -> Image.Image:
    """Images in rows, each with its prompt below.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1].
        prompts: ``N`` prompts; long ones are cut.
        columns: Images in a row.
        side: Width of an image in the grid, in pixels.
    """
    text_height = 40
    rows = -(-len(prompts) // columns)
    grid = Image.new("RGB", (columns * (side + 8), rows * (side + text_height)), "white")
    draw = ImageDraw.Draw(grid)
    for i, (pixels, prompt) in enumerate(zip(_uint8(images), prompts, strict=True)):
        x, y = i % columns * (side + 8) + 4, i // columns * (side + text_height) + 4
        image = Image.fromarray(pixels)
        height = round(side * image.height / image.width)
        grid.paste(image.resize((side, height), Image.Resampling.BICUBIC).crop((0, 0, side, side)), (x, y))
        wrapped = partial(textwrap.wrap, width=side // 6, max_lines=3, placeholder=" ...")
        lines = [line for part in prompt.splitlines() for line in wrapped(part)][:3]
        draw.multiline_text((x, y + side + 1), "\n".join(lines), fill="black", spacing=1, font_size=10)
    return grid


class ImageGrids(Callback):
    """Shows the first validation images, always of the same prompts and noise.

    They go to TensorBoard, and as PNG files to ``images/``.

    Args:
        count: Images in a grid, from the first rank.
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
        if not self._prompts or not writes(trainer):
            return
        grid = image_grid(torch.cat(self._images), self._prompts)
        self._images, self._prompts = [], []
        folder = run_folder(trainer) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"validation_{pl_module.images:08d}.png")
        if isinstance(trainer.logger, TensorBoardLogger):
            pixels = np.asarray(grid)
            trainer.logger.experiment.add_image(
                "validation", pixels, global_batch(trainer), dataformats="HWC"
            )


class ImageWriter(Callback):
    """``predict`` writes PNG files, and ``metadata.jsonl`` with each one's prompt, seed and rewards."""

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._folder = unused(run_folder(trainer) / "predictions")
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
            rows.append(row | finite({name: float(values[i]) for name, values in scores.items()}))
        ranks = pl_module.gather(rows)
        if trainer.is_global_zero:
            with (self._folder / "metadata.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for rank in ranks for row in rank)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            Console().print(f"images     {self._folder}", soft_wrap=True, highlight=False)
