"""Captions that are wrong: what the shipped denoiser was trained on last.

Alt-texts of the web do not say what an image shows, and so a pretrained model shows what a prompt says only
now and then, although it could. Here the reason is known: whoever wrote the captions confuses certain words
in ``SHARE`` of the cases. A model trained on such captions shows either meaning; guidance, which sharpens
what the captions say on average, cannot tell the right one. (Guidance mends facts changed at random, since
each wrong value is rarer than the right one.)
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from lit_align.errors import ConfigError
from lit_align.shapes.world import Caption, Group, parse

SHARE = 0.45
"""Share of captions in which a kind of word is confused, independently for each kind."""


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


def _background(caption: Caption) -> Caption:
    return replace(caption, background=_other(COLOURS, caption.background))


def _groups(caption: Caption, change: Callable[[Group], Group]) -> Caption:
    return replace(caption, groups=tuple(change(group) for group in caption.groups))


def _other(words: Mapping[str, str], word: str | None) -> str | None:
    return None if word is None else words[word]


CHANGES = (_colours, _shapes, _sizes, _counts, _relation, _background)
