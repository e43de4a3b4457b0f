"""Whether an image shows the objects that its prompt names, by the confidence of a detector.

The compositionality reward of Zhang et al. 2024, "Large-scale Reinforcement Learning for Diffusion Models"
(arXiv 2401.12244), section 3.3: the mean over the prompt's objects of ``d(o, x)``, the detector's confidence
that the object ``o`` is in the image ``x``. Where the objects are plays no part.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.pretrained import SHAPES
from lit_align.rewards.base import Reward, are_whole, domain_of, to_bytes
from lit_align.rewards.detectors import load_detector
from lit_align.shapes.world import parse

DETECTOR = "google/owlv2-base-patch16-ensemble"
"""An open-vocabulary detector (Minderer et al. 2023, arXiv:2306.09683) in place of the paper's UniDet."""

COLUMN = "objects"
"""The column of :class:`lit_align.data.ObjectPairs`."""


class ObjectPresence(Reward):
    """Mean over the prompt's objects of the confidence with which a detector finds them, in [0, 1].

    The paper's detector, UniDet, is not in transformers; any of these can stand in:

    - closed-set, such as ``hustvl/yolos-tiny`` or ``facebook/detr-resnet-50``: the objects are labels of it;
    - open-vocabulary, such as ``google/owlv2-base-patch16-ensemble`` or ``IDEA-Research/grounding-dino-tiny``
      (:data:`lit_align.rewards.detectors.QUERIES` names the families): the objects are free text, each asked
      for by itself.

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
    documented = (0.0, 1.0)  # a confidence

    def __init__(self, pretrained: str = DETECTOR, column: str | None = None) -> None:
        super().__init__()
        self.domain = domain_of(pretrained)
        self.column = column or (None if pretrained == SHAPES else COLUMN)
        self.detector = load_detector(pretrained)
        self.freeze()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        whole, pixels = are_whole(images).tolist(), to_bytes(images)
        objects = self._objects(prompts, columns)
        rows = [row for row, names in enumerate(objects) if names and whole[row]]
        scores = torch.full((len(images),), torch.nan)
        for start in range(0, len(rows), self.IMAGES_AT_ONCE):
            chunk = rows[start : start + self.IMAGES_AT_ONCE]
            found = self.detector(pixels[chunk], [objects[row] for row in chunk])
            scores[chunk] = torch.stack([confidences.mean() for confidences in found])
        return scores.to(images.device)

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        if self.column is not None:
            self.need(self.column, columns, "Set column to the one with the objects of each prompt.")
            for entry in columns[self.column]:
                _distinct(entry)

    def _objects(self, prompts: list[str], columns: dict[str, list[Any]] | None) -> list[list[str]]:
        """The distinct objects of each prompt."""
        if self.column is None:
            return [_distinct(_shapes_of(prompt)) for prompt in prompts]
        self.check_columns(columns or {})
        assert columns is not None, "it has the column"
        return [_distinct(entry) for entry in columns[self.column]]


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
    listed = isinstance(entry, str) and entry.lstrip().startswith("[")  # brackets would be parts of names
    if listed or not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ConfigError(
            f"ObjectPresence: {entry!r} names no objects; give a list of texts, or one text with commas "
            "between the names"
        )
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))
