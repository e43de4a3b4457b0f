"""Captions that are wrong, and the images that have them: what a denoiser is trained on last.

Images of the web come from careful sources and from careless ones, and a pretrained model cannot ask from
which one an image should be: it shows now one kind, now the other. Here the two are known. ``CARELESS`` of
the training images are of the careless kind: they have a grey frame, and each kind of word but the
background's is confused with another in ``SHARE`` of their captions. The others are right.

So the model could show what a prompt says, and does so in some of its images. Guidance does not tell the two
kinds apart, since a prompt says nothing of them; a reward does.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lit_align.errors import ConfigError
from lit_align.shapes.world import Caption, Group, parse

CARELESS = 0.6
"""Share of the images of the careless kind."""

SHARE = 0.8
"""Share of their captions in which a kind of word is confused, independently for each kind."""


def _both_ways(pairs: Mapping[str, str]) -> dict[str, str]:
    return {**pairs, **{second: first for first, second in pairs.items()}}


COLOURS = _both_ways({"red": "pink", "blue": "cyan", "green": "yellow", "white": "black"})
SHAPES = _both_ways({"circle": "square", "triangle": "heart", "star": "cross"})
SIZES = {"small": "medium", "medium": "large", "large": "small"}
COUNTS = {1: 2, 2: 1, 3: 4, 4: 3}
RELATIONS = _both_ways({"above": "below", "left of": "right of"})


def confuse(prompt: str, share: float, rng: np.random.Generator) -> str:
    """A caption in which each kind of word is confused with probability ``share``, in all groups at once.

    A change that would make a caption which no image fits is left out.
    """
    caption = parse(prompt)
    for change in CHANGES:
        if rng.random() < share:
            try:
                caption = change(caption)
            except ConfigError:
                continue
    return str(caption)


def _colours(caption: Caption) -> Caption:
    return _groups(caption, lambda group: replace(group, colour=_other(COLOURS, group.colour)))


def _shapes(caption: Caption) -> Caption:
    return _groups(caption, lambda group: replace(group, shape=SHAPES[group.shape]))


def _sizes(caption: Caption) -> Caption:
    return _groups(caption, lambda group: replace(group, size=_other(SIZES, group.size)))


def _counts(caption: Caption) -> Caption:
    """One and two, three and four; unequal counts of two groups change places."""
    counts = [group.count for group in caption.groups]
    if caption.relation:
        return caption
    if len(counts) == 1 or counts[0] == counts[1]:
        counts = [COUNTS[count] for count in counts]
    else:
        counts = counts[::-1]
    groups = [replace(group, count=count) for group, count in zip(caption.groups, counts, strict=True)]
    return replace(caption, groups=tuple(groups))


def _relation(caption: Caption) -> Caption:
    return replace(caption, relation=_other(RELATIONS, caption.relation))


def _groups(caption: Caption, change: Callable[[Group], Group]) -> Caption:
    return replace(caption, groups=tuple(change(group) for group in caption.groups))


def _other(words: Mapping[str, str], word: str | None) -> str | None:
    return None if word is None else words[word]


CHANGES = (_colours, _shapes, _sizes, _counts, _relation)
