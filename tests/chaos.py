"""Kills runs at random moments, lets them go on, and compares what they leave with runs that nobody killed.

    python -m tests.chaos --kills 100 [--methods ddpo spin] [--ranks 1 2] [--seed 0] [--out FOLDER]

Each method trains through the real command line with a tiny model: six rollout batches and four validations,
AdamW, a schedule, two loggers. A run is killed up to four times, goes on by the same command (``--ckpt_path
auto``), ends, and is compared bit for bit: checkpoints, adapter, images, ``validation.*``,
``metrics.csv``, pool, and all that TensorBoard shows. The seed decides the moments: uniform over the
computing time of a whole run, at one of its writes or soon after, or right after one of its files was
replaced. Which instruction a kill meets is left to the machine.

The tool runs on Linux. Stop it when you like: the same command goes on where it was, and does again what the
package's code of another day did. Exit status 1 if a run was not as it must be.
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lit_align.cli  # noqa: F401  (first: it keeps other libraries quiet)
from lit_align.cli.quiet import quiet
from lit_align.files import write
from tests.benchmarks.harness.markdown import table
from tests.reliability.commands import METHODS, ROOT, RUNS, fit, tiny_model
from tests.reliability.compare import differences, leftovers
from tests.reliability.processes import Job
from tests.reliability.watch import Watch

KINDS = {"run": 2, "write": 2, "replace": 1}
"""When a kill comes, and how often: any time, while something is written, when a file was replaced."""

SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 2, signal.SIGINT: 1, signal.SIGUSR1: 1}
"""What is sent, and how often."""

KILLS = 4
"""Of a run, at most: it must come to an end."""

DELAY = 0.003
"""Seconds within which a kill follows a write."""

LIMIT = 60.0
"""Seconds within which all ranks must end when one got a signal, on a busy machine."""


@dataclass(frozen=True)
class Kill:
    """A kill that is planned.

    Attributes:
        kind: One of :data:`KINDS`.
        share: Of the computing time, or of the writes, of a whole run; 0 to 1.
        delay: Seconds after the write.
        signal: What is sent.
        ranks: To whom.
    """

    kind: str
    share: float
    delay: float
    signal: signal.Signals
    ranks: tuple[int, ...]


@dataclass
class Result:
    """A run that was killed and went on, as it is stored.

    Attributes:
        method: Its method.
        ranks: Processes.
        number: Of the run, among those of this method and number of processes.
        source: Hash of the package's code.
        kills: What happened to it: ``kind``, ``signal``, ``ranks``, ``codes`` of all ranks, ``file`` that
            was written last, ``left``, the drafts that were cut.
        starts: Of the command, the first one included.
        faults: What is not as it must be; empty if all is well.
    """

    method: str
    ranks: int
    number: int
    source: str
    kills: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Whole:
    """A run that nothing interrupted.

    Attributes:
        folder: Its own.
        cpu: Seconds of computing of rank 0.
        counts: Its writes and replacements.
    """

    folder: Path
    cpu: float
    counts: dict[str, int]


class Cell:
    """The runs of one method with one number of processes.

    Args:
        method: One of :data:`METHODS`.
        ranks: Processes.
        work: Folder of the runs.
        seed: Of the moments.
        fresh: Start new interpreters.
    """

    def __init__(self, method: str, ranks: int, work: Path, seed: int = 0, fresh: bool = False) -> None:
        self.method, self.ranks, self.fresh = method, ranks, fresh
        self.work = work / f"{method}-{ranks}"
        self.arguments = [*fit(method, tiny_model(work / "model"), ranks), "--ckpt_path=auto"]
        self.seed = seed
        self._whole: Whole | None = None

    def whole(self) -> Whole:
        """The run that the others are compared with."""
        if self._whole is None:
            folder = empty(self.work / "whole")
            watch, job = Watch(folder / "logs"), Job(self.arguments, folder, self.ranks, self.fresh)
            cpu, limit = 0.0, time.monotonic() + 5 * LIMIT
            while job.running() and time.monotonic() < limit:
                watch.read(0.01)
                cpu = max(cpu, job.cpu())
            watch.close()
            if not job.wait(0) or any(job.codes):
                raise RuntimeError(f"{self.method} does not run: see {job.log}")
            self._whole = Whole(folder / RUNS / "version_0", cpu, watch.counts)
        return self._whole

    def killed(self, number: int, kills: int, source: str) -> Result:
        """A run that is killed so often, unless it ends before, and goes on to its end."""
        draw = random.Random(f"{self.seed} {self.method} {self.ranks} {number}")
        result = Result(self.method, self.ranks, number, source)
        folder, whole = empty(self.work / f"killed-{number}"), self.whole()
        for planned in [*(_plan(draw, self.ranks) for _ in range(kills)), None]:
            if self._start(folder, planned, result):
                break
        runs = folder / RUNS
        if not result.faults:
            newest = max(runs.glob("version_*"), key=lambda run: int(run.name.removeprefix("version_")))
            result.faults += differences(whole.folder, newest)
            result.faults += [f"{name} was left behind" for name in leftovers(newest)]
        if not result.faults:
            shutil.rmtree(folder)  # of the others one wants to see more
        return result

    def _start(self, folder: Path, planned: Kill | None, result: Result) -> bool:
        """Start the command, kill it or let it end; whether nothing is left to do."""
        result.starts += 1
        earlier = leftovers(folder)
        watch = Watch(folder / "logs")
        job = Job(self.arguments, folder, self.ranks, self.fresh)
        met = planned is not None and self._await(planned, job, watch)
        if planned is not None and met:
            job.send(planned.signal, planned.ranks)
            ended = job.wait(LIMIT)
            result.kills.append(
                {
                    "kind": planned.kind,
                    "signal": planned.signal.name,
                    "ranks": list(planned.ranks),
                    "codes": job.codes,
                    "file": watch.path.name,
                    "left": [name for name in leftovers(folder) if "draft" in name and name not in earlier],
                }
            )
        else:
            ended = job.wait(5 * LIMIT)
        watch.close()
        wrong = [] if ended else ["a rank did not end by itself"]
        wrong += _wrong(job, planned if met else None)
        result.faults += [f"start {result.starts}: {what}" for what in wrong]
        return bool(wrong) or not any(job.codes)

    def _await(self, planned: Kill, job: Job, watch: Watch) -> bool:
        """Wait for the moment; False if the run ends before."""
        whole = self.whole()
        if planned.kind == "run":
            while job.running():
                watch.read(0.001)
                if job.cpu() >= planned.share * whole.cpu:
                    return True
            return False
        until = 1 + int(planned.share * whole.counts[planned.kind])
        while job.running():
            if watch.read(0.01, planned.kind, until):
                time.sleep(planned.delay)
                return bool(job.running())
        return False


def _plan(draw: random.Random, ranks: int) -> Kill:
    """The next kill; one write in two is met at once."""
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    sent = draw.choices(list(SIGNALS), list(SIGNALS.values()))[0]
    delay = draw.choice([0.0, draw.uniform(0, DELAY)]) if kind == "write" else 0.0
    victims = tuple(range(ranks)) if draw.random() < 0.7 else (draw.randrange(ranks),)
    # The further a kill, the more is done between two; not so far that runs end before their kills.
    share = draw.random() if kind == "run" else draw.random() * 2 / KILLS
    return Kill(kind, share, delay, sent, victims)


def _wrong(job: Job, kill: Kill | None) -> list[str]:
    """What is wrong with the ends of the ranks; nothing if they are as they must be."""
    if kill is None:
        return [f"exit statuses {job.codes}"] if any(job.codes) else []
    good = {0, -kill.signal, 128 + kill.signal}  # it came too late, or before anything could be saved
    wrong = [
        f"rank {rank} ended with {job.codes[rank]}" for rank in kill.ranks if job.codes[rank] not in good
    ]
    if kill.signal != signal.SIGKILL and "Traceback" in job.said():
        wrong.append(f"a traceback after {kill.signal.name}")
    return wrong


def empty(folder: Path) -> Path:
    """The folder of a job, with nothing in it but one for its runs."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "logs").mkdir(parents=True)
    return folder


