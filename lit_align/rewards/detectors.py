"""Detectors of transformers, asked for objects by name: how sure they are, and where the objects stand."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

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
from lit_align.pretrained import load_part, load_whole, loading
from lit_align.shapes import DETECTOR as SHAPES_DETECTOR
from lit_align.tokens import Counts, count_tokens, warn_of_cut

Bytes = NDArray[np.uint8]

QUERIES = {
    "owlvit": "a photo of a {}",
    "owlv2": "a photo of a {}",
    "grounding-dino": "{}.",
    "mm-grounding-dino": "{}.",
}
"""The open-vocabulary families, and how each wants to be asked for an object (their model cards)."""

BLANK = np.zeros((1, 32, 32, 3), np.uint8)
"""Prepared once at construction, where a package that a processor lacks can still be named early."""

COCO = {"computer keyboard": "keyboard", "computer mouse": "mouse", "tv remote": "remote"}
"""What labels of COCO are called in GenEval's prompts, where the names differ."""


class Found(NamedTuple):
    """The detections of one object in an image, the surest first.

    Attributes:
        scores: ``(n,)`` in [0, 1].
        boxes: ``(n, 4)``: left, top, right and bottom in pixels.
    """

    scores: Tensor
    boxes: Tensor


def load_detector(pretrained: str) -> "Detector":
    """The detector of a folder, a hub id or ``"shapes"``.

    Raises:
        ConfigError: It cannot be loaded.
    """
    family = load_part(AutoConfig, pretrained, SHAPES_DETECTOR).model_type
    return (OpenVocabulary if family in QUERIES else ClosedSet)(pretrained)


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

    @abstractmethod
    def boxes(self, images: Bytes, objects: Sequence[list[str]], threshold: float) -> list[dict[str, Found]]:
        """Where objects are; arguments as of :meth:`forward`, and the confidence that counts.

        Returns:
            For each image by the name of the object.
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
        self.model = load_whole(load, pretrained, SHAPES_DETECTOR, "detector")
        with loading(pretrained):
            self.processor = load_part(AutoImageProcessor, pretrained, SHAPES_DETECTOR)
            self.prepare(BLANK)
        labels = cast(dict[int, str], self.model.config.id2label)
        self.numbers = {label: number for number, label in labels.items()}

    def forward(self, images: Bytes, objects: Sequence[list[str]]) -> list[Tensor]:
        """Highest score among the detections of each label."""
        found = self.processor.post_process_object_detection(self.run(images), threshold=0.0)
        return [
            torch.stack([_highest(one["scores"][one["labels"] == self.number(name)]) for name in names])
            for one, names in zip(found, objects, strict=True)
        ]

    def boxes(self, images: Bytes, objects: Sequence[list[str]], threshold: float) -> list[dict[str, Found]]:
        """All detections of each label."""
        found = self.processor.post_process_object_detection(
            self.run(images), threshold=threshold, target_sizes=[images.shape[1:3]] * len(images)
        )
        return [
            {name: _found(one, one["labels"] == self.number(name)) for name in names}
            for one, names in zip(found, objects, strict=True)
        ]

    def number(self, name: str) -> int:
        """Number of a label.

        Raises:
            ConfigError: There is none of that name.
        """
        number = self.numbers.get(name, self.numbers.get(COCO.get(name, name)))
        if number is None:
            raise ConfigError(
                f"the detector knows no label {name!r}; name the objects as it does "
                f"({', '.join(sorted(self.numbers))}), or give an open-vocabulary detector."
            )
        return number


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
        self.model = load_whole(load, pretrained, SHAPES_DETECTOR, "detector")
        with loading(pretrained):
            self.processor = load_part(AutoProcessor, pretrained, SHAPES_DETECTOR)
            self.prepare(BLANK, text=["nothing."])
        config: Any = self.model.config
        self.query = QUERIES[config.model_type]
        longest = getattr(config, "max_text_len", config.text_config.max_position_embeddings)
        self.longest: int = longest
        self._reader, self._told = f"the detector {pretrained!r}", False

    def forward(self, images: Bytes, objects: Sequence[list[str]]) -> list[Tensor]:
        """Highest probability over queries, and over the words of the text."""
        counts = [len(names) for names in objects]
        logits = self.run(images.repeat(counts, axis=0), **self.in_words(objects)).logits
        return list(logits.float().sigmoid().amax(dim=(1, 2)).cpu().split(counts))

    def in_words(self, objects: Sequence[list[str]]) -> dict[str, Any]:
        """What the processor asks for, flat: OWL's pad each inner list for itself."""
        texts = [self.query.format(name.lower()) for names in objects for name in names]
        self._told = self._told or warn_of_cut(
            self._reader, self.tokens, [*dict.fromkeys(texts)], "names of objects"
        )
        return {"text": texts, "padding": True, "truncation": True, "max_length": self.longest}

    def tokens(self, text: str) -> Counts:
        """How many tokens a text has, and how many are read."""
        return [(count_tokens(self.processor.tokenizer, text), self.longest)]

    def boxes(self, images: Bytes, objects: Sequence[list[str]], threshold: float) -> list[dict[str, Found]]:
        """The detections of each text, as the processor reads them."""
        counts = [len(names) for names in objects]
        inputs = self.prepare(images.repeat(counts, axis=0), **self.in_words(objects))
        output = self.model(**inputs.to(self.model.device))
        asked = {} if "owl" in self.model.config.model_type else {"input_ids": inputs["input_ids"]}
        found = iter(
            self.processor.post_process_grounded_object_detection(
                output, threshold=threshold, target_sizes=[images.shape[1:3]] * sum(counts), **asked
            )
        )
        return [{name: _found(next(found), ...) for name in names} for names in objects]


def _highest(scores: Tensor) -> Tensor:
    return scores.max().float().cpu() if len(scores) else torch.zeros(())


def _found(detected: dict[str, Tensor], chosen: Any) -> Found:
    scores, boxes = detected["scores"][chosen].float().cpu(), detected["boxes"][chosen].float().cpu()
    order = scores.argsort(descending=True, stable=True)
    return Found(scores[order], boxes[order])
