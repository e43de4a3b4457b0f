"""The index of a source: the first row of each different prompt, sorted by split, as two arrays."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from lit_align.data.prompts.sources import PromptSource
from lit_align.data.splits import EMPTY, Keys, lowest_key, prompt_keys
from lit_align.errors import ConfigError

ON_DISK = 100_000
"""Sources with a fingerprint and at least this many rows keep their index on disk: making it is slow."""

CHUNK = 1 << 16
"""Rows that are read at once."""

FORMAT = 3
"""Part of the names on disk; to be raised when what the files hold changes."""


@dataclass(frozen=True)
class Index:
    """The usable prompts of a source in the order of their :func:`~lit_align.randomness.place`.

    A split is therefore a slice.

    Attributes:
        keys: ``(N,)`` uint64, ascending (see :func:`~lit_align.data.splits.prompt_keys`).
        rows: ``(N,)`` int64. The row of each prompt; the first one where it is there more than once.
        empty: Number of rows without a prompt.
        repeated: Number of rows whose prompt was there before.
    """

    keys: Keys
    rows: NDArray[np.int64]
    empty: int = 0
    repeated: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def window(self, start: float, end: float) -> slice:
        """The positions of the prompts with ``start <= place < end``."""
        first, last = (
            len(self) if key >> 64 else int(np.searchsorted(self.keys, np.uint64(key)))
            for key in map(lowest_key, (start, end))
        )
        return slice(first, last)


def index(source: PromptSource) -> Index:
    """The index of a source: on disk, and memory-mapped, of a large one with a fingerprint, else in memory.

    The index on disk is made once and lies in the folder ``lit_align`` of the ``datasets`` cache. It may be
    deleted at any time.

    Raises:
        ConfigError: No row has a prompt, or the index cannot be written.
    """
    fingerprint = source.fingerprint()
    if fingerprint is None or len(source) < ON_DISK:
        return _make(source)
    import datasets

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "lit_align"
    name = hashlib.blake2b(fingerprint.encode(), digest_size=12).hexdigest()
    file = cache / f"prompts-{FORMAT}-{name}.arrow"
    if found := _known(file, len(source)):
        return found
    try:
        _write(_make(source), file)
    except OSError as error:
        what = f"cannot write the index of {source} into {cache} ({error})"
        raise ConfigError(f"{what}: make room there, or set HF_DATASETS_CACHE") from error
    return _read(file)


def _known(file: Path, rows: int) -> Index | None:
    """The index in a file, if it is there and whole, of a source with so many rows."""
    try:
        found = _read(file)
        inside = found.rows.min() >= 0 and found.rows.max() < rows and len(found.keys) == len(found.rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException):
        return None  # none, damaged, or of something else: it is made anew
    return found if inside else None


def read_keys(source: PromptSource) -> Keys:
    """The key of each row's prompt, ``(len(source),)``.

    Raises:
        ConfigError: One is no text.
    """
    keys = np.empty(len(source), np.uint64)
    quiet = len(keys) < ON_DISK or getattr(rank_zero_only, "rank", 0) != 0
    starts = range(0, len(keys), CHUNK)
    for start in track(starts, f"Indexing {source}", console=Console(stderr=True), disable=quiet):
        rows = range(start, min(start + CHUNK, len(keys)))
        prompts = list(source.prompts(rows))
        for row, prompt in zip(rows, prompts, strict=True):
            if not isinstance(prompt, str):
                raise ConfigError(
                    f"{source}: the prompt of row {row} is {prompt!r}; give a text for every row"
                )
        try:
            keys[start : rows.stop] = prompt_keys([prompt.strip() for prompt in prompts])
        except UnicodeError as error:
            raise ConfigError(
                f"a prompt in rows {rows.start} to {rows.stop - 1} of {source} is not Unicode text "
                f"({error}): save the file as UTF-8"
            ) from error
    return keys


def _make(source: PromptSource) -> Index:
    unsorted = read_keys(source)
    keys, rows = np.unique(unsorted, return_index=True)  # the first row of each
    kept = keys != EMPTY
    keys, rows = keys[kept], rows[kept]
    if not len(keys):
        raise ConfigError(f"{source} has no usable prompt: all of its {len(source)} rows are empty")
    empty = int(np.count_nonzero(unsorted == EMPTY))
    return Index(keys, rows, empty, len(unsorted) - empty - len(keys))


def _write(made: Index, file: Path) -> None:
    """Write an index; it appears as a whole or not at all, also where several processes write it."""
    counts = {"empty": str(made.empty), "repeated": str(made.repeated)}
    table = pa.table({"keys": made.keys, "rows": made.rows}).replace_schema_metadata(counts)
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with pa.ipc.new_file(str(draft), table.schema) as opened:
            opened.write_table(table)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _read(file: Path) -> Index:
    """An index whose arrays are memory-mapped."""
    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    keys, rows = (table[name].chunk(0).to_numpy() for name in ("keys", "rows"))
    counts = {name.decode(): int(count) for name, count in table.schema.metadata.items()}
    return Index(keys, rows, counts["empty"], counts["repeated"])
