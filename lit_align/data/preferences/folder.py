"""Preference data of one's own: a table of prompts, names of images and labels."""

from itertools import chain

from lit_align.data.images import UnreadableImage, read_inside
from lit_align.data.preferences.source import PairSource, read_label, states_of
from lit_align.data.prompts import CSVPrompts, JSONLPrompts
from lit_align.errors import ConfigError, user_path


class FolderPairs(PairSource):
    """A CSV or JSON lines file that names pairs of images, beside their files.

    A row holds a prompt, two file names relative to the table's folder, and the label of the first image:
    1 where it is preferred, 0 where the other one is, 0.5 or nothing for a tie. The files lie in that folder
    or below it, and so do the targets of links.

    Args:
        path: The table, ``*.csv`` with a header line or ``*.jsonl``.
        prompt: Column of the prompts.
        first: Column of the first images.
        second: Column of the second images.
        label: Column of the labels.

    Raises:
        ConfigError: The table cannot be read or has no such column, a label is none of these, or the
            first row's images are not there.
    """

    def __init__(
        self,
        path: str,
        prompt: str = "prompt",
        first: str = "image_0",
        second: str = "image_1",
        label: str = "label_0",
    ) -> None:
        file = user_path(path)
        if file.suffix not in (".csv", ".jsonl"):
            raise ConfigError(f"{path} ends in '{file.suffix}': give a table *.csv or *.jsonl")
        if first == second:
            raise ConfigError(f"first and second are both {first!r}: give the column of each image")
        self.path, self.folder = path, file.parent
        names = [first, second]
        # 0001 is a name too, so the names stay text.
        table = CSVPrompts(path, prompt, names) if file.suffix == ".csv" else JSONLPrompts(path, prompt)
        there = table.columns(0)
        for setting, column in (("first", first), ("second", second), ("label", label)):
            if column not in there:  # no near name is proposed: label_1 would make the losers win
                raise ConfigError(
                    f"{path} has no column '{column}', only {', '.join([prompt, *there])}: set {setting} to "
                    "one of them; first and second hold a file name each, and label holds 1 where the first "
                    "image is preferred, 0 where the second is"
                )
        rows = [table.columns(row) for row in range(len(table))]
        self._prompts = table.prompts(range(len(table)))
        self._names = [[str(values[name] or "") for name in names] for values in rows]
        self._labels = [
            read_label(values[label], f"{self.where(row)}, column '{label}'")
            for row, values in enumerate(rows)
        ]
        for side, column in enumerate(names):
            try:
                self.image(0, side)
            except UnreadableImage as error:
                raise ConfigError(
                    f"{self.where(0)}, column '{column}': {error}; names are relative to "
                    f"{self.folder.absolute()}"
                ) from error

    def __len__(self) -> int:
        return len(self._labels)

    def prompt(self, row: int) -> str:
        return self._prompts[row]

    def label(self, row: int) -> float:
        return self._labels[row]

    def image(self, row: int, side: int) -> bytes:
        return read_inside([self.folder], self._names[row][side])

    def images_are(self) -> str:
        return states_of(self.folder, chain.from_iterable(self._names))

    def __str__(self) -> str:
        return self.path
