"""What an image shows: a scene, drawn at random to fit a caption."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lit_align.shapes.world.grammar import COLOURS, RADII, RELATIONS, Caption

IMAGE_SIDE = 64  # pixels a side
PITCH = 8  # pixels between the places where an object's centre can be, as between those of the latent
FAVOURITE, FAVOURITE_SHARE = "red", 0.7  # bias of the data: an unnamed colour is mostly this one
FRAME = 2  # pixels at each border that no object reaches: some images have a frame there
MARGIN, BORDER = 3.0, float(FRAME)  # least distance between two objects, and from the border, in pixels

Floats = npt.NDArray[np.float32]


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
    """Everything that an image shows."""

    objects: tuple[Item, ...]
    background: str


def sample_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draw a scene that the caption fits, filling in what it leaves unsaid.

    Sizes are uniform; the background is uniform over the colours that no object is said to have; an unsaid
    colour is ``FAVOURITE`` with probability ``FAVOURITE_SHARE``, else uniform over the others (a wanted
    bias of the data; never the background's colour). The objects of a group share what is drawn.
    """
    said = {group.colour for group in caption.groups}
    free = [name for name in COLOURS if name not in said]
    background = caption.background or free[rng.integers(len(free))]
    radii, looks = [], []
    for group in caption.groups:
        colour = group.colour or _sample_colour(background, rng)
        radius = RADII[group.size or list(RADII)[rng.integers(len(RADII))]]
        radii += [radius] * group.count
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
    """Centres drawn in turn, each uniform over the places that are left; begun anew when none is left.

    The places are ``PITCH`` apart. A small denoiser learns shapes that stand anywhere slowly: after half an
    hour on one core it had every colour and no outline.
    """
    xs, ys = np.meshgrid(*[np.arange(PITCH, IMAGE_SIDE, PITCH, dtype=np.float32)] * 2)
    while True:
        places: list[tuple[float, float]] = []
        for radius in radii:
            low, high = radius + BORDER, IMAGE_SIDE - radius - BORDER
            room = (xs >= low) & (xs <= high) & (ys >= low) & (ys <= high)
            for (x, y), other in zip(places, radii, strict=False):
                gap = radius + other + MARGIN
                room &= (abs(xs - x) >= gap) | (abs(ys - y) >= gap)
            if relation and places:
                room &= lies(relation, xs - places[0][0], ys - places[0][1], 1.2)
            spots = np.flatnonzero(room)
            if not len(spots):
                break
            spot = spots[rng.integers(len(spots))]
            places.append((float(xs.flat[spot]), float(ys.flat[spot])))
        if len(places) == len(radii):
            return places


def lies(relation: str, dx: Floats, dy: Floats, slope: float) -> npt.NDArray[np.bool_]:
    """Whether the second object, at (dx, dy) from the first, lies mainly in the direction named."""
    ux, uy = RELATIONS[relation]
    return np.asarray(ux * dx + uy * dy >= slope * np.abs(uy * dx + ux * dy))
