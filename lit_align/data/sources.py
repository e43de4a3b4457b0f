"""Where prompts come from: text, CSV, JSON lines and Parquet files, or the hub."""

import difflib
import io
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from pyarrow import csv, json, parquet

from lit_align.errors import ConfigError


class PromptSource(ABC):
    """Numbered prompts with optional further columns; a subclass of yours can be named in YAML too.

    Attributes:
        distinct: Promises that no prompt is empty or there twice, so that the source is never read as a
            whole.
    """

    distinct: ClassVar[bool] = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def prompt(self, row: int) -> str:
        """The prompt of a row, ``0 <= row < len(self)``."""

    def columns(self, row: int) -> dict[str, Any]:
        """The other values of a row, under the same names for every row. They travel to the rewards."""
        return {}

    def __str__(self) -> str:
        """What error messages call this source."""
        return type(self).__name__


class TextPrompts(PromptSource):
    """A UTF-8 text file with one prompt a line.

    Args:
        path: The file.

    Raises:
        ConfigError: The file is missing, empty or not UTF-8.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Not splitlines(): it also splits at characters such as U+2028, which stand inside real prompts.
        self._lines = _read_utf8(path).replace("\r\n", "\n").removesuffix("\n").split("\n")

    def __len__(self) -> int:
        return len(self._lines)

    def prompt(self, row: int) -> str:
        return self._lines[row]

    def __str__(self) -> str:
        return self.path


class TablePrompts(PromptSource):
    """Rows of an Arrow table; the base of the sources below, and a way to give a table made in Python.

    Args:
        table: The rows.
        column: The column with the prompts; the others travel with them.
        name: What error messages call this source.

    Raises:
        ConfigError: The table is empty, has no such column, names one twice, or the column holds no text.
    """

    def __init__(self, table: pa.Table, column: str, name: str = "table") -> None:
        self.name = name
        names = table.column_names
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean column: {near[0]}?" if near else "set column to one of them"
            raise ConfigError(f"{name} has no column '{column}', only {', '.join(names) or 'none'}: {hint}")
        if len(set(names)) < len(names):
            raise ConfigError(f"{name} has two columns of one name among {', '.join(names)}: rename one")
        if table.num_rows == 0:
            raise ConfigError(f"{name} has no rows: give a source with at least one prompt")
        kind = table.schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(f"column '{column}' of {name} holds {kind}, not text: name the prompts' column")
        self._prompts = table.column(column)
        self._others = {other: table.column(other) for other in names if other != column}

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt(self, row: int) -> str:
        return self._prompts[row].as_py() or ""

    def columns(self, row: int) -> dict[str, Any]:
        return {name: values[row].as_py() for name, values in self._others.items()}

    def __str__(self) -> str:
        return self.name


class CSVPrompts(TablePrompts):
    """A UTF-8 CSV file with a header line.

    Args:
        path: The file.
        column: The column with the prompts.

    Raises:
        ConfigError: The file is missing, empty, not UTF-8, not CSV, or has no such column of text.
    """

    def __init__(self, path: str, column: str = "prompt") -> None:
        data = _read_utf8(path).encode()
        parse = csv.ParseOptions(newlines_in_values=True)
        convert = csv.ConvertOptions(column_types={column: pa.string()})
        try:
            table = csv.read_csv(io.BytesIO(data), parse_options=parse, convert_options=convert)
        except pa.ArrowException as error:
            raise _unreadable(path, "CSV with a header line", error) from error
        super().__init__(table, column, path)


class JSONLPrompts(TablePrompts):
    """A UTF-8 file with one JSON object a line.

    Args:
        path: The file.
        column: The key of the prompts.

    Raises:
        ConfigError: The file is missing, empty, not UTF-8, not JSON lines, or has no such key with text.
    """

    def __init__(self, path: str, column: str = "prompt") -> None:
        data = _read_utf8(path).encode()
        one_block = json.ReadOptions(block_size=len(data) + 1)  # a line must fit into a block
        try:
            table = json.read_json(io.BytesIO(data), read_options=one_block)
        except pa.ArrowException as error:
            raise _unreadable(path, "JSON lines", error) from error
        super().__init__(table, column, path)


class ParquetPrompts(TablePrompts):
    """A Parquet file.

    Args:
        path: The file.
        column: The column with the prompts.

    Raises:
        ConfigError: The file is missing, empty, not Parquet, or has no such column of text.
    """

    def __init__(self, path: str, column: str = "prompt") -> None:
        try:
            table = parquet.ParquetFile(_check_file(path)).read()
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "Parquet", error) from error
        super().__init__(table, column, path)


class HubPrompts(TablePrompts):
    """A dataset of the Hugging Face hub, or a local folder that ``datasets.load_dataset`` reads.

    Args:
        name: The hub id or the folder.
        split: Which of the dataset's own splits to read; slices such as ``train[:1000]`` work.
        column: The column with the prompts.

    Raises:
        ConfigError: The dataset cannot be reached or read, or has no such column of text.
    """

    def __init__(self, name: str, split: str = "train", column: str = "prompt") -> None:
        import datasets  # .5 to .8 s: only those who read from the hub should wait for it

        try:
            rows = datasets.load_dataset(name, split=split)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            what = f"cannot load split '{split}' of dataset '{name}' ({_first_line(error)})"
            raise ConfigError(f"{what}: check the name, or download it and give a local file") from error
        super().__init__(rows.with_format("arrow")[:], column, f"dataset {name} ({split})")


def _check_file(path: str) -> Path:
    file = Path(path).expanduser()
    if file.is_dir():
        raise ConfigError(f"{path} is a folder, not a file with prompts: give the path of a file in it")
    if not file.is_file():
        raise ConfigError(f"{path} does not exist (looked for {file.absolute()}): check the path")
    if file.stat().st_size == 0:
        raise ConfigError(f"{path} is empty: give a file with at least one prompt")
    return file


def _read_utf8(path: str) -> str:
    data = _check_file(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        found = f"byte {data[error.start]:#04x} in line {line}"
        raise ConfigError(f"{path} is not UTF-8 ({found}): save it as UTF-8") from error


def _unreadable(path: str, form: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} is not {form} ({_first_line(error)}): repair it or choose another source class"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
