"""The Shapes world: captions, pictures that fit them exactly, and a judge of what a picture shows.

A picture is 64 x 64 RGB: one to four solid shapes, in one or two groups, on a flat background. A caption is
an English phrase of a small grammar; what it leaves unsaid is free::

    caption    = group [("and" | relation) group] ["on a" colour "background"]
    group      = ("a" | "two" | "three" | "four") [size] [colour] shape
    relation   = "above" | "below" | "left of" | "right of"    only between two single objects

:class:`PromptSpace` numbers the captions of a kind, 2,570,016 in all (two groups always differ in colour or
shape, and no object has the colour of its background):

* ``single``, one group, everything said: 4 counts x 3 sizes x 8 colours x 6 shapes x 7 backgrounds = 4,032;
* ``open``, one group, colour unsaid: 4 counts x 4 sizes x 6 shapes x 9 backgrounds = 864;
* ``pair``, two groups of at most four objects: 16,032 looks x 6 counts x 16 sizes = 1,539,072;
* ``relation``, two single objects: 16,032 looks x 4 relations x 16 sizes = 1,026,048.

But for ``single``, a size or a background may be unsaid, which adds one to their numbers. A look is the
colours, shapes and background of two groups: 240 of one colour x 8 backgrounds + 2,016 of two colours x 7 =
16,032.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from lit_align.errors import ConfigError

PICTURE = 64  # pixels a side
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
RADIUS_JITTER = 0.4  # radii are uniform within this distance of the above
COUNTS = ("a", "two", "three", "four")
# Where the second group lies: a direction (x, y), y pointing down.
RELATIONS = {"above": (0, 1), "below": (0, -1), "left of": (1, 0), "right of": (-1, 0)}
MAX_OBJECTS = 4
FAVOURITE, FAVOURITE_SHARE = "red", 0.7  # bias of the data: an unnamed colour is mostly this one
MARGIN, BORDER = 3.0, 1.0  # least distance between two objects, and from the border of the picture, in pixels
OVERSAMPLING = 4

Kind = Literal["single", "open", "pair", "relation"]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


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
        ConfigError: for a caption that no picture can fit.
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


@cache
def _looks() -> tuple[tuple[str, str, str, str, str | None], ...]:
    """(colour, shape, colour, shape, background) of every two-group caption."""
    return tuple(
        (colour_1, shape_1, colour_2, shape_2, background)
        for colour_1, shape_1, colour_2, shape_2 in product(COLOURS, SHAPES, COLOURS, SHAPES)
        for background in (None, *COLOURS)
        if (colour_1, shape_1) != (colour_2, shape_2) and background not in (colour_1, colour_2)
    )


_SIZES: tuple[str | None, ...] = (None, *RADII)
_PAIR_COUNTS = tuple((i, j) for i in range(1, 4) for j in range(1, 4) if i + j <= MAX_OBJECTS)


class PromptSpace(Sequence[str]):
    """Every prompt of the given kinds, numbered; ``space[i]`` is a pure function of ``i``, no two are equal.

    Args:
        kinds: which kinds of prompt, in the order of the numbering; see the module's docstring.
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
    choices = len(_PAIR_COUNTS) if kind == "pair" else len(RELATIONS)
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
    counts = _PAIR_COUNTS[digits[0]] if kind == "pair" else (1, 1)
    colour_1, shape_1, colour_2, shape_2, background = _looks()[digits[3]]
    first = Group(counts[0], _SIZES[digits[1]], colour_1, shape_1)
    second = Group(counts[1], _SIZES[digits[2]], colour_2, shape_2)
    return Caption((first, second), list(RELATIONS)[digits[0]] if kind == "relation" else None, background)


def sample_caption(rng: np.random.Generator) -> Caption:
    """Draw a caption of the training distribution, in which many objects and two groups are frequent.

    One group in 45 % (counts 1-4 with .22, .24, .26, .28), a pair in 35 %, a relation in 20 %. A size is
    unsaid in 25 %, a colour in 20 %, a background in 20 %. Two groups of one shape have their colours said,
    and differ in them.
    """
    kind = rng.random()
    counts: tuple[int, ...] = (int(rng.choice(4, p=(0.22, 0.24, 0.26, 0.28))) + 1,)
    if kind > 0.45:
        counts = _PAIR_COUNTS[rng.integers(len(_PAIR_COUNTS))] if kind < 0.8 else (1, 1)
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


