"""Images of a run: grids of the held-out prompts, and what ``predict`` writes."""

import io
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from lit_align.callbacks.console import show
from lit_align.callbacks.files import finite, writes
from lit_align.callbacks.grid import image_grid, pixels, shrink, uint8
from lit_align.callbacks.histograms import tensorboards
from lit_align.data import Batch
from lit_align.files import new_folder, unused, write, writing
from lit_align.folder import run_folder


@dataclass
class Shown:
    """Held-out images that are shown, one of each prompt.

    Attributes:
        index: Numbers of the images.
        tasks: The task of each; empty where there is only one.
        prompts: Their prompts.
        images: ``(3, H, W)`` each, uint8.
        scores: Of each image by name; filled when the validation is over.
    """

    index: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)


class ImageGrids(Callback):
    """Shows images of the held-out prompts, before and after training, with the same prompts and noise.

    They go to TensorBoard, and as PNG files to ``images/``. Below each pair stand the prompt and the rewards.
    Where a policy does not start at the pretrained model, there is no image before.

    Args:
        count: Prompts of each task in a grid, from the first rank; one image of each is shown.
        side: Longer side of an image in the grid, in pixels.
    """

    def __init__(self, count: int = 16, side: int = 160) -> None:
        self.count = count
        self.side = side
        self._before: Shown | None = None
        self._now = Shown()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not writes(trainer):
            return
        now = self._now
        for i in batch.firsts.nonzero().flatten().tolist():
            if now.tasks.count(batch.task) < self.count:
                now.index.append(int(batch.index[i]))
                now.tasks.append(batch.task)
                now.prompts.append(batch.prompts[i])
                now.images.append(shrink(uint8(outputs[i]), self.side))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        now, self._now = self._now, Shown()
        if not now.index or trainer.sanity_checking or not writes(trainer):
            return
        names = [n for n in pl_module.latest if n == "reward" or n.startswith("reward/")]
        now.scores = {n: [float(pl_module.latest[n][i]) for i in now.index] for n in names}
        if not pl_module.images:  # unless the policy starts elsewhere than at the pretrained model
            self._before = now if pl_module.baseline is pl_module.latest else None
        before = self._before if pl_module.baseline else None  # without one it is of another measurement
        if before is not None and (before.index, before.prompts) != (now.index, now.prompts):
            before = None  # other prompts: there is nothing to compare
        grid = self._grid(now, None if before is now else before)
        path = run_folder(trainer) / "images" / f"validation_{pl_module.images:08d}.png"
        write(path if trainer.state.fn == "fit" else unused(path), png(grid))
        for writer in tensorboards(trainer):
            writer.add_image("validation", np.asarray(grid), pl_module.images, dataformats="HWC")

    def _grid(self, now: Shown, before: Shown | None) -> Image.Image:
        cells = [[image] for image in now.images]
        if before is not None:
            cells = [[old, image] for old, image in zip(before.images, now.images, strict=True)]
        captions = []
        for i, prompt in enumerate(now.prompts):
            lines = [prompt]
            for name, values in now.scores.items():
                old = before.scores[name][i : i + 1] if before and name in before.scores else []
                if not all(math.isnan(value) for value in [*old, values[i]]):  # another task's
                    lines.append(f"{name.removeprefix('reward/')} {_change([*old, values[i]])}")
            captions.append("\n".join(lines))
        return image_grid(cells, captions, columns=4 if before else 8, side=self.side)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if pl_module.images and not pl_module.baseline:  # what was before is of another measurement
            self._before = None

    def state_dict(self) -> dict[str, Any]:
        if self._before is None:
            return {}
        return vars(self._before) | {"images": torch.stack(self._before.images)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._before = Shown(**(state_dict | {"images": list(state_dict["images"])}))


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file; in memory, since Pillow hides the error of a full disk."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def _change(values: list[float]) -> str:
    return " -> ".join("no score" if math.isnan(value) else f"{value:.2f}" for value in values)


class ImageWriter(Callback):
    """``predict`` writes PNG files, and ``metadata.jsonl`` with each one's prompt, seed, rewards and columns.

    The columns of the data, which scorers such as GenEval's need, stand under their own names.
    """

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._folder = run_folder(trainer) / "predictions"
        if trainer.is_global_zero:
            self._folder = new_folder(self._folder)
        self._folder = trainer.strategy.broadcast(self._folder)

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
        rows, row = [], dict[str, Any]()
        for i, image in enumerate(uint8(images)):
            number = int(batch.index[i])
            row = {
                "file_name": f"{number:06d}.png",
                "prompt": batch.prompts[i],
                "seed": pl_module.seed,
                "index": number,
            }
            place = self._folder / str(row["file_name"])
            with writing(place):  # what has no line in metadata.jsonl does not count: it need not be whole
                place.write_bytes(png(Image.fromarray(pixels(image))))
            row |= finite({name: float(values[i]) for name, values in scores.items()})
            rows.append({name: values[i] for name, values in batch.columns.items()} | row)
        if not batch_idx and (lost := [name for name in batch.columns if name in row]):
            rank_zero_warn(
                f"metadata.jsonl has its own {', '.join(lost)}, so these columns of the prompts are not in "
                "it; rename them in the data to keep them"
            )
        ranks = pl_module.gather(rows)
        if trainer.is_global_zero:
            path = self._folder / "metadata.jsonl"
            with writing(path), path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, default=str) + "\n" for rank in ranks for row in rank)

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            show(f"images       {self._folder}")
