"""Readers of one file each: a whole table in memory, or an error that names the file."""

import difflib
import io
import json
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet
from pyarrow.json import ReadOptions, read_json

from lit_align.data.files import read_utf8, unreadable
from lit_align.errors import ConfigError


def read_lines(file: Path) -> pa.Table:
    """Each line as ``text``."""
    # Not splitlines(): it also splits at characters such as U+2028, which stand inside real prompts.
    text = read_utf8(file).replace("\r\n", "\n").replace("\r", "\n")
    return pa.table({"text": text.removesuffix("\n").split("\n")})


def read_delimited(file: Path, texts: list[str], parse: csv.ParseOptions, form: str) -> pa.Table:
    """Columns under a header line, named ``form`` in errors; ``texts`` stay text, whatever they look like."""
    data = read_utf8(file).encode()
    convert = csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
    try:
        return csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)
    except pa.ArrowException as error:
        raise unreadable(file, form, error) from error


def read_jsonl(file: Path, column: str) -> pa.Table:
    """Each line a JSON object that has the column."""
    data = read_utf8(file).encode()
    one_block = ReadOptions(block_size=len(data) + 1)  # a line must fit into a block
    try:
        table = read_json(io.BytesIO(data), read_options=one_block)
    except pa.ArrowException as error:
        raise unreadable(file, "JSON lines", error) from error
    check_columns(table.column_names, [column], str(file))
    return table


def read_json_list(file: Path, column: str) -> pa.Table:
    """Each entry of one list: a text, which becomes ``text``, or an object that has the column."""
    try:
        rows = json.loads(read_utf8(file))
        if rows and isinstance(rows, list) and all(isinstance(row, str) for row in rows):
            return pa.table({"text": rows})
        table = pa.Table.from_pylist(rows)
    except (ValueError, LookupError, AttributeError, TypeError, pa.ArrowException) as error:
        raise unreadable(file, "one JSON list of texts or of objects that are alike", error) from error
    check_columns(table.column_names, [column], str(file))
    return table


def open_parquet(file: Path) -> parquet.ParquetFile:
    """The file's schema and row groups; nothing of its rows is read."""
    try:
        return parquet.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "Parquet", error) from error


def read_parquet(file: Path, columns: list[str] | None) -> pa.Table:
    """Some columns, or all."""
    try:
        return open_parquet(file).read(columns)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, "Parquet", error) from error


def check_columns(names: list[str], wanted: list[str], name: str) -> None:
    """Refuse to go on without a column.

    Args:
        names: The columns that are there.
        wanted: Those that are asked for.
        name: What error messages call the place.

    Raises:
        ConfigError: One is not there; with the name that may have been meant.
    """
    small = {there.lower(): there for there in names}
    for column in wanted:
        if column not in names:
            near = difflib.get_close_matches(column.lower(), small, n=1)
            hint = f"did you mean column: {small[near[0]]}?" if near else "set column to one of them"
            raise ConfigError(f"{name} has no column '{column}', only {', '.join(names) or 'none'}: {hint}")
