"""What the columns of published preference data mean, and the pairs that their rows make."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, NamedTuple

import pyarrow as pa

from lit_align.data.preferences.source import read_label
from lit_align.errors import ConfigError


class Pair(NamedTuple):
    """Two images of a prompt.

    Attributes:
        rows: The row that each image stands in; both the same where a row is a pair.
        items: The place of each in its row: 0 and 1 of a pair, or its place in a list of images.
        label: 1 where the first is preferred, 0 where the second is, NaN where neither is.
    """

    rows: tuple[int, int]
    items: tuple[int, int]
    label: float


@dataclass(frozen=True)
class PairColumns:
    """The names of the columns, in one of three forms.

    - A row is a pair: ``first`` and ``second`` hold an image each, and ``label`` 1 where the first is
      preferred, 0 where the second is, 0.5 for a tie; or ``first_votes`` and ``second_votes`` hold how many
      preferred each; without any of these the first is preferred.
    - A row is a prompt with several images: ``images`` holds a list, and ``preference`` (more is better) or
      ``rank`` (1 is best) a list of numbers.
    - A row is one image: ``group`` says which rows belong together, ``image`` holds it, and ``rank`` or
      ``preference`` a number.

    Args:
        prompt: Text.
        first: An image, or the name of its file.
        second: The same.
        label: A number.
        first_votes: A number.
        second_votes: A number.
        images: A list of names of files.
        group: What rows of one prompt have in common.
        image: An image, or the name of its file.
        preference: A number, or a list of them; more is better.
        rank: A number, or a list of them; less is better.

    Raises:
        ConfigError: They are of none of these forms.
    """

    prompt: str = "prompt"
    first: str | None = None
    second: str | None = None
    label: str | None = None
    first_votes: str | None = None
    second_votes: str | None = None
    images: str | None = None
    group: str | None = None
    image: str | None = None
    preference: str | None = None
    rank: str | None = None

    def __post_init__(self) -> None:
        given = {name for name in self.names() if name != "prompt"}
        forms = (
            {"first", "second"},
            {"first", "second", "label"},
            {"first", "second", "first_votes", "second_votes"},
            {"images", "preference"},
            {"images", "rank"},
            {"group", "image", "preference"},
            {"group", "image", "rank"},
        )
        if given not in forms:
            known = "; ".join(", ".join(sorted(form)) for form in forms)
            raise ConfigError(
                f"columns: {', '.join(sorted(given)) or 'nothing'} make no pairs; give prompt and one of "
                f"these: {known}"
            )
        if self.first is not None and self.first == self.second:
            raise ConfigError(
                f"columns: first and second are both {self.first}; give the column of each image"
            )

    def names(self) -> dict[str, str]:
        """The columns that are given, by what they mean."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: column for name, column in given.items() if column is not None}

    @property
    def holding_images(self) -> list[str]:
        """The columns with images or names of files."""
        return [column for column in (self.first, self.second, self.images, self.image) if column is not None]

    def pairs(self, table: pa.Table, margin: float, name: str) -> Iterator[Pair]:
        """All pairs of a table.

        Args:
            table: The columns, without images.
            margin: Share of all votes that the winner must have more than the other, else neither is
                preferred.
            name: What error messages call the table.

        Raises:
            ConfigError: A label, a vote or a rank is none.
        """
        if self.first is not None:
            return self._of_rows(table, margin, name)
        return self._of_lists(table, name) if self.images is not None else self._of_groups(table, name)

    def _of_rows(self, table: pa.Table, margin: float, name: str) -> Iterator[Pair]:
        count = len(table)
        if self.label is not None:
            labels: Iterable[float] = (
                read_label(value, f"row {row} of {name}, column '{self.label}'")
                for row, value in enumerate(table[self.label].to_pylist())
            )
        elif self.first_votes is not None and self.second_votes is not None:
            votes = [_numbers(table, column, name) for column in (self.first_votes, self.second_votes)]
            labels = (_of_votes(first, second, margin) for first, second in zip(*votes, strict=True))
        else:
            labels = (1.0 for _ in range(count))
        for row, label in enumerate(labels):
            yield Pair((row, row), (0, 1), label)

    def _of_lists(self, table: pa.Table, name: str) -> Iterator[Pair]:
        column = self.preference or self.rank or ""
        for row, (images, values) in enumerate(
            zip(_lists(table, self.images or "", name), _lists(table, column, name), strict=True)
        ):
            if len(images) != len(values):
                raise ConfigError(
                    f"row {row} of {name} has {len(images)} images in '{self.images}' and {len(values)} "
                    f"numbers in '{column}': repair it or leave it out"
                )
            scores = [self._worth(value, f"row {row} of {name}, column '{column}'") for value in values]
            for one, other in combinations(range(len(images)), 2):
                yield Pair((row, row), (one, other), _better(scores[one], scores[other]))

    def _of_groups(self, table: pa.Table, name: str) -> Iterator[Pair]:
        column = self.preference or self.rank or ""
        values = table[column].to_pylist()
        prompts = [(prompt or "").strip() for prompt in table[self.prompt].to_pylist()]
        members: dict[Any, list[int]] = {}
        for row, group in enumerate(table[self.group].to_pylist()):
            if group is None:
                raise ConfigError(
                    f"row {row} of {name}, column '{self.group}': it is empty; give the image a group"
                )
            members.setdefault(group, []).append(row)
        for group, rows in members.items():
            if (other := next((row for row in rows if prompts[row] != prompts[rows[0]]), None)) is not None:
                raise ConfigError(
                    f"rows {rows[0]} and {other} of {name} have the {self.group} {group!r} and different "
                    f"prompts, so their images cannot be compared: give each prompt a {self.group} of its own"
                )
            scores = {
                row: self._worth(values[row], f"row {row} of {name}, column '{column}'") for row in rows
            }
            for one, other in combinations(rows, 2):
                yield Pair((one, other), (0, 0), _better(scores[one], scores[other]))

    def _worth(self, value: Any, where: str) -> float:
        """A number of which more is better."""
        worth = _number(value, where)
        return -worth if self.rank is not None else worth


