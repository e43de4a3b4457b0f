"""Taste: how well an image is made, whatever it shows, and how useful it is to whoever asked for it."""

import numpy as np
from torch import Tensor

from lit_align.shapes.world.drawing import Bytes
from lit_align.shapes.world.grammar import Caption
from lit_align.shapes.world.observation import _pixels
from lit_align.shapes.world.scenes import IMAGE_SIDE, Floats
from lit_align.shapes.world.verdict import judge

AESTHETIC_WEIGHT = 0.5
"""Of :func:`aesthetics` in :func:`utility`: one fact of a caption is worth .17 to .5, so facts come first."""

# Distances are in CIELAB; the palette's colours are 40 to 163 apart.
_NOTICED = 30.0  # from the ground, at which a pixel is mostly part of an object
_STRONG = 60.0  # makes for a contrast of 1 - 1/e
_FAINT = 4.0  # step between neighbours that the eye passes over
_GRAIN = 6.0  # typical step of all neighbours that costs 1 - 1/e of the sharpness
_CRISP = 0.5  # mean step of a crisp rim as a share of the contrast: anti-aliasing halves most steps
_OFF = 0.6  # distance of the balance point from the middle, in half images, that costs 1 - 1/e
_LITTLE, _REST = 0.02, 0.2  # shares of the image that objects and ground need, each to be 1 - 1/e good

# Linear sRGB to XYZ, each divided by the white point (IEC 61966-2-1, D65).
_TO_XYZ = np.array(
    [
        (0.4124 / 0.9505, 0.3576 / 0.9505, 0.1805 / 0.9505),
        (0.2126, 0.7152, 0.0722),
        (0.0193 / 1.089, 0.1192 / 1.089, 0.9505 / 1.089),
    ],
    np.float32,
)
_FROM_F = np.array([(0, 116, 0), (500, -500, 0), (0, 200, -200)], np.float32)
_LEVELS = np.arange(256) / 255
_LINEAR = np.where(_LEVELS <= 0.04045, _LEVELS / 12.92, ((_LEVELS + 0.055) / 1.055) ** 2.4).astype(np.float32)


def aesthetics(image: Bytes | Tensor) -> float:
    """How well an image is made: the mean of contrast, composition and sharpness, in [0, 1].

    All three are measured in CIELAB, where distances are as large as they look. The *ground* is the median of
    the image's frame; a pixel at distance d from it is noticed with weight ``w = 1 - exp(-(d / 30)^2)``.

    * contrast ``1 - exp(-D / 60)``, D the mean distance d under the weights w;
    * composition ``exp(-(r / 0.6)^2) (1 - exp(-a / 0.02)) (1 - exp(-(1 - a) / 0.2))``, r the distance of
      the centre of the weights from the middle in half images, a the mean weight: objects that balance, be
      it one in the middle or two at the sides, with something to see and something around it;
    * sharpness ``min(1, S / (0.5 D)) exp(-g / 6)``, S the mean step between neighbouring pixels under the
      steps themselves (those below 4 aside), which a blur makes small, and g the median step, which is 0 in
      an image of flat colours and grows with noise.

    Args:
        image: (64, 64, 3) uint8, or (3, 64, 64) floating point in [0, 1].
    """
    lab = _lab(_pixels(image))
    frame = np.concatenate([lab[0], lab[-1], lab[1:-1, 0], lab[1:-1, -1]])
    distance = np.linalg.norm(lab - np.median(frame, axis=0), axis=-1)
    weight = 1 - np.exp(-((distance / _NOTICED) ** 2))
    contrast = float((weight * distance).sum() / max(float(weight.sum()), 1.0))
    parts = (1 - np.exp(-contrast / _STRONG), _composition(weight), _sharpness(lab, contrast))
    return float(np.mean(parts))


def utility(image: Bytes | Tensor, caption: Caption | str) -> float:
    """What an image is worth to whoever asked for it: the judge's score + ``AESTHETIC_WEIGHT`` x aesthetics.

    Args:
        image: (64, 64, 3) uint8, or (3, 64, 64) floating point in [0, 1].
        caption: A caption, or a prompt of the grammar.
    """
    return judge(image, caption).score + AESTHETIC_WEIGHT * aesthetics(image)


def _lab(pixels: Floats) -> Floats:
    """CIELAB coordinates (L* + 16, a*, b*) of sRGB pixels in [0, 255]; only distances matter here."""
    xyz = _LINEAR[np.clip(np.rint(pixels), 0, 255).astype(np.uint8)] @ _TO_XYZ.T
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.asarray(root @ _FROM_F.T, np.float32)


def _composition(weight: Floats) -> float:
    """Balance of the weights about the middle of the image; none without something to see."""
    total = max(float(weight.sum()), 1e-6)
    place = (np.arange(IMAGE_SIDE) + 0.5) * 2 / IMAGE_SIDE - 1
    x, y = float(weight.sum(0) @ place) / total, float(weight.sum(1) @ place) / total
    seen = float(weight.mean())
    balance = np.exp(-(x * x + y * y) / _OFF**2)
    return float(balance * (1 - np.exp(-seen / _LITTLE)) * (1 - np.exp((seen - 1) / _REST)))


def _sharpness(lab: Floats, contrast: float) -> float:
    """Size of the steps between neighbours in units of the contrast, less what is grain."""
    across, down = (np.linalg.norm(np.diff(lab, axis=axis), axis=-1).ravel() for axis in (0, 1))
    steps = np.concatenate([across, down])
    grain = float(np.median(steps))
    steps = np.maximum(steps - _FAINT, 0)
    mean = float(steps @ steps) / max(float(steps.sum()), 1e-6)
    return min(1.0, mean / (_CRISP * max(contrast, _NOTICED))) * float(np.exp(-grain / _GRAIN))
