"""The method of a command: its class, and whether the configuration is one for it."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import lit_align.methods
from lit_align.cli.given import Given
from lit_align.errors import ConfigError


def use_method(given: Given, model: str | None) -> str | None:
    """The class in place of the configuration's, if a later file or the command gives another.

    Raises:
        ConfigError: It is a method with other options.
    """
    named = [(file, name) for file in given.files if (name := file.model_class())]
    wanted = model or (named[-1][1] if named else "")
    try:
        new, old = _class(wanted), _class(named[0][1]) if named else None
    except (ImportError, ValueError):
        return None  # the parser says so
    if new is not None:
        _check_annotations(wanted, new)
    if old is new or old is None or new is None:
        return None
    base, first = named[0]
    if not issubclass(new, old):
        method = wanted.rpartition(".")[2].removesuffix("Module").lower()
        own = Path(base.path).with_name(f"{method}.yaml")
        start = f"start from {own}" if own.exists() else "start from a configuration of that method"
        raise ConfigError(f"model: {base.path} is for {first}, and {wanted} has other options; {start}")
    return wanted


def _check_annotations(class_path: str, method: Any) -> None:
    """Refuse a method whose arguments have no types, by which values are turned into objects."""
    untyped = [
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.annotation is inspect.Parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    if untyped:
        raise ConfigError(
            f"model: {class_path} has no type for {', '.join(untyped)}; annotate the arguments of its "
            "__init__, as in `sampler: SamplerFactory`, since values are converted by these types"
        )


def _class(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module) if module else lit_align.methods, last, None)