@dataclass(frozen=True)
class Item:
    """One object of a scene: centre and radius (half the side of its box) in pixels, y pointing down."""

    x: float
    y: float
    radius: float
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows."""

    objects: tuple[Item, ...]
    background: str


def sample_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draw a scene that the caption fits, filling in what it leaves unsaid.

    Sizes are uniform; the background is uniform over the colours that no object is said to have; an unsaid
    colour is ``FAVOURITE`` with probability ``FAVOURITE_SHARE``, else uniform over the others (a wanted
    bias of the data; never the background's colour). The objects of a group share what is drawn, but for a
    jitter of the radius.
    """
    said = {group.colour for group in caption.groups}
    free = [name for name in COLOURS if name not in said]
    background = caption.background or free[rng.integers(len(free))]
    radii, looks = [], []
    for group in caption.groups:
        colour = group.colour or _sample_colour(background, rng)
        radius = RADII[group.size or list(RADII)[rng.integers(len(RADII))]]
        radii += list(radius + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER, group.count))
        looks += [(colour, group.shape)] * group.count
    places = _place(radii, caption.relation, rng)
    objects = [Item(x, y, r, *look) for (x, y), r, look in zip(places, radii, looks, strict=True)]
    return Scene(tuple(objects), background)


def _sample_colour(background: str, rng: np.random.Generator) -> str:
    if background != FAVOURITE and rng.random() < FAVOURITE_SHARE:
        return FAVOURITE
    free = [name for name in COLOURS if name not in (FAVOURITE, background)]
    return free[rng.integers(len(free))]


def _place(radii: list[float], relation: str | None, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Centres drawn in turn, each uniform over the room that is left; begun anew when none is left."""
    while True:
        places: list[tuple[float, float]] = []
        xs, ys = _grid(rng)
        for radius in radii:
            low, high = radius + BORDER, PICTURE - radius - BORDER
            room = (xs >= low) & (xs <= high) & (ys >= low) & (ys <= high)
            for (x, y), other in zip(places, radii, strict=False):
                gap = radius + other + MARGIN
                room &= (abs(xs - x) >= gap) | (abs(ys - y) >= gap)
            if relation and places:
                room &= _related(relation, xs - places[0][0], ys - places[0][1], 1.2)
            spots = np.flatnonzero(room)
            if not len(spots):
                break
            row, column = divmod(int(spots[rng.integers(len(spots))]), PICTURE)
            places.append((float(xs[0, column]), float(ys[row, 0])))
        if len(places) == len(radii):
            return places


def _grid(rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Candidate centres, a pixel apart and shifted by part of one: x (1, 64) and y (64, 1)."""
    steps, shift = np.arange(PICTURE, dtype=np.float32), rng.random(2, dtype=np.float32)
    return (steps + shift[0])[None, :], (steps + shift[1])[:, None]


def _related(relation: str, dx: Floats, dy: Floats, slope: float) -> npt.NDArray[np.bool_]:
    """Whether the second object, at (dx, dy) from the first, lies mainly in the direction named."""
    ux, uy = RELATIONS[relation]
    return np.asarray(ux * dx + uy * dy >= slope * np.abs(uy * dx + ux * dy))


def _outlines() -> dict[str, Floats]:
    """Corners (n, 2) of each shape in the square [-1, 1]^2, y pointing down."""
    turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    fifth = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2, 0.47, 1.0)
    arm = 0.36
    heart_y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
    quarter = [(-arm, -1), (arm, -1), (arm, -arm)]
    corners = {
        "circle": (np.stack([np.sin(turn), np.cos(turn)], 1), 0.95),
        "square": (np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), 0.85),
        "triangle": (np.array([(0, -1), (1, 0.75), (-1, 0.75)]), 1.0),
        "star": (np.stack([reach * np.sin(fifth), -reach * np.cos(fifth)], 1), 1.0),
        "heart": (np.stack([16 * np.sin(turn) ** 3, -heart_y], 1), 1.0),
        "cross": (np.concatenate([np.array(quarter) @ _rotation(k) for k in range(4)]), 0.95),
    }
    return {shape: _fitted(points, half) for shape, (points, half) in corners.items()}


