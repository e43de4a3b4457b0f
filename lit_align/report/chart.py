"""Line charts as SVG, for a page without scripts or files of others."""

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 340, 210, 52, 34, 26, 24
"""Pixels: of a chart, and around its axes."""

COLOURS = ("#3366cc", "#dc7633", "#2e8b57", "#a83279", "#7f6a00", "#00838f", "#8e44ad", "#555555")
"""Of lines, in order."""

Points = Sequence[tuple[float, float]]


def chart(title: str, lines: Mapping[str, Points], x_name: str = "images") -> str:
    """A line chart.

    Args:
        title: Above it.
        lines: By name; a colour each, in their order. One without points has a colour too, so that charts
            of the same names have the same colours. Where there are several names, those drawn are written.
        x_name: Below it.

    Returns:
        The SVG element; an empty text if no line has two points.
    """
    if not any(len(points) > 1 for points in lines.values()):
        return ""
    everything = [point for points in lines.values() for point in points]
    xs, ys = (_ticks([point[axis] for point in everything]) for axis in (0, 1))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="{LEFT}" y="15">{escape(title)}</text>']
    for x in xs:
        left, low = place(x, ys[0])
        parts.append(
            f'<text class="tick" x="{left:.1f}" y="{low + 13:.1f}" text-anchor="middle">{x:g}</text>'
        )
    for y in ys:
        left, low = place(xs[0], y)
        parts.append(f'<line class="rule" x1="{left}" x2="{WIDTH - RIGHT}" y1="{low:.1f}" y2="{low:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 5}" y="{low + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(f'<text class="tick" x="{WIDTH / 2}" y="{HEIGHT - 5}">{escape(x_name)}</text>')
    where = TOP
    for number, (name, points) in enumerate(lines.items()):
        if not points:
            continue
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for point in points:
            x, y = place(*point)
            said = escape(f"{name}: {point[0]:g}, {point[1]:.4g}")
            dot = f'cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"'
            parts.append(f"<circle {dot}><title>{said}</title></circle>")
        where += 13
        if len(lines) > 1:
            parts.append(
                f'<text class="tick" x="{LEFT + 8}" y="{where}" style="fill:{colour}">{escape(name)}</text>'
            )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around some values: three to seven, one below and one above them all."""
    low, high = min(values), max(values)
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / 4
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, max(last, first + 1) + 1)]
