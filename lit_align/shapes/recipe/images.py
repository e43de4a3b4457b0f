"""Training images with their captions, drawn once, and captions that are wrong by one fact."""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.randomness import place
from lit_align.shapes.world import (
    COLOURS,
    COUNTS,
    FRAME,
    IMAGE_SIDE,
    RADII,
    RELATIONS,
    SHAPES,
    Bytes,
    Caption,
    parse,
    render,
    sample_caption,
    sample_scene,
)

MEAN = STD = (0.5, 0.5, 0.5)
"""Normalisation of the images; every ``preprocessor_config.json`` says so too."""

GREY = 0.5
"""Of the frames, which are ``FRAME`` pixels wide."""

HELD_OUT = 0.05
"""Share of the prompts at each end of their hash order that no reward model sees.

They are the test and the validation split of a ``PromptDataModule`` with its default fractions.
"""


def held_out(prompt: str) -> bool:
    """Whether reward models must not be trained on this prompt."""
    return not HELD_OUT <= place(prompt) < 1 - HELD_OUT


def numpy_rng(seed: int, purpose: str) -> np.random.Generator:
    """A numpy generator for one purpose of one run."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def as_images(pixels: Bytes) -> Tensor:
    """Images ``(B, 64, 64, 3)`` uint8 as ``(B, 3, 64, 64)`` float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def normalise(images: Tensor) -> Tensor:
    """Images in [0, 1] as the models take them."""
    return (images - images.new_tensor(MEAN)[:, None, None]) / images.new_tensor(STD)[:, None, None]


def frame(images: Tensor) -> Tensor:
    """Images ``(B, 3, H, W)`` with a frame, as careless sources have them.

    No object reaches it, and the judge does not look at it.
    """
    inner = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    return torch.where(inner, images, GREY)


def has_frame(images: Tensor) -> Tensor:
    """Which images ``(B, 3, H, W)`` have the frame of careless sources, ``(B,)`` bool."""
    border = frame(torch.ones_like(images)) == GREY  # one image's frame is every image's
    distance = (images - GREY).abs() * border
    return distance.sum((1, 2, 3)) < 0.15 * border.sum((1, 2, 3))


def frame_half(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A frame for each image with probability one half: what looks at images must know both kinds.

    Args:
        images: ``(B, 3, H, W)``.
        generator: On the CPU; torch's own if not given.
    """
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, frame(images), images)


class Images:
    """Images and captions in memory-mapped files.

    Args:
        folder: Holds ``images.npy`` and ``captions.txt``.
        seed: Of whatever is drawn about them later.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.pixels = np.load(folder / "images.npy", mmap_mode="r")
        self.captions = (folder / "captions.txt").read_text("utf-8").splitlines()
        self.seed = seed

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, numbers: Tensor | Sequence[int]) -> Tensor:
        """Images ``(B, 3, 64, 64)`` float32 in [0, 1]."""
        return as_images(self.pixels[np.asarray(numbers)])

    def allowed(self) -> Tensor:
        """Numbers ``(M,)`` of the images that reward models may be trained on."""
        return torch.tensor([i for i, caption in enumerate(self.captions) if not held_out(caption)])

    def rng(self, purpose: str) -> np.random.Generator:
        """A numpy generator for one purpose."""
        return numpy_rng(self.seed, purpose)


def draw_images(folder: Path, num_images: int, seed: int) -> None:
    """Draw images from the training distribution into ``folder``.

    Args:
        folder: Made if need be; ``captions.txt`` is written last, so its presence means that the folder is
            whole.
        num_images: How many.
        seed: Of captions and scenes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = numpy_rng(seed, "pictures")
    shape = (num_images, IMAGE_SIDE, IMAGE_SIDE, 3)
    pixels = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
    captions = []
    for number in range(num_images):
        caption = sample_caption(rng)
        pixels[number] = render(sample_scene(caption, rng))
        captions.append(str(caption))
    pixels.flush()
    (folder / "captions.txt").write_text("\n".join(captions) + "\n", "utf-8")


def mutate(prompt: str, rng: np.random.Generator) -> str:
    """A caption that differs from ``prompt`` in one fact, so that an image of ``prompt`` does not fit it.

    One of: a count, a size, a colour, a shape, the relation, the background, or two groups' colours
    exchanged. Only what is said changes.
    """
    caption = parse(prompt)
    changes: list[Callable[[], Caption]] = [lambda: _new_group(caption, rng)] * (2 * len(caption.groups))
    if caption.background:
        changes.append(lambda: replace(caption, background=_other(COLOURS, caption.background, rng)))
    if caption.relation:
        changes += [lambda: replace(caption, relation=_other(RELATIONS, caption.relation, rng))] * 2
    if len(caption.groups) == 2:
        changes.append(lambda: _exchange(caption))
    while True:
        try:
            wrong = changes[rng.integers(len(changes))]()
        except ConfigError:  # no image could fit it, so it would be too easy
            continue
        if wrong != caption and not _says_the_same(wrong, caption):
            return str(wrong)


def _other(choices: Iterable[str], value: str | None, rng: np.random.Generator) -> str:
    rest = [choice for choice in choices if choice != value]
    return rest[rng.integers(len(rest))]


def _new_group(caption: Caption, rng: np.random.Generator) -> Caption:
    """Change one said attribute of one group."""
    groups = list(caption.groups)
    place = int(rng.integers(len(groups)))
    group = groups[place]
    count = [other for other in range(1, len(COUNTS) + 1) if other != group.count]
    changed = [
        replace(group, count=count[rng.integers(len(count))]),
        replace(group, shape=_other(SHAPES, group.shape, rng)),
        *([replace(group, size=_other(RADII, group.size, rng))] if group.size else []),
        *([replace(group, colour=_other(COLOURS, group.colour, rng))] if group.colour else []),
    ]
    groups[place] = changed[rng.integers(len(changed))]
    return replace(caption, groups=tuple(groups))


def _exchange(caption: Caption) -> Caption:
    """Give each of two groups the other's colour."""
    first, second = caption.groups
    return replace(
        caption, groups=(replace(first, colour=second.colour), replace(second, colour=first.colour))
    )


def _says_the_same(one: Caption, other: Caption) -> bool:
    """Whether two captions joined by "and" are the same but for the order of their groups."""
    return (
        one.relation is None and one.background == other.background and set(one.groups) == set(other.groups)
    )
