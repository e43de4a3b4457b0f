"""Preference data in Pick-a-Pic's Parquet files, here or on the hub, of which a few row groups are held."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
from pyarrow import dataset, fs

from lit_align.data.files import check_lengths, first_line
from lit_align.data.images import UnreadableImage
from lit_align.data.preferences.source import HeldOut, PairSource
from lit_align.data.prompts import PromptSource, ShapesPromptSet
from lit_align.errors import ConfigError
from lit_align.shapes import PICK

IMAGES = ("jpg_0", "jpg_1")
LIGHT = {"caption": pa.large_string(), "label_0": pa.float64(), "has_label": pa.bool_()}
"""The columns that are read at the start, and their types."""
SPLIT = re.compile(r"([^/]+)-\d{5}-of-\d{5}[^/]*$")
"""How ``datasets`` names the files of a split."""
OPENED_AT_ONCE = 16
"""Files whose light columns are read at the same time: over a network most of the time is waiting."""


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
        names, system = _find(path)
        self._local = system is None
        place = (
            fs.LocalFileSystem(use_mmap=True) if system is None else fs.PyFileSystem(fs.FSSpecHandler(system))
        )
        files = [dataset.ParquetFileFormat().make_fragment(name, filesystem=place) for name in names]
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            light = pa.concat_tables(pool.map(_read_light, files)).combine_chunks()
        if not len(light):
            raise ConfigError(f"{path} has no rows: give files with at least one pair")
        check_lengths(light["caption"], path)
        self._captions, self._labels = light["caption"], _labels(light, path)
        self._groups = [
            group for file in files for group in file.split_by_row_group() if group.row_groups[0].num_rows
        ]
        self._starts = [0, *accumulate(group.row_groups[0].num_rows for group in self._groups)]
        self._make_cache()

    def _make_cache(self) -> None:
        self._group = lru_cache(self.mixed)(self._read_images)
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_group", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_cache()  # in a process that is spawned

    def __len__(self) -> int:
        return len(self._labels)

    def prompt(self, row: int) -> str:
        return self._captions[row].as_py() or ""

    def label(self, row: int) -> float:
        return float(self._labels[row])

    def blocks(self) -> Sequence[range]:
        return [range(a, b) for a, b in zip(self._starts[:-1], self._starts[1:], strict=True)]

    def image(self, row: int, side: int) -> bytes:
        number = bisect_right(self._starts, row) - 1
        with self._lock:  # so that no two threads read the same group
            group = self._group(number)
        if isinstance(group, UnreadableImage):
            raise group
        data = group[IMAGES[side]][row - self._starts[number]].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise UnreadableImage("there is none")
        return data

    def where(self, row: int) -> str:
        file = self._groups[bisect_right(self._starts, row) - 1].path
        first = next(
            start for start, group in zip(self._starts, self._groups, strict=False) if group.path == file
        )
        return f"row {row - first} of {file}"

    def images_are(self) -> str:
        groups = [(Path(group.path).name, group.row_groups[0]) for group in self._groups]
        return str([(name, group.num_rows, group.total_byte_size) for name, group in groups])

    def __str__(self) -> str:
        return self.path

    def _read_images(self, number: int) -> pa.Table | UnreadableImage:
        """The images of a row group."""
        group = self._groups[number]
        try:
            return group.to_table(columns=list(IMAGES))
        except (pa.ArrowException, OSError) as error:
            if not self._local and not isinstance(error, pa.ArrowException):
                raise  # the network: another try may work, so no row is given up for it
            return UnreadableImage(f"row group {group.row_groups[0].id} is damaged ({first_line(error)})")


class PickaPicHub(PickaPicFiles):
    """Pick-a-Pic on the Hugging Face hub, read where it lies: nothing is kept on the disk.

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


def _find(path: str) -> tuple[list[str], Any]:
    """The files in the order of their names, and the file system, None for the local one."""
    try:
        system, root = fsspec.core.url_to_fs(path)
        folder = system.isdir(root)
        pattern = f"{root.rstrip('/')}/*.parquet" if folder else root
        files = sorted(map(str, system.glob(pattern))) if folder or "*" in root else [root]
        there = bool(files) and system.isfile(files[0])
    except Exception as error:  # each file system raises errors of its own
        raise ConfigError(
            f"{path} cannot be reached ({first_line(error)}): check the name and the network, "
            "or download the files and give their folder"
        ) from error
    if not there:
        raise ConfigError(f"{path} has no Parquet file: give a file, a folder of *.parquet, or a pattern")
    splits = {found[1] for file in files if (found := SPLIT.search(file))}
    if len(splits) > 1:
        raise ConfigError(
            f"{path} holds the files of several splits ({', '.join(sorted(splits))}): give a pattern for "
            "one of them, such as train-*.parquet"
        )
    return files, None if "file" in system.protocol else system


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
            f"{file.path} is no Parquet file that can be read ({first_line(error)}): load it again"
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
            "jpg_1 is, 0.5 for a tie), or save the images as files and give FolderPairs a table of them"
        )
    for name in IMAGES:
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:  # an image of datasets
            kind = kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
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
