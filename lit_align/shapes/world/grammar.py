"""The language of the world: its words, what a caption says, reading one and drawing one."""

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from lit_align.errors import ConfigError

# Near the corners of the RGB cube: at least 138 apart, and 67 from any blend of two others.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 44),
    "green": (35, 160, 75),
    "blue": (35, 65, 200),
    "yellow": (252, 208, 48),
    "cyan": (85, 215, 230),
    "pink": (244, 100, 196),
    "white": (250, 250, 250),
    "black": (28, 28, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
# Half the side of the square that holds the shape, in pixels.
RADII = {"small": 6.0, "medium": 9.0, "large": 12.6}
COUNTS = ("a", "two", "three", "four")
# Where the second group lies: a direction (x, y), y pointing down.
RELATIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
MAX_OBJECTS = 4
# How many objects the two groups of a pair may have.
PAIR_COUNTS = tuple((i, j) for i in range(1, 4) for j in range(1, 4) if i + j <= MAX_OBJECTS)


@dataclass(frozen=True)
class Group:
    """One to four objects that share size, colour and shape; None is unsaid."""

    count: int
    size: str | None
    colour: str | None
    shape: str

    def __str__(self) -> str:
        plural = "" if self.count == 1 else "es" if self.shape.endswith("s") else "s"
        words = (COUNTS[self.count - 1], self.size, self.colour, self.shape + plural)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Caption:
    """What a prompt says; ``str(caption)`` is the prompt.

    Raises:
        ConfigError: for a caption that no image can fit.
    """

    groups: tuple[Group, ...]
    relation: str | None
    background: str | None

    def __post_init__(self) -> None:
        if sum(group.count for group in self.groups) > MAX_OBJECTS:
            raise ConfigError(f"'{self}' asks for more than {MAX_OBJECTS} objects; lower a count.")
        if self.relation and [group.count for group in self.groups] != [1, 1]:
            raise ConfigError(
                f"'{self.relation}' in '{self}' needs one object on each side; write 'a' for both."
            )
        if self.background and any(group.colour == self.background for group in self.groups):
            raise ConfigError(
                f"'{self.background}' in '{self}' is an object's colour and the background's; change one."
            )

    def __str__(self) -> str:
        groups = f" {self.relation or 'and'} ".join(str(group) for group in self.groups)
        return groups + (f" on a {self.background} background" if self.background else "")


def parse(prompt: str) -> Caption:
    """Read a prompt of the world: the inverse of ``str(caption)``.

    Raises:
        ConfigError: naming the word that the grammar does not allow there.
    """
    words = re.sub(r"\b(left|right) of\b", r"\1_of", prompt).split()
    links = {"and": None, **{name.replace(" ", "_"): name for name in RELATIONS}}
    groups, relation = [_read_group(words, prompt)], None
    if words and words[0] in links:
        relation = links[words.pop(0)]
        groups.append(_read_group(words, prompt))
    background = None
    if words:
        _expect(words, ("on",), prompt)
        _expect(words, ("a",), prompt)
        background = _expect(words, COLOURS, prompt)
        _expect(words, ("background",), prompt)
    if words:
        raise ConfigError(
            f"cannot read '{words[0]}' in the prompt '{prompt}': it should end before this word."
        )
    return Caption(tuple(groups), relation, background)


def in_grammar(prompt: str) -> bool:
    """Whether a prompt is a caption of the world."""
    try:
        parse(prompt)
    except ValueError:
        return False
    return True


def _read_group(words: list[str], prompt: str) -> Group:
    count = COUNTS.index(_expect(words, COUNTS, prompt)) + 1
    size = words.pop(0) if words and words[0] in RADII else None
    colour = words.pop(0) if words and words[0] in COLOURS else None
    shapes = {str(Group(count, None, None, shape)).split()[1]: shape for shape in SHAPES}
    return Group(count, size, colour, shapes[_expect(words, shapes, prompt)])


def _expect(words: list[str], allowed: Collection[str], prompt: str) -> str:
    word = words.pop(0) if words else "the end"
    if word not in allowed:
        raise ConfigError(f"cannot read '{word}' in the prompt '{prompt}': expected {' or '.join(allowed)}.")
    return word


def sample_caption(rng: np.random.Generator) -> Caption:
    """Draw a caption of the training distribution, in which many objects and two groups are frequent.

    One group in 45 % (counts 1-4 with .22, .24, .26, .28), a pair in 35 %, a relation in 20 %. A size is
    unsaid in 25 %, a colour in 20 %, a background in 20 %. Two groups of one shape have their colours said,
    and differ in them.
    """
    kind = rng.random()
    counts: tuple[int, ...] = (int(rng.choice(4, p=(0.22, 0.24, 0.26, 0.28))) + 1,)
    if kind > 0.45:
        counts = PAIR_COUNTS[rng.integers(len(PAIR_COUNTS))] if kind < 0.8 else (1, 1)
    groups = tuple(_sample_group(count, rng) for count in counts)
    while len(groups) == 2 and _alike(groups[0], groups[1]):
        groups = tuple(_sample_group(count, rng) for count in counts)
    free = [name for name in COLOURS if name not in {group.colour for group in groups}]
    background = None if rng.random() < 0.2 else free[rng.integers(len(free))]
    return Caption(groups, list(RELATIONS)[rng.integers(4)] if kind >= 0.8 else None, background)


def _sample_group(count: int, rng: np.random.Generator) -> Group:
    size = None if rng.random() < 0.25 else list(RADII)[rng.integers(len(RADII))]
    colour = None if rng.random() < 0.2 else list(COLOURS)[rng.integers(len(COLOURS))]
    return Group(count, size, colour, SHAPES[rng.integers(len(SHAPES))])


def _alike(first: Group, second: Group) -> bool:
    unclear = first.colour is None or second.colour is None or first.colour == second.colour
    return first.shape == second.shape and unclear
