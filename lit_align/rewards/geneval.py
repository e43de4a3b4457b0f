"""How many of the objects, colours and positions that a prompt asks for a detector finds in the image.

The dense reward for prompts of GenEval (Ghosh et al. 2023, arXiv:2310.11513) of Flow-GRPO (Liu et al. 2025,
arXiv:2505.05470). Shapes: ``B`` images, ``n`` objects.
"""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.pretrained import SHAPES, shared
from lit_align.rewards.base import Reward, are_whole, domain_of, to_bytes
from lit_align.rewards.clip import CLIP_MODEL, CLIPCosine
from lit_align.rewards.detectors import Found, load_detector

DETECTOR = "hustvl/yolos-base"
"""A detector of COCO's labels (Fang et al. 2021) in place of mmdet's Mask2Former, which is not on the hub."""

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The colours of GenEval."""

PLACES = ("left of", "right of", "above", "below")
"""The places of GenEval."""

COLOUR_TEXTS = ("a photo of a {colour} {object}", "a photo of a {colour}-colored {object}")
"""How CLIP is asked for the colour of an object; a third text does not name it. GenEval's own."""

COLOUR_ALONE = "a photo of a {colour} object"

LARGEST_COUNT = 16
"""At most so many detections of a kind count, those of highest confidence; as published, like the margin."""

MARGIN = 0.1
"""Share of the sizes of two objects by which their centres must differ for a position."""


