"""The configuration files of a command, read beforehand: mistakes in them are reported with their line."""

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from lit_align.errors import ConfigError

LARGEST = 2**20
"""Bytes of a configuration; the largest here has some thousands."""

MOST = 100_000
"""Values of a configuration, those of its aliases each time that they are used."""


@dataclass(frozen=True)
class ConfigFile:
    """A YAML (or JSON) file, with the places of all its values.

    Attributes:
        path: As the user wrote it.
        text: Its content.
        root: The mapping.
    """

    path: str
    text: str
    root: yaml.MappingNode

    def find(self, path: Sequence[str]) -> tuple[yaml.Node, yaml.Node] | None:
        """The key and the value of an option.

        Args:
            path: The names that lead to it, without ``init_args``, which may or may not be written out.
        """
        key: yaml.Node = self.root
        value: yaml.Node = self.root
        for name in path:
            entries = [entry for level in _levels(value) for entry in level.value if _name(entry[0]) == name]
            if not entries:
                return None
            key, value = entries[-1]
        return key, value

    def line(self, path: Sequence[str], word: str | None = None) -> int | None:
        """The line (from 1) of an option or, below it, of a name or a value; None if it is not here."""
        if (found := self.find(path)) is None:
            return None
        key, value = found
        if word is None:
            return key.start_mark.line + 1
        lines = [n.start_mark.line + 1 for n in _scalars(value) if n.value == word]
        return lines[0] if lines else None

    def paths(self) -> list[list[str]]:
        """The names that lead to every option, without ``init_args``."""
        return _paths(self.root)

    def class_at(self, path: Sequence[str]) -> str | None:
        """The class that the file gives for an option, if it gives one."""
        found = self.find(path)
        if found is None:
            return None
        value = found[1]
        if isinstance(value, yaml.MappingNode):
            value = {k.value: v for k, v in value.value}.get("class_path", value)
        return value.value if isinstance(value, yaml.ScalarNode) else None

    def value_at(self, path: Sequence[str]) -> str | None:
        """The single value that the file gives for an option, as it is written; None if it gives none."""
        found = self.find(path)
        return found[1].value if found and isinstance(found[1], yaml.ScalarNode) else None

    def model_class(self) -> str | None:
        """The class that the file gives for the model, if it gives one."""
        return self.class_at(["model"])

    def named_base(self) -> str | None:
        """The configuration that the first line of an overlay names."""
        named = re.search(r"[Oo]verlay (?:for|after) (\S+\.yaml)", self.text.partition("\n")[0])
        return named[1] if named else None


