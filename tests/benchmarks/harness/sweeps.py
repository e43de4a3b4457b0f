"""What the sweeps of several seeds say together: MSDDA beside its baselines."""

import math
from collections.abc import Sequence
from typing import Any

CLEAR = 2.0
"""Standard errors from which a lead of one seed is counted."""


def sweeps(found: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: hypervolumes, then every method at every weight.

    A figure is the mean over the seeds, and its error that of the mean if the seeds' own errors, which are
    those of prompts, are independent. A lead is MSDDA's, on the same pictures: positive where it is better.

    Args:
        found: ``sweep.json`` of each seed; all have the same points.
    """
    methods = found[0]["hypervolume"]
    rows = [["method", "hypervolume", "MSDDA's lead", "clear in"], ["---"] * 4]
    for method in methods:
        volumes = [(s["hypervolume"][method], s["hypervolume_error"][method]) for s in found]
        leads = [(s["hypervolume_lead"].get(method), s["hypervolume_lead_error"].get(method)) for s in found]
        rows.append([method, *_pooled(volumes), *(_pooled(leads, sign="+") + _clear(leads))])
    lines = [f"Sweep of {found[0]['pictures']} pictures, {len(found)} seeds:", "", *_table(rows)]

    objectives = found[0]["objectives"]
    header = [
        "weights",
        "method",
        *objectives,
        "truth",
        "KL",
        "gain",
        "MSDDA's lead",
        "clear in",
        "s/picture",
    ]
    rows = [header, ["---"] * len(header)]
    for points in sorted(
        zip(*(s["points"] for s in found), strict=True), key=lambda p: _weights(p[0], objectives)
    ):
        cells = [_pooled(_of(points, name)) for name in (*(f"reward/{n}" for n in objectives), "truth", "kl")]
        leads = _of(points, "lead")
        compared = [_pooled(_of(points, "gain"), sign="+"), _pooled(leads, sign="+"), _clear(leads)]
        weights = " ".join(f"{weight:g}" for weight in _weights(points[0], objectives))
        seconds = sum(point["seconds"] for point in points) / len(points)
        flat = [text for cell in (*cells, *compared) for text in cell]
        rows.append([weights, points[0]["method"], *flat, f"{seconds:.3f}"])
    return [*lines, "", *_table(rows)]


def _weights(point: dict[str, Any], objectives: Sequence[str]) -> tuple[float, ...]:
    """Those of a point; the base has none."""
    return tuple(point[f"weight/{n}"] for n in objectives if point[f"weight/{n}"] is not None)


def _of(points: Sequence[dict[str, Any]], name: str) -> list[tuple[float | None, float | None]]:
    return [(point.get(name), point.get(f"{name}/se")) for point in points]


def _pooled(values: Sequence[tuple[float | None, float | None]], sign: str = "") -> list[str]:
    """Mean and standard error; empty where a seed has no figure."""
    known = [(value, error) for value, error in values if value is not None and error is not None]
    if len(known) < len(values):
        return [""]
    mean = sum(value for value, _ in known) / len(known)
    error = math.sqrt(sum(error**2 for _, error in known)) / len(known)
    return [f"{mean:{sign}.3f} ± {error:.3f}"]


def _clear(leads: Sequence[tuple[float | None, float | None]]) -> list[str]:
    """In how many seeds MSDDA is ahead, and behind, by more than its error allows."""
    known = [(value, error) for value, error in leads if value is not None and error is not None]
    if len(known) < len(leads):
        return [""]
    ahead, behind = (sum(side * value > CLEAR * error for value, error in known) for side in (1, -1))
    return [f"{ahead} ahead, {behind} behind"]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]
