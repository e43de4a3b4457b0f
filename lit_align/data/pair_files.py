"""Preference data in Pick-a-Pic's Parquet files, here or on the hub, of which a few row groups are held."""

import difflib
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
from pyarrow import parquet

from lit_align.data.files import first_line
from lit_align.data.pairs import HeldOut, PairSource, UnreadableImage
from lit_align.data.shapes import ShapesPromptSet
from lit_align.data.sources import PromptSource
from lit_align.errors import ConfigError
from lit_align.shapes import PICK

IMAGES = ("jpg_0", "jpg_1")
LIGHT = ("caption", "label_0", "has_label")
SPLIT = re.compile(r"([^/]+)-\d{5}-of-\d{5}[^/]*$")
"""How ``datasets`` names the files of a split."""
OPENED_AT_ONCE = 16
"""Files whose light columns are read at the same time: over a network, waiting takes most of it."""


class PickaPicFiles(PairSource):
    """Parquet files in the schema of Pick-a-Pic v1 and v2 (Kirstain et al. 2023).

    At the start, the columns ``caption``, ``label_0`` and ``has_label`` are read: about 100 bytes a row.
    Images are read by whole row groups, when an image of one is asked for, and the last few are held. Each
    rank reads all row groups, as its share of a batch lies scattered in them.

    Args:
        path: A file, a folder with ``*.parquet``, or a pattern with ``*``; also a URL that fsspec reads
            (``hf://``, ``s3://``).
        row_groups: Row groups that are held, and mixed in the training order. More mix better and take more
            memory on every rank: 335 GB of 959,040 rows, as Pick-a-Pic v2 has, is .35 MB a row.

    Raises:
        ConfigError: There is no such file, it is not Parquet, or a column is missing or of another type.
    """

    def __init__(self, path: str, row_groups: int = 4) -> None:
        if row_groups < 1:
            raise ConfigError(f"row_groups is {row_groups}: give at least 1")
        self.path, self.mixed = path, row_groups
        self._files, self._system = _find(path)
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            parts = list(pool.map(self._read_light, self._files))
        self._footers = [footer for footer, _ in parts]
        light = pa.concat_tables([table for _, table in parts]).combine_chunks()
        if not len(light):
            raise ConfigError(f"{path} has no rows: give files with at least one pair")
        self._captions = light["caption"]
        self._labels = _verdicts(light)
        groups = [
            (file, g) for file, footer in enumerate(self._footers) for g in range(footer.num_row_groups)
        ]
        self._groups = [(f, g) for f, g in groups if self._footers[f].row_group(g).num_rows]
        sizes = [self._footers[file].row_group(g).num_rows for file, g in self._groups]
        self._starts = [0, *accumulate(sizes)]
        self._held: OrderedDict[int, pa.Table | UnreadableImage] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict(), "_lock": None}  # for processes that are spawned

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_lock": Lock()}

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
        group = self._group(number)
        if isinstance(group, UnreadableImage):
            raise group
        data = group[IMAGES[side]][row - self._starts[number]].as_py()
        if data is None:
            raise UnreadableImage("there is none")
        return data

    def where(self, row: int) -> str:
        number = bisect_right(self._starts, row) - 1
        file, group = self._groups[number]
        first = self._starts[number] - sum(self._footers[file].row_group(g).num_rows for g in range(group))
        return f"row {row - first} of {self._files[file]}"

    def images_are(self) -> str:
        groups = [(f, self._footers[f].row_group(g)) for f, g in self._groups]
        return str(
            [(Path(self._files[f]).name, group.num_rows, group.total_byte_size) for f, group in groups]
        )

    def __str__(self) -> str:
        return self.path

    def _group(self, number: int) -> pa.Table | UnreadableImage:
        """The images of a row group; read by one thread at a time, so that none is read twice."""
        with self._lock:
            if number not in self._held:
                while len(self._held) >= self.mixed:
                    self._held.popitem(last=False)
                self._held[number] = self._read_images(*self._groups[number])
            self._held.move_to_end(number)
            return self._held[number]

    def _read_images(self, file: int, group: int) -> pa.Table | UnreadableImage:
        try:
            with self._open(self._files[file], metadata=self._footers[file]) as shard:
                return shard.read_row_group(group, columns=list(IMAGES))
        except (pa.ArrowException, OSError) as error:
            if self._system is not None and not isinstance(error, pa.ArrowException):
                raise  # the network: another try may work, so no row is given up for it
            return UnreadableImage(f"row group {group} is damaged ({first_line(error)})")

    def _read_light(self, file: str) -> tuple[Any, pa.Table]:
        try:
            with self._open(file) as shard:
                _check_columns(file, shard.schema_arrow)
                names = [name for name in LIGHT if name in shard.schema_arrow.names]
                table = shard.read(columns=names)
        except ConfigError:
            raise
        except Exception as error:  # each file system raises errors of its own
            raise ConfigError(
                f"{file} is no Parquet file that can be read ({first_line(error)}): load it again"
            ) from error
        if "has_label" not in names:
            table = table.append_column("has_label", pa.array(np.ones(len(table), bool)))
        wanted = {"caption": pa.large_string(), "label_0": pa.float64(), "has_label": pa.bool_()}
        try:
            return shard.metadata, table.select(LIGHT).cast(pa.schema(wanted))
        except pa.ArrowException as error:
            kinds = ", ".join(f"{name}: {kind}" for name, kind in wanted.items())
            raise ConfigError(f"{file}: {first_line(error)}; Pick-a-Pic's columns are {kinds}") from error

    @contextmanager
    def _open(self, file: str, metadata: Any = None) -> Iterator[parquet.ParquetFile]:
        if self._system is None:
            with parquet.ParquetFile(file, metadata=metadata, memory_map=True) as shard:
                yield shard
        else:
            with (
                self._system.open(file, "rb") as opened,
                parquet.ParquetFile(opened, metadata=metadata, pre_buffer=True) as shard,
            ):
                yield shard


class PickaPicHub(PickaPicFiles):
    """Pick-a-Pic on the Hugging Face hub, read where it lies: nothing is kept on the disk.

    Whoever trains for more than a pass, or on several ranks, should download it
    (``hf download --repo-type dataset``) and use :class:`PickaPicFiles`.

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
        there = bool(files) and (system.isfile(files[0]))
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


def _check_columns(file: str, schema: pa.Schema) -> None:
    for name in ("caption", *IMAGES, "label_0"):
        if name not in schema.names:
            near = difflib.get_close_matches(name, schema.names, n=1)
            hint = f" (is it '{near[0]}'?)" if near else ""
            there = ", ".join(schema.names)
            raise ConfigError(
                f"{file} has no column '{name}'{hint}, only {there}: Pick-a-Pic's schema needs it"
            )
    for name in IMAGES:
        kind = schema.field(name).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ConfigError(f"column '{name}' of {file} holds {kind}, not encoded images (binary)")


def _verdicts(light: pa.Table) -> "np.ndarray[Any, np.dtype[np.float64]]":
    labels = light["label_0"].to_numpy().copy()
    labels[~light["has_label"].fill_null(False).to_numpy()] = np.nan
    return labels
