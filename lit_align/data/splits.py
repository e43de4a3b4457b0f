"""The split of a prompt and the order of rows: pure functions of texts, seeds and counters."""

import math
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lit_align.randomness import derive_seed, one_spelling, place

Keys = NDArray[np.uint64]
"""Keys of prompts (see :func:`prompt_keys`)."""

WORD = (1 << 64) - 1


def prompt_keys(prompts: Sequence[str]) -> Keys:
    """``(N,)``: the 48 bits of each prompt's :func:`~lit_align.randomness.place`, then 16 of its CRC-32.

    Sorted keys stand in the order of the places, so a split is a slice of them. The chance that any two of 10
    million different prompts share a key, and one is lost, is 3 in a million.

    Args:
        prompts: Prompts without spaces around them.
    """
    places = np.array([place(prompt) for prompt in prompts])
    checks = np.array([zlib.crc32(one_spelling(prompt).encode()) for prompt in prompts], np.uint64)
    return np.ldexp(places, 48).astype(np.uint64) << np.uint64(16) | checks & np.uint64(0xFFFF)


EMPTY = prompt_keys([""])[0]
"""The key of the empty prompt."""


def lowest_key(share: float) -> int:
    """The lowest key whose place is at least ``share``; ``2 ** 64``, which no key reaches, for 1."""
    return math.ceil(share * (1 << 48)) << 16  # exact: places are multiples of 2^-48


def find(keys: Keys, wanted: Keys) -> NDArray[np.int64]:
    """The positions in ``keys``, which ascend, of those of the wanted keys that are there."""
    found = np.searchsorted(keys, wanted)
    inside = found < len(keys)
    found, wanted = found[inside], wanted[inside]
    return found[keys[found] == wanted]


class Permutation:
    """A keyed permutation of ``0 .. size - 1`` that is computed entry by entry and never stored.

    A Feistel network on pairs of digits in base ``ceil(sqrt(size))``; numbers beyond ``size`` are sent
    through it again until they come back inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002).

    Args:
        size: Number of entries.
        seed: The run's seed.
        counters: Other numbers that select the permutation, such as the pass over the data.
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
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): mixes the bits of a 64-bit word."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)
