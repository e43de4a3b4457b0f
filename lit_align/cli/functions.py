"""Rewards that are plain functions: their import path is enough, in files and on the command line."""

import importlib
import json
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import get_loader
from yaml import YAMLError

LOAD_YAML = get_loader("yaml")
"""How the parser reads text: 1e-3 is a number."""


def with_functions(value: Any) -> Any:
    """A configuration in which each reward that is the path of a function is a ``FunctionReward`` of it."""
    if isinstance(value, list):
        return [with_functions(part) for part in value]
    if not isinstance(value, dict):
        return value
    found = {name: with_functions(part) for name, part in value.items()}
    if isinstance(found.get("rewards"), dict):
        found["rewards"] = {name: _reward(part) for name, part in found["rewards"].items()}
    return found


def arguments_with_functions(arguments: Sequence[str]) -> list[str]:
    """The same for options such as ``--model.rewards.rewards.mine my_rewards.mine``, and for mappings."""
    found: list[str] = []
    last = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        given = value if equals else argument
        name = option if equals else last
        if re.search(r"\.rewards\.\w[\w-]*(\.class_path)?$", name) and is_function(given):
            name = name.removesuffix(".class_path")
            if not equals:
                found.pop()
            found += [name, "FunctionReward", f"{name}.function", given]
        elif given.startswith("{"):
            found.append(f"{option if equals else ''}{equals}{_mapping(name, given)}")
        else:
            found.append(argument)
        last = argument
    return found


def _mapping(option: str, text: str) -> str:
    """A mapping on the command line; as it was written where it names no function."""
    try:
        value = LOAD_YAML(text)
    except YAMLError:  # the parser will say so
        return text
    name = option.rpartition(".")[2]
    made = with_functions({name: value})[name]
    return text if made == value else json.dumps(made)


def is_function(path: Any) -> bool:
    """Whether a text is the import path of a function, or of another object that can be called."""
    if not isinstance(path, str) or not re.fullmatch(r"\w+(\.\w+)+", path):
        return False
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
        return callable(found) and not isinstance(found, type)
    except Exception:  # whatever a module of the user raises: the parser will say so
        return False


def _reward(given: Any) -> Any:
    """What stands for a reward."""
    path = given.get("class_path") if isinstance(given, dict) else given
    if not is_function(path):
        return given
    options = given.get("init_args") or {} if isinstance(given, dict) else {}
    return {"class_path": "FunctionReward", "init_args": options | {"function": path}}
