"""What the user wrote: the files and the arguments of a command, and where in them an option stands."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_align.cli.config_files import ConfigFile, options_in
from lit_align.cli.renamed import first_edition


@dataclass(frozen=True)
class Given:
    """What the user wrote: the files and the arguments of the command."""

    files: Sequence[ConfigFile]
    arguments: Sequence[str]

    def place(self, path: Sequence[str], word: str | None = None) -> str:
        """Where an option stands, or below it a word: a file and a line, or the option itself."""
        values = [a.partition("=")[2] or a for a in self.arguments]
        options = [option for argument in self.arguments if (option := option_of(argument))]
        below = word is not None and any(word in value for value in values)  # as in --model.x {y: word}
        on_command = any(
            o[: len(path)] == list(path) or (below and list(path[: len(o)]) == o) for o in options
        )
        for sought in dict.fromkeys((word, None)):
            if on_command and (sought is None or any(sought in value for value in values)):
                return f"--{'.'.join(path)}"
            for file in reversed(self.files):
                for written in (path, first_edition(path)):
                    if (line := file.line(written, sought)) is not None:
                        return f"{file.path}, line {line}: {'.'.join(written)}"
        return ".".join(path)

    def naming(self, class_path: str) -> list[str]:
        """The option of the files that names a class, without ``init_args``; empty if none does."""
        for file in reversed(self.files):
            for path in file.paths():
                if file.class_at(path) == class_path:
                    return path
        return []

    def classes(self, path: Sequence[str]) -> set[str]:
        """The names, without modules, of the classes that the files give for an option."""
        given = (file.class_at(written) for file in self.files for written in (path, first_edition(path)))
        return {name.rpartition(".")[2] for name in given if name}

    def wrote(self, path: Sequence[str], but: Collection[str] = ()) -> bool:
        """Whether an option stands in a file or, alone or inside of a mapping, on the command line.

        Args:
            path: The option.
            but: Classes; what a file gives one of them does not count.
        """
        files = [f for f in self.files if (f.class_at(path[:-1]) or "").rpartition(".")[2] not in but]
        if any(file.find(way) for file in files for way in (path, first_edition(path))):
            return True
        options = [option for argument in self.arguments if (option := option_of(argument))]
        if any(option[: len(path)] == list(path) for option in options):
            return True
        mappings = [
            text for argument in self.arguments if "{" in (text := argument.partition("=")[2] or argument)
        ]
        return any(re.search(rf"\b{re.escape(path[-1])}\b", text) for text in mappings)

    def other_base(self, path: Sequence[str]) -> str | None:
        """The configuration that the overlay with an option is for, if that is not among the files.

        With the overlay beside it that is for one of the files, if there is one, as ``sd15_any.yaml`` beside
        ``sd15.yaml``.
        """
        names = {Path(file.path).name for file in self.files}
        overlay = next((file for file in reversed(self.files) if file.line(path) is not None), None)
        base = overlay and overlay.named_base()
        if not overlay or not base or Path(base).name in names:
            return None
        for other in sorted(Path(overlay.path).parent.glob(f"{Path(overlay.path).stem}_*.yaml")):
            meant = other.read_text(encoding="utf-8").partition("\n")[0]
            if fits := [name for name in names if f"configs/{name}" in meant]:
                return f"{base}; {fits[0]} takes {other}"
        return base

    def overruled(self) -> list[str]:
        """What to tell of options before a file that gives them another value, which wins."""
        told, before = list[str](), list[tuple[str, str]]()
        for option, value in options_in(self.arguments):
            if option not in ("--config", "-c"):
                before += [(option, value or "")] if option_of(option) and not option.endswith("+") else []
                continue
            for file in (file for file in self.files if file.path == value):
                for earlier, wanted in before:
                    written = file.value_at(option_of(earlier))
                    if written is not None and _read(written) != _read(wanted):
                        told.append(
                            f"{earlier} {wanted} stands before --config {file.path}, whose {written} wins; "
                            "put options after the files"
                        )
        return told

    def rescaled(self, lora: Any) -> str | None:
        """What to tell of an adapter whose rank is not the one for which a file gives ``alpha``.

        Args:
            lora: The rank and ``alpha`` of the command; None without an adapter.
        """
        for file in reversed(self.files):
            rank, alpha = (file.value_at(["model", "backbone", "lora", name]) for name in ("rank", "alpha"))
            if rank is None or alpha is None:
                continue
            before, kept = _read(rank), _read(alpha)
            if lora and kept and lora.alpha == kept and lora.rank != before:
                return (
                    f"lora.rank {lora.rank}: alpha stays {kept:g}, so updates are scaled by "
                    f"{kept / lora.rank:g}, and not by {kept / before:g} as in {file.path}; to keep it give "
                    f"--model.backbone.lora.alpha {kept / before * lora.rank:g}"
                )
            return None
        return None

    def argument(self, option: str) -> str:
        """The argument as the user wrote it, of which the parser names the end."""
        names = [argument.partition("=")[0] for argument in self.arguments]
        return next((n for n in names if n.startswith("--") and n.endswith(option.lstrip("-"))), option)

    def paths(self) -> list[list[str]]:
        """The names that lead to every option of the files, without ``init_args``."""
        return [path for file in self.files for path in file.paths()]

    def ending_with(self, name: str, but: Sequence[str] = ()) -> list[str]:
        """Options of the files whose last part is a name: where a misplaced option may belong.

        Args:
            name: The last part.
            but: The place where it was found, and does not belong.
        """
        found = [path for path in self.paths() if path[-1] == name and len(path) > 1 and path != list(but)]
        return list(dict.fromkeys(".".join(path) for path in found))


def _read(text: str) -> Any:
    """The value that a text of YAML stands for: 1e-5 and 1.0e-5 are one number, true and True one answer."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def option_of(argument: str) -> list[str]:
    """The names of an argument's option, without ``init_args``; empty if it is a value."""
    name = argument.partition("=")[0].removeprefix("--").removesuffix("+")
    return [part for part in name.split(".") if part != "init_args"] if argument.startswith("--") else []