class GenEval(Reward):
    """How far the image shows what its prompt asks for: a mean of terms, 1 if all is there; can be negative.

    The data says what is asked for, in a column as in GenEval's ``*_metadata.jsonl``: a list of
    ``{class, count, color?, position?: [where, group]}``. Each entry gives these terms:

    - ``1 - |count - found| / count``;
    - of a colour ``1 - |count - found in that colour| / count``;
    - of a position 1, if all of the objects lie so to all of the entry with that number, else 0.

    Where the number is wrong, the other term of an entry is 0. Departures from the published server: there a
    missed position gives a term 0, and then a second term 1; here the colour is taken from the object's box,
    not its mask; the detector is another. What a prompt excludes is not used, as published, since the number
    says it already.

    Args:
        pretrained: The detector: a hub id, a folder, or ``"shapes"``; see :class:`ObjectPresence` for which.
        colours: A CLIP that names colours: a hub id, a folder, or ``"shapes"``; by default OpenAI's ViT-L/14,
            as published, and with ``pretrained="shapes"`` the bundled one.
        column: The data's column with what is asked for.
        tag: The data's column with the kind of prompt: ``counting`` has a threshold of its own.
        threshold: Confidence from which a detection counts.
        counting_threshold: The same for prompts about numbers.
        overlap: Of two detections of a kind that overlap by more than this (intersection over union) the
            surer one counts; 1 is no limit, as published. Open-vocabulary detectors need about .5.

    Raises:
        ConfigError: A model cannot be loaded, or a number is not a share; on scoring, if there is no such
            column, or it cannot be understood.
    """

    IMAGES_AT_ONCE = 16
    differentiable = False
    scope = "sample"
    documented = (-math.inf, 1.0)

    def __init__(
        self,
        pretrained: str = DETECTOR,
        colours: str | None = None,
        column: str = "include",
        tag: str = "tag",
        threshold: float = 0.3,
        counting_threshold: float = 0.9,
        overlap: float = 1.0,
    ) -> None:
        super().__init__()
        colours = colours or (SHAPES if pretrained == SHAPES else CLIP_MODEL)
        self.domain = domain_of(SHAPES if SHAPES in (pretrained, colours) else pretrained)
        numbers = {"threshold": threshold, "counting_threshold": counting_threshold, "overlap": overlap}
        for name, number in numbers.items():
            if not 0 <= number <= 1:
                raise ConfigError(f"GenEval: {name} is {number}; give a share from 0 to 1.")
        self.detector, self.clip = load_detector(pretrained), shared(CLIPCosine, colours)
        self.column, self.tag, self.overlap = column, tag, overlap
        self.threshold, self.counting_threshold = threshold, counting_threshold
        self.freeze()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        asked = self._asked(columns or {})
        counting = [kind == "counting" for kind in (columns or {}).get(self.tag, [""] * len(images))]
        whole, pixels = are_whole(images).tolist(), to_bytes(images)
        rows = [row for row, entries in enumerate(asked) if entries and whole[row]]
        scores = torch.full((len(images),), torch.nan, device=images.device)
        for start in range(0, len(rows), self.IMAGES_AT_ONCE):
            chunk = rows[start : start + self.IMAGES_AT_ONCE]
            names = [list(dict.fromkeys(entry["class"] for entry in asked[row])) for row in chunk]
            lowest = min(self.threshold, self.counting_threshold)
            found = self.detector.boxes(pixels[chunk], names, lowest)
            for row, objects in zip(chunk, found, strict=True):
                least = self.counting_threshold if counting[row] else self.threshold
                kept = {name: self._kept(one, least) for name, one in objects.items()}
                terms = self._terms(images[row], asked[row], kept)
                scores[row] = sum(terms) / len(terms)
        return scores

    def _kept(self, found: Found, least: float) -> Tensor:
        """Boxes ``(n, 4)`` that count, the surest first."""
        boxes = found.boxes[found.scores > least][:LARGEST_COUNT]
        kept: list[int] = []
        for number, box in enumerate(boxes):
            if all(overlap(box, boxes[other]) <= self.overlap for other in kept):
                kept.append(number)
        return boxes[kept]

    def _terms(
        self, image: Tensor, asked: Sequence[Mapping[str, Any]], found: Mapping[str, Tensor]
    ) -> list[float]:
        """The terms of an image ``(3, H, W)``, given the boxes ``(n, 4)`` of each object."""
        terms: list[float] = []
        right: list[Tensor | None] = []  # of each entry its boxes, if all of it is right
        for entry in asked:
            boxes, count = found[entry["class"]], int(entry["count"])
            colour, position = entry.get("color"), entry.get("position")
            terms.append(1 - abs(count - len(boxes)) / count)
            matched = len(boxes) == count
            if not matched:
                terms += [0.0] if colour or position else []
            if matched and colour:
                named = self._colours(image, boxes, entry["class"]).count(colour)
                terms.append(1 - abs(count - named) / count)
                matched = named == count
            if matched and position:
                where, group = position
                target = right[int(group)]
                matched = target is not None and all(
                    where in relations(box, other) for box in boxes for other in target
                )
                terms.append(float(matched))
            right.append(boxes if matched else None)
        return terms

    def _colours(self, image: Tensor, boxes: Tensor, name: str) -> list[str]:
        """The likeliest colour of the object in each box ``(n, 4)`` of an image ``(3, H, W)``."""
        height, width = image.shape[1:]
        crops = []
        for box in boxes:
            left, top = (int(edge) for edge in box[:2].floor().clamp(min=0))
            right, bottom = max(left + 1, min(width, int(box[2].ceil()))), int(box[3].ceil())
            bottom = max(top + 1, min(height, bottom))
            crops.append(self.clip.embed_images(image[None, :, top:bottom, left:right]))
        texts = torch.stack([self._colour(colour, name) for colour in COLOURS])
        return [COLOURS[number] for number in (torch.cat(crops) @ texts.T).argmax(dim=1).tolist()]

    def _colour(self, colour: str, name: str) -> Tensor:
        """Unit embedding ``(D,)`` of a colour: the mean over its texts."""
        texts = [text.format(colour=colour, object=name) for text in COLOUR_TEXTS]
        return F.normalize(self.clip.embed([*texts, COLOUR_ALONE.format(colour=colour)]).mean(dim=0), dim=0)

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        self._asked(columns)

    def _asked(self, columns: Mapping[str, list[Any]]) -> list[list[Mapping[str, Any]]]:
        """What is asked of each image."""
        listed = "class and count of the objects, as in GenEval's *_metadata.jsonl"
        self.need(self.column, columns, f"Set column to the one that lists {listed}.")
        for entries in columns[self.column]:
            for number, entry in enumerate(entries or []):
                if not (isinstance(entry, Mapping) and entry.get("class") and _is_count(entry.get("count"))):
                    raise ConfigError(
                        f"GenEval: the column '{self.column}' holds {entry!r}; give {{class: dog, count: 2}}"
                        ", with color and position where they are asked for."
                    )
                if (colour := entry.get("color")) and colour not in COLOURS:
                    raise ConfigError(
                        f"GenEval: the column '{self.column}' holds the color {colour!r}, which no object is "
                        f"found to have; give one of {', '.join(COLOURS)}."
                    )
                if (position := entry.get("position")) and not _is_position(position, number):
                    raise ConfigError(
                        f"GenEval: the column '{self.column}' holds the position {position!r}; give a place, "
                        f"one of {', '.join(PLACES)}, and the number of an entry before, from 0."
                    )
        return [list(entries or []) for entries in columns[self.column]]


def _is_count(value: object) -> bool:
    return isinstance(value, Real) and float(value) >= 1  # numpy's too


def _is_position(value: Any, number: int) -> bool:
    """Whether a value is a place beside an entry before that of this number."""
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and value[0] in PLACES and str(value[1]).isdigit() and int(value[1]) < number


def overlap(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two boxes ``(4,)``."""
    inner = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0).prod()
    areas = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod()
    return float(inner / (areas - inner)) if areas > inner else 0.0


def relations(one: Tensor, other: Tensor) -> set[str]:
    """How a box ``(4,)`` lies to another: left of, right of, above, below; none where they are too close."""
    offset = (one[:2] + one[2:]) / 2 - (other[:2] + other[2:]) / 2
    sizes = (one[2:] - one[:2]) + (other[2:] - other[:2])
    revised = (offset.abs() - MARGIN * sizes).clamp(min=0) * offset.sign()
    if (revised.abs() < 1e-3).all():
        return set()
    x, y = (revised / offset.norm()).tolist()
    said = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in said.items() if holds}
