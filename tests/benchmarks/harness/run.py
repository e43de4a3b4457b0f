"""Runs the cells of a plan: fit, further tests, then the test once, each taken up again if interrupted.

Cells of pretrained models have no fit: a validation, and where it is asked for a test.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from lit_align.files import write
from tests.benchmarks.harness.plan import ROOT, TRAINS, Cell
from tests.benchmarks.harness.record import keep_images, record, result_path, run_of, stored


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
        status: Of its exit.
        cpu: Seconds that its threads, and the processes that it waited for, computed.
    """

    status: int
    cpu: float


Launch = Callable[[list[str], Path, int], Ended]
"""``(arguments of lit_align, log file, descriptor to keep open) -> how it ended``."""
Tell = Callable[[Cell, str], None]
"""``(cell, what it does now)``."""
State = dict[str, dict[str, Any]]
"""Of each stage of a cell: its fingerprint, whether it is done, its commands, its seconds, those of its CPUs.

``cpu`` is None where a command of it ran before CPU seconds were counted.
"""

SECONDS_PER_LOOK = 2.0
"""Between two looks at a cell that another plan measures."""

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


class CellFailed(Exception):
    """A cell could not be finished; the message says why."""


class Subprocesses:
    """Launches ``python -m lit_align`` in processes of their own, so that cells share nothing.

    Args:
        workers: How many run at a time. Where several share a machine, each computes in one thread.
    """

    def __init__(self, workers: int) -> None:
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"} if workers > 1 else {}
        self.environment = os.environ | threads
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def __call__(self, arguments: list[str], log: Path, keep: int) -> Ended:
        if self.stopped:
            return Ended(1, 0.0)
        command = [sys.executable, "-m", "lit_align", *arguments]
        with log.open("ab") as file:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=(keep,),
            )
        self.running.add(process)
        if self.stopped:  # while it started
            _end(process)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # else it would be waited for once more
        self.running.discard(process)
        return Ended(process.returncode, used.ru_utime + used.ru_stime)

    def stop(self) -> None:
        """End what runs, and start nothing more."""
        self.stopped = True
        for process in list(self.running):
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """As ``terminate``, which may wait for the process itself, and so take its CPU seconds away."""
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGTERM)


