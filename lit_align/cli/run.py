"""The command line: ``python -m lit_align {fit,validate,test,predict} --config configs/<method>.yaml``."""

import errno
import signal
import sys
from typing import Any

import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from lightning import LightningDataModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_align.cli.align import AlignCLI
from lit_align.cli.config_files import check_order, given_files, read
from lit_align.cli.errors import Given, explain
from lit_align.cli.method import model_argument, use_method
from lit_align.cli.quiet import quiet
from lit_align.cli.renamed import translated, translated_arguments
from lit_align.cli.serve import serve_command
from lit_align.errors import ConfigError
from lit_align.methods import AlignmentModule

LOAD_YAML = get_loader("yaml")

NO_SPACE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
"""Errors of files that are the machine's and not the program's."""


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["serve"]:
        serve_command(arguments[1:])
        return
    given = Given((), arguments)
    helps = any(argument in ("-h", "--help") or ".help" in argument for argument in arguments)
    if arguments and arguments[0] in AlignCLI.subcommands() and not helps:
        given = Given([read(path) for path in given_files(arguments)], arguments)
        model = model_argument(arguments)
        check_order(given.files, arguments, model)
        method = use_method(given, model)
    else:
        method = None

    def load(text: str) -> Any:
        """YAML as the parser reads it, with the names of today, and the method that was asked for."""
        value = LOAD_YAML(text)
        if isinstance(value, dict) and {"model", "data", "trainer"} & value.keys():
            value = translated(value)
            if method and isinstance(value.get("model"), dict) and "class_path" in value["model"]:
                value["model"]["class_path"] = method
        return value

    set_loader("yaml", load, exceptions=(yaml.YAMLError,))
    try:
        AlignCLI(
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
            args=translated_arguments(arguments),
        )
    except ArgumentError as error:
        raise ConfigError(explain(error, given)) from None
    finally:
        set_loader("yaml", LOAD_YAML, exceptions=(yaml.YAMLError,))


def _sentence(error: BaseException) -> str | None:
    """What to tell the user; None where only a traceback helps."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ConfigError | MisconfigurationException):
            return str(inner)
        if isinstance(inner, ModuleNotFoundError) and inner.name is None:  # a library says what to install
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return None


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments, those of the process if not given.
    """
    quiet()
    try:
        _run(list(sys.argv[1:] if args is None else args))
    except SIGTERMException:  # Lightning would end as if all had been done
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        if (told := _sentence(error)) is None:
            raise
        print(f"lit_align: {told}", file=sys.stderr)
        raise SystemExit(2) from None
