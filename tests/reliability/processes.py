"""Commands in processes that can be killed."""

import math
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

import lit_align.cli  # noqa: F401  (what a fork need not import again)

GRACE = 1.0
"""Seconds that a rank has to end by itself when another has failed."""


class Job:
    """A command in one process a rank, as torchrun starts them.

    The processes are forked from this one, which has imported everything: a start then takes a second and not
    eight. What runs is the real command line, in a session of its own.

    Args:
        arguments: Of ``python -m lit_align``.
        folder: Where the command is started.
        ranks: Processes.
        fresh: Start new interpreters instead, as a user does.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, ranks: int = 1, fresh: bool = False) -> None:
        self.log = folder / "said.txt"
        self._began = self.log.stat().st_size if self.log.exists() else 0
        self.codes: list[int | None] = [None] * ranks
        port = _free_port()
        sys.stdout.flush()
        sys.stderr.flush()
        self.processes: list[int] = []
        for rank in range(ranks):
            if not (process := os.fork()):
                self._become(arguments, folder, rank, ranks, port, fresh)
            self.processes.append(process)

    def _become(
        self, arguments: Sequence[str], folder: Path, rank: int, ranks: int, port: int, fresh: bool
    ) -> None:
        """Turn the forked process into the command; never returns."""
        code = 1
        try:
            os.setsid()
            # In the background of a shell Ctrl-C is ignored, and children inherit that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(folder)
            said = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.environ.pop("PL_GLOBAL_SEED", None)
            if ranks > 1:
                os.environ.update(_place(rank, ranks, port))
            if fresh:
                os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
                os.execv(sys.executable, [sys.executable, "-m", "lit_align", *arguments])
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", 1) for stream in (1, 2))
            sys.argv = ["lit_align", *arguments]
            rank_zero_only.rank = rank  # found when Lightning is imported
            runpy.run_module("lit_align", run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT  # what a shell says of it
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> list[int]:
        """Ranks whose processes have not ended."""
        for rank, process in enumerate(self.processes):
            if self.codes[rank] is None and (ended := os.waitpid(process, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(ended[1])
        return [rank for rank, code in enumerate(self.codes) if code is None]

    def cpu(self) -> float:
        """Seconds that rank 0 has computed; waiting for a busy machine does not count."""
        try:
            return int(Path(f"/proc/{self.processes[0]}/schedstat").read_text().split()[0]) / 1e9
        except (FileNotFoundError, ProcessLookupError):
            return 0.0

    def said(self) -> str:
        """What the command has printed, errors too."""
        return self.log.read_bytes()[self._began :].decode(errors="replace") if self.log.exists() else ""

    def send(self, sent: signal.Signals, ranks: Sequence[int]) -> None:
        """Send a signal to those of some ranks that still run, at once."""
        for rank in set(ranks) & set(self.running()):
            os.kill(self.processes[rank], sent)

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all ranks; False, and they are killed, if it takes longer.

        As torchrun does, it ends the ranks that are left when one has failed.
        """
        limit, ends, in_time = time.monotonic() + seconds, math.inf, True
        while running := self.running():
            now = time.monotonic()
            if now > limit:
                self.send(signal.SIGKILL, running)
                in_time = False
            elif now > ends:
                self.send(signal.SIGTERM, running)
                ends = limit
            elif ends == math.inf and any(self.codes):
                ends = now + GRACE
            time.sleep(0.01)
        return in_time


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    place |= {"NODE_RANK": 0, "GROUP_RANK": 0, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
