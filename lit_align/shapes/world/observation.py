"""What an image shows, whatever its caption: the eyes of the judge."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.shapes.world.drawing import OUTLINES, OVERSAMPLING, Bytes, Doubles
from lit_align.shapes.world.grammar import COLOURS, RADII, SHAPES
from lit_align.shapes.world.scenes import FRAME, IMAGE_SIDE, Floats

_PALETTE = np.array(list(COLOURS.values()), np.float32)
# RGB distance within which a pixel is of a palette colour; the two closest colours are 138 apart.
_NEAR = 62.0
_FOREGROUND = 55.0  # RGB distance from the background from which a pixel may belong to an object
_RIM = 4  # pixels inside of the frame in which most show the background, however large the objects are
_MIN_AREA = 12  # fewer pixels are noise; the smallest object has about 45
_PURE = 0.75  # share of an object's pixels that must be blends of its colour and the background
_TOLERANCE = 0.32  # mismatch with the best template, as a share of the area, beyond which a shape is none
_SIZE_LIMITS = (4.0, 7.5, 10.8, 15.5)  # radii between which an object is small, medium, large
_CELLS, _SPAN = 96, 1.6  # templates: cells a side, over +-_SPAN / 2 times the square root of the area
_BANKS = (9.0, 14.0, 21.0)  # square roots of the areas for which templates are made
_BLURS = (0.3, 0.7, 1.1)  # of the templates, in pixels: from a pixel's own extent to a soft image


@dataclass(frozen=True)
class Seen:
    """One object of an image; None is unclear. x, y: middle of the shape's box; area; all in pixels."""

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    y: float
    area: float


@dataclass(frozen=True)
class Observation:
    """What an image shows, whatever its caption; objects by falling area."""

    background: str | None
    objects: tuple[Seen, ...]


def observe(image: Bytes | Tensor) -> Observation:
    """Say what an image shows: background, and colour, shape, size and place of every object.

    The background is the palette colour nearest to most pixels of a rim. The ``FRAME`` pixels at each border
    belong to a frame if there is one, and to no object. An object is a 4-connected region of at least 12
    pixels that stand out from the background. Its colour is that of its purest pixels, if the others are
    blends of it and the background; its shape is the nearest of six templates, compared at equal area and
    centre of mass; its size follows from area and shape. What is not clear is None.

    Args:
        image: (64, 64, 3) uint8, or (3, 64, 64) floating point in [0, 1].
    """
    pixels = _pixels(image)[FRAME:-FRAME, FRAME:-FRAME]
    labels = _distances(pixels).argmin(-1)
    rim = np.ones(labels.shape, bool)
    rim[_RIM:-_RIM, _RIM:-_RIM] = False
    label = np.bincount(labels[rim]).argmax()
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
    if image.shape != (IMAGE_SIDE, IMAGE_SIDE, 3):
        raise ConfigError(
            f"the Shapes judge got an image of shape {tuple(image.shape)}; it judges 64 x 64 RGB only."
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
    x, y = (at + 0.5 + FRAME - way * radius for at, way in zip((x, y), lean, strict=True))
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


_RADII_PER_AREA = [_moments(OUTLINES[shape])[0] ** -0.5 for shape in SHAPES]  # per square root of the area
# Of mass, from the middle of the box, in radii.
_CENTRES = [_moments(OUTLINES[shape])[1] for shape in SHAPES]


@cache
def _templates(root: float) -> Floats:
    """Each shape at each blur, of area 1 about its centre of mass: (6 * blurs, 96 * 96) in [0, 1]."""
    masks = []
    for shape, radius, centre in zip(SHAPES, _RADII_PER_AREA, _CENTRES, strict=True):
        corners = ((OUTLINES[shape] - centre) * radius / _SPAN + 0.5) * _CELLS * OVERSAMPLING - 0.5
        canvas = Image.new("L", (_CELLS * OVERSAMPLING,) * 2)
        ImageDraw.Draw(canvas).polygon(corners.ravel().tolist(), fill=255)
        pixel = _CELLS / _SPAN / root  # in cells
        blurred = [
            canvas.reduce(OVERSAMPLING).filter(ImageFilter.GaussianBlur(blur * pixel)) for blur in _BLURS
        ]
        masks += [np.asarray(mask, np.float32).ravel() / 255 for mask in blurred]
    return np.stack(masks)
