"""A run that gets a signal to end: what it still saves, how its processes agree, and how it resumes."""

import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_align.callbacks import BatchCheckpoint
from lit_align.cli.checkpoint import Saved
from lit_align.cli.signals import GRACE, SIGNALS, exit_code
from lit_align.errors import ConfigError, chain
from lit_align.folder import run_folder

LOST = re.compile(
    r"gloo|NCCL|Connection (closed|reset)|Broken pipe|socket has timed out|wait timeout|Timed out waiting"
)
"""What torch says where another process is gone or silent; it has no type of exception for all of them."""


class Command:
    """The command of this process, and what to say of it when it ends early.

    Args:
        arguments: Those after ``python -m lit_align``.

    Attributes:
        folder: Of the run, once it trains; None before, and of a command that does not.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.folder: Path | None = None

    def announce(self) -> None:
        """Say, once over all processes, that this run ends, and how to go on."""
        if rank_zero_only.rank:  # type: ignore[attr-defined]
            return
        if SIGNALS.first is None:
            why = f"{SIGNALS.lost or 'another process of this run has to end'}, so this one ends too"
        else:
            why = f"{signal.Signals(SIGNALS.first).name}: ends"
            if SIGNALS.patient:
                why += f" after this rollout batch or in {GRACE:g} seconds"
                why += ", at once with a second Ctrl-C" if SIGNALS.first == signal.SIGINT else ""
        say(f"{why}; {self.how_to_go_on()}")

    def how_to_go_on(self) -> str:
        """What to do next, in words."""
        program = "python -m lit_align"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            program = "torchrun ... -m lit_align"
        elif "SLURM_STEP_ID" in os.environ:
            program = f"srun ... {program}"
        same = f"{program} {shlex.join(self.arguments)}"
        if self.folder is None or not (self.folder / "checkpoints" / "last.ckpt").exists():
            return f"nothing is lost; to start again: {same}"
        kept, given = _without_checkpoint(self.arguments)
        if given == "auto":
            return f"to resume, the same command: {same}"
        return f"to resume: {program} {shlex.join([*kept, '--ckpt_path', str(self.folder)])}"


def _without_checkpoint(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """The arguments without ``--ckpt_path``, and its value."""
    kept, value, rest = list[str](), None, iter(arguments)
    for argument in rest:
        option, equals, text = argument.partition("=")
        if option == "--ckpt_path":
            value = text if equals else next(rest, None)
        else:
            kept.append(argument)
    return kept, value


class Preemption(Callback):
    """Ends a fit at the end of a rollout batch when any of its processes has been told to end.

    The checkpoint of that batch is written, whatever the interval of checkpoints. All processes end together,
    or each by itself when its grace is over.

    Args:
        command: What this process runs.
        saved: The checkpoint that this process goes on from.
    """

    def __init__(self, command: Command, saved: Saved | None) -> None:
        self.command = command
        self.saved = saved
        self._ends = 0  # the signal

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Check that all processes go on from the same point.

        Raises:
            ConfigError: They do not.
        """
        if not SIGNALS.active:  # a process that the Trainer has forked or spawned
            SIGNALS.start(self.command.announce)
        if trainer.world_size > 1:
            _check_same_start(self.saved, trainer.world_size)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        SIGNALS.install()
        SIGNALS.patient = True
        self.command.folder = run_folder(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        SIGNALS.install()

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        SIGNALS.install()

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        SIGNALS.install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._ends = self._asked(trainer)
        if self._ends:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, BatchCheckpoint):  # it comes after this one
                    callback.every = 1

    def _asked(self, trainer: Trainer) -> int:
        """The signal that any process has heard; 0 for none."""
        heard = SIGNALS.first or 0
        if trainer.world_size == 1:
            return heard
        greatest = torch.tensor(heard, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(greatest, torch.distributed.ReduceOp.MAX)
        return heard or int(greatest)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The rollout batch before this one is saved, with its validation if it had one."""
        if self._ends:
            SIGNALS.patient = False
            if SIGNALS.first is None:
                self.command.announce()
            raise SystemExit(exit_code(self._ends))

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        SIGNALS.patient = False


def _check_same_start(saved: Saved | None, world: int) -> None:
    own = None if saved is None else (str(saved.path), saved.images, saved.steps)
    starts: list[Any] = [None] * world
    torch.distributed.all_gather_object(starts, own)
    for rank, start in enumerate(starts):
        if (start and start[1:]) != (starts[0] and starts[0][1:]):
            first, other = (f"{at[0]} at {at[1]} images" if at else "none" for at in (starts[0], start))
            raise ConfigError(
                f"ckpt_path: process 0 resumes from {first}, and process {rank} from {other}; let all nodes "
                "see the same folder of runs, or name the checkpoint"
            )


def say(text: str) -> None:
    """Print a line for people, on a line of its own."""
    print(f"{chr(10) if sys.stderr.isatty() else ''}lit_align: {text}", file=sys.stderr, flush=True)


def lost_process(error: BaseException) -> str | None:
    """What to say of an error that means that another process is gone; None if it means something else."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    for inner in chain(error):
        if isinstance(inner, torch.distributed.DistError) or (
            together and isinstance(inner, RuntimeError) and LOST.search(str(inner))
        ):
            silent = re.search("[Tt]imed out|timeout", str(inner))
            ended = "did not answer within the time limit" if silent else "ended"
            return f"{SIGNALS.lost or f'another process of this run {ended}'}, so this one ends too"
    return None