def options_in(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Every argument as an option, with its value: after ``=``, or the next argument, if there is one."""
    for argument, following in zip_longest(arguments, arguments[1:]):
        option, equals, value = argument.partition("=")
        yield option, value if equals else following


def values_of(arguments: Sequence[str], *options: str) -> list[str]:
    """What the command line gives for an option, which may have several names, each time that it stands."""
    given = options_in(arguments)
    return [value for option, value in given if option in options and value is not None]


def given_files(arguments: Sequence[str]) -> list[str]:
    """The values of all ``--config`` and ``-c``."""
    found = values_of(arguments, "--config", "-c")
    return [path for path in found if "\n" not in path and not path.startswith("{")]  # else it is the content


def read(path: str, option: str = "--config") -> ConfigFile:
    """Read a configuration.

    Args:
        path: The file.
        option: Under which it was given.

    Raises:
        ConfigError: It is not there, is not YAML, says something twice, or has a name that is none.
    """
    if os.path.isdir(path):
        inside = sorted(file.name for file in Path(path).glob("*.yaml"))
        raise ConfigError(
            f"{option} {path}: this is a folder; give a file of it: {', '.join(inside) or 'none'}"
        )
    try:
        if Path(path).exists() and not Path(path).is_file():  # reading it may never end
            raise ConfigError(f"{option} {path}: this is a pipe or a device; give a file")
        if Path(path).stat().st_size > LARGEST:
            raise ConfigError(f"{option} {path}: it has more than {LARGEST >> 20} MiB; give a configuration")
        text = Path(path).read_text("utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{option} {path}: there is no such file{_near_files(path)}") from None
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"{option} {path}: this is not a text file") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a link to itself
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{option} {path[:200]}: this cannot be read ({reason}); check the path") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = _mark(text, error)
        raise ConfigError(f"{path}, line {mark.line + 1 if mark else '?'}: {_syntax(text, error)}") from None
    except yaml.YAMLError:
        raise ConfigError(f"{option} {path}: this is not a text file") from None
    except RecursionError:
        raise ConfigError(f"{option} {path}: it is nested too deeply; look at its brackets") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{option} {path}: a configuration has the sections trainer, model and data; this file has none"
        )
    _values(path, root, {})
    _refuse_twice(path, root)
    return ConfigFile(path, text, root)


def check_order(files: Sequence[ConfigFile], arguments: Sequence[str], model: str | None) -> None:
    """Refuse overlays without a configuration before them.

    Args:
        files: In the order of the command.
        arguments: The whole command.
        model: The class that the command line gives for the model.

    Raises:
        ConfigError: With the command that was meant.
    """
    if not files and model is None:
        options = [argument.partition("=")[0] for argument in arguments if argument.startswith("-")]
        near = difflib.get_close_matches("--config", options, n=1)
        raise ConfigError(
            f"{near[0]}: there is no such option; did you mean --config?"
            if near
            else "no configuration: give one, as in --config configs/ddpo.yaml (configs/README.md lists them)"
        )
    whole = [number for number, file in enumerate(files) if file.model_class()]
    if whole and whole[0]:
        early = next(
            (file for file in files[: whole[0]] if file.find(["model"]) or file.find(["data"])), None
        )
        if early is not None:
            raise ConfigError(
                f"{early.path} is an overlay, so it comes after the configuration: --config "
                f"{files[whole[0]].path} --config {early.path}"
            )
    if not whole and model is None:
        raise ConfigError(
            f"{files[0].path} is an overlay: give a configuration before it, as in --config "
            f"{files[0].named_base() or 'configs/ddpo.yaml'} --config {files[0].path}"
        )


def _name(key: yaml.Node) -> str:
    """The option that a key names; ``callbacks+`` adds to ``callbacks``."""
    return str(key.value).removesuffix("+")


def _levels(node: yaml.Node) -> list[yaml.MappingNode]:
    """A mapping and its ``init_args``, or those of a list."""
    if isinstance(node, yaml.SequenceNode):
        return [level for part in node.value for level in _levels(part)]
    if not isinstance(node, yaml.MappingNode):
        return []
    inner = [v for k, v in node.value if k.value == "init_args" and isinstance(v, yaml.MappingNode)]
    return [node, *inner]


def _scalars(node: yaml.Node) -> list[yaml.Node]:
    """All names and plain values below a node, in order."""
    if isinstance(node, yaml.MappingNode):
        return [scalar for entry in node.value for part in entry for scalar in _scalars(part)]
    if isinstance(node, yaml.SequenceNode):
        return [scalar for part in node.value for scalar in _scalars(part)]
    return [node]


def _paths(node: yaml.Node, before: tuple[str, ...] = ()) -> list[list[str]]:
    found = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        path = before if key.value == "init_args" else (*before, str(key.value))
        if key.value != "class_path" and path:
            found += [list(path), *_paths(value, path)]
    return found


def _values(path: str, node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for with its aliases, of which a few can stand for billions.

    Raises:
        ConfigError: They are more than :data:`MOST`, an alias is inside of what it stands for, or one has a
            tag, by which other readers make objects.
    """
    if (count := known.get(id(node))) is not None:
        if not count:
            raise ConfigError(f"--config {path}: an alias (*) stands for a value that contains it")
        return count
    known[id(node)] = 0
    if ":python/" in node.tag or not node.tag.startswith("tag:yaml.org,2002:"):
        line, tag = node.start_mark.line + 1, node.tag.rpartition(":")[2]
        raise ConfigError(f"{path}, line {line}: the tag !{tag.lstrip('!')} is not known; take it out")
    parts = node.value if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        parts = [one for entry in node.value for one in entry]
    count = 1 + sum(_values(path, part, known) for part in parts)
    if count > MOST:
        raise ConfigError(f"--config {path}: its aliases (*) stand for more than {MOST} values")
    known[id(node)] = count
    return count


def _refuse_twice(path: str, node: yaml.Node) -> None:
    if isinstance(node, yaml.SequenceNode):
        for part in node.value:
            _refuse_twice(path, part)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:null"):
            raise ConfigError(
                f"{path}, line {line}: YAML does not read {key.value!r} as a name; put it into quotes"
            )
        if isinstance(key, yaml.ScalarNode):
            if key.value in first:
                raise ConfigError(
                    f"{path}, line {line}: {key.value} stands in line {first[key.value]} already; the second "
                    "would replace the first, so make one of them"
                )
            first[key.value] = line
        _refuse_twice(path, value)


def _mark(text: str, error: yaml.MarkedYAMLError) -> Any:
    """Where the mistake is: where something begins that never ends, or where the reader got lost."""
    at_end = error.problem_mark is not None and error.problem_mark.index >= len(text.rstrip())
    return error.context_mark if at_end and error.context_mark else error.problem_mark


def _syntax(text: str, error: yaml.MarkedYAMLError) -> str:
    mark, lines = _mark(text, error), text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "a tab at the beginning of the line; YAML is indented by spaces"
    where = f" here: {line.strip()!r}" if line.strip() else ""
    return f"not valid YAML{where}; look at the indentation, the quotes and the brackets above it"


def _near_files(path: str) -> str:
    folder = Path(path).parent
    there = [str(file) for file in folder.glob("*.yaml")] if folder.is_dir() else []
    near = difflib.get_close_matches(path, there, n=1)
    return f"; did you mean {near[0]}?" if near else ""
