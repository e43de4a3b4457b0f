"""Several objectives at once: weights on the simplex, Pareto fronts, and the volume that a front covers."""

from collections.abc import Sequence
from itertools import combinations, pairwise

import torch
from torch import Tensor


def simplex_grid(names: Sequence[str], steps: int) -> list[dict[str, float]]:
    """All weights that are multiples of ``1 / steps`` and sum to 1, from all on the first name to the last.

    Args:
        names: The ``m`` objectives.
        steps: Parts of an edge; there are ``steps + m - 1`` choose ``m - 1`` points.
    """
    points = []
    for bars in combinations(range(steps + len(names) - 1), len(names) - 1):
        ends = (-1, *bars, steps + len(names) - 1)
        counts = [right - left - 1 for left, right in pairwise(ends)]
        points.append({name: count / steps for name, count in zip(names, counts, strict=True)})
    return points[::-1]


def pareto_front(points: Tensor) -> Tensor:
    """Which points no other dominates (at least as good in all objectives, better in one).

    Args:
        points: ``(N, m)``, higher is better.

    Returns:
        ``(N,)`` bool.
    """
    at_least = (points[:, None] >= points[None, :]).all(-1)
    better = (points[:, None] > points[None, :]).any(-1)
    return ~(at_least & better).any(0)


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """The volume that is dominated by the points and dominates the reference point, exactly.

    By slices along the last objective (Zitzler and Thiele 1999 defined it); the cost grows fast with the
    number of objectives, and is nothing for two or three.

    Args:
        points: ``(N, m)``, higher is better; those that do not dominate the reference point add nothing.
        reference: ``(m,)``.
    """
    gains = (points - reference).double()
    return _volume(gains[(gains > 0).all(1)])


def _volume(gains: Tensor) -> float:
    if not len(gains):
        return 0.0
    if gains.shape[1] == 1:
        return float(gains.max())
    gains = gains[gains[:, -1].argsort(descending=True)]
    below = torch.cat([gains[1:, -1], gains.new_zeros(1)])
    depths = (gains[:, -1] - below).tolist()
    slices = (depth * _volume(gains[: i + 1, :-1]) for i, depth in enumerate(depths) if depth > 0)
    return sum(slices, 0.0)
