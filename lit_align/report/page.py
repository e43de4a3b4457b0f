"""One self-contained page about one run, or several side by side."""

import base64
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from lit_align.comparison import DISTANCES
from lit_align.report.again import commands
from lit_align.report.chart import Points, chart
from lit_align.report.comparable import differences, incomparable
from lit_align.report.curves import against, at, first_at
from lit_align.report.run import Run, Shown, names_of

CURVES = ("val/reward", "val/truth", "val/kl", "val/drift", "val/diversity", "val/unscored")
"""Curves that stand first; the single rewards follow."""

NOTICEABLE = 0.05
"""Share by which a metric of images must change for the page to speak of it."""

NORMAL_95 = 1.96
"""Standard errors on each side of a 95 % interval, of many images."""

SIGNS = {
    "diversity": (-1, "images of one prompt have become more alike: the run may collapse"),
    "saturation": (1, "colours are more saturated: often the first sign of an exploited reward"),
    "high_frequency": (1, "fine texture has grown: often the sign of an exploited reward"),
    "unscored": (1, "more images have no score"),
}
"""Metrics whose change warns, the direction, and what it may mean."""


def render(runs: Sequence[Run]) -> str:
    """The page as HTML.

    Args:
        runs: At least one. The images are those of the first run that has some.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["number"] = _number
    template = environment.from_string(files("lit_align.report").joinpath("page.html").read_text("utf-8"))
    names = names_of(runs)
    number = next((number for number, run in enumerate(runs) if run.shown), 0)
    return template.render(
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        runs=[_about(run, name) for run, name in zip(runs, names, strict=True)],
        differences=differences(runs),
        equal=at_equal(runs),
        charts=[one for one in _charts(runs) if one],
        shown=[_picture(one) for one in runs[number].shown],
        shown_of=names[number],
    )


def verdict(run: Run) -> list[str]:
    """The result in sentences: the reward, the truth, and warnings."""
    metrics, said = run.metrics, []
    for name in ("reward", "truth"):
        if (found := metrics.get(name)) and "difference" in found:
            said.append(f"{name} {_change(found)}, {_significance(found)}")
    for name, (direction, meaning) in SIGNS.items():
        found = metrics.get(name, {})
        before, difference, error = (found.get(key) for key in ("before", "difference", "standard_error"))
        if before is None or difference is None or not direction * difference > NOTICEABLE * abs(before):
            continue
        if error is None or abs(difference) > 2 * error:
            said.append(f"{name} {_change(found)}: {meaning}")
    reward, truth = (metrics.get(name, {}) for name in ("reward", "truth"))
    if _clear(reward) > 0 > _clear(truth):
        said.append("the reward rises while the truth falls: it is being exploited")
    return said


def table(run: Run) -> list[dict[str, Any]]:
    """A row for each metric that has a value."""
    rows = []
    for name, found in run.metrics.items():
        after = found.get("after", found.get("mean"))
        if after is None or (name == "reward/truth" and "truth" in run.metrics):
            continue
        distance = name in DISTANCES
        rows.append(
            {
                "name": name,
                "before": "" if distance else _number(found.get("before")),
                "after": _number(after),
                "change": "" if distance else _change(found),
                "wins": "" if distance else _wins(name, found),
                "style": "" if distance else _style(name, found),
            }
        )
    return rows


def _about(run: Run, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "method": run.method,
        "folder": str(run.folder),
        "images": run.images,
        "split": run.split,
        "count": run.count,
        "verdict": verdict(run),
        "table": table(run),
        "compared": run.compared,
        "configs": {file.name: file.read_text("utf-8") for file in (run.fitted, run.tested) if file},
        "commands": commands(run),
    }


def at_equal(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Held-out curves of several runs at equal numbers of images, and at equal distance.

    Those that measure another thing in each run are left out.

    Returns:
        Rows: what is equal (``at``), ``names`` of curves, and for each of them the ``values`` of the runs.
    """
    if len(runs) < 2:
        return []
    apart = incomparable(runs)
    names = [name for name in CURVES[:2] if all(run.curves.get(name) for run in runs) and name not in apart]
    rows = []
    images = min((run.curves[names[0]][-1][0] for run in runs), default=0) if names else 0
    if images:
        values = [[at(run.curves[name], images) for run in runs] for name in names]
        rows.append({"at": f"{images:g} images", "names": names, "values": values})
    for distance in DISTANCES:
        paths = [[against(run.curves, f"val/{distance}", name) for run in runs] for name in names]
        if f"val/{distance}" in apart or not paths or not all(path for of_name in paths for path in of_name):
            continue
        reached = min(max(x for x, _ in path) for path in paths[0])
        values = [[first_at(path, reached) for path in of_name] for of_name in paths]
        rows.append({"at": f"{distance} {reached:.3g}", "names": names, "values": values})
    return rows


