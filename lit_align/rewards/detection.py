"""How many objects a detector sees, with a gradient to the pixels: for removing, or asking for, a number."""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForObjectDetection, PreTrainedModel

from lit_align.errors import ConfigError
from lit_align.pretrained import load_whole, processor_config
from lit_align.rewards.base import Reward, domain_of
from lit_align.shapes import DETECTOR as SHAPES_DETECTOR

DETECTOR = "hustvl/yolos-tiny"
"""The smallest published model of these families, trained on the 80 kinds of COCO (Fang et al. 2021)."""

FAMILIES = ("yolos", "detr")
"""Model types whose last class is "no object"; others of DETR's kin score every class by itself."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Pixel statistics of ImageNet, which DETR and YOLOS use where their processor names none."""

SHORTEST, LONGEST = 800, 1333
"""Edges that these detectors resize images to where their processor names none."""

YOLOS_STEP = 16
"""YOLOS's processor rounds the edges down to multiples of this."""


class ObjectCount(Reward):
    """Minus the expected number of objects, or minus its distance to a wanted number.

    Each of the detector's queries holds at most one object, so that the sum over queries of the probability
    that it holds one (or one of a kind) is the expected number. DETR: Carion et al. 2020, arXiv:2005.12872;
    YOLOS: Fang et al. 2021, arXiv:2106.00666. AlignProp reports the control of the number of objects
    (Prabhudesai et al. 2023, arXiv:2310.03739); its code has no such reward, so this count is our own.

    Args:
        pretrained: A hub id, a folder with a transformers YOLOS or DETR, or ``"shapes"`` for the bundled
            detector. Safetensors only.
        label: Count objects of this kind only, such as ``person`` (Shapes: ``circle``).
        target: The wanted number; without it fewer are better, which teaches removal.

    Raises:
        ConfigError: The detector cannot be loaded or is of another family, it has no such label, or the
            target is not a number of objects.
    """

    IMAGES_AT_ONCE = 64
    differentiable = True
    scope = "sample"
    documented = (-math.inf, 0.0)  # minus a number
    mean: Tensor
    std: Tensor

    def __init__(
        self, pretrained: str = DETECTOR, label: str | None = None, target: float | None = None
    ) -> None:
        super().__init__()
        self.domain = domain_of(pretrained)
        if target is not None and not (math.isfinite(target) and target >= 0):
            raise ConfigError(
                f"ObjectCount: target is {target}; give the wanted number of objects, 0 or more, "
                "or leave it out to have fewer objects score more."
            )
        self.model = _load_model(pretrained)
        self.classes, self.target = _classes(self.model, pretrained, label), target
        self.processor = processor_config(pretrained, SHAPES_DETECTOR)
        normalise = self.processor.get("do_normalize", True)
        mean = self.processor.get("image_mean", MEAN) if normalise else (0, 0, 0)
        std = self.processor.get("image_std", STD) if normalise else (1, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).float().view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).float().view(1, 3, 1, 1), persistent=False)
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        count = self.count(images)
        return -count if self.target is None else -(count - self.target).abs()

    def count(self, images: Tensor) -> Tensor:
        """Expected number ``(B,)`` of the objects that count in ``(B, 3, H, W)`` images in [0, 1]."""
        chunks = [self.preprocess(chunk) for chunk in images.split(self.IMAGES_AT_ONCE)]
        return expected(torch.cat([self.model(pixel_values=chunk).logits for chunk in chunks]), self.classes)

    def preprocess(self, images: Tensor) -> Tensor:
        """Antialiased bilinear resize as the processor's configuration says, unrounded, and normalise."""
        pixels = images.to(self.mean.dtype)
        size = self._size(*images.shape[-2:])
        if size != tuple(images.shape[-2:]):
            pixels = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
        return (pixels - self.mean) / self.std

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """The height and width in which the detector sees an image."""
        if not self.processor.get("do_resize", True):
            return height, width
        size = self.processor.get("size", {})
        if isinstance(size, int):  # processors before 2023
            size = {"shortest_edge": size, "longest_edge": self.processor.get("max_size", LONGEST)}
        if "height" in size:
            return size["height"], size["width"]
        low, high = sorted((height, width))
        limit = size.get("longest_edge", LONGEST)
        short = min(size.get("shortest_edge", SHORTEST), limit * low / high)
        step = YOLOS_STEP if self.model.config.model_type == "yolos" else 1
        edges = [int(edge) // step * step for edge in (round(short), short * high / low)]
        return (edges[0], edges[1]) if height <= width else (edges[1], edges[0])


def expected(logits: Tensor, classes: list[int]) -> Tensor:
    """Expected number of objects.

    Args:
        logits: ``(B, queries, kinds + 1)``, "no object" last.
        classes: The kinds that count.

    Returns:
        ``(B,)``.
    """
    likely = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    return likely[..., classes].sum(dim=(1, 2))


def _load_model(pretrained: str) -> PreTrainedModel:
    """A detector of a family whose confidences say that there is no object."""
    model: PreTrainedModel = load_whole(
        AutoModelForObjectDetection.from_pretrained, pretrained, SHAPES_DETECTOR, "detector"
    )
    if model.config.model_type not in FAMILIES:
        raise ConfigError(
            f"pretrained: {pretrained!r} is a {model.config.model_type}, whose confidences are no "
            f"probabilities of 'no object'; give a model of one of these families: {', '.join(FAMILIES)}."
        )
    return model


def _classes(model: PreTrainedModel, pretrained: str, label: str | None) -> list[int]:
    """Numbers of the classes that count."""
    labels = cast(dict[int, str], model.config.id2label)
    if label is None:
        return sorted(labels)
    if classes := [number for number, name in labels.items() if name == label]:
        return classes
    there = ", ".join(sorted(set(labels.values())))
    raise ConfigError(
        f"ObjectCount: {pretrained!r} knows no label {label!r}; give one of these, "
        f"or none to count them all: {there}."
    )
