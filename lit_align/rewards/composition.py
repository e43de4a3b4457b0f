"""Whether an image shows the objects that its prompt names, by the confidence of a detector.

The compositionality reward of Zhang et al. 2024, "Large-scale Reinforcement Learning for Diffusion Models"
(arXiv 2401.12244), section 3.3: the mean over the prompt's objects of ``d(o, x)``, the detector's confidence
that the object ``o`` is in the image ``x``. Where the objects are plays no part.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    PreTrainedModel,
)

from lit_align.errors import ConfigError
from lit_align.pretrained import SHAPES, load_whole, loading, resolve
from lit_align.rewards.base import Reward, domain_of, to_bytes
from lit_align.shapes import DETECTOR as SHAPES_DETECTOR
from lit_align.shapes.world import parse

Bytes = NDArray[np.uint8]

DETECTOR = "google/owlv2-base-patch16-ensemble"
"""An open-vocabulary detector (Minderer et al. 2023, arXiv:2306.09683) in place of the paper's UniDet."""

COLUMN = "objects"
"""The column of :class:`lit_align.data.ObjectPairs`."""

QUERIES = {
    "owlvit": "a photo of a {}",
    "owlv2": "a photo of a {}",
    "grounding-dino": "{}.",
    "mm-grounding-dino": "{}.",
}
"""The open-vocabulary families, and how each wants to be asked for an object (their model cards)."""

BLANK = np.zeros((1, 32, 32, 3), np.uint8)
"""Prepared once at construction, where a package that a processor lacks can still be named early."""


class ObjectPresence(Reward):
    """Mean over the prompt's objects of the confidence with which a detector finds them, in [0, 1].

    The paper's detector, UniDet, is not in transformers; any of these can stand in:

    - closed-set, such as ``hustvl/yolos-tiny`` or ``facebook/detr-resnet-50``: the objects are labels of it;
    - open-vocabulary, such as ``google/owlv2-base-patch16-ensemble`` or ``IDEA-Research/grounding-dino-tiny``
      (:data:`QUERIES` names the families): the objects are free text, each asked for by itself.

    An object's confidence is the highest of the detections of its label, 0 if there is none. An object that
    is named twice counts once. A prompt without objects gives no score.

    Args:
        pretrained: A hub id, a folder with a transformers detector and its processor, or ``"shapes"`` for the
            bundled detector. Safetensors only.
        column: The data's column with each prompt's objects: a list, or text with commas between them. By
            default ``objects``; with ``pretrained="shapes"`` the shapes that a prompt of that world names.

    Raises:
        ConfigError: The detector cannot be loaded; on scoring, if there is no such column, a prompt is not of
            the Shapes world, or a closed-set detector has no such label.
    """

    IMAGES_AT_ONCE = 16
    differentiable = False
    scope = "sample"

    def __init__(self, pretrained: str = DETECTOR, column: str | None = None) -> None:
        super().__init__()
        self.domain = domain_of(pretrained)
        with loading(pretrained):
            family = AutoConfig.from_pretrained(
                resolve(pretrained, SHAPES_DETECTOR), trust_remote_code=False
            ).model_type
        self.column = column or (None if pretrained == SHAPES else COLUMN)
        self.detector: Detector = (OpenVocabulary if family in QUERIES else ClosedSet)(pretrained)
        self.freeze()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Score ``(B, 3, H, W)`` images (see :class:`Reward`)."""
        whole, pixels = images.flatten(1).sum(dim=1).isfinite().tolist(), to_bytes(images)
        objects = self._objects(prompts, columns)
        rows = [row for row, names in enumerate(objects) if names and whole[row]]
        scores = torch.full((len(images),), torch.nan)
        for start in range(0, len(rows), self.IMAGES_AT_ONCE):
            chunk = rows[start : start + self.IMAGES_AT_ONCE]
            found = self.detector(pixels[chunk], [objects[row] for row in chunk])
            scores[chunk] = torch.stack([confidences.mean() for confidences in found])
        return scores.to(images.device)

    def _objects(self, prompts: list[str], columns: dict[str, list[Any]] | None) -> list[list[str]]:
        """The distinct objects of each prompt."""
        if self.column is None:
            return [_distinct(_shapes_of(prompt)) for prompt in prompts]
        if columns is None or self.column not in columns:
            there = ", ".join(columns or {}) or "none"
            raise ConfigError(
                f"ObjectPresence: the data has no column '{self.column}'; its columns: {there}. Set column "
                "to the one with the objects of each prompt."
            )
        return [_distinct(entry) for entry in columns[self.column]]


class Detector(nn.Module, ABC):
    """A transformers detector with its own way to prepare images."""

    model: PreTrainedModel
    processor: Any

    @abstractmethod
    def forward(self, images: Bytes, objects: Sequence[list[str]]) -> list[Tensor]:
        """Confidence of each object in its image.

        Args:
            images: ``(B, H, W, 3)``.
            objects: Names of the objects to find in each image, at least one.

        Returns:
            For each image ``(objects,)`` in [0, 1].
        """

    def prepare(self, images: Bytes, **texts: Any) -> Any:
        """What the model reads of images ``(B, H, W, 3)``, and of texts."""
        return self.processor(
            images=list(images), return_tensors="pt", input_data_format="channels_last", **texts
        )

    def run(self, images: Bytes, **texts: Any) -> Any:
        """The model's output."""
        return self.model(**self.prepare(images, **texts).to(self.model.device))


