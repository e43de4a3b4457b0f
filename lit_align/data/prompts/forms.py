"""Forms of files that ``datasets`` reads: the rows are memory-mapped, and errors name the file."""

import glob
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from lit_align.data.files import (
    check_content,
    find_files,
    fingerprint,
    read_utf8,
    unreadable,
)
from lit_align.errors import ConfigError, first_line

LARGE = 16 * 2**20
"""Files of more bytes together take a while to read: a terminal shows a progress bar."""

RAISED = (OSError, ValueError, TypeError, pa.ArrowException)
"""What builders of ``datasets`` raise, beside its own errors."""


@dataclass(frozen=True)
class FileForm:
    """A form of files.

    Attributes:
        name: What error messages call it.
        ending: How the names of a folder's files end.
        builder: The builder of ``datasets`` that reads it.
        options: Settings of the builder.
        text: Whether files are text, in UTF-8.
    """

    name: str
    ending: str
    builder: str
    options: Mapping[str, Any] = field(default_factory=dict)
    text: bool = True

    def read(self, path: str) -> tuple[pa.Table, str | None]:
        """The rows of the files that a path means, in their order, and their fingerprint.

        At the first start ``datasets`` writes the rows as Arrow files into its cache. They are memory-mapped:
        a later start reads only the rows that are used.

        Raises:
            ConfigError: No file is there, or one is not of this form, or they do not fit together.
        """
        import datasets  # .3 s: only those who need it should wait for it

        files = find_files(path, self.ending)
        for file in files if self.text else ():
            check_content(file, self.ending == ".jsonl")
        large = sum(file.stat().st_size for file in files) > LARGE
        with _quiet(bars=large and sys.stderr.isatty()):
            try:
                rows = self._load(files)
            except (*RAISED, datasets.exceptions.DatasetsError) as error:
                raise self._explained(error.__cause__ or error, path, files) from error
        pa.default_memory_pool().release_unused()  # copying leaves some 350 MB behind
        return rows.data.table, fingerprint(rows)

    def _load(self, files: Sequence[Path], streaming: bool = False) -> Any:
        import datasets

        names = [glob.escape(str(file.absolute())) for file in files]
        return datasets.load_dataset(
            self.builder, data_files=names, split="train", streaming=streaming, **self.options
        )

    def _explained(self, reason: BaseException, path: str, files: Sequence[Path]) -> ConfigError:
        """What to tell of files that could not be read: which one is to blame, if one is."""
        import datasets

        if "no data" in str(reason) or "at least one example" in str(reason):
            return ConfigError(f"{path} has no rows: give a source with at least one prompt")
        if "datasets dtype equivalent" in str(reason):
            return ConfigError(
                f"{path} has a column of a type that datasets does not read ({first_line(reason)}): save "
                "the files without it"
            )
        if isinstance(reason, OSError) and reason.errno:  # of the system, not of what a file holds
            return ConfigError(
                f"{path} cannot be written into the cache at {datasets.config.HF_DATASETS_CACHE} "
                f"({first_line(reason)}): make room there, or set HF_DATASETS_CACHE"
            )
        for file in files:
            try:
                if self.text:
                    read_utf8(file)
                for _ in self._load([file], streaming=True).with_format("arrow").iter(10_000):
                    pass
            except ConfigError as error:
                return error
            except (*RAISED, datasets.exceptions.DatasetsError) as error:
                return unreadable(file, self.name, first_line(error))
        return ConfigError(
            f"the files of {path} do not fit together ({first_line(reason)}): give all of them the same "
            "columns, and a column the same type in all"
        )


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """No log lines of ``datasets``, whose errors become ours, and no progress bars unless asked for.

    Nor a request to its makers' server, with which it counts how often a form is read: it waits for the
    answer, and where a name server does not answer, for that too.
    """
    import datasets

    verbosity, hidden = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(verbosity)
        if not hidden:
            datasets.enable_progress_bars()
