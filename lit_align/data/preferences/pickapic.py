"""Preference data in Pick-a-Pic's Parquet files, here or on the hub, of which a few row groups are held."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lit_align.data.files import check_lengths
from lit_align.data.preferences.row_groups import RowGroups, holds_images, open_parquet, read_light
from lit_align.data.preferences.source import HeldOut, PairSource
from lit_align.data.prompts import PromptSource, ShapesPromptSet
from lit_align.errors import ConfigError, first_line
from lit_align.shapes import PICK

IMAGES = ("jpg_0", "jpg_1")
LIGHT = {"caption": pa.large_string(), "label_0": pa.float64(), "has_label": pa.bool_()}
"""The columns that are read at the start, and their types."""


class PickaPicFiles(PairSource):
    """Parquet files in the schema of Pick-a-Pic v1 and v2 (Kirstain et al. 2023).

    At the start, the columns ``caption``, ``label_0`` and ``has_label`` are read: about 100 bytes a row.
    Images are read by whole row groups, when an image of one is asked for, and the last few are held. Each
    rank reads all row groups, because the rows of its share are in all of them.

    Args:
        path: A file, a folder with ``*.parquet``, or a pattern with ``*``; also a URL that fsspec reads
            (``hf://``, ``s3://``).
        row_groups: Row groups that are held, and mixed in the training order. More mix better and take more
            memory on every rank: 335 GB of 959,040 rows, as Pick-a-Pic v2 has, is .35 MB a row.

    Raises:
        ConfigError: There is no such file, it is not Parquet, a column is missing or of another type, or a
            label is none.
    """

    def __init__(self, path: str, row_groups: int = 4) -> None:
        if row_groups < 1:
            raise ConfigError(f"row_groups is {row_groups}: give at least 1")
        self.path, self.mixed = path, row_groups
        files, local = open_parquet(path)
        light = read_light(files, _read_light)
        if not len(light):
            raise ConfigError(f"{path} has no rows: give files with at least one pair")
        check_lengths(light["caption"], path)
        self._captions, self._labels = light["caption"], _labels(light, path)
        self._rows = RowGroups(files, IMAGES, row_groups, local)

    def __len__(self) -> int:
        return len(self._labels)

    def prompt(self, row: int) -> str:
        return self._captions[row].as_py() or ""

    def label(self, row: int) -> float:
        return float(self._labels[row])

    def blocks(self) -> Sequence[range]:
        return self._rows.blocks()

    def image(self, row: int, side: int) -> bytes:
        return self._rows.image(row, IMAGES[side])

    def where(self, row: int) -> str:
        return self._rows.where(row)

    def images_are(self) -> str:
        return str(self._rows)

    def __str__(self) -> str:
        return self.path


class PickaPicHub(PickaPicFiles):
    """Pick-a-Pic on the Hugging Face hub, read from there: nothing is kept on the disk.

    The published ids, ``yuvalkirstain/pickapic_v1`` and ``_v2``, have answered 404 since April 2025 (issue 36
    of its repository PickScore): name a copy in the same schema. :class:`WebDatasetPairs` reads copies in
    archives.

    To train for more than a pass, or on several ranks, download it (``hf download --repo-type dataset``) and
    use :class:`PickaPicFiles`.

    Args:
        name: The hub id.
        split: Which of the dataset's own splits.
        row_groups: See :class:`PickaPicFiles`.

    Raises:
        ConfigError: The dataset cannot be reached, or see :class:`PickaPicFiles`.
    """

    def __init__(
        self, name: str = "yuvalkirstain/pickapic_v2", split: str = "train", row_groups: int = 4
    ) -> None:
        super().__init__(f"hf://datasets/{name}/data/{split}-*.parquet", row_groups)


class ShapesPick(PickaPicFiles):
    """The shipped sample of Shapes-Pick: 1,000 pairs, ties included, of 64 x 64 pixels.

    Its prompts to validate and test on are the shipped sets of these names.
    """

    def __init__(self) -> None:
        super().__init__(str(PICK))

    def held_out(self, split: HeldOut) -> PromptSource | None:
        return ShapesPromptSet(split)

    def __str__(self) -> str:
        return "Shapes-Pick"


def _read_light(file: Any) -> pa.Table:
    """The columns of a Parquet file that are no images."""
    try:
        schema = file.physical_schema
        _check_schema(file.path, schema)
        table = file.to_table(columns=[name for name in LIGHT if name in schema.names])
    except ConfigError:
        raise
    except Exception as error:  # each file system raises errors of its own
        raise ConfigError(
            f"{file.path} is not a Parquet file that can be read ({first_line(error)}): load it again"
        ) from error
    if "has_label" not in table.column_names:
        table = table.append_column("has_label", pa.array(np.ones(len(table), bool)))
    try:
        return table.select(list(LIGHT)).cast(pa.schema(LIGHT))
    except pa.ArrowException as error:
        kinds = ", ".join(f"{name}: {kind}" for name, kind in LIGHT.items())
        raise ConfigError(f"{file.path}: {first_line(error)}; Pick-a-Pic's columns are {kinds}") from error


def _check_schema(file: str, schema: pa.Schema) -> None:
    needed = ("caption", *IMAGES, "label_0")
    # No near names are proposed: those of label_0 are label_1 and has_label, under which another image wins.
    if missing := [name for name in needed if name not in schema.names]:
        raise ConfigError(
            f"{file} has no column '{missing[0]}', only {', '.join(schema.names)}: save it with Pick-a-Pic's "
            "columns caption, jpg_0, jpg_1 (encoded images) and label_0 (1 where jpg_0 is preferred, 0 where "
            "jpg_1 is, 0.5 for a tie), or read it with PreferenceFiles, which knows other sets' columns"
        )
    for name in IMAGES:
        kind = schema.field(name).type
        if not holds_images(kind):
            raise ConfigError(f"column '{name}' of {file} holds {kind}, not encoded images (binary)")


def _labels(light: pa.Table, path: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The labels, NaN where there is none."""
    labels = light["label_0"].to_numpy().copy()
    labels[~light["has_label"].fill_null(False).to_numpy()] = np.nan
    other = ~np.isnan(labels) & ~np.isin(labels, (0.0, 0.5, 1.0))
    if other.any():
        raise ConfigError(
            f"column 'label_0' of {path} holds {labels[other][0]:g} in row {np.flatnonzero(other)[0]}: save "
            "it with 1 where jpg_0 is preferred, 0 where jpg_1 is, and 0.5 for a tie"
        )
    return labels
