"""Which prompts belong to a split, and in which order: pure functions of texts, seeds and counters."""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from lightning.pytorch.utilities import rank_zero_info

from lit_align.data.batch import Batch, repeat_prompts
from lit_align.data.sources import PromptSource
from lit_align.errors import ConfigError
from lit_align.randomness import derive_seed

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
    """The prompts of one split: rows of a source, of which some may belong to another split.

    Attributes:
        source: Where the prompts come from.
        rows: The source's usable rows.
        accepts: Whether a prompt belongs to the split. It is asked when a prompt is reached, so that a source
            of millions of prompts is never read as a whole.
    """

    source: PromptSource
    rows: Sequence[int]
    accepts: Callable[[str], bool]

    def walk(self, order: Permutation, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield ``(position after it, row)`` for each prompt of the split from position ``start`` on."""
        for position in range(start, len(order)):
            row = self.rows[order[position]]
            if self.accepts(self.source.prompt(row).strip()):
                yield position + 1, row

    def first(self, wanted: int) -> list[int]:
        """The first rows (or all, if fewer) in an order that depends on nothing but the number of rows."""
        order = Permutation(len(self.rows), 0, purpose="evaluation order")
        return [row for _, row in islice(self.walk(order), wanted)]

    def batch(self, rows: Sequence[int], groups: Sequence[int], images_per_prompt: int) -> Batch:
        """The batch of some rows with their group numbers (see :func:`repeat_prompts`)."""
        prompts = [self.source.prompt(row).strip() for row in rows]
        columns = [self.source.columns(row) for row in rows]
        return repeat_prompts(prompts, columns, groups, images_per_prompt)


def usable_rows(source: PromptSource) -> Sequence[int]:
    """The rows whose prompt is neither empty nor there before; what is dropped is reported."""
    if source.distinct:
        return range(len(source))
    seen: set[str] = set()
    rows = array("q")
    empty = 0
    for row in range(len(source)):
        prompt = source.prompt(row).strip()
        if not prompt:
            empty += 1
        elif prompt not in seen:
            seen.add(prompt)
            rows.append(row)
    if not rows:
        raise ConfigError(f"{source} has no usable prompt: all of its {len(source)} rows are empty")
    if repeated := len(source) - len(rows) - empty:
        rank_zero_info(f"{source}: {empty} empty and {repeated} repeated prompts dropped, {len(rows)} left")
    elif empty:
        rank_zero_info(f"{source}: {empty} empty prompts dropped, {len(rows)} left")
    return rows
