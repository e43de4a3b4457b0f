"""Small preference data in Pick-a-Pic's form, for the tests of files and of batches."""

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet

from lit_align.data import PairBatch, PairSource, PickaPicDataModule
from lit_align.shapes.recipe.preferences import SCHEMA

SHARDS, GROUPS, ROWS = 3, 4, 5
TIES = (7, 31)
NO_LABEL = (12,)


def jpeg(value: int, size: tuple[int, int] = (8, 8), form: str = "JPEG") -> bytes:
    """One grey."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, form, quality=100)
    return file.getvalue()


def row(number: int) -> dict[str, Any]:
    """The images of row n are the greys 2n and 2n + 1; the second is preferred in odd rows."""
    return {
        "caption": f"prompt {number // 2}",
        "jpg_0": jpeg(2 * number),
        "jpg_1": jpeg(2 * number + 1),
        "label_0": 0.5 if number in TIES else float(number % 2 == 0),
        "label_1": 0.5 if number in TIES else float(number % 2),
        "has_label": number not in NO_LABEL,
    }


def write(folder: Path, changes: dict[int, dict[str, Any]] | None = None) -> Path:
    """Sixty rows in three shards of four row groups of five rows, in the order and types of Pick-a-Pic."""
    size = GROUPS * ROWS
    rows = [row(number) | (changes or {}).get(number, {}) for number in range(SHARDS * size)]
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        table = pa.Table.from_pylist(rows[shard * size : (shard + 1) * size], SCHEMA)
        parquet.write_table(
            table, folder / f"train-{shard:05d}-of-{SHARDS:05d}-abc.parquet", row_group_size=ROWS
        )
    return folder


def module(source: PairSource | None, **settings: Any) -> PickaPicDataModule:
    defaults: dict[str, Any] = {"pairs_per_batch": 4, "resolution": 8, "validation_prompts": 1}
    held_out: dict[str, Any] = {"validation_fraction": 0.1, "test_fraction": 0.1, "test_prompts": 1}
    data = PickaPicDataModule(source, **(defaults | held_out | settings))
    data.setup("fit")
    return data


def index(batches: list[PairBatch]) -> list[int]:
    return [number for batch in batches for number in batch.index.tolist()]


def greys(images: torch.Tensor) -> list[int]:
    return (images * 255).round().mean((1, 2, 3)).int().tolist()
