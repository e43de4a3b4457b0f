"""Curves of a run, from TensorBoard's event files or a CSV logger's table."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from lit_align.files import read_rows

Curves = dict[str, list[tuple[float, float]]]
"""By tag: the number of images and the value, in order."""

Logged = tuple[str, float, float]
"""A tag, the number of images, and the value."""


def read_curves(folder: Path) -> Curves:
    """The curves of a run, which may have gone on with another logger.

    Of a step that was logged twice, the newest value, and that of the files that were written last.
    """
    table, events = [folder / "metrics.csv"], [*folder.glob("events.out.tfevents.*")]
    written = {
        read: max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
        for read, files in ((_of_table, table), (_of_events, events))
    }
    points: dict[str, dict[float, float]] = {}
    for read in sorted(written, key=written.__getitem__):
        for tag, step, value in read(folder):
            points.setdefault(tag, {})[step] = value
    curves = {tag: sorted(values.items()) for tag, values in points.items()}
    return {tag: [(x, y) for x, y in curve if math.isfinite(y)] for tag, curve in curves.items()}


def _of_table(folder: Path) -> Iterator[Logged]:
    for row in read_rows(folder / "metrics.csv"):
        for tag, value in row.items():
            if tag not in ("step", "epoch") and value and row.get("step"):
                yield tag, float(row["step"]), float(value)


def _of_events(folder: Path) -> Iterator[Logged]:
    if any(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}, purge_orphaned_data=True)
        events.Reload()
        for tag in events.Tags()["scalars"]:
            yield from ((tag, float(event.step), event.value) for event in events.Scalars(tag))


def at(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value of a curve at ``x``, between its points on a straight line; None beyond them."""
    places = [point[0] for point in curve]
    if not places or not places[0] <= x <= places[-1]:
        return None
    i = bisect_left(places, x)
    if places[i] == x:
        return curve[i][1]
    (x0, y0), (x1, y1) = curve[i - 1], curve[i]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def against(curves: Curves, x: str, y: str) -> list[tuple[float, float]]:
    """One curve against another: their values at the same numbers of images, in the order of the run."""
    values = dict(curves.get(y, []))
    return [(value, values[images]) for images, value in curves.get(x, []) if images in values]


def first_at(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value where a path first reaches ``x``, on a straight line from the point before; None if never."""
    before: tuple[float, float] | None = None
    for point in curve:
        if point[0] >= x:
            if before is None or point[0] == x:
                return point[1] if point[0] == x else None
            return before[1] + (point[1] - before[1]) * (x - before[0]) / (point[0] - before[0])
        before = point
    return None
