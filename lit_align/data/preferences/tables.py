"""Preference data as it is published: Parquet with images in it, or tables with the names of image files."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from lit_align.data.files import (
    check_columns,
    check_lengths,
    find_files,
    read_delimited,
)
from lit_align.data.images import UnreadableImage, read_inside
from lit_align.data.preferences.columns import KNOWN, PairColumns, known
from lit_align.data.preferences.row_groups import RowGroups, holds_images, open_parquet, read_light
from lit_align.data.preferences.source import PairSource, states_of
from lit_align.data.prompts.sources import JSON, JSONL
from lit_align.errors import ConfigError, first_line, tell, user_path

FORMS = (".parquet", ".jsonl", ".json", ".csv")


class PreferenceFiles(PairSource):
    """Pairs in the schema of published preference data, read without conversion.

    The columns are known by their names for open-image-preferences, HPDv2, HPDv3, ImageRewardDB, Rapidata and
    the table of :class:`FolderPairs`; ``columns`` says what others mean. Of a prompt with several images all
    pairs are taken whose ranks differ. Images in Parquet files are read by row groups, of which a few are
    held; those in files of their own when their turn comes.

    Args:
        path: A ``.parquet``, ``.jsonl``, ``.json`` or ``.csv`` file, a folder or a pattern of such files of
            one kind; Parquet also by a URL that fsspec reads (``hf://``, ``s3://``).
        columns: What the columns mean; by default that of a published set.
        folder: Where the files of images are; that of the table if not given.
        margin: Of votes: how much more of them the winner must have, as a share of all; below it neither is
            preferred.
        row_groups: Row groups with images that are held, and mixed in the training order.

    Raises:
        ConfigError: There is no such file, it cannot be read, its columns are unknown or missing, a number in
            it is none, or the first pair's images are not there.
    """

    def __init__(
        self,
        path: str,
        columns: PairColumns | None = None,
        folder: str | None = None,
        margin: float = 0.0,
        row_groups: int = 4,
    ) -> None:
        if row_groups < 1:
            raise ConfigError(f"row_groups is {row_groups}: give at least 1")
        if not 0 <= margin <= 1:
            raise ConfigError(f"margin is {margin}: give a share from 0 to 1")
        self.path, self.mixed = path, row_groups
        ending = _ending(path)
        self._rows: RowGroups | None = None
        if ending == ".parquet":
            light, columns = self._read_parquet(columns, row_groups)
        else:
            light = _read_table(path, ending, [columns] if columns else KNOWN.values())
            columns = columns or known(light.column_names, path)
            check_columns(light.column_names, list(columns.names().values()), path, "columns")
        if margin and columns.first_votes is None:
            raise ConfigError(f"margin is {margin}, and {path} has no votes: take it out")
        self.columns = columns
        self.folder = user_path(folder) if folder else _folder_of(path, named=self._rows is None)
        light = _with_text(light, columns.prompt)
        check_lengths(light[columns.prompt], path)
        pairs = list(columns.pairs(light, margin, path))
        if not pairs:
            raise ConfigError(f"{path} has no pairs: give files with at least one")
        self._places = np.array([(*pair.rows, *pair.items) for pair in pairs], np.int32)
        self._labels = np.array([pair.label for pair in pairs])
        self._order()
        self._light = light
        self._check_first()
        named = [f"{name}: {column}" for name, column in columns.names().items()]
        tell(f"{path}: {len(pairs)} pairs of {len(light)} rows, by the columns {', '.join(named)}")

    def _read_parquet(self, columns: PairColumns | None, row_groups: int) -> tuple[pa.Table, PairColumns]:
        """The columns of Parquet files that are no images, and what they mean."""
        files, local = open_parquet(self.path)
        try:
            schema = files[0].physical_schema
            columns = columns or known(schema.names, self.path)
            check_columns(schema.names, list(columns.names().values()), self.path, "columns")
            stored = [name for name in columns.holding_images if holds_images(schema.field(name).type)]
            light = [name for name in dict.fromkeys(columns.names().values()) if name not in stored]
            table = read_light(files, lambda file: file.to_table(columns=light))
        except (pa.ArrowException, OSError, KeyError) as error:
            raise ConfigError(
                f"{self.path} holds Parquet files that cannot be read together ({first_line(error)}): load "
                "them again"
            ) from error
        if stored:
            self._rows = RowGroups(files, stored, row_groups, local)
        return table, columns

    def _order(self) -> None:
        """Pairs in the order of their row groups, so that each is read once a pass."""
        first = self._places[:, 0]
        if self._rows is not None and (np.diff(first) < 0).any():
            order = np.argsort(first, kind="stable")
            self._places, self._labels = self._places[order], self._labels[order]

    def _check_first(self) -> None:
        """Refuse a table whose first image files are not there: the folder is another."""
        if self._rows is not None:
            return
        for side in (0, 1):
            try:
                self.image(0, side)
            except UnreadableImage as error:
                raise ConfigError(
                    f"{self.where(0)}: {error}; names of images are relative to {self.folder.absolute()}; "
                    "give another under folder"
                ) from error

    def __len__(self) -> int:
        return len(self._labels)

    def prompt(self, row: int) -> str:
        return str(self._light[self.columns.prompt][int(self._places[row, 0])].as_py() or "")

    def label(self, row: int) -> float:
        return float(self._labels[row])

    def image(self, row: int, side: Literal[0, 1] | int) -> bytes:
        place, item = int(self._places[row, side]), int(self._places[row, 2 + side])
        column = self._column(item)
        if self._rows is not None and column in self._rows.columns:
            return self._rows.image(place, column)
        return read_inside([self.folder], self._name(column, place, item))

    def _column(self, item: int) -> str:
        """The column of an image, by its place in a pair or a list."""
        return self.columns.images or self.columns.image or self.columns.holding_images[item]

    def _name(self, column: str, place: int, item: int) -> str:
        """The name of an image's file."""
        held = self._light[column][place].as_py()
        if self.columns.images is not None:
            held = (json.loads(held) if isinstance(held, str) else held)[item]
        held = held.get("path") if isinstance(held, dict) else held
        return str(held or "")

    def blocks(self) -> Sequence[range]:
        if self._rows is None:
            return [range(len(self))]
        groups = np.searchsorted(self._rows.starts, self._places[:, 0], side="right")
        edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(self)]
        return [range(start, stop) for start, stop in pairwise(edges)]

    def where(self, row: int) -> str:
        place = int(self._places[row, 0])
        return self._rows.where(place) if self._rows is not None else f"row {place} of {self.path}"

    def images_are(self) -> str:
        if self._rows is not None:
            return str(self._rows)
        images = (zip(row[:2], row[2:], strict=True) for row in self._places.tolist())
        named = (self._name(self._column(item), place, item) for pair in images for place, item in pair)
        return states_of(self.folder, named)

    def __str__(self) -> str:
        return self.path


