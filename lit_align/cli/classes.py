"""Why a class that a configuration names cannot be used."""

import difflib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lit_align.cli.config_files import options_in
from lit_align.cli.given import Given, option_of
from lit_align.data.prompts.sources import TABLES

READERS = {".txt": "TextPrompts", **TABLES}
PAIR_READERS = {".csv": "FolderPairs", ".jsonl": "FolderPairs", ".json": "PreferenceFiles"} | {
    ".parquet": "PreferenceFiles",
    ".tar": "WebDatasetPairs",
}
"""What reads the files of a source, by their endings."""


def instead_of_a_class(given: Given) -> str | None:
    """What to tell of a file, or of a model, where what reads it is asked for; None if there is none."""
    written = [(option_of(option), value or "") for option, value in options_in(given.arguments)]
    written += [
        (path, value) for file in given.files for path in file.paths() if (value := file.value_at(path))
    ]
    pairs = "PickaPicDataModule" in given.classes(["data"])
    for path, value in written:
        option, place = ".".join(path), given.place(path, value)
        if path == ["model", "backbone"] and ("/" in value or Path(value).exists()):
            return f"{place}: {value} is no class; give a model as --model.backbone.pretrained {value}"
        if path[:1] == ["data"] and path[-1].endswith("source"):
            readers = PAIR_READERS if pairs and path[-1] == "source" else READERS
            if reader := readers.get(Path(value).suffix.lower()):
                return (
                    f"{place}: {value} is a file, and not the class that reads it; give --{option} {reader} "
                    f"--{option}.path {value}"
                )
    return None


def unusable(value: str) -> tuple[str, str] | None:
    """A class in a refused value that cannot be used, and why; None where its classes can be made.

    Args:
        value: A class path, or the text of a mapping with class paths.
    """
    paths = re.findall(r"'class_path': '(\w+(?:\.\w+)+)'", value)
    if re.fullmatch(r"\w+(\.[^\W\d]\w*)+", value):  # 1.5 is a number
        paths = [value]
    return next(((path, fault) for path in paths for fault in _faults(path)), None)


def _faults(path: str) -> Iterator[str]:
    module, _, name = path.rpartition(".")
    try:
        room = importlib.import_module(module)
        kind: Any = getattr(room, name, None)
    except Exception as error:  # whatever a module of the user raises
        yield f"{path} cannot be imported ({type(error).__name__}: {error}); correct or install {module}"
        return
    if kind is None:
        if name == "py":
            yield f"{path} is a file; give the import path of a class in it, such as {module}.CLASS"
            return
        near = difflib.get_close_matches(name, dir(room), n=1)
        yield f"{module} has no {name}" + (f"; did you mean {near[0]}?" if near else "")
        return
    missing: frozenset[str] = getattr(kind, "__abstractmethods__", frozenset())
    if missing:
        base = next(b for b in kind.__mro__[1:] if missing & getattr(b, "__abstractmethods__", frozenset()))
        yield f"{name} lacks {', '.join(sorted(missing))}, which {base.__name__} asks for; write it"
