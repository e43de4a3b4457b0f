"""Metrics: values that a loss measures on the way; their means are logged."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lit_align.errors import ConfigError

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


def is_loss(computed: object) -> bool:
    """Whether it is what a :data:`Loss` returns."""
    match computed:
        case (Tensor(ndim=0, requires_grad=True), metrics):
            return _are_metrics(metrics)
    return False


def _are_metrics(given: object) -> bool:
    if not isinstance(given, dict):
        return False
    return all(isinstance(values, Tensor) and values.ndim == 1 for values in given.values())


def reported(scores: Metrics, metrics: Metrics) -> tuple[Metrics, Metrics]:
    """What a rank has measured of its rollout batch, for all ranks.

    Raises:
        TypeError: It is not what ``score`` reports and what ``update`` returns.
    """
    if not (_are_metrics(scores) and _are_metrics(metrics) and "reward" in scores):
        raise TypeError(
            "log_rollout_batch takes the report of self.score, with its 'reward', and metrics as self.update "
            "returns them: dicts of tensors (N,)"
        )
    return scores, {name: values.cpu().double() for name, values in metrics.items()}


def means(scores: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    """What is logged of a rollout batch, as ``train/<name>``.

    Args:
        scores: Of each image; NaN where there is none.
        measured: By the updates. What counts faults is logged only where it is not 0.

    Raises:
        ConfigError: A name is that of a score and of a metric.
    """
    if both := scores.keys() & measured.keys():
        raise ConfigError(f"metrics of a loss: {min(both)} is the name of a score; give it another name")
    logged: dict[str, Tensor | float] = {f"train/{n}": values.nanmean() for n, values in scores.items()}
    faults = ("unscored", "ratio_deviation")
    told = {n: v for n, v in measured.items() if not n.startswith(faults) or bool(v.any())}
    return logged | {f"train/{n}": values.mean() for n, values in told.items()}


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
