"""Names of the first edition, translated: its configurations and commands still run, with a warning each."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_align.cli.config_files import ConfigFile
from lit_align.errors import ConfigError

OPTIONS = {
    "model.optimizer": "model.optimisation.optimizer",
    "model.lr_scheduler": "model.optimisation.lr_scheduler",
    "model.clip_norm": "model.optimisation.clip_norm",
    "model.micro_batch": "model.optimisation.micro_batch",
    "model.guidance": "model.sampling.guidance",
    "model.rollout_batch": "model.sampling.batch",
    "model.seed": "model.sampling.seed",
    "model.sweep.pictures": "model.sweep.images",
    "data.prompts_per_collection": "data.prompts_per_batch",
    "data.collections_per_epoch": "data.batches_per_epoch",
    "data.tasks.*.prompts_per_collection": "data.tasks.*.prompts_per_batch",
}
"""Old and new places, without ``init_args``; ``*`` is any one name."""

VALUES = {"model.backbone.checkpointing": {"true": "prediction", "false": "none"}}
"""Options with the same name and other values."""

CLASSES = {
    "CollectionCheckpoint": "BatchCheckpoint",
    "PictureGrids": "ImageGrids",
    "PictureWriter": "ImageWriter",
    "HubPictures": "HubImages",
    "lit_align.baselines": "lit_align.methods.msdda",
    "lit_align.truncation": "lit_align.methods.alignprop",
}
"""Names in the path of a class: of the class, or of its module."""


def refuse_both(file: ConfigFile) -> None:
    """Refuse an option under its old and its new name, of which one would be passed over.

    Raises:
        ConfigError: The file has such a pair.
    """
    for old, new in OPTIONS.items():
        first, second = file.line(old.split(".")), file.line(new.split("."))
        if first is not None and second is not None:
            raise ConfigError(
                f"{file.path}, line {first}: {old} is now {new}, which line {second} gives too; take the old "
                "one out"
            )


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, or an overlay, with the names of today."""
    new: dict[str, Any] = _classes(config)
    for old in OPTIONS:
        for path in _places(new, old.split(".")):
            _move(new, path, _renamed(path))
    for name, values in VALUES.items():
        for path in _places(new, name.split(".")):
            holder, key = _holder(new, path)
            word = str(holder[key]).lower()
            if isinstance(holder[key], bool) and word in values:
                holder[key] = values[word]
                rank_zero_warn(f"{name}: {word} is now {values[word]}")
    return new


def translated_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments with the names of today."""
    new: list[str] = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and option.count("."):
            option = f"--{_translate_option(option[2:])}"
        name = new[-1] if new and not equals else option
        words = VALUES.get(_plain(name.removeprefix("--")), {})
        given = value if equals else argument
        if given in words:
            rank_zero_warn(f"{_plain(name.removeprefix('--'))}: {given} is now {words[given]}")
            argument = words[given]
            new.append(f"{option}={argument}" if equals else argument)
        elif argument.startswith("--"):
            new.append(f"{option}{equals}{_value(value)}")
        else:
            new.append(_value(argument))
    return new


def first_edition(path: Sequence[str]) -> list[str]:
    """Where an option stood in the first edition."""
    name = ".".join(path)
    for old, new in OPTIONS.items():
        if name == new or name.startswith(f"{new}."):
            return [*old.split("."), *path[new.count(".") + 1 :]]
    return list(path)


def _value(text: str) -> str:
    return _class(text) if text in CLASSES or text.startswith("lit_align.") else text


def _translate_option(name: str) -> str:
    """A dotted option whose beginning may be an old name; ``init_args`` stay where they are."""
    parts, plus = name.removesuffix("+").split("."), "+" * name.endswith("+")
    places = [place for place, part in enumerate(parts) if part != "init_args"]
    for count in range(len(places), 0, -1):
        path = [parts[place] for place in places[:count]]
        if (new := _renamed(path)) != path:
            end = places[count - 1] + 1
            kept = parts[: places[1]]  # model or data, and init_args if they are there
            rank_zero_warn(f"{'.'.join(path)} is now {'.'.join(new)}")
            return ".".join([*kept, *new[1:], *parts[end:]]) + plus
    return name


def _renamed(path: Sequence[str]) -> list[str]:
    for old, new in OPTIONS.items():
        names = old.split(".")
        if len(names) == len(path) and all(n in ("*", p) for n, p in zip(names, path, strict=True)):
            wild = iter(p for n, p in zip(names, path, strict=True) if n == "*")
            return [next(wild) if name == "*" else name for name in new.split(".")]
    return list(path)


def _plain(name: str) -> str:
    return name.replace(".init_args", "")


def _places(config: Any, names: Sequence[str], before: tuple[str, ...] = ()) -> list[list[str]]:
    """The paths in a configuration that a dotted name with ``*`` stands for, without ``init_args``."""
    if not names:
        return [list(before)]
    found = []
    for level in _levels(config):
        for key in [
            key for key in level if names[0] in ("*", key) and key not in ("init_args", "class_path")
        ]:
            found += _places(level[key], names[1:], (*before, key))
    return found


def _levels(config: Any) -> list[dict[str, Any]]:
    """Where the options of a part stand: beside ``class_path``, and in its ``init_args``."""
    levels = [config] if isinstance(config, dict) else []
    return levels + [level["init_args"] for level in levels if isinstance(level.get("init_args"), dict)]


def _holder(config: dict[str, Any], path: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The mapping that holds the last name of a path."""
    here: Any = config
    for name in path[:-1]:
        here = next(level[name] for level in _levels(here) if name in level)
    return next(level for level in _levels(here) if path[-1] in level), path[-1]


def _move(config: dict[str, Any], old: Sequence[str], new: Sequence[str]) -> None:
    holder, key = _holder(config, old)
    value = holder.pop(key)
    shared = next(n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    for name in new[shared:-1]:  # where it now belongs, from where it was
        if not isinstance(holder.get(name), dict):
            holder[name] = {}
        holder = holder[name]
    holder.setdefault(new[-1], value)
    rank_zero_warn(f"{'.'.join(old)} is now {'.'.join(new)}")


def _classes(config: Any) -> Any:
    """The same with the class paths of today; copied, since what follows changes it."""
    if isinstance(config, Mapping):
        new = {key: _classes(value) for key, value in config.items()}
        if isinstance(new.get("class_path"), str):
            new["class_path"] = _class(new["class_path"])
        return new
    if isinstance(config, list):
        return [_classes(value) for value in config]
    return _class(config) if isinstance(config, str) and config.startswith("lit_align.") else config


def _class(path: str) -> str:
    for old, new in CLASSES.items():
        moved = re.sub(rf"(^|\.){re.escape(old)}(?=\.|$)", rf"\g<1>{new}", path)
        if moved != path:
            rank_zero_warn(f"{path} is now {moved}")
            return moved
    return path
