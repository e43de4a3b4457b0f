"""DETR's set loss (Carion et al., "End-to-End Object Detection with Transformers", 2020), and a dense one.

transformers matches predictions to objects with scipy; with at most four objects, trying every assignment is
as exact, and needs nothing.
"""

import math
from functools import cache
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_align.shapes.world import SHAPES

NONE = len(SHAPES)
"""Class of a detection token that sees no object."""

NO_OBJECT, L1, GIOU = 1.0, 5.0, 2.0
"""Weights of the class "no object" and of the two losses of a box.

The latter are DETR's. Its 0.1 for "no object" makes up for 100 tokens; here there are 8 for up to 4 objects,
and with 0.1 a token that is right with a chance of 0.1 would say so with a confidence of 0.5.
"""


def overlaps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU (Rezatofighi et al. 2019) of boxes.

    Args:
        first: ``(..., 4)``: middle, width and height.
        second: ``(..., 4)``; the two are broadcast.

    Returns:
        Two tensors ``(...)``.
    """
    low, high = ([b[..., :2] + side * b[..., 2:] / 2 for b in (first, second)] for side in (-1, 1))
    inner = (torch.minimum(*high) - torch.maximum(*low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(*high) - torch.minimum(*low)).prod(-1).clamp(min=1e-9)
    union = (first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - inner).clamp(min=1e-9)
    return inner / union, inner / union - (hull - union) / hull


@cache
def _assignments(num_tokens: int, num_objects: int) -> Tensor:
    return torch.tensor(list(permutations(range(num_tokens), num_objects)))


def match(cost: Tensor) -> Tensor:
    """The cheapest assignment of a token to each object, all different, by trying every one.

    Args:
        cost: ``(B, tokens, objects)``; a column of zeros for an object that is not there.

    Returns:
        Token of each object, ``(B, objects)``.
    """
    tries = _assignments(*cost.shape[1:])
    totals = cost[:, tries, torch.arange(cost.shape[2])].sum(-1)
    return tries[totals.argmin(1)]


def set_loss(logits: Tensor, boxes: Tensor, shapes: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """DETR's loss: cross-entropy of all tokens, L1 and generalised IoU of those matched, a mean over objects.

    Args:
        logits: ``(B, tokens, NONE + 1)``.
        boxes: ``(B, tokens, 4)``.
        shapes: ``(B, objects)`` as in :func:`lit_align.shapes.recipe.detector.targets`.
        truth: ``(B, objects, 4)``, the objects' boxes.
    """
    present, columns = shapes < NONE, shapes[:, None].expand(-1, logits.shape[1], -1)
    likely = logits.softmax(-1).gather(2, columns)
    far = (boxes[:, :, None] - truth[:, None]).abs().sum(-1)
    apart = 1 - overlaps(boxes[:, :, None], truth[:, None])[1]
    owners = match((L1 * far + GIOU * apart - likely).detach() * present[:, None])
    wanted = torch.full(logits.shape[:2], NONE).scatter_(1, owners, shapes)
    weights = torch.tensor([1.0] * NONE + [NO_OBJECT])

    def mean(pairs: Tensor) -> Tensor:
        return (pairs.gather(1, owners[:, None])[:, 0] * present).sum() / present.sum().clamp(min=1)

    kinds = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights)
    return _sum(kinds, mean(far), mean(apart))


def dense_loss(logits: Tensor, boxes: Tensor, shapes: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """The same three losses, of patches that each name the object whose box holds the patch's middle.

    Args:
        logits: ``(B, rows * rows, NONE + 1)``.
        boxes: ``(B, rows * rows, 4)``.
        shapes: ``(B, objects)`` as in :func:`lit_align.shapes.recipe.detector.targets`.
        truth: ``(B, objects, 4)``, the objects' boxes.
    """
    rows = math.isqrt(logits.shape[1])
    ys, xs = torch.meshgrid(*[(torch.arange(rows) + 0.5) / rows] * 2, indexing="ij")
    offsets = torch.stack([xs, ys], -1).view(-1, 1, 2) - truth[:, None, :, :2]
    inside = (offsets.abs() <= truth[:, None, :, 2:] / 2).all(-1) & (shapes < NONE)[:, None]
    owners, held = inside.int().argmax(-1), inside.any(-1)
    wanted = shapes.gather(1, owners).where(held, NONE)
    goals = truth.gather(1, owners[..., None].expand(-1, -1, 4))

    def mean(values: Tensor) -> Tensor:
        return (values * held).sum() / held.sum().clamp(min=1)

    kinds = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return _sum(kinds, mean((boxes - goals).abs().sum(-1)), mean(1 - overlaps(boxes, goals)[1]))


def _sum(kinds: Tensor, l1: Tensor, giou: Tensor) -> dict[str, Tensor]:
    return {"loss": kinds + L1 * l1 + GIOU * giou, "class": kinds, "l1": l1, "giou": giou}
