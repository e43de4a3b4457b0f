"""The prompts of one split, and the orders in which they are taken."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from lit_align.data.batch import Batch
from lit_align.data.loading import Rows
from lit_align.data.prompts.index import Index, index
from lit_align.data.prompts.sources import PromptSource
from lit_align.data.splits import Keys, Permutation, find, prompt_keys
from lit_align.errors import ConfigError
from lit_align.randomness import place

COUNTED = 50_000
"""Of larger sources of distinct prompts, a split's expected size is used instead of counting its prompts."""


class PromptSet:
    """The prompts of a source whose place is in ``[start, end)``, a part of [0, 1).

    A prompt's split depends on its text alone. For most sources an index knows the rows of each split. A
    source of distinct prompts may have millions and is not read as a whole: ``rows`` are all of its rows, and
    each prompt is checked when its turn comes.

    Args:
        source: Where the prompts come from.
        held_out: Keys of prompts that are in no split, ascending in each array.
        start: Lower end of the split.
        end: Upper end of the split.
        found: The index of the source, if it is known.

    Attributes:
        rows: The rows to draw from.
        usable: Number of prompts of the source in all splits.
        index: The index of the source; None of many distinct prompts.
    """

    def __init__(
        self,
        source: PromptSource,
        held_out: Sequence[Keys] = (),
        start: float = 0.0,
        end: float = 1.0,
        found: Index | None = None,
    ) -> None:
        self.source = source
        self._held_out, self._start, self._end = held_out, start, end
        many = source.distinct and len(source) > COUNTED
        self.index = None if many else found or index(source)
        if self.index is None or source.distinct:
            self.rows: Rows = range(len(source)) if start < end else range(0)
            self.usable = len(source)
        else:
            self.rows, self.usable = self.index.rows[self.index.window(start, end)], len(self.index)

    def split(self, start: float, end: float) -> "PromptSet":
        """The prompts whose place is in ``[start, end)``."""
        return PromptSet(self.source, self._held_out, start, end, self.index)

    def prompt(self, row: int) -> str:
        """The prompt of a row, without spaces around it."""
        return self.source.prompt(row).strip()

    def walk(self, order: Permutation, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(position after it, row)`` for each prompt of the split from position ``start`` on."""
        for position in range(start, len(order)):
            row = int(self.rows[order[position]])
            if self.accepts(self.prompt(row)):
                yield position + 1, row

    def accepts(self, prompt: str) -> bool:
        """Whether a prompt belongs to the split."""
        inside = self._start <= place(prompt) < self._end
        return inside and not any(len(find(keys, prompt_keys([prompt]))) for keys in self._held_out)

    def count(self) -> int:
        """How many prompts the split has; expected, not counted, of many distinct prompts."""
        keys = self._keys()
        return int(len(self.source) * (self._end - self._start)) if keys is None else len(keys)

    def removed(self) -> int:
        """How many prompts of the split are held out; 0 of many distinct prompts, which are not counted."""
        if self.index is None:
            return 0
        window = self.index.window(self._start, self._end)
        return window.stop - window.start - self.count()

    def places(self) -> NDArray[np.float64] | None:
        """The places of the split's prompts, ascending; None of many distinct prompts."""
        keys = self._keys()
        return None if keys is None else np.ldexp((keys >> np.uint64(16)).astype(np.float64), -48)

    def has(self, wanted: Keys) -> int:
        """How many of some different keys are of prompts of the split; 0 of many distinct prompts."""
        keys = self._keys()
        return 0 if keys is None else len(find(keys, wanted))

    def _keys(self) -> Keys | None:
        """The keys of the split's prompts, ascending; None of many distinct prompts."""
        if self.index is None:
            return None
        keys = self.index.keys[self.index.window(self._start, self._end)]
        for held_out in self._held_out:
            keys = np.delete(keys, find(keys, held_out))
        return keys

    def keys(self, wanted: int) -> Keys:
        """The keys of all prompts of the source; of distinct ones, only of the first in the fixed order."""
        if self.index is not None and not self.source.distinct:
            return self.index.keys
        return self.keys_in_use(wanted)

    def keys_in_use(self, wanted: int) -> Keys:
        """The keys of the first prompts in the fixed order, ascending."""
        return np.unique(prompt_keys([self.prompt(row) for row in self.first(wanted, self.fixed_order())]))

    def training_order(self, seed: int, number: int) -> Permutation:
        """The order in which pass ``number`` of a run takes the prompts."""
        return Permutation(len(self.rows), seed, number, purpose="training order")

    def fixed_order(self) -> Permutation:
        """An order that depends on nothing but the number of rows."""
        return Permutation(len(self.rows), 0, purpose="evaluation order")

    def first(self, wanted: int, order: Permutation) -> list[int]:
        """The first rows of an order, or all if there are fewer."""
        return [row for _, row in islice(self.walk(order), wanted)]

    def batch(self, rows: Sequence[int], groups: Sequence[int], images_per_prompt: int) -> Batch:
        """The batch of some rows; images of a prompt stand next to each other.

        Image ``j`` of group ``g`` has the index ``g * images_per_prompt + j``.

        Args:
            rows: One per prompt, in their global order.
            groups: The global number of each prompt.
            images_per_prompt: Images that share a prompt.

        Raises:
            ConfigError: Two rows have other columns.
        """
        copies = range(images_per_prompt)
        columns = [self.source.columns(row) for row in rows]
        for row, values in zip(rows, columns, strict=True):
            if not isinstance(values, Mapping) or values.keys() != columns[0].keys():
                raise ConfigError(
                    f"{self.source}: the columns of row {rows[0]} are {columns[0]!s:.80}, of row {row} "
                    f"{values!s:.80}; give all rows a dict with the same names, and None for no value"
                )
        return Batch(
            prompts=[prompt for prompt in map(self.prompt, rows) for _ in copies],
            groups=torch.tensor(groups).repeat_interleave(images_per_prompt),
            columns={name: [values[name] for values in columns for _ in copies] for name in columns[0]},
            index=torch.tensor([group * images_per_prompt + copy for group in groups for copy in copies]),
        )