def _charts(runs: Sequence[Run]) -> list[str]:
    tags = dict.fromkeys(tag for run in runs for tag in run.curves if tag.startswith("val/reward/"))
    names, apart, charts = names_of(runs), incomparable(runs), []
    for tag in (*CURVES, *tags):
        if tag != "val/reward/truth":
            curves = [run.curves.get(tag, []) for run in runs]
            charts += _drawn(tag, dict(zip(names, curves, strict=True)), "images", tag in apart)
    paths = (("val/truth", "val/reward"), ("val/kl", "val/reward"), ("val/kl", "val/truth"))
    for across, up in paths:
        curves = [against(run.curves, across, up) for run in runs]
        lines = dict(zip(names, curves, strict=True))
        charts += _drawn(f"{up} against {across}", lines, across, bool({across, up} & apart))
    return charts


def _drawn(title: str, lines: Mapping[str, Points], x_name: str, apart: bool) -> list[str]:
    """A chart of all runs; one for each run where they measure another thing."""
    if not apart:
        return [chart(title, lines, x_name)]
    alone = ({other: lines[other] if other == name else () for other in lines} for name in lines)
    return [chart(title, one, x_name) for one in alone]


def _picture(shown: Shown) -> dict[str, Any]:
    def embedded(path: Any) -> str:
        kind = "jpeg" if path.suffix == ".jpg" else "png"
        return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"

    before, after = shown.scores.get("reward", (None, None))
    gain = None if before is None or after is None else after - before
    scores = {name: f"{_number(pair[0])} → {_number(pair[1])}" for name, pair in shown.scores.items()}
    return {
        "prompt": shown.prompt,
        "before": embedded(shown.before),
        "after": embedded(shown.after),
        "gain": gain,
        "scores": {name: text for name, text in scores.items() if _is_score(name)},
    }


def _is_score(name: str) -> bool:
    return name in ("reward", "truth") or (name.startswith("reward/") and name != "reward/truth")


def _clear(found: dict[str, float | None]) -> int:
    """The sign of a change of more than two standard errors; else 0."""
    difference, error = found.get("difference"), found.get("standard_error")
    if difference is None or error is None or abs(difference) <= 2 * error:
        return 0
    return 1 if difference > 0 else -1


def _style(name: str, found: dict[str, float | None]) -> str:
    """How a change is shown: better and worse are known of rewards alone."""
    clear = _clear(found)
    if not clear:
        return ""
    return ("up" if clear > 0 else "down") if _is_score(name) else "clear"


def _significance(found: dict[str, float | None]) -> str:
    wins = found.get("win_rate")
    share = "" if wins is None else f"better in {wins:.0%} of the images"
    if _clear(found):
        return share
    why = "its error is unknown" if found.get("standard_error") is None else "within two standard errors"
    return f"{share}; {why}, so inconclusive"


def _change(found: dict[str, float | None]) -> str:
    difference, error = found.get("difference"), found.get("standard_error")
    if difference is None:
        return ""
    return f"{difference:+.4f}" + ("" if error is None or not math.isfinite(error) else f" ± {error:.4f}")


def _wins(name: str, found: dict[str, float | None]) -> str:
    rate, error = found.get("win_rate"), found.get("win_rate_error")
    if rate is None or not (name == "truth" or name.startswith("reward")):
        return ""
    if not error or not math.isfinite(error):  # 0 where all images agree: it says nothing of others
        return f"{rate:.0%}"
    low, high = max(0.0, rate - NORMAL_95 * error), min(1.0, rate + NORMAL_95 * error)
    return f"{rate:.0%} ({low:.0%} to {high:.0%})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