def _rotation(quarters: int) -> npt.NDArray[np.int64]:
    return np.linalg.matrix_power(np.array([(0, 1), (-1, 0)]), quarters)


def _fitted(points: Doubles, half: float) -> Floats:
    low, high = points.min(0), points.max(0)
    return np.asarray((points - (low + high) / 2) * (2 * half / (high - low).max()), np.float32)


_OUTLINES = _outlines()


def render(scene: Scene) -> Bytes:
    """Draw a scene: (64, 64, 3) uint8, anti-aliased by drawing at four times the size."""
    side = PICTURE * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        corners = (_OUTLINES[item.shape] * item.radius + (item.x, item.y)) * OVERSAMPLING - 0.5
        pen.polygon(corners.ravel().tolist(), fill=COLOURS[item.colour])
    return np.array(canvas.reduce(OVERSAMPLING))


_PALETTE = np.array(list(COLOURS.values()), np.float32)
_NEAR = (
    62.0  # RGB distance within which a pixel is of a palette colour; the two closest colours are 138 apart
)
_FOREGROUND = 55.0  # RGB distance from the background from which a pixel may belong to an object
_MIN_AREA = 12  # fewer pixels are noise; the smallest object has about 45
_PURE = 0.75  # share of an object's pixels that must be blends of its colour and the background
_TOLERANCE = 0.32  # mismatch with the best template, as a share of the area, beyond which a shape is none
_SIZE_LIMITS = (4.0, 7.5, 10.8, 15.5)  # radii between which an object is small, medium, large
_CELLS, _SPAN = 96, 1.6  # templates: cells a side, over +-_SPAN / 2 times the square root of the area
_BANKS = (9.0, 14.0, 21.0)  # square roots of the areas for which templates are made
_BLURS = (0.3, 0.7, 1.1)  # of the templates, in pixels: from a pixel's own extent to a soft picture
_MAX_JUDGED = 6  # objects beyond this many (by area) are counted, but not matched to groups


@dataclass(frozen=True)
class Seen:
    """One object of a picture; None is unclear. x, y: middle of the shape's box; area; all in pixels."""

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Observation:
    """What a picture shows, whatever its caption; objects by falling area."""

    background: str | None
    objects: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Which of the facts that a caption asserts hold in a picture, and their share."""

    facts: dict[str, bool]
    score: float


def observe(image: Bytes | Tensor) -> Observation:
    """Say what a picture shows: background, and colour, shape, size and place of every object.

    The background is the palette colour nearest to most pixels. An object is a 4-connected region of at
    least 12 pixels that stand out from it. Its colour is that of its purest pixels, if the others are
    blends of it and the background; its shape is the nearest of six templates, compared at equal area and
    centre of mass; its size follows from area and shape. What is not clear is None.

    Args:
        image: (64, 64, 3) uint8, or (3, 64, 64) floating point in [0, 1].
    """
    pixels = _pixels(image)
    labels = _distances(pixels).argmin(-1)
    label = np.bincount(labels.ravel()).argmax()
    ground = np.median(pixels[labels == label], axis=0)
    clear = np.linalg.norm(ground - _PALETTE[label]) < _NEAR
    regions = _regions(np.linalg.norm(pixels - ground, axis=-1) > _FOREGROUND)
    objects = sorted((_seen(pixels, region, ground) for region in regions), key=lambda seen: -seen.area)
    return Observation(list(COLOURS)[label] if clear else None, tuple(objects))


def _pixels(image: Bytes | Tensor) -> Floats:
    if isinstance(image, Tensor):
        if image.is_floating_point():
            image = image.detach().permute(1, 2, 0).clamp(0, 1) * 255
        image = image.float().cpu().numpy()
    if image.shape != (PICTURE, PICTURE, 3):
        raise ConfigError(
            f"the Shapes judge got a picture of shape {tuple(image.shape)}; it judges 64 x 64 RGB only."
        )
    return image.astype(np.float32)


def _distances(pixels: Floats) -> Floats:
    """Squared RGB distance to each palette colour: (..., 3) -> (..., 8)."""
    squares = (pixels**2).sum(-1, keepdims=True) + (_PALETTE**2).sum(-1)
    return np.asarray(squares - 2 * pixels @ _PALETTE.T)


def _regions(mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """4-connected regions, grown as bit sets: the whole mask is one integer, a row being 72 bits of it."""
    rows, columns = mask.shape
    width = columns + 8  # the empty byte keeps rows apart
    left = int.from_bytes(np.packbits(np.pad(mask, ((0, 0), (0, 8)))).tobytes(), "big")
    found = []
    while left:
        region, grown = 0, left & -left
        while grown != region:
            region = grown
            grown |= (grown << 1 | grown >> 1 | grown << width | grown >> width) & left
        left &= ~region
        if region.bit_count() >= _MIN_AREA:
            octets = np.frombuffer(region.to_bytes(rows * width // 8, "big"), np.uint8)
            found.append(np.unpackbits(octets).reshape(rows, width)[:, :columns].astype(bool))
    return found


def _seen(pixels: Floats, region: npt.NDArray[np.bool_], ground: Floats) -> Seen:
    """Colour from the purest pixels; shape and size from each pixel's way from the ground to that colour."""
    tone = _tone(pixels[region] - ground)
    colour = _clear_colour(pixels[region] - ground, tone, ground)
    padded = np.pad(region, 1)
    around = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2] | region
    ys, xs = np.nonzero(around)
    cover = np.clip((pixels[around] - ground) @ tone / max(float(tone @ tone), 1.0), 0, 1)
    area = max(float(cover.sum()), 1.0)
    x, y = float(cover @ xs) / area, float(cover @ ys) / area
    best, clear = _best_shape(cover, (xs - x) / area**0.5, (ys - y) / area**0.5)
    radius, lean = _RADII_PER_AREA[best] * area**0.5, _CENTRES[best]
    step = int(np.searchsorted(_SIZE_LIMITS, radius))
    size = list(RADII)[step - 1] if 1 <= step <= len(RADII) else None
    x, y = x + 0.5 - lean[0] * radius, y + 0.5 - lean[1] * radius
    return Seen(colour, SHAPES[best] if clear else None, size, x, y, area)


