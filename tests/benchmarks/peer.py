"""TRL's DDPO and AlignProp beside ours, on one pipeline folder.

    python -m tests.benchmarks.peer speed --trl peer_env/bin/python [--method ddpo] [--rounds 5]
    python -m tests.benchmarks.peer race --trl peer_env/bin/python [--method ddpo] [--seeds 1 2 3]

TRL 0.23.1 is the last release with these trainers. It runs in a process of its own, with the interpreter that
``--trl`` names (README.md says how to make its environment); nothing here imports it.

``speed``: the same work. Both sides do rounds of the same geometry (images, steps, guidance, rank, batch, the
optimizer and its settings, a reward that costs nothing) in turns, one thread each, and while one works the
other waits. A round is a rollout batch with its reward, its updates, its checkpoint and its logs, as each
side has them. What counts is CPU time, so that a busy machine slows both, and the median of the rounds'
ratios; the first round of each warms up. The rows that the denoiser and the decoder evaluate are counted, so
that the table shows whether the work is the same.

``race``: CPU time to the same held-out reward on Shapes, each side as its authors recommend it; see
``peers/race.py``.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console

from lit_align.data import ShapesPrompts
from lit_align.errors import ConfigError
from lit_align.files import write
from lit_align.shapes import PIPELINE
from tests.benchmarks.harness.plan import ROOT
from tests.benchmarks.harness.run import CellFailed
from tests.benchmarks.peers import race
from tests.benchmarks.peers.our_side import arguments
from tests.benchmarks.peers.shown import SIDES, show, summary
from tests.benchmarks.peers.turns import Work

METHODS = ("ddpo", "alignprop")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def check(options: argparse.Namespace) -> None:
    """Refuse sizes that the two sides cannot share.

    Raises:
        ConfigError: They do not divide, or there are more attached steps than steps.
    """
    for name in ("images", "prompts", "steps", "rank", "batch", "rounds"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: give at least 1")
    if options.images % options.batch:
        raise ConfigError(f"--images {options.images} is not a multiple of --batch {options.batch}")
    if options.images % options.prompts:
        raise ConfigError(f"--images {options.images} is not a multiple of --prompts {options.prompts}")
    updates = options.images // options.batch
    if "ddpo" in options.method and options.prompts % updates:
        raise ConfigError(
            f"--prompts {options.prompts} do not divide into {updates} updates (--images / --batch): ours "
            "takes whole prompts in an update"
        )
    if "alignprop" in options.method and not 1 <= options.attached <= options.steps:
        raise ConfigError(f"--attached {options.attached}: give 1 to --steps, {options.steps}")


def measure(work: Work, trl: str, folder: Path) -> dict[str, Any]:
    """Let both sides do the work in turns.

    Args:
        work: The rounds.
        trl: The interpreter of TRL's environment.
        folder: For what both sides write; their logs are there.

    Returns:
        Of each side, what it said of itself and its rounds.

    Raises:
        RuntimeError: A side ended before its time.
    """
    with ExitStack() as stack:
        ends: dict[str, Connection] = {}
        processes: dict[str, subprocess.Popen[bytes]] = {}
        told: dict[str, dict[str, Any]] = {}
        for side in SIDES:
            (folder / side).mkdir()
            end, others = Pipe()
            process = start(side, work, trl, others, folder / side)
            others.close()  # so that the pipe ends when the process does
            stack.callback(finish, process)
            ends[side] = stack.enter_context(end)
            processes[side] = process
            told[side] = receive(end, process, folder / side / "log") | {"rounds": []}
        for _ in range(work.rounds + 1):
            for side, end in ends.items():
                end.send_bytes(b"go")
                told[side]["rounds"].append(receive(end, processes[side], folder / side / "log"))
    return told


def start(side: str, work: Work, trl: str, end: Connection, folder: Path) -> subprocess.Popen[bytes]:
    """Start the process of a side, with its end of the pipe and a ``log`` in ``folder``."""
    if side == "trl":
        module = [trl, "-m", "tests.benchmarks.peers.trl_side", "turns"]
        command = [*module, str(end.fileno()), work.to_json(), str(folder)]
    else:
        command = [sys.executable, "-m", "lit_align", *arguments(work, end.fileno(), folder)]
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(end.fileno(),),
        )


def receive(end: Connection, process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """What a side says next.

    Raises:
        RuntimeError: It ended instead.
    """
    try:
        found: dict[str, Any] = json.loads(end.recv_bytes())
    except (EOFError, ConnectionError):
        process.wait()  # until it has said why
        tail = log.read_text(errors="replace").splitlines()[-15:]
        said = [f"the side of {log.parent.name} ended early; the end of its log:", *tail]
        raise RuntimeError("\n".join(said)) from None
    return found


def finish(process: subprocess.Popen[bytes]) -> None:
    """Let a side that has done all its rounds end; end one that waits in vain."""
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print; returns what was measured, by method."""
    check(options)
    found: dict[str, Any] = {}
    source = ShapesPrompts(["pair", "relation"])
    apart = max(1, len(source) // options.prompts)
    prompts = [source.prompt(i * apart) for i in range(options.prompts)]
    for method in options.method:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            file = folder / "prompts.txt"
            file.write_text("\n".join(prompts) + "\n")
            sizes = {s: getattr(options, s) for s in ("images", "steps", "guidance", "rank", "batch")}
            work = Work(
                method,
                str(options.pipeline),
                str(file),
                **sizes,
                attached=options.attached,
                rounds=options.rounds,
            )
            told = measure(work, options.trl, folder)
        show(work, told, Console())
        found[method] = {"work": asdict(work), "summary": summary(told), "sides": told}
        if options.out:
            write(options.out, json.dumps(found, indent=1) + "\n")
    return found


def parse(given: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--trl", required=True, help="Python of the environment that has TRL")
    both.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    same = commands.add_parser("speed", parents=[both], help="the same work, in turns")
    same.add_argument("--pipeline", type=Path, default=PIPELINE, help="folder of a diffusers pipeline")
    same.add_argument("--images", type=int, default=64, help="images of a round")
    same.add_argument("--prompts", type=int, default=8, help="distinct prompts of a round")
    same.add_argument("--steps", type=int, default=20, help="sampling steps")
    same.add_argument("--guidance", type=float, default=5.0)
    same.add_argument("--rank", type=int, default=4, help="of the LoRA")
    same.add_argument("--batch", type=int, default=16, help="images at once; DDPO: images of an update")
    same.add_argument("--attached", type=int, default=10, help="last steps that AlignProp differentiates")
    same.add_argument("--rounds", type=int, default=5, help="rounds that are measured")
    same.add_argument("--out", type=Path, help="JSON file for what was measured")
    raced = commands.add_parser("race", parents=[both], help="time to the same held-out reward on Shapes")
    race.add_options(raced)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(given)
    if shutil.which(options.trl) is None:
        sys.exit(f"peer: --trl {options.trl}: there is no such program; give the Python that has TRL")
    try:
        speed(options) if options.command == "speed" else race.run(options)
    except (CellFailed, ConfigError, RuntimeError) as error:
        sys.exit(f"peer: {error}")


if __name__ == "__main__":
    main()
