"""Pairs of images with a made-up annotator's preferences, as rows and files of Pick-a-Pic's form.

Columns and types are those of the cards of yuvalkirstain/pickapic_v1 and pickapic_v2, ``__index_level_0__``
included. The values follow PickScore's script for such data: a tie has labels .5 and .5, ``best_image_uid``
"none" and ``has_label`` false; ``are_different`` means different models. Users, times and addresses are made
up.

The annotator compares the world's ``utility`` of the images as stored:

* of utilities less than ``TIE_BELOW`` apart, a share of ``TIE_SHARE`` are ties;
* else the image of utility u is preferred to that of v with probability ``sigmoid((u - v) / TEMPERATURE)``
  (Bradley and Terry, 1952).

On the 1,000 shipped pairs that makes 9 % ties, and 84 % of the other labels agree with the utilities.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import exp
from pathlib import Path
from uuid import UUID

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from lit_align.randomness import derive_seed
from lit_align.shapes.world import Bytes, utility

IMAGES = 4  # of a prompt
PAIRS = tuple(combinations(range(IMAGES), 2))
TEMPERATURE = 0.15
TIE_BELOW, TIE_SHARE = 0.05, 0.5
QUALITY = 95
"""Of the JPEGs, colours at full resolution: the judge's verdicts stay as they are."""

SECOND = 10**9
FIRST_DAY = 1_767_225_600 * SECOND  # 2026-01-01 in nanoseconds

SCHEMA = pa.schema(
    {
        "are_different": pa.bool_(),
        "best_image_uid": pa.string(),
        "caption": pa.string(),
        "created_at": pa.timestamp("ns"),
        "has_label": pa.bool_(),
        "image_0_uid": pa.string(),
        "image_0_url": pa.string(),
        "image_1_uid": pa.string(),
        "image_1_url": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),
        "label_1": pa.float64(),
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),
        "user_id": pa.int64(),
        "num_example_per_prompt": pa.int64(),
        "__index_level_0__": pa.int64(),
    }
)

Row = dict[str, object]


@dataclass(frozen=True)
class Shown:
    """An image of a pair, and what it is worth as it is stored."""

    uid: str
    url: str
    model: str
    jpg: bytes
    utility: float


def counted_rng(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator that is a pure function of its arguments."""
    return np.random.default_rng(derive_seed(seed, f"pick {purpose}", *counters))


def show(pixels: Bytes, caption: str, model: str, address: tuple[int, int, int]) -> Shown:
    """Store one image, and judge what is stored.

    Args:
        pixels: (64, 64, 3) uint8.
        caption: What was asked for.
        model: Who made it.
        address: Seed, number of the prompt, place among its images.
    """
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
    jpg = file.getvalue()
    seed, number, place = address
    uid = UUID(
        int=derive_seed(seed, "pick uid", number, place) << 64 | derive_seed(seed, "uid", number, place)
    )
    url = f"shapes://pick/{seed}/{number}/{place}.jpg"
    return Shown(str(uid), url, model, jpg, utility(np.asarray(Image.open(io.BytesIO(jpg))), caption))


def prefer(first: float, second: float, rng: np.random.Generator) -> float:
    """The first image's label, 1, 0 or .5, as an annotator of these utilities draws it."""
    tie, choice = rng.random(2)
    if abs(first - second) < TIE_BELOW and tie < TIE_SHARE:
        return 0.5
    return float(choice < 1 / (1 + exp((second - first) / TEMPERATURE)))


def compare(shown: Sequence[Shown], caption: str, seed: int, number: int) -> list[Row]:
    """All pairs of a prompt's images.

    The first image of each is image 0: as the places were drawn by chance, sides say nothing, and an image
    is stored in 1.5 columns on average.
    """
    rng = counted_rng(seed, "labels", number)
    user, rows = int(rng.integers(1, 1001)), []
    for place, (i, j) in enumerate(PAIRS):
        first, second, row = shown[i], shown[j], number * len(PAIRS) + place
        label = prefer(first.utility, second.utility, rng)
        rows.append(
            {
                "are_different": first.model != second.model,
                "best_image_uid": {1.0: first.uid, 0.0: second.uid}.get(label, "none"),
                "caption": caption,
                "created_at": FIRST_DAY + row * 10 * SECOND,
                "has_label": label != 0.5,
                "image_0_uid": first.uid,
                "image_0_url": first.url,
                "image_1_uid": second.uid,
                "image_1_url": second.url,
                "jpg_0": first.jpg,
                "jpg_1": second.jpg,
                "label_0": label,
                "label_1": 1 - label,
                "model_0": first.model,
                "model_1": second.model,
                "ranking_id": row,
                "user_id": user,
                "num_example_per_prompt": len(PAIRS),
                "__index_level_0__": row,
            }
        )
    return rows


def write_pairs(path: Path, rows: list[Row]) -> None:
    """One row group, so that a dictionary holds each image once; the file appears when it is whole."""
    fresh = path.with_name(f".{path.name}.new")
    parquet.write_table(
        pa.Table.from_pylist(rows, SCHEMA),
        fresh,
        row_group_size=len(rows),
        compression="zstd",
        compression_level=19,
        dictionary_pagesize_limit=1 << 28,
        write_statistics=False,
    )
    fresh.rename(path)
