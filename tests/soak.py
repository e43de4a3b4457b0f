"""Trains for an hour and watches memory, open files, threads and speed: all must stay flat.

    python -m tests.soak [--minutes 60] [--methods ddpo spin] [--out FOLDER]

Each method trains through the real command line with a tiny model, so that an hour has thousands of rollout
batches, validations, checkpoints and, for SPIN, iterations; then SIGTERM ends it. The process is watched from
outside. Speed is counted in batches per second of computing, since others may use the machine. What comes
before the warm-up is over does not count. Exit status 1 if something grew.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_align.cli.quiet import quiet
from lit_align.files import write
from tests.benchmarks.harness.markdown import table
from tests.chaos import LIMIT, empty
from tests.reliability.commands import ROOT, fit, tiny_model
from tests.reliability.processes import Job

FOR_EVER = 10**6
"""Epochs of a run that is ended by a signal."""

LONG = {
    "ddpo": ["--model.advantages=GroupAdvantages"],
    "spin": ["--model.iterations=100000", "--model.steps=20"],
}
"""What a long run of a method needs beside :data:`~tests.reliability.commands.METHODS`.

The statistics per prompt of :class:`PerPromptAdvantages` grow with the prompts, as they must.
"""

BATCHES = 20
"""In an epoch."""

WARM_UP = 0.2
"""Share of the time in which caches may fill."""

MEGABYTES, FILES, THREADS, SPEED = 5.0, 0.0, 0.0, 0.9
"""What is flat: megabytes per thousand batches, more open files and threads, and the share of the speed."""


@dataclass(frozen=True)
class Sample:
    """A process at one moment.

    Attributes:
        seconds: Since its start.
        batches: That it has trained on.
        cpu: Seconds that it has computed.
        memory: Megabytes that are resident.
        files: Open.
        threads: Of the process.
    """

    seconds: float
    batches: int
    cpu: float
    memory: float
    files: int
    threads: int


@dataclass(frozen=True)
class Course:
    """How the samples went after the warm-up, the last quarter of it against the first.

    Attributes:
        minutes: That were watched, the warm-up included.
        batches: In all.
        memory: Megabytes in the last quarter.
        growth: Megabytes per thousand batches, by least squares.
        files: More open files, not counting those that are written at the moment: the fewest of a quarter.
        threads: More threads, likewise.
        speed: Batches per second of computing, as a share.
    """

    minutes: float
    batches: int
    memory: float
    growth: float
    files: int
    threads: int
    speed: float

    def faults(self) -> list[str]:
        """What was not flat."""
        found = {
            f"memory grew by {self.growth:.2f} MB per thousand batches": self.growth > MEGABYTES,
            f"{self.files} more files are open": self.files > FILES,
            f"{self.threads} more threads run": self.threads > THREADS,
            f"the speed fell to {self.speed:.2f} of what it was": self.speed < SPEED,
        }
        return [fault for fault, holds in found.items() if holds]


def course(samples: Sequence[Sample]) -> Course:
    """What a run's samples say; at least eight of them after the warm-up."""
    warm = [one for one in samples if one.seconds >= WARM_UP * samples[-1].seconds]
    quarter = len(warm) // 4
    first, last = warm[:quarter], warm[-quarter:]
    slope = _slope([one.batches for one in warm], [one.memory for one in warm])
    return Course(
        minutes=samples[-1].seconds / 60,
        batches=samples[-1].batches,
        memory=sum(one.memory for one in last) / quarter,
        growth=1000 * slope,
        files=min(one.files for one in last) - min(one.files for one in first),
        threads=min(one.threads for one in last) - min(one.threads for one in first),
        speed=_speed(last) / _speed(first),
    )


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    spread = sum((one - x_mean) ** 2 for one in x)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / spread


def _speed(samples: Sequence[Sample]) -> float:
    return (samples[-1].batches - samples[0].batches) / (samples[-1].cpu - samples[0].cpu)


def sample(job: Job, began: float, batches: int) -> Sample:
    """A running job as it is now."""
    place = Path("/proc") / str(job.processes[0])
    resident = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    files, threads = (len(os.listdir(place / name)) for name in ("fd", "task"))
    return Sample(time.monotonic() - began, batches, job.cpu(), resident, files, threads)


def soak(methods: Sequence[str], minutes: float, out: Path) -> dict[str, list[Sample]]:
    """Train all methods at once for so long; the samples of each, which are stored, too.

    Raises:
        RuntimeError: A run ended before, or did not end by the signal as it must.
    """
    model, began = tiny_model(out / "model"), time.monotonic()
    jobs = {}
    for method in methods:
        arguments = [*fit(method, model, epochs=FOR_EVER, batches=BATCHES), *LONG.get(method, [])]
        jobs[method] = Job(arguments, empty(out / method), fresh=True)
    samples: dict[str, list[Sample]] = {method: [] for method in methods}
    try:
        while time.monotonic() - began < minutes * 60:
            time.sleep(min(10.0, minutes))
            for method, job in jobs.items():
                if not job.running():
                    raise RuntimeError(f"{method} ended by itself: see {job.log}")
                batches = job.log.read_bytes().count(b"  batch ")
                samples[method].append(sample(job, began, batches))
    finally:
        for method, job in jobs.items():
            job.send(signal.SIGTERM, [0])
            job.wait(LIMIT)
            write(out / f"{method}.json", json.dumps([asdict(one) for one in samples[method]]))
    if wrong := [method for method, job in jobs.items() if job.codes != [128 + signal.SIGTERM]]:
        raise RuntimeError(f"SIGTERM did not end {wrong[0]} as it must: see {jobs[wrong[0]].log}")
    return samples


def report(courses: dict[str, Course]) -> str:
    """The table of what was measured."""
    header = ["method", "minutes", "batches", "MB", "MB more per 1000 batches", "more open files"]
    header += ["more threads", "speed, last by first quarter"]
    return "\n".join(table(header, [_row(method, found) for method, found in courses.items()]))


def _row(method: str, found: Course) -> list[str]:
    more = [str(found.files), str(found.threads), f"{found.speed:.2f}"]
    return [
        method,
        f"{found.minutes:.0f}",
        str(found.batches),
        f"{found.memory:.0f}",
        f"{found.growth:.2f}",
        *more,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--methods", nargs="+", default=["ddpo", "spin"])
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "soak", help="of runs and samples")
    given = parser.parse_args(arguments)
    quiet()
    samples = soak(given.methods, given.minutes, given.out.absolute())
    courses = {method: course(found) for method, found in samples.items()}
    print(report(courses))
    for method, found in courses.items():
        for fault in found.faults():
            print(f"{method}: {fault}")
    return int(any(found.faults() for found in courses.values()))


if __name__ == "__main__":
    sys.exit(main())
