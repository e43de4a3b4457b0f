"""Metrics: values that a loss measures on the way; their means are logged."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
"""Measured values by name, ``(N,)`` each, without gradient; their mean is logged as ``train/<name>``."""

Loss = Callable[[], tuple[Tensor, Metrics]]
"""A part of an update's loss: computes a scalar with a gradient, and what was measured on the way."""


def pooled(parts: Iterable[Metrics]) -> Metrics:
    """The values of several parts as one, in their order; a part need not have every name."""
    pieces: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, values in part.items():
            pieces.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in pieces.items()}


def chosen(metrics: Metrics, rows: Tensor) -> Metrics:
    """The values of some rows alone.

    Args:
        metrics: ``(N,)`` each.
        rows: ``(N,)`` bool, on the CPU or where they are.
    """
    return {name: values[rows] for name, values in metrics.items()}


def waited_for(metrics: Mapping[str, Tensor]) -> Metrics:
    """What callbacks may wait for: metrics of training and validation, and none of the time that it took."""
    return {name: value.cpu() for name, value in metrics.items() if name.startswith(("train/", "val/"))}