class ClosedSet(Detector):
    """A detector with a fixed list of labels: YOLOS, DETR and their kin, read by their own post-processing.

    Args:
        pretrained: ``"shapes"``, a folder or a hub id.
    """

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        load = AutoModelForObjectDetection.from_pretrained
        self.model = load_whole(load, pretrained, SHAPES_DETECTOR, "detector", "detector")
        with loading(pretrained):
            self.processor = AutoImageProcessor.from_pretrained(
                resolve(pretrained, SHAPES_DETECTOR), trust_remote_code=False
            )
            self.prepare(BLANK)
        labels = cast(dict[int, str], self.model.config.id2label)
        self.numbers = {label: number for number, label in labels.items()}

    def forward(self, images: Bytes, objects: Sequence[list[str]]) -> list[Tensor]:
        """Highest score among the detections of each label."""
        for name in sorted({name for names in objects for name in names} - set(self.numbers)):
            raise ConfigError(
                f"ObjectPresence: the detector knows no label {name!r}; name the objects as it does "
                f"({', '.join(sorted(self.numbers))}), or give an open-vocabulary detector."
            )
        found = self.processor.post_process_object_detection(self.run(images), threshold=0.0)
        return [
            torch.stack([_highest(one["scores"][one["labels"] == self.numbers[name]]) for name in names])
            for one, names in zip(found, objects, strict=True)
        ]


class OpenVocabulary(Detector):
    """A detector that is asked in words: OWL-ViT, OWLv2, Grounding DINO.

    Every object is asked for in a pass of its own, so that its confidence does not depend on what else the
    prompt names.

    Args:
        pretrained: A folder or a hub id.
    """

    def __init__(self, pretrained: str) -> None:
        super().__init__()
        load = AutoModelForZeroShotObjectDetection.from_pretrained
        self.model = load_whole(load, pretrained, SHAPES_DETECTOR, "detector", "detector")
        with loading(pretrained):
            self.processor = AutoProcessor.from_pretrained(
                resolve(pretrained, SHAPES_DETECTOR), trust_remote_code=False
            )
            self.prepare(BLANK, text=["nothing."])
        config: Any = self.model.config
        self.query = QUERIES[config.model_type]
        longest = getattr(config, "max_text_len", config.text_config.max_position_embeddings)
        self.as_tokens = {"padding": True, "truncation": True, "max_length": longest}

    def forward(self, images: Bytes, objects: Sequence[list[str]]) -> list[Tensor]:
        """Highest probability over queries, and over the words of the text."""
        counts = [len(names) for names in objects]
        # Flat: OWL's processors pad each inner list for itself.
        texts = [self.query.format(name.lower()) for names in objects for name in names]
        repeated = images.repeat(counts, axis=0)
        logits = self.run(repeated, text=texts, **self.as_tokens).logits
        return list(logits.float().sigmoid().amax(dim=(1, 2)).cpu().split(counts))


def _shapes_of(prompt: str) -> list[str]:
    try:
        return [group.shape for group in parse(prompt).groups]
    except ConfigError as error:
        raise ConfigError(
            f"ObjectPresence: {str(error).rstrip('.')}; for prompts that are not of the Shapes world, name "
            "under 'column' the data's column with the objects of each prompt."
        ) from error


def _distinct(entry: Sequence[str] | str | None) -> list[str]:
    names = entry.split(",") if isinstance(entry, str) else entry or []
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))


def _highest(scores: Tensor) -> Tensor:
    return scores.max().float().cpu() if len(scores) else torch.zeros(())
