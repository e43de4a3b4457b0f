"""The numbering of all prompts, so that none of the millions is ever held in a list."""

from collections.abc import Sequence
from functools import cache
from itertools import combinations_with_replacement, product
from math import prod
from typing import Literal, get_args

from lit_align.errors import ConfigError
from lit_align.shapes.world.grammar import COLOURS, PAIR_COUNTS, RADII, RELATIONS, SHAPES, Caption, Group

Kind = Literal["single", "open", "pair", "relation"]

_SIZES: tuple[str | None, ...] = (None, *RADII)

ShapePairs = frozenset[frozenset[str]]
"""Unordered pairs of shapes; a shape with itself is a set of one."""

ALL_PAIRS: ShapePairs = frozenset(frozenset(pair) for pair in combinations_with_replacement(SHAPES, 2))


def shape_pairs(names: Sequence[str]) -> ShapePairs:
    """Pairs of shapes by name, such as "circle and star", in either order.

    Raises:
        ConfigError: A name is not a pair of shapes.
    """
    known = {f"{one} and {two}": frozenset((one, two)) for one, two in product(SHAPES, repeat=2)}
    for name in names:
        if name not in known:
            raise ConfigError(
                f"'{name}' is not a pair of shapes; join two of {', '.join(SHAPES)} with 'and', as in "
                "'circle and star'."
            )
    return frozenset(known[name] for name in names)


class PromptSpace(Sequence[str]):
    """Every prompt of the given kinds, numbered; ``space[i]`` is a pure function of ``i``, no two are equal.

    Args:
        kinds: which kinds of prompt, in the order of the numbering; see :mod:`lit_align.shapes.world`.
        pairs: the shapes that two groups may have together, at least one pair; captions of one group have all
            shapes.
    """

    def __init__(self, kinds: Sequence[Kind], pairs: ShapePairs = ALL_PAIRS) -> None:
        known = get_args(Kind)
        if not kinds:
            raise ConfigError(f"kinds is empty; give some of {', '.join(known)}.")
        for kind in kinds:
            if kind not in known or list(kinds).count(kind) > 1:
                raise ConfigError(
                    f"'{kind}' in kinds is unknown or twice; give each of {', '.join(known)} at most once."
                )
        self.kinds = tuple(kinds)
        self.pairs = pairs

    def __len__(self) -> int:
        return sum(_kind_length(kind, self.pairs) for kind in self.kinds)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # slices would hold prompts as a list
        return str(self.caption(index))

    def caption(self, index: int) -> Caption:
        """The caption with this number.

        Raises:
            IndexError: outside 0 .. len - 1.
        """
        rest = int(index)
        for kind in self.kinds:
            length = _kind_length(kind, self.pairs)
            if 0 <= rest < length:
                return _numbered(kind, rest, self.pairs)
            rest -= length
        raise IndexError(f"prompt {index} of {len(self)}")


@cache
def _radices(kind: Kind, pairs: ShapePairs) -> tuple[int, ...]:
    if kind == "single":
        return (4, len(RADII), len(SHAPES), len(COLOURS), len(COLOURS) - 1)
    if kind == "open":
        return (4, len(_SIZES), len(SHAPES), len(COLOURS) + 1)
    choices = len(PAIR_COUNTS) if kind == "pair" else len(RELATIONS)
    return (choices, len(_SIZES), len(_SIZES), len(_looks(pairs)))


@cache
def _kind_length(kind: Kind, pairs: ShapePairs) -> int:
    return prod(_radices(kind, pairs))


def _numbered(kind: Kind, index: int, pairs: ShapePairs) -> Caption:
    digits = []
    for radix in _radices(kind, pairs):
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
    colour_1, shape_1, colour_2, shape_2, background = _looks(pairs)[digits[3]]
    first = Group(counts[0], _SIZES[digits[1]], colour_1, shape_1)
    second = Group(counts[1], _SIZES[digits[2]], colour_2, shape_2)
    return Caption((first, second), list(RELATIONS)[digits[0]] if kind == "relation" else None, background)


@cache
def _looks(pairs: ShapePairs) -> tuple[tuple[str, str, str, str, str | None], ...]:
    """(colour, shape, colour, shape, background) of every two-group caption with these shapes."""
    return tuple(
        (colour_1, shape_1, colour_2, shape_2, background)
        for colour_1, shape_1, colour_2, shape_2 in product(COLOURS, SHAPES, COLOURS, SHAPES)
        for background in (None, *COLOURS)
        if frozenset((shape_1, shape_2)) in pairs
        if (colour_1, shape_1) != (colour_2, shape_2) and background not in (colour_1, colour_2)
    )
