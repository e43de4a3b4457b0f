"""``python -m lit_align report RUN [RUN ...]``: one page about a run, or about several side by side."""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from lit_align.errors import ConfigError, tell
from lit_align.files import write
from lit_align.report import Run, at_equal, differences, names_of, page_of, read_run, render

FIELDS = ("run", "split", "images", "metric")
"""Columns of the table before those of numbers."""


def report(arguments: Sequence[str]) -> None:
    """Write the page, and its numbers as JSON and CSV beside it.

    Args:
        arguments: After the word ``report``.

    Raises:
        ConfigError: A run has no result or is given twice, or a file would be replaced that is no earlier
            report.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lit_align report",
        description="Compare runs on one self-contained page: held-out metrics, curves, images. The images "
        "are those of the first run that kept some.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as logs/ddpo/version_0"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the page, an .html; if not given, that beside the result of a single run, such as report.html, "
        "and of several runs report.html here",
    )
    given = parser.parse_args(arguments)
    for folder in given.runs:
        if not folder.is_dir():
            raise ConfigError(
                f"report: there is no folder {folder}; give those of runs, such as logs/ddpo/version_0"
            )
    _check_distinct(given.runs)
    runs = [read_run(folder) for folder in given.runs]
    page: Path = given.out or (page_of(runs[0].result) if len(runs) == 1 else Path("report.html"))
    _check_replaced(page)
    apart = differences(runs)
    write(page, render(runs))
    found = {"runs": [_numbers(run) for run in runs], "differences": apart, "at_equal": at_equal(runs)}
    write(page.with_suffix(".json"), json.dumps(found, indent=2))
    write(page.with_suffix(".csv"), _table(runs))
    for line in apart:
        tell(f"differs      {line}")
    tell(f"report       {page}")


def _check_distinct(folders: Sequence[Path]) -> None:
    places = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if places[number] in places[:number]:
            raise ConfigError(f"report: {folder} is given twice; give each run once")


def _check_replaced(page: Path) -> None:
    """Refuse to replace what is no earlier report, such as the files of a test."""
    if page.suffix != ".html":
        raise ConfigError(f"--out: {page} is the page; give it a name that ends in .html")
    for file in (page, page.with_suffix(".json"), page.with_suffix(".csv")):
        if file.exists() and not _is_report(file):
            raise ConfigError(f"--out: {file} is there and no earlier report; give {page.name} another name")


def _is_report(file: Path) -> bool:
    """Whether a file is one that a report has written."""
    try:
        text = file.read_text("utf-8")
        if file.suffix == ".html":
            return "· lit_align</title>" in text
        if file.suffix == ".csv":
            return text.startswith(",".join(FIELDS))
        return {"runs", "at_equal"} <= set(json.loads(text))
    except (OSError, ValueError, TypeError):
        return False


def _numbers(run: Run) -> dict[str, object]:
    result = str(run.result)
    return {"run": str(run.folder), "result": result, "images": run.images, "metrics": run.metrics}


def _table(runs: Sequence[Run]) -> str:
    """A line for each run and metric."""
    text = io.StringIO()
    fields = ["before", "after", "mean", "difference", "standard_error", "win_rate", "win_rate_error"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow([*FIELDS, *fields])
    for run, called in zip(runs, names_of(runs), strict=True):
        for name, found in run.metrics.items():
            table.writerow([called, run.split, run.images, name, *(found.get(field) for field in fields)])
    return text.getvalue()
