"""Which prompts belong to a split, and in which order: pure functions of texts, seeds and counters."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from lit_align.data.batch import Batch, repeat_prompts
from lit_align.data.index import find, index, prompt_keys
from lit_align.data.sources import PromptSource
from lit_align.randomness import derive_seed, place

Rows = Sequence[int] | NDArray[np.int64]
"""Numbers of rows: counted, given, or memory-mapped from an index."""

COUNTED = 50_000
"""Of larger sources of distinct prompts, a split's expected size is used instead of counting its prompts."""

WORD = (1 << 64) - 1


class Permutation:
    """A keyed permutation of ``0 .. size - 1`` that is computed entry by entry and never stored.

    A Feistel network on pairs of digits in base ``ceil(sqrt(size))``; numbers beyond ``size`` are sent
    through it again until they come back inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002).

    Args:
        size: Number of entries.
        seed: The run's seed.
        counters: Whatever else tells this permutation from others (the pass over the data).
        purpose: What the order is for.
    """

    ROUNDS = 6

    def __init__(self, size: int, seed: int, *counters: int, purpose: str) -> None:
        self.size = size
        self._base = math.isqrt(max(size - 1, 0)) + 1
        self._keys = [derive_seed(seed, purpose, *counters, number) for number in range(self.ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < self.size:
            raise IndexError(position)
        value = self._encrypt(position)
        while value >= self.size:
            value = self._encrypt(value)
        return value

    def _encrypt(self, value: int) -> int:
        left, right = divmod(value, self._base)
        for key in self._keys:
            left, right = right, (left + _mix(right ^ key)) % self._base
        return left * self._base + right


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): 64 bits in, 64 well-stirred bits out."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one split: rows of a source, of which some may be held out or belong to another split.

    Attributes:
        source: Where the prompts come from.
        rows: The rows to draw from: the split's, by the source's index; or all, of a source without one.
        accepts: Whether a prompt belongs to the split. It is asked when a prompt is reached, so that a source
            of millions of prompts is never read as a whole.
        usable: Prompts of the source in all splits; the number of ``rows`` if not given.
    """

    source: PromptSource
    rows: Rows
    accepts: Callable[[str], bool]
    usable: int | None = None

    def walk(self, order: Permutation, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(position after it, row)`` for each prompt of the split from position ``start`` on."""
        for position in range(start, len(order)):
            row = int(self.rows[order[position]])
            if self.accepts(self.source.prompt(row).strip()):
                yield position + 1, row

    def training_order(self, seed: int, number: int) -> Permutation:
        """The order in which pass ``number`` of a run takes the prompts."""
        return Permutation(len(self.rows), seed, number, purpose="training order")

    def first(self, wanted: int) -> list[int]:
        """The first rows (or all, if fewer) in an order that depends on nothing but the number of rows."""
        return self._begin(Permutation(len(self.rows), 0, purpose="evaluation order"), wanted)

    def first_trained(self, wanted: int, seed: int) -> list[int]:
        """The rows (or all, if fewer) with which training begins in a run of that seed."""
        return self._begin(self.training_order(seed, 0), wanted)

    def _begin(self, order: Permutation, wanted: int) -> list[int]:
        return [row for _, row in islice(self.walk(order), wanted)]

    def batch(self, rows: Sequence[int], groups: Sequence[int], images_per_prompt: int) -> Batch:
        """The batch of some rows with their group numbers (see :func:`repeat_prompts`)."""
        prompts = [self.source.prompt(row).strip() for row in rows]
        columns = [self.source.columns(row) for row in rows]
        return repeat_prompts(prompts, columns, groups, images_per_prompt)


class Pool:
    """A source's usable prompts without those that are held out for another source's sake.

    A prompt's split depends on its text alone. Sources that promise distinct prompts have no index and are
    asked prompt by prompt; of all others the index knows each split.

    Args:
        source: The prompts.
        held_out: Keys of prompts that are in no split (see :class:`~lit_align.data.index.Index`), ascending.

    Raises:
        ConfigError: The source has no usable prompt.
    """

    def __init__(self, source: PromptSource, held_out: Sequence[NDArray[np.uint64]] = ()) -> None:
        self.source = source
        self.held_out = held_out
        self.index = None if source.distinct else index(source)
        if self.index is not None:
            self.index.report(source)

    def split(self, start: float, end: float) -> PromptSet:
        """The prompts whose place is in ``[start, end)``, a part of [0, 1)."""
        if self.index is not None:
            rows = self.index.rows[self.index.window(start, end)]
            return PromptSet(self.source, rows, self._allows, len(self.index))
        all_or_none = range(len(self.source)) if start < end else range(0)
        return PromptSet(
            self.source, all_or_none, lambda prompt: start <= place(prompt) < end and self._allows(prompt)
        )

    def count(self, start: float, end: float) -> int:
        """How many prompts that split has; expected, not counted, of large sources of distinct prompts."""
        if self.index is not None:
            window = self.index.window(start, end)
            inside = (self._removed >= window.start) & (self._removed < window.stop)
            return window.stop - window.start - int(np.count_nonzero(inside))
        if len(self.source) > COUNTED:
            return int(len(self.source) * (end - start))
        accepts = self.split(start, end).accepts
        return sum(accepts(self.source.prompt(row).strip()) for row in range(len(self.source)))

    def overlap(self) -> int | None:
        """How many of the source's prompts are held out; None for large sources of distinct prompts."""
        if self.index is not None:
            return len(self._removed)
        if len(self.source) > COUNTED:
            return None
        return sum(not self._allows(self.source.prompt(row).strip()) for row in range(len(self.source)))

    def keys(self, wanted: int) -> NDArray[np.uint64]:
        """The keys of all prompts; of distinct ones, of the first alone (see :meth:`PromptSet.first`)."""
        if self.index is not None:
            return self.index.keys
        first = self.split(0.0, 1.0).first(wanted)
        return np.unique(prompt_keys([self.source.prompt(row).strip() for row in first]))

    @cached_property
    def _removed(self) -> NDArray[np.int64]:
        """Positions in the index of what is held out."""
        assert self.index is not None
        found = [find(self.index.keys, keys) for keys in self.held_out]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)

    def _allows(self, prompt: str) -> bool:
        return not any(len(find(keys, prompt_keys([prompt]))) for keys in self.held_out)