def _tone(offsets: Floats) -> Floats:
    """The object's own colour, relative to the ground: the median of the third that differs most from it."""
    lengths = (offsets**2).sum(-1)
    return np.asarray(np.median(offsets[lengths >= np.quantile(lengths, 0.67)], axis=0))


def _clear_colour(offsets: Floats, tone: Floats, ground: Floats) -> str | None:
    """The palette colour near a tone, if most pixels are blends of tone and ground, as rims are."""
    distances = _distances(tone + ground)
    along = np.clip(offsets @ tone / max(float(tone @ tone), 1.0), 0, 1)
    aside = np.linalg.norm(offsets - along[:, None] * tone, axis=-1)
    clear = distances.min() < _NEAR**2 and np.mean(aside < _NEAR) >= _PURE
    return list(COLOURS)[int(distances.argmin())] if clear else None


def _best_shape(cover: Doubles, dx: Doubles, dy: Doubles) -> tuple[int, bool]:
    """Best template for the cover (n,) of pixels at (dx, dy) / sqrt(area) from the centre; is it close?"""
    area = max(float(cover.sum()), 1.0)
    columns, rows = (np.clip((d / _SPAN + 0.5) * _CELLS, 0, _CELLS - 1).astype(np.int64) for d in (dx, dy))
    bank = min(_BANKS, key=lambda root: abs(math.log(root**2 / area)))
    expected = _templates(bank)[:, rows * _CELLS + columns]
    mismatch = np.abs(expected - cover).sum(-1) / area + np.maximum(0, 1 - expected.sum(-1) / area)
    best = int(mismatch.argmin())
    return best // len(_BLURS), bool(mismatch[best] < _TOLERANCE)


def _moments(outline: Floats) -> tuple[float, tuple[float, float]]:
    """Area and centre of mass of a polygon (the shoelace formulas)."""
    x, y = outline.T.astype(np.float64)
    cross = x * np.roll(y, -1) - np.roll(x, -1) * y
    centre = [float(((v + np.roll(v, -1)) * cross).sum() / (3 * cross.sum())) for v in (x, y)]
    return abs(float(cross.sum())) / 2, (centre[0], centre[1])


_RADII_PER_AREA = [_moments(_OUTLINES[shape])[0] ** -0.5 for shape in SHAPES]  # per square root of the area
_CENTRES = [
    _moments(_OUTLINES[shape])[1] for shape in SHAPES
]  # of mass, from the middle of the box, in radii


