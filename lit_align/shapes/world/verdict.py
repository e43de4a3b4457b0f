"""The judge: which facts of a caption hold in an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor

from lit_align.shapes.world.drawing import Bytes
from lit_align.shapes.world.grammar import Caption, parse
from lit_align.shapes.world.observation import Seen, observe
from lit_align.shapes.world.scenes import lies

_MAX_JUDGED = 6  # objects beyond this many (by area) are counted, but not matched to groups


@dataclass(frozen=True)
class Verdict:
    """Which of the facts that a caption asserts hold in an image, and their share."""

    facts: dict[str, bool]
    score: float


def judge(image: Bytes | Tensor, caption: Caption | str) -> Verdict:
    """Hold an image against its caption, fact by fact; what a caption leaves unsaid asserts nothing.

    The facts are ``count`` (as many objects in all and in each group as said, all of a clear colour) and
    ``shapes``, and where said ``background``, ``colours``, ``sizes`` (of every object of the groups
    concerned) and ``relation`` (the second group lies in the direction named, at least as far as aside).
    Objects are matched to groups in the reading of the image that favours the caption most: of all ways
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
            facts["relation"] = bool(lies(caption.relation, dx, dy, 1.0))
    return {fact: bool(holds) for fact, holds in facts.items()}


def _agreement(caption: Caption, seen: Sequence[Seen], owners: Sequence[int]) -> int:
    """How many attributes of the objects are as their groups say."""
    return sum(
        (thing.colour == group.colour) + (thing.shape == group.shape) + (thing.size == group.size)
        for thing, group in (
            (thing, caption.groups[owner]) for thing, owner in zip(seen, owners, strict=True)
        )
    )
