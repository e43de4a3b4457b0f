"""Where prompts come from: tables made in Python, files, or the hub.

How to read published sets as they are distributed (``keep`` chooses the other columns that travel along):

============  ==========================================================  ==================================
set           files                                                       source
============  ==========================================================  ==================================
HPDv2         ``train.json``: a list of objects with ``prompt``;          ``JSONPrompts``; a pattern such as
              ``benchmark/anime.json`` and 3 more styles: lists of texts  ``benchmark/*.json`` joins files
GenEval       ``*_metadata.jsonl`` with ``prompt`` and what to count      ``JSONLPrompts``
Pick-a-Pic    Parquet shards with ``caption``, one row per pair           ``ParquetPrompts``, ``keep: []``
DiffusionDB   ``metadata.parquet`` with ``prompt``, one row per image    ``ParquetPrompts``, ``keep: []``
PartiPrompts  ``PartiPrompts.tsv``: ``Prompt Category Challenge Note``    ``TSVPrompts``, column ``Prompt``
DrawBench     CSV with ``Prompts`` and ``Category``                       ``CSVPrompts``, column ``Prompts``
animals       ship with the package                                       ``Animals``
============  ==========================================================  ==================================
"""

import json
import re
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
from lightning.pytorch.utilities import rank_zero_warn
from pyarrow import parquet

from lit_align.data.files import (
    check_columns,
    check_lengths,
    find_files,
    read_delimited,
    unreadable,
)
from lit_align.data.loading import counted
from lit_align.data.prompts.forms import FileForm
from lit_align.errors import ConfigError, first_line

UTF8 = {"encoding": "utf-8-sig"}
"""How text is read; with this name the JSON builder of ``datasets`` refuses bytes that are not UTF-8."""

TEXT = FileForm("UTF-8 text", ".txt", "text", UTF8)
JSONL = FileForm("JSON lines", ".jsonl", "json", UTF8)
TABLES = {
    ".csv": "CSVPrompts",
    ".tsv": "TSVPrompts",
    ".jsonl": "JSONLPrompts",
    ".json": "JSONPrompts",
    ".parquet": "ParquetPrompts",
}
"""Endings of files that are no text with a prompt a line, and the sources that read them."""

LISTED = re.compile(r'\s*(?:\d+[.)]|[-*•])\s|\s*"[^"]*",?\s*$')
"""A line with a number or a bullet before the prompt, or in quotes."""

JSON = FileForm("one JSON list of texts or of objects that are alike", ".json", "json", UTF8)


class PromptSource(ABC):
    """Numbered prompts with optional further columns; YAML can name a subclass of yours too.

    Attributes:
        distinct: Promises that no prompt is empty or there twice, so that the source need not be read as a
            whole.
    """

    distinct: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def prompt(self, row: int) -> str:
        """The prompt of a row, ``0 <= row < len(self)``."""

    def prompts(self, rows: range) -> list[str]:
        """The prompts of neighbouring rows; to be overridden where there is a faster way than one by one."""
        return [self.prompt(row) for row in rows]

    def columns(self, row: int) -> dict[str, Any]:
        """The other values of a row, under the same names for every row. Rewards receive them."""
        return {}

    def fingerprint(self) -> str | None:
        """What changes with the prompts, for an index on disk; without it, every start makes the index."""
        return None

    def __str__(self) -> str:
        """What error messages call this source."""
        return type(self).__name__


class TablePrompts(PromptSource):
    """Rows of an Arrow table; the base of the sources below, and a way to give a table made in Python.

    Args:
        table: The rows.
        column: The column with the prompts.
        name: What error messages call this source.
        keep: The other columns that travel with the prompts; all of them if not given.
        files: Fingerprint of the files that the table is mapped from, if it is.

    Raises:
        ConfigError: The table is empty, has no such column, names one twice, or the column holds no text; of
            the sources below, a file is missing, empty, not UTF-8 or not of its form.
    """

    def __init__(
        self,
        table: pa.Table,
        column: str,
        name: str = "table",
        keep: list[str] | None = None,
        files: str | None = None,
    ) -> None:
        self.name = name
        names = table.column_names
        check_columns(names, [column, *(keep or ())], name)
        if len(set(names)) < len(names):
            raise ConfigError(f"{name} has two columns of one name among {', '.join(names)}: rename one")
        if table.num_rows == 0:
            raise ConfigError(f"{name} has no rows: give a source with at least one prompt")
        kind = table.schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if pa.types.is_string_view(kind):  # as Polars may write it; what reads rows here knows the others
            table = table.set_column(
                names.index(column), column, table.column(column).cast(pa.large_string())
            )
            kind = pa.large_string()
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            remedy = "give each prompt a row" if pa.types.is_list(kind) else "name the prompts' column"
            raise ConfigError(f"column '{column}' of {name} holds {kind}, not text: {remedy}")
        self._prompts = table.column(column)
        check_lengths(self._prompts, name)
        others = names if keep is None else keep
        self._others = {other: table.column(other) for other in others if other != column}
        self._fingerprint = files and f"{files}:{column}"

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt(self, row: int) -> str:
        return self._prompts[row].as_py() or ""

    def prompts(self, rows: range) -> list[str]:
        return [prompt or "" for prompt in self._prompts[rows.start : rows.stop].to_pylist()]

    def columns(self, row: int) -> dict[str, Any]:
        return {name: _plain(values[row].as_py(), values.type) for name, values in self._others.items()}

    def fingerprint(self) -> str | None:
        return self._fingerprint

    def __str__(self) -> str:
        return self.name