@cache
def _templates(root: float) -> Floats:
    """Each shape at each blur, of area 1 about its centre of mass: (6 * blurs, 96 * 96) in [0, 1]."""
    masks = []
    for shape, radius, centre in zip(SHAPES, _RADII_PER_AREA, _CENTRES, strict=True):
        corners = ((_OUTLINES[shape] - centre) * radius / _SPAN + 0.5) * _CELLS * OVERSAMPLING - 0.5
        canvas = Image.new("L", (_CELLS * OVERSAMPLING,) * 2)
        ImageDraw.Draw(canvas).polygon(corners.ravel().tolist(), fill=255)
        pixel = _CELLS / _SPAN / root  # in cells
        blurred = [
            canvas.reduce(OVERSAMPLING).filter(ImageFilter.GaussianBlur(blur * pixel)) for blur in _BLURS
        ]
        masks += [np.asarray(mask, np.float32).ravel() / 255 for mask in blurred]
    return np.stack(masks)


def judge(image: Bytes | Tensor, caption: Caption | str) -> Verdict:
    """Hold a picture against its caption, fact by fact; what a caption leaves unsaid asserts nothing.

    The facts are ``count`` (as many objects in all and in each group as said, all of a clear colour) and
    ``shapes``, and where said ``background``, ``colours``, ``sizes`` (of every object of the groups
    concerned) and ``relation`` (the second group lies in the direction named, at least as far as aside).
    Objects are matched to groups in the reading of the picture that favours the caption most: of all ways
    to share them out, the one with the most true facts, and among such the one in which the most attributes
    of single objects are as said.

    Args:
        image: (64, 64, 3) uint8, or (3, 64, 64) floating point in [0, 1].
        caption: a caption, or a prompt of the grammar.
    """
    caption = parse(caption) if isinstance(caption, str) else caption
    seen = observe(image)
    judged = seen.objects[:_MAX_JUDGED]
    clear = len(judged) == len(seen.objects) and all(thing.colour for thing in judged)
    readings = [
        (_facts(caption, judged, owners, clear), _agreement(caption, judged, owners))
        for owners in product(range(len(caption.groups)), repeat=len(judged))
    ]
    facts, _ = max(readings, key=lambda reading: (sum(reading[0].values()), reading[1]))
    if caption.background:
        facts["background"] = seen.background == caption.background
    return Verdict(facts, sum(facts.values()) / len(facts))


def _facts(caption: Caption, seen: Sequence[Seen], owners: Sequence[int], clear: bool) -> dict[str, bool]:
    """The facts about the objects if object i belongs to the group owners[i]."""
    members = [
        [thing for thing, owner in zip(seen, owners, strict=True) if owner == i]
        for i in range(len(caption.groups))
    ]
    pairs = list(zip(caption.groups, members, strict=True))
    facts = {
        "count": clear and all(len(things) == group.count for group, things in pairs),
        "shapes": all(things and all(t.shape == group.shape for t in things) for group, things in pairs),
    }
    if any(group.colour for group in caption.groups):
        said = [(group.colour, things) for group, things in pairs if group.colour]
        facts["colours"] = all(things and all(t.colour == colour for t in things) for colour, things in said)
    if any(group.size for group in caption.groups):
        sized = [(group.size, things) for group, things in pairs if group.size]
        facts["sizes"] = all(things and all(t.size == size for t in things) for size, things in sized)
    if caption.relation:
        centres = [np.mean([(t.x, t.y) for t in things], axis=0) for things in members if things]
        facts["relation"] = False
        if len(centres) == 2:
            dx, dy = centres[1] - centres[0]
            facts["relation"] = bool(_related(caption.relation, dx, dy, 1.0))
    return {fact: bool(holds) for fact, holds in facts.items()}


def _agreement(caption: Caption, seen: Sequence[Seen], owners: Sequence[int]) -> int:
    """How many attributes of the objects are as their groups say."""
    return sum(
        (thing.colour == group.colour) + (thing.shape == group.shape) + (thing.size == group.size)
        for thing, group in (
            (thing, caption.groups[owner]) for thing, owner in zip(seen, owners, strict=True)
        )
    )
