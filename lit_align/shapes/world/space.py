"""The numbering of all prompts, so that none of the millions is ever held in a list."""

from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np

from lit_align.errors import ConfigError
from lit_align.shapes.world.grammar import COLOURS, PAIR_COUNTS, RADII, RELATIONS, SHAPES, Caption, Group

Kind = Literal["single", "open", "pair", "relation"]

_SIZES: tuple[str | None, ...] = (None, *RADII)


class PromptSpace(Sequence[str]):
    """Every prompt of the given kinds, numbered; ``space[i]`` is a pure function of ``i``, no two are equal.

    Args:
        kinds: which kinds of prompt, in the order of the numbering; see :mod:`lit_align.shapes.world`.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        known = get_args(Kind)
        for kind in kinds:
            if kind not in known or list(kinds).count(kind) > 1:
                raise ConfigError(
                    f"'{kind}' in kinds is unknown or twice; give each of {', '.join(known)} at most once."
                )
        self.kinds = tuple(kinds)

    def __len__(self) -> int:
        return sum(_kind_length(kind) for kind in self.kinds)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices would hold prompts as a list
        return str(self.caption(index))

    def caption(self, index: int) -> Caption:
        """The caption with this number.

        Raises:
            IndexError: outside 0 .. len - 1.
        """
        rest = int(index)
        for kind in self.kinds:
            if 0 <= rest < _kind_length(kind):
                return _numbered(kind, rest)
            rest -= _kind_length(kind)
        raise IndexError(f"prompt {index} of {len(self)}")


def _radices(kind: Kind) -> tuple[int, ...]:
    if kind == "single":
        return (4, len(RADII), len(SHAPES), len(COLOURS), len(COLOURS) - 1)
    if kind == "open":
        return (4, len(_SIZES), len(SHAPES), len(COLOURS) + 1)
    choices = len(PAIR_COUNTS) if kind == "pair" else len(RELATIONS)
    return (choices, len(_SIZES), len(_SIZES), len(_looks()))


def _kind_length(kind: Kind) -> int:
    return int(np.prod(_radices(kind)))


def _numbered(kind: Kind, index: int) -> Caption:
    digits = []
    for radix in _radices(kind):
        index, digit = divmod(index, radix)
        digits.append(digit)
    if kind == "single":
        colour = list(COLOURS)[digits[3]]
        background: str | None = [name for name in COLOURS if name != colour][digits[4]]
        group = Group(digits[0] + 1, list(RADII)[digits[1]], colour, SHAPES[digits[2]])
        return Caption((group,), None, background)
    if kind == "open":
        background = (None, *COLOURS)[digits[3]]
        return Caption((Group(digits[0] + 1, _SIZES[digits[1]], None, SHAPES[digits[2]]),), None, background)
    counts = PAIR_COUNTS[digits[0]] if kind == "pair" else (1, 1)
    colour_1, shape_1, colour_2, shape_2, background = _looks()[digits[3]]
    first = Group(counts[0], _SIZES[digits[1]], colour_1, shape_1)
    second = Group(counts[1], _SIZES[digits[2]], colour_2, shape_2)
    return Caption((first, second), list(RELATIONS)[digits[0]] if kind == "relation" else None, background)


@cache
def _looks() -> tuple[tuple[str, str, str, str, str | None], ...]:
    """(colour, shape, colour, shape, background) of every two-group caption."""
    return tuple(
        (colour_1, shape_1, colour_2, shape_2, background)
        for colour_1, shape_1, colour_2, shape_2 in product(COLOURS, SHAPES, COLOURS, SHAPES)
        for background in (None, *COLOURS)
        if (colour_1, shape_1) != (colour_2, shape_2) and background not in (colour_1, colour_2)
    )
