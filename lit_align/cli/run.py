"""The command line: ``python -m lit_align {fit,validate,test,predict} --config configs/<method>.yaml``."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentError, set_loader
from lightning import LightningDataModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lit_align.cli.align import AlignCLI
from lit_align.cli.config_files import check_order, given_files, read, values_of
from lit_align.cli.doctor import DoctorCLI
from lit_align.cli.errors import explain
from lit_align.cli.export import export_command
from lit_align.cli.functions import LOAD_YAML, arguments_with_functions, with_functions
from lit_align.cli.given import Given
from lit_align.cli.method import use_method
from lit_align.cli.pairs import pairs_command
from lit_align.cli.preemption import Command, lost_process, say
from lit_align.cli.quiet import quiet
from lit_align.cli.renamed import refuse_both, translated, translated_arguments
from lit_align.cli.report import report
from lit_align.cli.sections import with_content
from lit_align.cli.serve import serve_command
from lit_align.cli.signals import SIGNALS, exit_code
from lit_align.errors import ConfigError, chain
from lit_align.files import CLOSED, FULL, unwritable
from lit_align.methods import AlignmentModule

SECOND = 3.0
"""Seconds that another process than the first waits before it prints an error; torchrun and SLURM look at
their processes every 0.1 to 1."""

TOOLS = {"export": export_command, "pairs": pairs_command, "report": report, "serve": serve_command}
"""Commands beside those of a Trainer."""


def _run(command: Command, cli: type[AlignCLI] = AlignCLI) -> None:
    arguments = command.arguments
    given = Given((), arguments)
    helps = any(argument in ("-h", "--help") or ".help" in argument for argument in arguments)
    if arguments and arguments[0] in AlignCLI.subcommands() and not helps:
        given = Given([read(path) for path in given_files(arguments)], arguments)
        for file in given.files:
            refuse_both(file)
        for overruled in given.overruled():
            rank_zero_warn(overruled)
        model = next(reversed(values_of(arguments, "--model", "--model.class_path")), None)
        check_order(given.files, arguments, model)
        method = use_method(given, model)
    else:
        method = None

    def load(text: str) -> Any:
        """YAML as the parser reads it, with the names of today, and the method that was asked for."""
        # The parser hands a null that is given for an option of an option on as the text "None".
        value = None if text == "None" else LOAD_YAML(text)
        if isinstance(value, dict) and {"model", "data", "trainer"} & value.keys():
            value = with_functions(translated(with_content(value)))
            if method and isinstance(value.get("model"), dict) and "class_path" in value["model"]:
                value["model"]["class_path"] = method
        return value

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
    try:
        cli(
            command=command,
            given=given,
            model_class=AlignmentModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,  # RunConfig does it
            load_from_checkpoint_support=False,  # checkpoints hold no constructor's arguments
            seed_everything_default=0,
            parser_kwargs={
                "exit_on_error": False,
                "allow_abbrev": False,
                "prog": "python -m lit_align",
                "description": "Align text-to-image diffusion models with rewards and preferences.",
            },
            args=arguments_with_functions(translated_arguments(arguments)),
        )
    except ArgumentError as error:
        raise ConfigError(_late_command(arguments) or explain(error, given)) from None
    finally:
        set_loader("yaml", LOAD_YAML, exceptions=(yaml.YAMLError,))


def _late_command(arguments: Sequence[str]) -> str | None:
    """What to say where options stand before the command, or without one; None where they may.

    A file with a section for each command may stand there, as LightningCLI has it.
    """
    if not arguments or not arguments[0].startswith("-"):
        return None
    sections = {key.value for path in given_files(arguments) for key, _ in read(path).root.value}
    if sections & AlignCLI.subcommands().keys():
        return None
    name = next((a for a in arguments if a in {*AlignCLI.subcommands(), *TOOLS, "doctor"}), None)
    example = "as in python -m lit_align fit --config configs/ddpo.yaml"
    if name is None:
        return f"{arguments[0]}: there is no command; give one first, {example}"
    return f"{arguments[0]}: options stand after the command, {name}, {example}"


def _sentence(error: BaseException) -> str | None:
    """What to tell the user; None where only a traceback helps."""
    for inner in chain(error):
        if isinstance(inner, ConfigError | MisconfigurationException):
            return str(inner)
        if isinstance(inner, ModuleNotFoundError) and inner.name is None:  # a library says what to install
            return str(inner)
    if isinstance(error, OSError):  # where it is of the machine, not of the program
        curves = "tfevents" in str(error.filename)  # TensorBoard's, whatever it meets
        if curves or error.errno in (*FULL, *CLOSED):
            return unwritable(os.fsdecode(error.filename or "a file of the run"), error)
    return None


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if not given.
    """
    quiet()
    command, code = Command(sys.argv[1:] if args is None else args), 1
    SIGNALS.start(command.announce)
    try:
        if (name := "".join(command.arguments[:1])) in TOOLS:
            TOOLS[name](command.arguments[1:])
        elif name == "doctor":
            _run(Command(["fit", *command.arguments[1:]]), DoctorCLI)
        else:
            _run(command)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
        raise
    except Exception as error:
        if (end := _told(error, command)) is None:
            raise
        code = end
        raise SystemExit(code) from None
    finally:
        _end(code, process=args is None)


def _told(error: Exception, command: Command) -> int | None:
    """Print an error as a sentence; returns the exit code, or None where only a traceback helps.

    The first process speaks first. Where all have failed in the same way, its launcher ends the others while
    they wait, so that the user reads one message and not one from each.
    """
    if SIGNALS.first is not None:  # what fails while a run is being ended is no news
        return exit_code(SIGNALS.first)
    SIGNALS.patient = False
    rank = rank_zero_only.rank or 0  # type: ignore[attr-defined]
    if (lost := lost_process(error)) is not None:
        if not rank:
            say(f"{lost}; {command.how_to_go_on()}")
        return 1
    if rank:
        time.sleep(SECOND)
    if _is_unread(error):
        say(f"nobody reads what this prints any more, as after | head, so it ends; {command.how_to_go_on()}")
        return exit_code(signal.SIGPIPE)
    if (told := _sentence(error)) is None:
        return None
    say(f"process {rank}: {told}" if rank else told)
    return 2


def _is_unread(error: Exception) -> bool:
    """Whether the pipe that this process prints to is closed; nothing is printed from then on."""
    try:
        if isinstance(error, BrokenPipeError):
            sys.stdout.flush()  # what could not be written is still there
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _end(code: int, process: bool) -> None:
    """Leave nothing running.

    Args:
        code: Of the exit.
        process: Whether the process ends with the command.
    """
    if code:
        SIGNALS.end_others()
    if not process:
        SIGNALS.stop()
    elif code:
        SIGNALS.leave(code)
