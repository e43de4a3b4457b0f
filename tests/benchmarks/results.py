"""Makes a table of results: runs the cells of a plan that have no result yet, and reports.

    python -m tests.benchmarks.results --plan tests/benchmarks/plans/ddpo.yaml [--workers 2]

A cell is one ``lit_align fit`` and, once, ``lit_align test`` on prompts that were never used before, with the
further tests that the plan names. Beside them the pretrained models are measured: several guidances with
``validate``, then none and the best of them with ``validate`` and ``test``. Stop it when you like: the same
command goes on where it was, to the bit. A cell runs again when its configuration, an override, its seed, a
further test or the Shapes weights change. Exit status 1 if a cell failed; the others are finished.
"""

import argparse
import signal
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lit_align.errors import ConfigError
from lit_align.files import write
from tests.benchmarks.harness.baselines import measured
from tests.benchmarks.harness.plan import ROOT, Cell, Plan, load_plan
from tests.benchmarks.harness.plots import copy_images, plot_curves, plot_frontier
from tests.benchmarks.harness.pretrained import distinct, pretrained_of
from tests.benchmarks.harness.record import images, stored
from tests.benchmarks.harness.report import markdown, verdict
from tests.benchmarks.harness.run import Launch, Subprocesses, run_all, run_cell


def make(plan: Plan, out: Path, work: Path, launch: Launch, workers: int, source: str) -> dict[str, str]:
    """Run what has no result yet, and report.

    Args:
        plan: The plan.
        out: Folder of the results.
        work: Folder of the runs.
        launch: Runs one command.
        workers: Cells at a time.
        source: The plan's file, for the report.

    Returns:
        For each cell that failed, the reason.
    """

    def run(cells: list[Cell]) -> dict[str, str]:
        return _run(cells, out, work, launch, workers)

    cells, models = plan.cells(), pretrained_of(plan, out)
    once = distinct(models.values())
    failed = run([cell for model in once for cell in model.tuning(plan)])
    failed |= run([*(cell for model in once for cell in model.cells(plan, out)), *cells])
    results = [result for cell in cells if (result := stored(cell, out))]
    if results:
        baselines = measured(plan, models, out)
        shown = {(cell.config, cell.seed): images(cell, out) for cell in cells if stored(cell, out)}
        drawn = plot_frontier(plan, results, out / f"{plan.name}_frontier.png", baselines)
        plot_curves(plan, results, out / f"{plan.name}.png", baselines)
        write(out / f"{plan.name}.md", markdown(plan, results, shown, source, baselines, drawn) + "\n")
        copy_images(plan, results, out)
    for config in plan.configs:
        own = [result for result in results if result["config"] == config]
        print(f"{config}: {verdict(own, plan.seeds)}")
    return failed


def _run(cells: list[Cell], out: Path, work: Path, launch: Launch, workers: int) -> dict[str, str]:
    """Run the cells that have no result yet, and show what they do."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.fields[does]}"))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        rows = {cell.name: progress.add_task(cell.name, does="waits", start=False, total=1) for cell in cells}

        def tell(cell: Cell, does: str) -> None:
            progress.start_task(rows[cell.name])
            ended = does.startswith(("done", "finished", "failed"))
            progress.update(rows[cell.name], does=does, completed=int(ended))

        one = partial(run_cell, out=out, work=work, launch=launch, tell=tell)
        return run_all(cells, one, launch, workers, tell)


def options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results, logs = ROOT / "tests" / "benchmarks" / "results", ROOT / "logs" / "results"
    parser.add_argument("--plan", type=Path, required=True, help="the plan; its keys: harness/plan.py")
    parser.add_argument("--out", type=Path, default=results, help="folder for the results")
    parser.add_argument("--work", type=Path, default=logs, help="folder for the runs")
    parser.add_argument("--workers", type=int, default=1, help="cells at a time; several: one thread each")
    return parser.parse_args()


def main() -> int:
    """Run the command line."""
    given = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended too
    try:
        plan = load_plan(given.plan)
        launch = Subprocesses(given.workers)
        failed = make(plan, given.out, given.work, launch, given.workers, str(given.plan))
    except ConfigError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("results: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for name, reason in failed.items():
        print(f"\n{name} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
