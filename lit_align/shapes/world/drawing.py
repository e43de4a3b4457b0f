"""The renderer: outlines of the shapes, and the image of a scene."""

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from lit_align.shapes.world.grammar import COLOURS
from lit_align.shapes.world.scenes import IMAGE_SIDE, Floats, Scene

OVERSAMPLING = 4  # pixels of the canvas a side of a pixel of the image

Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


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


OUTLINES = _outlines()  # corners (n, 2) in units of the radius


def render(scene: Scene) -> Bytes:
    """Draw a scene: (64, 64, 3) uint8, anti-aliased by drawing at four times the size."""
    side = IMAGE_SIDE * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        corners = (OUTLINES[item.shape] * item.radius + (item.x, item.y)) * OVERSAMPLING - 0.5
        pen.polygon(corners.ravel().tolist(), fill=COLOURS[item.colour])
    return np.array(canvas.reduce(OVERSAMPLING))
