"""What the sweeps of several seeds say together: MSDDA beside its baselines."""

import math
from collections.abc import Sequence
from typing import Any

from tests.benchmarks.harness.markdown import table

CLEAR = 2.0
"""Standard errors from which a lead of one seed is counted."""
IMAGES = ("front", "strip")
"""Kept of a sweep."""
Value = tuple[float | None, float | None]
"""A value and its standard error in one seed; None where there is none."""


def sweeps(found: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: hypervolumes, then every method at every weight.

    A value is the mean over the seeds, and its error that of the mean if the seeds' own errors, which are
    those of prompts, are independent. A lead is MSDDA's, on the same images: positive where it is better.

    Args:
        found: ``sweep.json`` of each seed; all have the same points.
    """
    objectives = found[0]["objectives"]
    rewards = [f"reward/{name}" for name in objectives]
    by_point = sorted(
        zip(*(sweep["points"] for sweep in found), strict=True),
        key=lambda points: _weights(points[0], objectives),
    )
    rows = []
    for points in by_point:
        weights = " ".join(f"{weight:g}" for weight in _weights(points[0], objectives))
        measured = [_pooled(_of(points, name)) for name in (*rewards, "truth", "kl")]
        gain, leads = _of(points, "gain"), _of(points, "lead")
        seconds = sum(point["seconds"] for point in points) / len(points)
        compared = [_pooled(gain, "+"), _pooled(leads, "+"), _clear(leads)]
        rows.append([weights, points[0]["method"], *measured, *compared, f"{seconds:.3f}"])
    header = [
        "weights",
        "method",
        *objectives,
        "truth",
        "KL",
        "gain",
        "MSDDA's lead",
        "clear in",
        "s/image",
    ]
    return [
        f"Sweep of {found[0]['images']} images, {len(found)} seeds:",
        "",
        *table(["method", "hypervolume", "MSDDA's lead", "clear in"], _volumes(found)),
        "",
        *table(header, rows),
    ]


def _volumes(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for method in found[0]["hypervolume"]:
        volumes, leads = (
            [(sweep[name].get(method), sweep[f"{name}_error"].get(method)) for sweep in found]
            for name in ("hypervolume", "hypervolume_lead")
        )
        rows.append([method, _pooled(volumes), _pooled(leads, "+"), _clear(leads)])
    return rows


def _weights(point: dict[str, Any], objectives: Sequence[str]) -> tuple[float, ...]:
    """Those of a point; the base has none."""
    return tuple(point[f"weight/{n}"] for n in objectives if point[f"weight/{n}"] is not None)


def _of(points: Sequence[dict[str, Any]], name: str) -> list[Value]:
    return [(point.get(name), point.get(f"{name}/se")) for point in points]


def _known(metrics: Sequence[Value]) -> list[tuple[float, float]]:
    """The metrics, or nothing where a seed has none."""
    known = [(value, error) for value, error in metrics if value is not None and error is not None]
    return known if len(known) == len(metrics) else []


def _pooled(metrics: Sequence[Value], sign: str = "") -> str:
    """Mean and standard error; empty where a seed has no value."""
    if not (known := _known(metrics)):
        return ""
    mean = sum(value for value, _ in known) / len(known)
    error = math.sqrt(sum(error**2 for _, error in known)) / len(known)
    return f"{mean:{sign}.3f} ± {error:.3f}"


def _clear(leads: Sequence[Value]) -> str:
    """In how many seeds MSDDA is ahead, and behind, by more than its error allows."""
    if not (known := _known(leads)):
        return ""
    ahead, behind = (sum(side * value > CLEAR * error for value, error in known) for side in (1, -1))
    return f"{ahead} ahead, {behind} behind"
