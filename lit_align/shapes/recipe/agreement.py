"""How far two judgements of the same images agree: Pearson's and Spearman's correlation."""

import numpy as np
from numpy.typing import ArrayLike

from lit_align.shapes.world import Doubles


def agreement(first: ArrayLike, second: ArrayLike, name: str) -> dict[str, float]:
    """Correlations of values ``(N,)`` and ``(N,)`` and of their ranks; NaN where either is constant.

    Args:
        first: One judgement of each image.
        second: The other.
        name: What the entries' names begin with.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    with np.errstate(invalid="ignore"):
        return {f"{name}, Pearson": _pearson(a, b), f"{name}, Spearman": _pearson(_ranks(a), _ranks(b))}


def _pearson(a: Doubles, b: Doubles) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: Doubles) -> Doubles:
    """Ranks from 1; equal values share their mean rank."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((counts.cumsum() - (counts - 1) / 2)[places], np.float64)
