"""Messages to the user: one exception that is shown as a sentence, and lines of information."""

import logging
import os
import sysconfig
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_only

Made = TypeVar("Made")

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})
"""Folders of code that a user did not write."""

LONGEST = 300
"""Characters of a foreign message that are shown."""


LOG = logging.getLogger("lit_align")
"""Where :func:`tell` writes; the command line shows it, other programs as they configure it."""

LOG.setLevel(logging.INFO)


def tell(text: str) -> None:
    """Show the user a line that is not a warning, once over all ranks."""
    if not rank_zero_only.rank:  # type: ignore[attr-defined]
        LOG.info(text)


class ConfigError(ValueError):
    """A value that the user gave cannot work.

    The message names the value, the place where it was given and the remedy; the command line prints it
    alone and exits with status 2.
    """


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, each once: an error that a thread passes on may be its own cause."""
    seen: set[int] = set()
    inner: BaseException | None = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        yield inner
        inner = inner.__cause__ or inner.__context__


def check_positive(values: Mapping[str, float | None]) -> None:
    """Refuse settings that are not above 0; None is a setting that was left out.

    Raises:
        ConfigError: One is not; NaN is none either.
    """
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: {value} must be positive")


def check_not_negative(values: Mapping[str, float]) -> None:
    """As :func:`check_positive`, for settings that may be 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ConfigError(f"{name}: {value} must not be negative")


def check_kinds(values: Mapping[str, tuple[object, type]]) -> None:
    """Refuse what is not of its class; on the command line the parser does.

    Args:
        values: By the name of the setting, with the class that each must have.

    Raises:
        ConfigError: One has another.
    """
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            shown = textwrap.shorten(repr(value), 60, placeholder=" ...")
            raise ConfigError(f"{name}: {shown} is not of the class {kind.__name__}; give one that is")


def check_same(name: str, same: bool) -> None:
    """Refuse a part that was set on a module after it was built: what follows from it is of the first one.

    Raises:
        ConfigError: It is not the same.
    """
    if not same:
        raise ConfigError(
            f"{name}: a module takes this when it is built, and it was set later; build the module anew, "
            "with backbone=module.backbone to keep its weights"
        )


def user_path(path: str) -> Path:
    """A path as a user writes it, with ``~``.

    Raises:
        ConfigError: No file can have such a name.
    """
    try:
        place = Path(path).expanduser()
        place.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, no such user
        shown = path if len(path) <= LONGEST else f"{path[:LONGEST]} ..."
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{shown!r} cannot be the path of a file ({reason}): check the path") from error
    return place


def built(kind: type[Made], /, *args: Any, **kwargs: Any) -> Made:
    """Make an object of a user's class, for jsonargparse's ``add_instantiator``.

    A working directory that the constructor changes is put back: a run's folder may be relative to it.

    Raises:
        ConfigError: The constructor raises; the message names the class and the line.
    """
    try:
        with same_directory():
            return kind(*args, **kwargs)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{kind.__module__}.{kind.__qualname__} cannot be made: {described(error)}"
        ) from error


@contextmanager
def same_directory() -> Iterator[None]:
    """Put back the working directory, also where it was deleted while the run went on."""
    place = os.open(".", os.O_RDONLY)
    try:
        yield
    finally:
        os.fchdir(place)
        os.close(place)


def first_line(error: BaseException) -> str:
    """The start of somebody else's error message; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def described(error: BaseException) -> str:
    """Type, message and place of an exception from code that is not ours, on one line.

    The place is the innermost line outside of installed libraries.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
    said = textwrap.shorten(str(error), LONGEST, placeholder=" ...")
    place = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}{': ' if said else ''}{said}{place}"
