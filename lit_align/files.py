"""How files are written: whole or not at all, under names of their own, or with a sentence that says why not.

Nothing that was written is lost by what comes after it: a killed process, a full disk, a second process.
"""

import csv
import errno
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from lit_align.errors import ConfigError, chain

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)
TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY)
UNLINKED = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""Of file systems without hard links."""


def unwritable(path: Path | str, error: OSError) -> str:
    """What to tell of a file that cannot be written: which, why, and the remedy.

    Args:
        path: The file.
        error: What the system said.
    """
    if error.errno in FULL:
        remedy = "make room there and resume with --ckpt_path; what was written before is whole"
    elif error.errno in CLOSED:
        remedy = "check the permissions, or let runs write elsewhere (save_dir of the logger)"
    elif error.errno in TAKEN:
        remedy = "something else has that name, or the name of a folder above; move it away"
    else:
        remedy = "check the disk, and whether the folder is still there"
    return f"{path} cannot be written ({error.strerror or error}): {remedy}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the machine, in what is done here, into a sentence about ``path``.

    Raises:
        ConfigError: The file cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (cause := _of_the_machine(error)) is None:
            raise
        raise ConfigError(unwritable(path, cause)) from error


def _of_the_machine(error: BaseException) -> OSError | None:
    """The system's error behind one of a library: torch raises its own over it, and safetensors names it."""
    for inner in chain(error):
        if isinstance(inner, OSError):
            return inner
        if isinstance(inner, SafetensorError):
            number = re.search(r"os error (\d+)", str(inner))
            return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None
    return None


def unused(path: Path, *beside: str) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist, nor with other endings."""
    number, candidate = 1, path
    while candidate.exists() or any(candidate.with_suffix(ending).exists() for ending in beside):
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def read_config(path: Path) -> dict[str, Any]:
    """A configuration in the folder of a run.

    Raises:
        ConfigError: It is none.
    """
    try:
        found = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a configuration; put back what the run wrote")
    return found


def numbered(path: Path) -> list[Path]:
    """Of ``path``, ``path-2``, ``path-3``, ... those that exist, in the order of their numbers."""
    pattern = re.compile(rf"{re.escape(path.stem)}(?:-(\d+))?{re.escape(path.suffix)}")
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    numbers = {int(found[1] or 1): file for file in there if (found := pattern.fullmatch(file.name))}
    return [numbers[number] for number in sorted(numbers)]


@contextmanager
def _draft(path: Path, fill: Callable[[Path], object]) -> Iterator[Path]:
    """A file beside ``path`` that is whole, on disk and readable by whom the user's umask says."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fill(draft)
            sync(draft)
            follow_umask(draft)
            yield draft
        finally:
            draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on disk: renamed before that, it could be empty after a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Write a file so that a reader sees the old one or the whole new one, at any moment.

    Args:
        path: The file.
        fill: Writes the content to the path that it is given, which is in the same folder.

    Raises:
        ConfigError: It cannot be written; the old one is as it was.
    """
    with _draft(path, fill) as draft:
        draft.replace(path)


def replace_folder(folder: Path, draft: Path) -> None:
    """Put the files of ``draft`` in place of those of ``folder``, each at once: no moment is without them."""
    files = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sync(draft / name)
        (draft / name).replace(folder / name)
    for old in [path for path in folder.rglob("*") if path.is_file()]:
        if old.relative_to(folder) not in files:
            old.unlink()
    shutil.rmtree(draft)


def write(path: Path, content: str | bytes) -> None:
    """Write a text or bytes so that a reader sees all of it or none.

    Raises:
        ConfigError: It cannot be written.
    """
    replace_file(path, lambda draft: _put(draft, content))


def write_new(path: Path, content: str, *beside: str) -> Path:
    """Write a text under a name that nothing has: ``path``, ``path-2``, ... Two processes never share one.

    Args:
        path: The first of these names.
        content: The text.
        beside: Endings of other files that the name is for, too.

    Raises:
        ConfigError: It cannot be written.
    """
    with _draft(path, lambda draft: _put(draft, content)) as draft:
        while True:
            candidate = unused(path, *beside)
            try:
                os.link(draft, candidate)
            except FileExistsError:  # another process was faster
                continue
            except OSError as error:
                if error.errno not in UNLINKED:
                    raise
                candidate.touch(exist_ok=False)
                draft.replace(candidate)
            return candidate


def new_folder(path: Path) -> Path:
    """Make a folder that is nobody else's: ``path``, ``path-2``, ...

    Raises:
        ConfigError: It cannot be made.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            candidate = unused(path)
            try:
                candidate.mkdir()
            except FileExistsError:
                continue
            return candidate


def rename_new(draft: Path, path: Path) -> Path:
    """Give a folder that is complete a name that nothing has: ``path``, ``path-2``, ...

    Raises:
        ConfigError: It cannot be renamed.
    """
    with writing(path):
        while True:
            candidate = unused(path)
            try:
                return draft.rename(candidate)
            except OSError as error:  # another process was faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without the part of a line that a killed process may leave; none of no file."""
    text = path.read_text("utf-8") if path.exists() else ""
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))


def _put(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def follow_umask(path: Path) -> None:
    """Give a file, or all files below a folder, the mode of new files; some libraries make them private."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)