# ---- the table


def source() -> str:
    """Hash of the package's code and of the configurations: a result of other code counts no more."""
    digest = hashlib.sha256()
    for folder, pattern in (("lit_align", "*.py"), ("configs", "*.yaml")):
        for path in sorted((ROOT / folder).rglob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(cell: Cell, kills: int, out: Path) -> list[Result]:
    """Kill runs of a cell so often; those that are stored in ``out`` are not made again."""
    results: list[Result] = []
    while (left := kills - sum(len(result.kills) for result in results)) > 0:
        number = len(results)
        path = out / f"{cell.method}-{cell.ranks}-{cell.seed}-{number}.json"
        stored = Result(**json.loads(path.read_text())) if path.exists() else None
        if stored is None or stored.source != source():
            stored = cell.killed(number, min(left, KILLS), source())
            write(path, json.dumps(asdict(stored), indent=1))
        results.append(stored)
        told = "; ".join(stored.faults) or "identical"
        print(f"{cell.method} x {cell.ranks}, run {number}: {len(stored.kills)} kills, {told}", flush=True)
    return results


def report(cells: Sequence[Sequence[Result]]) -> str:
    """The table of what was tried."""
    rows = [_row(f"{results[0].method}", str(results[0].ranks), results) for results in cells]
    everything = [result for results in cells for result in results]
    rows.append(_row("all", "", everything))
    files = Counter(_file(kill["file"]) for result in everything for kill in result.kills)
    met = ", ".join(f"{name} {count}" for name, count in files.most_common())
    header = ["method", "processes", "runs", "kills", *KINDS, *(sent.name for sent in SIGNALS)]
    lines = table([*header, "files cut", "starts", "identical"], rows)
    return "\n".join([*lines, "", f"Last written before a kill: {met}."])


def _row(method: str, ranks: str, results: Sequence[Result]) -> list[str]:
    kills = [kill for result in results for kill in result.kills]
    kinds, sent = Counter(kill["kind"] for kill in kills), Counter(kill["signal"] for kill in kills)
    counts = [len(results), len(kills), *(kinds[kind] for kind in KINDS)]
    counts += [*(sent[one.name] for one in SIGNALS), sum(bool(kill["left"]) for kill in kills)]
    counts.append(sum(result.starts for result in results))
    good = sum(not result.faults for result in results)
    return [method, ranks, *map(str, counts), f"{good} of {len(results)}"]


def _file(name: str) -> str:
    """A file's kind, without what is different in every run."""
    name = re.sub(r"^\.|(\.\d+)?\.draft$", "", name)
    if name.endswith(".safetensors") or name.startswith("tmp"):  # of an adapter, a pool, or latents
        return "safetensors"
    return next((kind for kind in ("events", "validation", "config") if name.startswith(kind)), name)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100, help="over all methods and numbers of processes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2], help="numbers of processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fresh", action="store_true", help="new interpreters: a start takes much longer")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "chaos", help="of runs and results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    given = options(arguments)
    quiet()
    out = given.out.absolute()
    pairs = [(method, ranks) for method in given.methods for ranks in given.ranks]
    kills = [given.kills // len(pairs) + (i < given.kills % len(pairs)) for i in range(len(pairs))]
    cells = [
        run(Cell(method, ranks, out / "runs", given.seed, given.fresh), count, out)
        for (method, ranks), count in zip(pairs, kills, strict=True)
        if count
    ]
    text = report(cells)
    write(out / "table.md", text + "\n")
    print(text)
    return int(any(result.faults for results in cells for result in results))


if __name__ == "__main__":
    sys.exit(main())