def _ending(path: str) -> str:
    """Of what form the files are that a path means."""
    place = path.partition("://")[2] or path
    for ending in FORMS:
        if place.endswith(ending):
            return ending
    if "://" in path:
        return ".parquet"
    there = [
        ending for ending in FORMS if user_path(path).is_dir() and any(user_path(path).glob(f"*{ending}"))
    ]
    if len(there) == 1:
        return there[0]
    held = f"holds {' and '.join(there)} files" if there else "is not a table"
    raise ConfigError(f"{path} {held}: give a file or a pattern of {', '.join(FORMS)}")


def _read_table(path: str, ending: str, columns: Iterable[PairColumns]) -> pa.Table:
    if ending == ".csv":  # prompts and names of files are text, whatever they look like: 0001 is not 1
        texts = [name for one in columns for name in (one.prompt, *one.holding_images)]
        return read_delimited(path, ending, texts, delimiter=",", quoted=True)
    return (JSONL if ending == ".jsonl" else JSON).read(path)[0]


def _folder_of(path: str, named: bool) -> Path:
    """Where a table lies; those with names of images lie in one folder, or a name would mean several."""
    if "://" in path:
        return Path()
    first, *others = dict.fromkeys(file.parent for file in find_files(path, _ending(path)))
    if named and others:
        raise ConfigError(
            f"{path} means tables in several folders, such as {first} and {others[0]}, and names of images "
            "are relative to one: give it under folder, or one table"
        )
    return first


def _with_text(table: pa.Table, name: str) -> pa.Table:
    """The table with a column of prompts as plain text, whatever way of storing text a program chose.

    Raises:
        ConfigError: The column holds something else.
    """
    kind = table.schema.field(name).type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    ways = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    if not any(way(text) for way in ways):
        raise ConfigError(f"columns: prompt names a column of {kind}, not text")
    plain = table[name].cast(pa.large_string())
    return table.set_column(table.column_names.index(name), name, plain)
