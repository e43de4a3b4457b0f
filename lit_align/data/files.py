"""How files and datasets are found and read, and what is said of those that cannot be."""

import csv
import difflib
import glob
import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.loading import counted
from lit_align.errors import ConfigError, first_line, user_path

MAX_PROMPT = 10_000
"""Bytes of a prompt. Text encoders read 77 tokens, a few 512 (some 2,500 characters); what is much longer is
a file without line breaks or a quote that is not closed, and takes memory in every table and index."""

PACKED = (
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x28\xb5\x2f\xfd",
    b"\x04\x22\x4d\x18",
    b"7z\xbc",
)
"""How files begin that gzip, bzip2, xz, zip, zstd, lz4 and 7z write. ``datasets`` would unpack them into its
cache whatever their names are, a thousand times as large."""

SPLIT = re.compile(r"(?:^|[_-])(train|val|valid|validation|test|dev)(?:$|[_.-])")
"""How names of files say of which split they are."""

SHARD = re.compile(r"-\d+-of-0*(\d+)\b")
"""How names of files say of how many they are one."""

DELIMITERS = (",", ";", "\t", "|")
"""What programs write between columns; spreadsheets write semicolons where the comma is in numbers."""

MAX_BLOCK = 2**31 - 1
"""Bytes of a CSV that pyarrow reads at once, at most."""

MAX_DEPTH = 500
"""Brackets inside of brackets in a line of JSON; at some thousands the reader of pyarrow ends the process."""


def find_files(path: str, ending: str) -> list[Path]:
    """The files that a path means, sorted by name.

    Args:
        path: A file, a folder, or a pattern such as ``shards/*.parquet``. Hidden files of a folder are not
            meant.
        ending: How the names of a folder's files end.

    Raises:
        ConfigError: There is none, or one of them is empty or may not be read.
    """
    if not path:
        raise ConfigError("path is empty: give the path of a file, or of a folder")
    if "://" in path:
        raise ConfigError(f"{path} is an address: download what is there, and give the path of the file")
    place = user_path(path)
    if place.is_dir():
        inside = (file for file in place.rglob(f"*{ending}") if file.is_file())
        files = [file for file in inside if not _is_hidden(file.relative_to(place))]
        check_splits(path, place, files)
        remedy = f"give the path of a file, or a folder with files whose names end in {ending}"
        missing = f"{path} is a folder without {ending} files: {remedy}"
    elif place.is_file():
        files = [place]
    else:
        files = [Path(name) for name in glob.glob(str(place), recursive=True) if Path(name).is_file()]
        missing = f"{path} does not exist (looked for {place.absolute()}): check the path"
        if place.exists():
            missing = f"{path} is a pipe or a device, not a file: save what it gives, and give that file"
    if not files:
        raise ConfigError(missing)
    for file in files:
        if not os.access(file, os.R_OK):
            raise ConfigError(f"{file} cannot be read: check its permissions")
        if file.stat().st_size == 0:
            remedy = "give a file with at least one prompt" if len(files) == 1 else "delete or restore it"
            raise ConfigError(f"{file} is empty: {remedy}")
    return sorted(files)


def _is_hidden(inside: Path) -> bool:
    """Whether people do not see a file: a checkpoint of Jupyter, or what macOS writes beside it."""
    return any(part.startswith(".") for part in inside.parts)


def check_splits(path: str, folder: Path, files: list[Path]) -> None:
    """Refuse a folder with the files of several splits, which would be read as one; tell of missing files.

    Raises:
        ConfigError: Its files are called ``train.txt`` and ``test.txt``, or ``color_train.txt`` and
            ``color_val.txt``, or are in folders of such names.
    """
    shards = [int(found[1]) for file in files if (found := SHARD.search(file.name))]
    if len(set(shards)) == 1 and len(shards) < shards[0]:
        rank_zero_warn(
            f"{path} holds {len(shards)} of {shards[0]} files by their names: the others are missing"
        )
    splits: dict[str, Path] = {}
    for file in files:
        inside = file.relative_to(folder)
        for name in (*inside.parts[:-1], inside.stem):
            if found := SPLIT.search(name.lower()):
                splits.setdefault(found[1], inside)
    if len(splits) > 1:
        (split, first), (_, second), *_ = splits.items()
        inside, name = (first.parent, "*") if first.parent.parts else (Path(), f"*{split}*")
        raise ConfigError(
            f"{path} holds the files of several splits, such as {first} and {second}: give one of them, or "
            f"a pattern such as {Path(path) / inside / name}{first.suffix}, and others under "
            "validation_source, test_source"
        )


