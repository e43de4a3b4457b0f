"""Options of a class that takes the place of another one: what nobody wrote has the new class's own default.

The parser hands the values of the old class on to options of the same name. That is right for what a user
wrote, such as a learning rate, and wrong for what is only the old class's default: AdamW's ``eps`` is a
number, Adafactor's a pair. It is wrong for the weights of a reward too: those of PickScore load as HPS v2.
"""

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lit_align.cli.given import Given
from lit_align.errors import ConfigError
from lit_align.pretrained import SHAPES
from lit_align.rewards import Reward

NOTHING = inspect.Parameter.empty

# As a default that is annotated as text, such as Timer's: the parser leaves it to YAML, which knows none.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_str(str(member.value)))


class Parser(LightningArgumentParser):
    """A parser that prints configurations as they are used.

    Attributes:
        given: What the user wrote; None of the parsers that the library makes for itself.
    """

    given: Given | None = None

    def dump(self, cfg: Namespace, **options: Any) -> str:
        if self.given is not None:
            use_own_defaults(cfg, self.given)
        return str(super().dump(cfg, **options))


def use_own_defaults(config: Any, given: Given) -> None:
    """Set options that nobody wrote for their class to its defaults, where it replaced another one.

    Args:
        config: Of a command, as the parser made it; changed in place.
        given: What the user wrote.

    Raises:
        ConfigError: A number stands where a class without annotations has several.
    """
    for path, class_path, options in _parts(config, ()):
        kind = resolve_name(class_path)
        replaced = given.classes(path) - {class_path.rpartition(".")[2]}
        scores = isinstance(kind, type) and issubclass(kind, Reward)
        for name, value in list(options.items(branches=True, nested=False)):
            default, annotated = _declared(kind, name)
            # The weights of another reward are not this one's; those of Shapes are a choice for all.
            model = scores and name == "pretrained" and value != SHAPES
            if replaced and _is_plain(default) and not given.wrote([*path, name], replaced if model else ()):
                options[name] = default
            elif isinstance(default, tuple) and not annotated and isinstance(value, int | float | str):
                raise ConfigError(
                    f"{given.place([*path, name])}: {value!r} is one value, and {class_path} has several "
                    f"there, {default} if nothing is given; give as many"
                )


def _parts(value: Any, path: tuple[str, ...]) -> Iterator[tuple[list[str], str, Any]]:
    """The place without ``init_args``, the class path and the options of every class in a configuration."""
    entries = dict(value.items(branches=True, nested=False)) if isinstance(value, Namespace) else value
    if not isinstance(entries, Mapping):
        return
    if isinstance(entries.get("class_path"), str) and isinstance(entries.get("init_args"), Namespace):
        yield list(path), entries["class_path"], entries["init_args"]
    for name, entry in entries.items():
        yield from _parts(entry, path if name == "init_args" else (*path, str(name)))


def _declared(kind: Any, name: str) -> tuple[Any, bool]:
    """The default of an option, and whether it is annotated; the option may be that of a base class."""
    for base in getattr(kind, "__mro__", ()):
        if "__init__" in vars(base):
            found = inspect.signature(base.__init__).parameters.get(name)
            if found is not None:
                return found.default, found.annotation is not NOTHING
    return NOTHING, True


def _is_plain(value: Any) -> bool:
    """Whether a default is a value that a configuration can hold."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
