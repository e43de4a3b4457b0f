"""``python -m lit_align report RUN [RUN ...]``: one page about a run, or about several side by side."""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from lit_align.errors import ConfigError, tell
from lit_align.files import write
from lit_align.report import Run, at_equal, read_run, render


def report(arguments: Sequence[str]) -> None:
    """Write the page, and its numbers as JSON and CSV beside it.

    Args:
        arguments: After the word ``report``.

    Raises:
        ConfigError: A run has no result, or the page would replace a file.
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
        "--out", type=Path, help="the page; report.html in the first run's folder, if not given"
    )
    given = parser.parse_args(arguments)
    for folder in given.runs:
        if not folder.is_dir():
            raise ConfigError(
                f"report: there is no folder {folder}; give those of runs, such as logs/ddpo/version_0"
            )
    runs = [read_run(folder) for folder in given.runs]
    page: Path = given.out or (runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html"))
    write(page, render(runs))
    found = {"runs": [_numbers(run) for run in runs], "at_equal": at_equal(runs)}
    write(page.with_suffix(".json"), json.dumps(found, indent=2))
    write(page.with_suffix(".csv"), _table(runs))
    tell(f"report       {page}")


def _numbers(run: Run) -> dict[str, object]:
    result = str(run.result)
    return {"run": str(run.folder), "result": result, "images": run.images, "metrics": run.metrics}


def _table(runs: Sequence[Run]) -> str:
    """A line for each run and metric."""
    text = io.StringIO()
    fields = ["before", "after", "mean", "difference", "standard_error", "win_rate", "win_rate_error"]
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["run", "split", "images", "metric", *fields])
    for run in runs:
        for name, found in run.metrics.items():
            table.writerow([run.name, run.split, run.images, name, *(found.get(field) for field in fields)])
    return text.getvalue()
