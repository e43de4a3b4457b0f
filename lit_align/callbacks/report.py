"""``report.html``: the results of a test, with images of the pretrained model beside the policy's."""

import io
import json
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from PIL import Image
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE
from lit_align.callbacks.console import show
from lit_align.callbacks.files import writes
from lit_align.callbacks.grid import pixels, shrink, uint8
from lit_align.callbacks.images import png
from lit_align.callbacks.summary import tested_split
from lit_align.data import Batch
from lit_align.files import write
from lit_align.folder import run_folder
from lit_align.report import read_run, render
from lit_align.report.run import images_folder, page_of, result_of

PIXELATED = 128
"""Longer side in pixels up to which an image is kept without loss; larger ones are JPEG."""


class TestReport(Callback):
    """Keeps images of a test, and writes the page about the run.

    The images lie beside the result, in ``test_images/``. The page stands alone: it holds them too. Those of
    the training prompts (``test_split: train``) are not kept.

    Args:
        count: Prompts of which the first image is kept.
        side: Longer side of a kept image, in pixels.
    """

    __test__ = False  # pytest would take it for a test

    def __init__(self, count: int = 256, side: int = 256) -> None:
        self.count = count
        self.side = side
        self._kept: list[tuple[int, str, bytes, bytes, str]] = []

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._kept = []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        after, before = outputs[POLICY], outputs[REFERENCE]
        if tested_split(trainer) != "test":
            return
        for i in batch.firsts.nonzero().flatten().tolist():
            if len(self._kept) < self.count:
                files = [self._file(image) for image in (before[i], after[i])]
                self._kept.append((int(batch.index[i]), batch.prompts[i], files[0][0], *files[1]))

    def _file(self, image: Tensor) -> tuple[bytes, str]:
        """An image as the bytes of a file, and its ending."""
        small = Image.fromarray(pixels(shrink(uint8(image), self.side)))
        if max(small.size) <= PIXELATED:
            return png(small), "png"
        stream = io.BytesIO()
        small.save(stream, "jpeg", quality=88)
        return stream.getvalue(), "jpg"

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        ranks = pl_module.gather(self._kept)
        self._kept = []
        if not writes(trainer) or tested_split(trainer) != "test" or not pl_module.tested:
            return
        folder = run_folder(trainer)
        result = result_of(folder)
        rows = sorted((row for rank in ranks for row in rank), key=lambda row: row[0])
        self._write(images_folder(result), rows[: self.count])
        page = page_of(result)
        write(page, render([read_run(folder, result)]))
        show(f"{'report':<12} {page}")

    def _write(self, folder: Path, rows: list[tuple[int, str, bytes, bytes, str]]) -> None:
        lines = []
        for index, prompt, before, after, ending in rows:
            names = {kind: f"{index:06d}_{kind}.{ending}" for kind in ("before", "after")}
            for kind, content in (("before", before), ("after", after)):
                write(folder / names[kind], content)
            lines.append(json.dumps({"index": index, "prompt": prompt} | names))
        write(folder / "metadata.jsonl", "".join(f"{line}\n" for line in lines))
