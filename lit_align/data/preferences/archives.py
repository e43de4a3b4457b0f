"""Preference data in tar archives of webdataset: members of one key are a row, their endings its columns."""

import math
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.files import find_files
from lit_align.data.images import UnreadableImage, check_bytes
from lit_align.data.loading import counted
from lit_align.data.preferences.source import PairSource, read_label
from lit_align.errors import ConfigError

OPENED_AT_ONCE = 8

TRUE = ("true", "1", "1.0")


class Member(NamedTuple):
    """Where a member lies in its archive."""

    start: int
    size: int


class Row(NamedTuple):
    """A pair of an archive."""

    key: str
    prompt: str
    label: float
    images: tuple[Member, Member]


@dataclass(frozen=True)
class ArchiveColumns:
    """Endings of the members of a row; several of one meaning are tried in turn.

    Args:
        prompt: Text.
        first: An image.
        second: The same.
        label: 1 where the first is preferred, 0 where the second is, 0.5 for a tie.
        has_label: ``True`` or ``False``; rows without it have a label.
    """

    prompt: tuple[str, ...] = ("caption", "original_prompt.txt", "caption.txt", "txt")
    first: tuple[str, ...] = ("jpg_0", "jpg_0.jpg")
    second: tuple[str, ...] = ("jpg_1", "jpg_1.jpg")
    label: tuple[str, ...] = ("label_0", "label_0.txt")
    has_label: tuple[str, ...] = ("has_label", "has_label.txt")


class WebDatasetPairs(PairSource):
    """Pairs in tar archives, as the mirrors of Pick-a-Pic on the hub hold them; nothing is unpacked.

    At the start the headers of all members and the small ones among them are read. Images are read where they
    lie when their turn comes.

    Args:
        path: A ``.tar`` file, a folder of them, or a pattern such as ``train_*.tar``.
        columns: Endings of the members; by default those of the mirrors.
        archives: Archives that are mixed in the training order.

    Raises:
        ConfigError: There is no such file, it is no archive, or has no pairs with these endings.
    """

    def __init__(self, path: str, columns: ArchiveColumns = ArchiveColumns(), archives: int = 2) -> None:
        self.path, self.mixed = path, archives
        self._files = find_files(path, ".tar")
        with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
            read = list(pool.map(lambda file: _rows(file, columns), self._files))
        self._rows = [(number, row) for number, (rows, _) in enumerate(read) for row in rows]
        self._counts = [len(rows) for rows, _ in read]
        if not self._rows:
            raise ConfigError(
                f"{path} has no pairs: no key has members that end in {' or '.join(columns.first)}, "
                f"{' or '.join(columns.second)}, {' or '.join(columns.prompt)} and "
                f"{' or '.join(columns.label)}; say under columns how they end"
            )
        if halves := [half for _, halves in read for half in halves]:
            rank_zero_warn(
                f"{path}: {counted(len(halves), 'key')} with some of the members of a pair alone, such as "
                f"{halves[0]}, left out; {counted(len(self._rows), 'pair')} read"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, row: int) -> str:
        return self._rows[row][1].prompt

    def label(self, row: int) -> float:
        return self._rows[row][1].label

    def image(self, row: int, side: int) -> bytes:
        number, found = self._rows[row]
        member = found.images[side]
        check_bytes(member.size)
        try:
            with self._files[number].open("rb") as file:
                data = _read(file, member)
        except OSError as error:
            raise UnreadableImage(f"{self._files[number]} cannot be read ({error.strerror})") from error
        if len(data) < member.size:
            raise UnreadableImage("the archive ends before it")
        return data

    def blocks(self) -> Sequence[range]:
        starts = [sum(self._counts[:number]) for number in range(len(self._counts) + 1)]
        return [range(a, b) for a, b in pairwise(starts)]

    def where(self, row: int) -> str:
        number, found = self._rows[row]
        return f"key {found.key} of {self._files[number]}"

    def images_are(self) -> str:
        states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files]
        return str(states)

    def __str__(self) -> str:
        return self.path


def _rows(file: Path, columns: ArchiveColumns) -> tuple[list[Row], list[str]]:
    """The pairs of an archive, in the order of their keys, and where those are of which a part is missing."""
    members: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for info in archive:
                if info.isreg():
                    folder, slash, name = info.name.rpartition("/")
                    key, _, ending = name.partition(".")  # webdataset: the key ends at the first dot
                    members.setdefault(folder + slash + key, {})[ending] = Member(info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{file} is not a tar archive that can be read ({error}): load it again") from error
    rows, halves = [], list[str]()
    with file.open("rb") as opened:
        for key, there in members.items():
            first, second, prompt, label = (
                _one(there, endings)
                for endings in (columns.first, columns.second, columns.prompt, columns.label)
            )
            if first is None or second is None or prompt is None or label is None:
                halves += [f"key {key} of {file}"] if first or second else []
                continue
            decided = _one(there, columns.has_label)
            rows.append(
                Row(
                    key,
                    _read(opened, prompt).decode("utf-8", "replace"),
                    _label(_read(opened, label), decided and _read(opened, decided), f"key {key} of {file}"),
                    (first, second),
                )
            )
    return rows, halves


def _one(there: dict[str, Member], endings: Sequence[str]) -> Member | None:
    return next((there[ending] for ending in endings if ending in there), None)


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.start)
    return file.read(member.size)


def _label(text: bytes, decided: Any, where: str) -> float:
    if decided and decided.decode("utf-8", "replace").strip().lower() not in TRUE:
        return math.nan
    said = text.decode("utf-8", "replace").strip()
    return read_label(None if said == "None" else said, where)
