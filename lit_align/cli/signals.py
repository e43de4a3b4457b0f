"""Signals that end a process: it gets a few seconds to end well, and never more.

Python runs a signal's handler when the main thread is back in Python code, which may be never: a collective
call waits for a process that is gone. A thread of its own therefore hears of the signal, tells the user, and
ends the process when its time is over.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from select import select
from types import FrameType
from typing import Any

GRACE = 5.0
"""Seconds from a signal to the end. SLURM, torchrun and Kubernetes kill after 30 if not told otherwise."""

ECHO = 1.0
"""Seconds in which torchrun hands on a Ctrl-C that the terminal has already sent to every process."""

TURN = 0.5
"""Seconds between two looks at the other processes."""

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What clusters, launchers and people send."""


def exit_code(signum: int) -> int:
    """That of a process which a signal has ended: 143 for SIGTERM, 130 for Ctrl-C, 138 for SIGUSR1."""
    return 128 + signum


class Signals:
    """Hears the signals of this process, of which there is one; so there is one :data:`SIGNALS`.

    Attributes:
        first: The signal that came first; None before.
        patient: Whether the main thread ends by itself, when its rollout batch is done. If not, a signal
            raises :class:`SystemExit` there.
        lost: A process of this machine that ended with an error, in words.
        launcher: What has started the other processes of this machine; None if another program has.
    """

    def __init__(self) -> None:
        self._pipe: tuple[int, int] | None = None
        self._forget()

    def _forget(self) -> None:
        self.first: int | None = None
        self.patient = False
        self.lost: str | None = None
        self.launcher: Any = None
        self._raised = False
        self._announce: Callable[[], None] = lambda: None
        self._code, self._deadline = 1, float("inf")
        self._came = 0.0  # when the first signal came
        self._told = False
        self._processes: list[subprocess.Popen[Any]] = []

    # ---- begin and end

    @property
    def active(self) -> bool:
        """Whether this process hears its signals."""
        return self._pipe is not None

    def start(self, announce: Callable[[], None]) -> None:
        """Hear the signals from now on; only the main thread can.

        Args:
            announce: Tells the user that this process ends; called once, by another thread.
        """
        if self.active or threading.current_thread() is not threading.main_thread():
            return
        self._forget()
        self._announce = announce
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._earlier_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._earlier = {signum: signal.getsignal(signum) for signum in STOPPING}
        self.install()
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def install(self) -> None:
        """Install our handlers again where another one was put: the Trainer's own waits for ever."""
        for signum in STOPPING if self.active else ():
            if self._earlier[signum] != signal.SIG_IGN:  # as a job in the background ignores Ctrl-C
                signal.signal(signum, self._handle)

    def stop(self) -> None:
        """Leave the signals to who had them before."""
        if self._pipe is None:
            return
        signal.set_wakeup_fd(self._earlier_pipe)
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        os.write(self._pipe[1], b"\0")
        self._thread.join()
        for end in self._pipe:
            os.close(end)
        self._pipe = None

    def leave(self, code: int) -> None:
        """End the process within the grace, whatever a library still waits for."""
        self._told = True
        if self.first is None:
            self._code = code
        self._deadline = min(self._deadline, time.monotonic() + GRACE)

    def forked(self) -> None:
        """In a forked child, which has no listening thread: restore the earlier handlers."""
        if self._pipe is not None:
            signal.set_wakeup_fd(-1)
            for signum, handler in self._earlier.items():
                signal.signal(signum, handler)
            self._pipe = None

    # ---- in the main thread

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.first = self.first or signum
        if not self.patient and not self._raised:
            self._raised = True
            raise SystemExit(exit_code(self.first))

    def end_others(self) -> None:
        """End the processes that this one has started: by SIGTERM, and then by SIGKILL."""
        for process in self._others():
            process.terminate()
        until = time.monotonic() + GRACE
        for process in self._others():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    # ---- in the thread that listens

    def _listen(self) -> None:
        assert self._pipe is not None
        while True:
            self._look_at_others()
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._end()
            if not select([self._pipe[0]], [], [], min(left, TURN))[0]:
                continue
            heard = os.read(self._pipe[0], 64)
            for signum in heard:
                if signum in STOPPING:
                    self._hear(signum)
            if 0 in heard:
                return

    def _hear(self, signum: int) -> None:
        if not self._came:
            self.first = self.first or signum
            self._came = time.monotonic()
            self._code, self._deadline = exit_code(self.first), self._came + GRACE
            for process in self._others():
                process.terminate()
            if self.launcher is not None:
                self.launcher.kill(signal.SIGTERM)
            self._tell()
        elif signum == signal.SIGINT and time.monotonic() - self._came > self._echo():
            self._end()

    def _tell(self) -> None:
        if not self._told:
            self._told = True
            self._announce()

    def _echo(self) -> float:
        return ECHO if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def _others(self) -> list[subprocess.Popen[Any]]:
        """The processes that the Trainer has started and that still run.

        They are taken from its launcher, which would end this process by SIGKILL, without a word, when one of
        them ends.
        """
        started = getattr(self.launcher, "procs", [])
        while started and isinstance(started[-1], subprocess.Popen):
            self._processes.append(started.pop())
        return [process for process in self._processes if process.poll() is None]

    def _look_at_others(self) -> None:
        """Wait for a process that has failed no longer than after a signal."""
        self._others()
        failed = [process for process in self._processes if process.returncode]
        if failed and self.lost is None and self.first is None:
            self.lost = f"process {failed[0].pid} ended with {_described(failed[0].returncode)}"
            self._deadline = time.monotonic() + GRACE

    def _end(self) -> None:
        self._tell()
        for process in self._others():
            process.kill()
        sys.stderr.flush()
        os._exit(self._code)


def _described(returncode: int) -> str:
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


SIGNALS = Signals()
"""Those of this process."""

os.register_at_fork(after_in_child=SIGNALS.forked)
