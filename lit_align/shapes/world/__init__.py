"""The Shapes world: captions, images that fit them exactly, and a judge of what an image shows.

An image is 64 x 64 RGB: one to four solid shapes, in one or two groups, on a flat background. A caption is
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

from lit_align.shapes.world.drawing import Bytes, Doubles, render
from lit_align.shapes.world.grammar import (
    COLOURS,
    COUNTS,
    MAX_OBJECTS,
    RADII,
    RELATIONS,
    SHAPES,
    Caption,
    Group,
    in_grammar,
    parse,
    sample_caption,
)
from lit_align.shapes.world.observation import Observation, Seen, observe
from lit_align.shapes.world.scenes import (
    BORDER,
    FAVOURITE,
    FAVOURITE_SHARE,
    FRAME,
    IMAGE_SIDE,
    MARGIN,
    Item,
    Scene,
    sample_scene,
)
from lit_align.shapes.world.space import ALL_PAIRS, Kind, PromptSpace, ShapePairs, shape_pairs
from lit_align.shapes.world.taste import AESTHETIC_WEIGHT, aesthetics, utility
from lit_align.shapes.world.verdict import Verdict, judge
from lit_align.shapes.world.vocabulary import is_shapes_vocabulary, unknown_words, untaught, words

__all__ = [
    "AESTHETIC_WEIGHT",
    "ALL_PAIRS",
    "BORDER",
    "COLOURS",
    "COUNTS",
    "FAVOURITE",
    "FAVOURITE_SHARE",
    "FRAME",
    "IMAGE_SIDE",
    "MARGIN",
    "MAX_OBJECTS",
    "RADII",
    "RELATIONS",
    "SHAPES",
    "Bytes",
    "Caption",
    "Doubles",
    "Group",
    "Item",
    "Kind",
    "Observation",
    "PromptSpace",
    "Scene",
    "Seen",
    "ShapePairs",
    "Verdict",
    "aesthetics",
    "in_grammar",
    "is_shapes_vocabulary",
    "judge",
    "observe",
    "parse",
    "render",
    "sample_caption",
    "sample_scene",
    "shape_pairs",
    "unknown_words",
    "untaught",
    "utility",
    "words",
]