def _plain(value: Any, kind: pa.DataType) -> Any:
    """A value in which JSON of several types, such as ``["left of", 0]``, is no longer text."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        try:
            return json.loads(value)
        except ValueError:  # as 0001, which datasets takes for JSON and stores as it is
            return value
    if pa.types.is_list(kind):
        return [_plain(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _plain(value[field.name], field.type) for field in kind}
    return value


class TextPrompts(TablePrompts):
    """UTF-8 text with one prompt a line.

    Args:
        path: A file, a folder of ``.txt`` files, or a pattern such as ``prompts/*.txt``.
    """

    def __init__(self, path: str) -> None:
        for ending, kind in TABLES.items():
            if path.lower().endswith(ending):
                raise ConfigError(
                    f"{path} has the name of a table, and TextPrompts would read each line as a prompt: "
                    f"give {kind} as the source, or a file with another ending"
                )
        table, files = TEXT.read(path)
        super().__init__(table, "text", path, files=files)
        start = self.prompt(0).strip()
        if start == "[" or start.startswith('["') or start.lstrip("[ ").startswith('{"'):
            raise ConfigError(
                f"{path} begins with JSON, and TextPrompts would read each line as a prompt: give "
                "JSONLPrompts as the source, or JSONPrompts where the file is one list"
            )
        first = self.prompts(range(min(3, len(self))))
        if len(first) > 1 and all(map(LISTED.match, first)):
            rank_zero_warn(
                f"the lines of {path} are those of a list, such as {first[0]!r}, and TextPrompts takes a "
                "whole line as the prompt: delete what does not belong to it"
            )
        if "\t" in start:
            rank_zero_warn(
                f"the first line of {path} has a tab, which TextPrompts takes as part of the prompt: if the "
                "file is a table, name it *.tsv, and give TSVPrompts as the source"
            )
        if hashes := pc.sum(pc.starts_with(self._prompts, "#")).as_py():
            rank_zero_warn(
                f"{counted(hashes, 'line')} of {path} with a # at the start, which TextPrompts reads as "
                "prompts: delete them if they are comments"
            )


class CSVPrompts(TablePrompts):
    """UTF-8 CSV with a header line, read into memory.

    Args:
        path: The file.
        column: The column with the prompts.
        texts: Other columns that are text whatever they look like: 0001 is a name, not 1.
    """

    def __init__(self, path: str, column: str = "prompt", texts: list[str] | None = None) -> None:
        table = read_delimited(path, ".csv", [column, *(texts or ())], delimiter=",", quoted=True)
        check_columns(table.column_names, [column], f"the first line of {path}")
        super().__init__(table, column, path)


class TSVPrompts(TablePrompts):
    """UTF-8 text with a header line, tabs between the columns and no quoting, read into memory.

    A quote is a character like any other: prompts such as ``"STOP" painted on a wall`` stay whole.

    Args:
        path: The file.
        column: The column with the prompts.
    """

    def __init__(self, path: str, column: str = "prompt") -> None:
        table = read_delimited(path, ".tsv", [column], delimiter="\t", quoted=False)
        check_columns(table.column_names, [column], f"the first line of {path}")
        super().__init__(table, column, path)


class JSONLPrompts(TablePrompts):
    """UTF-8 text with one JSON object a line.

    Args:
        path: A file, a folder of ``.jsonl`` files, or a pattern such as ``shards/*.jsonl``.
        column: The key of the prompts; the others travel with them.
    """

    def __init__(self, path: str, column: str = "prompt") -> None:
        table, files = JSONL.read(path)
        super().__init__(table, column, path, files=files)


class JSONPrompts(TablePrompts):
    """A UTF-8 file that is one JSON list, of texts or of objects.

    Args:
        path: A file, a folder of ``.json`` files, or a pattern such as ``benchmark/*.json``.
        column: The key of the prompts in objects; the others travel with them, numbers with ten decimals.
            Texts need none.
    """

    def __init__(self, path: str, column: str = "prompt") -> None:
        table, files = JSON.read(path)
        column = "text" if table.column_names == ["text"] else column  # what a list of texts becomes
        super().__init__(table, column, path, files=files)


class ParquetPrompts(TablePrompts):
    """Parquet files.

    Args:
        path: A file, a folder of ``.parquet`` files, or a pattern such as ``train-*.parquet``.
        column: The column with the prompts.
        keep: The other columns that travel with the prompts; all of them if not given. Give ``[]`` where the
            others are large, such as images: what is kept is copied into the cache.
    """

    def __init__(self, path: str, column: str = "prompt", keep: list[str] | None = None) -> None:
        columns = None if keep is None else [column, *keep]
        for file in find_files(path, ".parquet"):
            try:
                names = parquet.read_schema(file).names
            except (pa.ArrowException, OSError) as error:
                raise unreadable(file, "Parquet", first_line(error)) from error
            check_columns(names, columns or [column], str(file))
        table, files = FileForm("Parquet", ".parquet", "parquet", {"columns": columns}, text=False).read(path)
        super().__init__(table, column, path, keep, files)