def fingerprint(rows: Any, split: str = "train") -> str | None:
    """What tells a dataset's rows from others: split and files, with sizes and times; None without files."""
    files = [Path(entry["filename"]) for entry in rows.cache_files]
    facts = [f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    return hashlib.blake2b("\n".join([split, *facts]).encode()).hexdigest() if files else None


def read_delimited(path: str, ending: str, texts: list[str], delimiter: str, quoted: bool) -> pa.Table:
    """Columns under a header line, read into memory.

    Args:
        path: The file.
        ending: How its name ends.
        texts: Columns that stay text, whatever they look like.
        delimiter: What stands between the columns.
        quoted: Whether a field may stand in quotes, and then hold delimiters and line breaks.

    Raises:
        ConfigError: There is no such file, or more than one, or it is not of this form.
    """
    if len(files := find_files(path, ending)) > 1:
        raise ConfigError(f"{path} means {len(files)} files: give the path of a file")
    (file,), form = files, f"{ending[1:].upper()} with a header line"
    text = read_utf8(file)
    if quoted:
        _check_quotes(file, text, form)
    parse = pa.csv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
    )
    convert = pa.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string()))
    data = text.encode()
    # In one block: a row may not be longer than a block.
    whole = pa.csv.ReadOptions(block_size=min(max(len(data), 1), MAX_BLOCK))
    try:
        table = pa.csv.read_csv(io.BytesIO(data), whole, parse, convert)
    except pa.ArrowException as error:
        if found := re.search(r"(Expected \d+ columns, got \d+): (.*)", first_line(error)):
            remedy = "put quotes around prompts that hold a comma" if quoted else "give all rows as many"
            raise ConfigError(f"{file} is not {form} ({found[1]} in {found[2]!r}): {remedy}") from error
        raise unreadable(file, form, first_line(error)) from error
    (name, *others) = table.column_names
    if not others and (used := next((one for one in DELIMITERS if one != delimiter and one in name), None)):
        raise ConfigError(
            f"{file} has {used!r} between its columns, and {ending[1:].upper()} has {delimiter!r}: save it "
            "with these, and quotes around prompts that hold them"
        )
    return table


def _check_quotes(file: Path, text: str, form: str) -> None:
    """Refuse quotes that are not closed, which pyarrow would read over, and tell of rows of several lines."""
    rows, line, long = csv.reader(io.StringIO(text, newline=""), strict=True), 1, list[int]()
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        for _ in rows:
            long += [line] if rows.line_num > line else []
            line = rows.line_num + 1
    except csv.Error as error:
        raise ConfigError(
            f"{file} is not {form} ({error} in the row that starts in line {line}): close its quotes; "
            "a quote inside a quoted prompt is written twice"
        ) from error
    if long:
        rank_zero_warn(
            f"{counted(len(long), 'row')} of {file} with a line break in quotes, the first from line "
            f"{long[0]} on: if that is not meant, close the quotes"
        )


def read_utf8(file: Path) -> str:
    """The text of a file without its byte order mark.

    Raises:
        ConfigError: It is packed, or not UTF-8.
    """
    data = file.read_bytes()
    _check_packed(file, data[:8])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = f"byte {data[error.start]:#04x} in line {line}"
        raise ConfigError(f"{file} is not UTF-8 ({found}): save it as UTF-8") from error


def _check_packed(file: Path, start: bytes) -> None:
    if start.startswith(PACKED):
        raise ConfigError(
            f"{file} is compressed or a spreadsheet, not text: unpack it first, or save the sheet as CSV"
        )


def check_content(file: Path, lines: bool) -> None:
    """Refuse a text file that its reader must not see.

    Args:
        file: The file.
        lines: Whether it holds JSON lines.

    Raises:
        ConfigError: It is packed, or nested too deeply.
    """
    with file.open("rb") as opened:
        _check_packed(file, opened.read(8))
        opened.seek(0)
        for number, line in enumerate(opened if lines else (), start=1):
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
                raise ConfigError(
                    f"{file} has more than {MAX_DEPTH} nested brackets in line {number}: leave that value out"
                )


def _depth(line: bytes) -> int:
    """How many brackets of a line of JSON are open at a time."""
    deepest = depth = 0
    for bracket in re.findall(rb"[\[\]{}]", re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def check_lengths(prompts: pa.ChunkedArray, name: str) -> None:
    """Refuse prompts of more than :data:`MAX_PROMPT` bytes; reads their lengths alone.

    Args:
        prompts: A column of text.
        name: What error messages call the place.

    Raises:
        ConfigError: One is longer.
    """
    start = 0
    for chunk in prompts.chunks:
        values = chunk.dictionary if isinstance(chunk, pa.DictionaryArray) else chunk
        if (pc.max(pc.binary_length(values)).as_py() or 0) > MAX_PROMPT:
            lengths = pc.binary_length(chunk.cast(pa.large_string()) if values is not chunk else chunk)
            row = pc.index(pc.greater(lengths, MAX_PROMPT), True).as_py()
            raise ConfigError(
                f"the prompt in row {start + row} of {name} has {lengths[row].as_py()} bytes, more than "
                f"{MAX_PROMPT}: is a line break or the end of a quote missing?"
            )
        start += len(chunk)


def unreadable(file: Path, form: str, reason: str) -> ConfigError:
    """The error of a file that is not what it should be."""
    return ConfigError(f"{file} is not {form} ({reason}): repair it or choose another source class")


def check_columns(there: list[str], wanted: list[str], name: str, setting: str = "column") -> None:
    """Refuse to go on without a column.

    Args:
        there: The columns that are there.
        wanted: The columns that are needed.
        name: What error messages call the place.
        setting: What names the column.

    Raises:
        ConfigError: One is not there; with the name that may have been meant.
    """
    small = {column.lower(): column for column in there}
    for column in wanted:
        if column not in there:
            near = difflib.get_close_matches(column.lower(), small, n=1)
            meant = small[near[0]] if near else ""
            shown = meant if meant == meant.strip() else repr(meant)  # with the spaces that are in the file
            hint = f"did you mean {setting}: {shown}?" if near else f"set {setting} to one of them"
            raise ConfigError(f"{name} has no column '{column}', only {', '.join(there) or 'none'}: {hint}")
