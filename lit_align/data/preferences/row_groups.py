"""Parquet files, here or on the hub, of which a few row groups with images are held."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
from pyarrow import dataset, fs

from lit_align.data.files import check_splits
from lit_align.data.images import UnreadableImage
from lit_align.errors import ConfigError, first_line

SPLIT = re.compile(r"([^/]+)-\d{5}-of-\d{5}[^/]*$")
"""How ``datasets`` names the files of a split."""

OPENED_AT_ONCE = 16
"""Files whose light columns are read at the same time: over a network most of the time is waiting."""


class RowGroups:
    """The images of Parquet files, read by whole row groups when one of a group is asked for.

    Args:
        files: Fragments of a dataset.
        columns: Those with images.
        held: Row groups that are held.
        local: Whether the files are on this machine.
    """

    def __init__(self, files: Iterable[Any], columns: Sequence[str], held: int, local: bool) -> None:
        self.columns, self.held, self.local = list(columns), held, local
        self.groups = [
            group for file in files for group in file.split_by_row_group() if group.row_groups[0].num_rows
        ]
        self.starts = [0, *accumulate(group.row_groups[0].num_rows for group in self.groups)]
        self._make_cache()

    def _make_cache(self) -> None:
        self.group = lru_cache(self.held)(self._read)
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("group", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_cache()  # in a process that is spawned

    def blocks(self) -> list[range]:
        """The rows of each group."""
        return [range(a, b) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]

    def image(self, row: int, column: str) -> bytes:
        """An encoded image.

        Raises:
            UnreadableImage: It is not there.
        """
        number = bisect_right(self.starts, row) - 1
        with self._lock:  # so that no two threads read the same group
            group = self.group(number)
        if isinstance(group, UnreadableImage):
            raise group
        data = group[column][row - self.starts[number]].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise UnreadableImage("there is none")
        return data

    def where(self, row: int) -> str:
        """Where a row is stored, for messages."""
        file = self.groups[bisect_right(self.starts, row) - 1].path
        first = next(
            start for start, group in zip(self.starts, self.groups, strict=False) if group.path == file
        )
        return f"row {row - first} of {file}"

    def __str__(self) -> str:
        """What changes with the files, as far as that can be told without reading images."""
        groups = [(Path(group.path).name, group.row_groups[0]) for group in self.groups]
        return str([(name, group.num_rows, group.total_byte_size) for name, group in groups])

    def _read(self, number: int) -> pa.Table | UnreadableImage:
        """The images of a row group."""
        group = self.groups[number]
        try:
            return group.to_table(columns=self.columns)
        except (pa.ArrowException, OSError) as error:
            if not self.local and not isinstance(error, pa.ArrowException):
                raise  # the network: another try may work, so no row is given up for it
            return UnreadableImage(f"row group {group.row_groups[0].id} is damaged ({first_line(error)})")


def open_parquet(path: str) -> tuple[list[Any], bool]:
    """Fragments of the Parquet files that a path or a URL means, and whether they are on this machine.

    Raises:
        ConfigError: There is none, or they are of several splits, or the place cannot be reached.
    """
    names, system = _find(path)
    local = system is None
    place = fs.LocalFileSystem(use_mmap=True) if local else fs.PyFileSystem(fs.FSSpecHandler(system))
    return [dataset.ParquetFileFormat().make_fragment(name, filesystem=place) for name in names], local


def read_light(files: Sequence[Any], read: Callable[[Any], pa.Table]) -> pa.Table:
    """The columns of files that are no images, in memory."""
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        return pa.concat_tables(pool.map(read, files)).combine_chunks()


def holds_images(kind: pa.DataType) -> bool:
    """Whether a type is that of encoded images: binary, or an image of ``datasets``."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return any(of(kind) for of in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view))


def _is_table(name: str) -> bool:
    return name.endswith(".parquet") and not Path(name).name.startswith(".")


def _find(path: str) -> tuple[list[str], Any]:
    """The files in the order of their names, and the file system, None for the local one."""
    try:
        system, root = fsspec.core.url_to_fs(path)
        folder, files = system.isdir(root), [root]
        if folder or "*" in root:
            found = map(str, system.ls(root, detail=False) if folder else system.glob(root))
            files = sorted(name for name in found if not folder or _is_table(name))
        there = bool(files) and system.isfile(files[0])
    except Exception as error:  # each file system raises errors of its own
        raise ConfigError(
            f"{path} cannot be reached ({first_line(error)}): check the name and the network, "
            "or download the files and give their folder"
        ) from error
    if not there:
        raise ConfigError(f"{path} has no Parquet file: give a file, a folder of *.parquet, or a pattern")
    splits = {named[1] for file in files if (named := SPLIT.search(file))}
    if len(splits) > 1:
        raise ConfigError(
            f"{path} holds the files of several splits ({', '.join(sorted(splits))}): give a pattern for "
            "one of them, such as train*.parquet"
        )
    if folder:
        check_splits(path, Path(root), [Path(file) for file in files])
    return files, None if "file" in system.protocol else system