def run_all(
    cells: list[Cell], run: Callable[[Cell], None], launch: Launch, workers: int, tell: Tell = lambda *_: None
) -> dict[str, str]:
    """Run cells, some at a time.

    Args:
        cells: The cells.
        run: Brings one to its result.
        launch: What it runs commands with; if this is interrupted, it starts no more.
        workers: Cells at a time.
        tell: Is told which failed.

    Returns:
        For each cell that failed, by name, the reason.
    """
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(run, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                if (error := future.exception()) is None:
                    continue
                told = [str(error)] if isinstance(error, CellFailed) else traceback.format_exception(error)
                failed[futures[future].name] = "".join(told)
                tell(futures[future], "failed")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(launch, Subprocesses):
                launch.stop()
            raise
    return failed


def run_cell(cell: Cell, out: Path, work: Path, launch: Launch, tell: Tell) -> None:
    """Bring one cell to its result, from wherever it stands.

    Raises:
        CellFailed: A command failed, or another process is at work on this cell.
    """
    if stored(cell, out):
        tell(cell, "finished before")
        return
    folder = work.absolute() / cell.plan / cell.name

    def waits() -> bool:
        stopped = isinstance(launch, Subprocesses) and launch.stopped  # the user has interrupted
        return cell.steps != TRAINS and not stopped

    with alone(folder, waits) as lock:
        if stored(cell, out):  # another plan has measured the same pretrained model meanwhile
            tell(cell, "finished before")
            return
        fingerprint, state = cell.fingerprint(), _state(folder, cell)
        if cell.continues and not state["fit"]["commands"]:
            _take_over(cell.continues, folder, state)
        for stage in state:
            if not state[stage]["done"]:
                _run_stage(cell, stage, folder, state, launch, lock, tell)
        result = record(cell, folder, fingerprint, state)
        keep_images(cell, folder, out)
        write(result_path(cell, out), json.dumps(result, indent=1) + "\n")
    tell(cell, "done")


def command(cell: Cell, stage: str, folder: Path, checkpoint: Path | None) -> list[str]:
    """Arguments of ``python -m lit_align`` that run a stage of a cell in its folder."""
    logger = (f"save_dir={folder.parent}", f"name={folder.name}", f"version={run_of(cell, stage)}")
    options = [f"--trainer.logger.init_args.{option}" for option in logger]
    resume = [f"--ckpt_path={checkpoint}"] if checkpoint else []
    verb, added = ("test", cell.also[stage]) if stage in cell.also else (stage, ())
    return [verb, *cell.arguments, *added, *QUIET, *options, *resume]


def _run_stage(
    cell: Cell, stage: str, folder: Path, state: State, launch: Launch, lock: int, tell: Tell
) -> None:
    run = folder / run_of(cell, stage)
    checkpoint = checkpoint_of(run)
    arguments = command(cell, stage, folder, checkpoint)
    own = state[stage]
    own["commands"].append(" ".join(["python -m lit_align", *arguments]).replace(f"{ROOT}/", ""))
    _save(folder, state)
    tell(cell, f"{stage}, resumed" if stage == "fit" and checkpoint else stage)
    if stage != "fit":  # what another test, or a shorter run, has left there
        _remove(run, "test*.json", "test*.csv", "sweep*")
    log, started = folder / f"{stage}.log", time.monotonic()
    status, cpu = launch(arguments, log, lock)
    if status == 0 and stage in cell.also:
        for kind in ("json", "csv"):  # test_train.json, where it was on the prompts of training
            (found,) = run.glob(f"test*.{kind}")
            found.replace(run / f"{stage}.{kind}")
    own["seconds"] += time.monotonic() - started
    own["cpu"] = None if own.get("cpu") is None else own["cpu"] + cpu
    own["done"] = status == 0
    _save(folder, state)
    if status:
        raise ended(f"{stage} ended with status {status}", log)


def checkpoint_of(run: Path) -> Path | None:
    """From where a run goes on; one that has no whole checkpoint is removed, and begins anew."""
    checkpoint = run / "checkpoints" / "last.ckpt"
    if zipfile.is_zipfile(checkpoint):
        return checkpoint
    shutil.rmtree(run, ignore_errors=True)
    return None


def ended(how: str, log: Path) -> CellFailed:
    """The error of a command that failed, with the last that it said."""
    tail = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    return CellFailed("\n".join([f"{how}; the end of {log}:", *tail]))


def _remove(folder: Path, *patterns: str) -> None:
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _state(folder: Path, cell: Cell) -> State:
    """What was done for this cell so far; what other settings left behind is removed.

    All that follows a stage whose settings changed is done again: tests put their files in one place.
    """
    found, same = _read_state(folder), True
    state: State = {}
    for stage, fingerprint in cell.stages().items():
        same = same and found.get(stage, {}).get("fingerprint") == fingerprint
        fresh = {"fingerprint": fingerprint, "done": False, "commands": [], "seconds": 0.0, "cpu": 0.0}
        state[stage] = found[stage] if same else fresh
        if not same:
            (folder / f"{stage}.log").unlink(missing_ok=True)
            if stage == "fit":
                shutil.rmtree(folder / "version_0", ignore_errors=True)
    return state


def _read_state(folder: Path) -> State:
    path = folder / "state.json"
    found: State = json.loads(path.read_text()) if path.exists() else {}
    return found


def _take_over(shorter: Cell, folder: Path, state: State) -> None:
    """Let a run begin as a copy of a shorter one, if that is finished and of what its cell is now."""
    other = folder.parent / shorter.name
    fit = _read_state(other).get("fit")
    if fit is None or not fit["done"] or fit["fingerprint"] != shorter.stages()["fit"]:
        return
    shutil.rmtree(folder / "version_0", ignore_errors=True)
    shutil.copytree(
        other / "version_0", folder / "version_0", ignore=shutil.ignore_patterns("test*", "sweep*", "config*")
    )
    state["fit"] |= {"commands": fit["commands"], "seconds": fit["seconds"], "cpu": fit.get("cpu")}


def _save(folder: Path, state: State) -> None:
    write(folder / "state.json", json.dumps(state, indent=1) + "\n")


@contextmanager
def alone(folder: Path, waits: Callable[[], bool] = lambda: False) -> Iterator[int]:
    """Lock a cell's folder.

    The process of a run inherits the lock, so that one which outlives a killed harness is not joined by a
    second one in the same folder.

    Args:
        folder: Of the cell.
        waits: Whether to wait until others leave it, asked at each look: two plans can need the same cell.

    Raises:
        CellFailed: Another process is at work there, and it is not waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waits():
                    raise CellFailed(f"another process is at work in {folder}") from None
                time.sleep(SECONDS_PER_LOOK)
        yield file.fileno()