KNOWN = {
    "ImageRewardDB (metadata)": PairColumns(group="prompt_id", image="image_path", rank="rank"),
    "open-image-preferences": PairColumns(first="chosen", second="rejected"),
    "HPDv2 (train)": PairColumns(images="file_path", preference="human_preference"),
    "HPDv2 (train, as on the hub)": PairColumns(images="image_path", preference="human_preference"),
    "HPDv2 (test)": PairColumns(images="image_path", rank="rank"),
    "HPDv3": PairColumns(first="path1", second="path2"),
    "ImageRewardDB": PairColumns(group="prompt_id", image="image", rank="rank"),
    "Rapidata": PairColumns(
        first="image1", second="image2", first_votes="votes_image1", second_votes="votes_image2"
    ),
    "Rapidata (later sets)": PairColumns(
        first="image1",
        second="image2",
        first_votes="weighted_results_image1_preference",
        second_votes="weighted_results_image2_preference",
    ),
    "FolderPairs": PairColumns(first="image_0", second="image_1", label="label_0"),
}
"""Published schemas: a table is of the first whose columns it has all."""

VERDICTS = {"label", "label_0", "preference", "preferred", "winner", "choice", "votes"}
"""Names of columns that say which image is preferred, where the order of the images does not."""


def known(there: Sequence[str], name: str) -> PairColumns:
    """The published schema whose columns are all there.

    Raises:
        ConfigError: It is none, or a further column seems to say which image is preferred.
    """
    for columns in KNOWN.values():
        if set(columns.names().values()) <= set(there):
            ordered = {*columns.names()} == {"prompt", "first", "second"}
            if ordered and columns.first != "chosen" and (said := sorted(VERDICTS & set(there))):
                raise ConfigError(
                    f"{name} has the columns {columns.first} and {columns.second}, of which the first would "
                    f"be the preferred image, and {said[0]}: say under columns what they mean, such as "
                    f"{{first: {columns.first}, second: {columns.second}, label: {said[0]}}}, without label "
                    "where the first is always preferred"
                )
            return columns
    if {"jpg_0", "jpg_1"} <= set(there):  # not known here: its has_label says which labels count
        raise ConfigError(f"{name} has the columns of Pick-a-Pic: read it with PickaPicFiles")
    raise ConfigError(
        f"{name} has the columns {', '.join(there)}, which belong to no known set ({', '.join(KNOWN)}): "
        "say under columns what they mean, such as {prompt: caption, first: winner, second: loser}"
    )


def _of_votes(first: float, second: float, margin: float) -> float:
    total = first + second
    if not total > 0 or abs(first - second) / total < margin:
        return math.nan
    return _better(first, second)


def _better(first: float, second: float) -> float:
    return math.nan if first == second else float(first > second)


def _numbers(table: pa.Table, column: str, name: str) -> list[float]:
    found = []
    for row, value in enumerate(table[column].to_pylist()):
        where = f"row {row} of {name}, column '{column}'"
        found.append(_number(value or 0, where))
        if found[-1] < 0:
            raise ConfigError(f"{where}: {value!r} is not a number of votes")
    return found


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise ConfigError(f"{where}: {value!r} is not a number")
    return number


def _lists(table: pa.Table, column: str, name: str) -> list[list[Any]]:
    """Lists of a column; text is read as JSON, of which some tables hold lists."""
    found: list[list[Any]] = []
    for row, value in enumerate(table[column].to_pylist()):
        held = value
        if isinstance(value, str):
            try:
                held = json.loads(value)
            except ValueError:
                held = None
        if not isinstance(held, list):
            raise ConfigError(f"row {row} of {name}, column '{column}': {value!r} is not a list")
        found.append(held)
    return found
