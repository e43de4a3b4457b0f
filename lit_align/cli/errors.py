"""What the parser refuses, as a sentence: where it stands, what is wrong, and what was probably meant."""

import difflib
import inspect
import re
from collections.abc import Iterable, Sequence
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, get_args, get_type_hints

import lightning.pytorch.callbacks
import lightning.pytorch.loggers
import torch.optim.lr_scheduler
from lightning import Trainer

import lit_align.advantages
import lit_align.backbones
import lit_align.callbacks
import lit_align.data
import lit_align.methods
import lit_align.methods.alignprop
import lit_align.methods.msdda
import lit_align.rewards
import lit_align.samplers
from lit_align.cli.classes import instead_of_a_class, unusable
from lit_align.cli.given import Given, option_of

ROOMS: tuple[ModuleType, ...] = (
    lit_align.methods,
    lit_align.advantages,
    lit_align.backbones,
    lit_align.data,
    lit_align.rewards,
    lit_align.samplers,
    lit_align.callbacks,
    lit_align.methods.alignprop,
    lit_align.methods.msdda,
    lightning.pytorch.loggers,
    lightning.pytorch.callbacks,
    torch.optim,
    torch.optim.lr_scheduler,
)
"""Where the classes are that a configuration names."""

COMMANDS = ("fit", "validate", "test", "predict")

TOOLS = ("export", "pairs", "report", "doctor", "serve")
"""Commands that the parser does not know."""

KINDS = {
    "dict": "a mapping (name: value)",
    "list": "a list",
    "tuple": "a list, such as [1, 2]",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
}


def explain(error: BaseException, given: Given) -> str:
    """The parser's message, which quotes its types, as a sentence for a user."""
    if told := instead_of_a_class(given):
        return told
    text = _of_the_class_that_was_given(str(error))
    for pattern, tell in (
        (r"unrecognized arguments: (.*)", _unrecognised),
        # With the parser's key before it, the message is about a part of a class.
        (r"\AGroup '([^']+)' does not accept option '([^']+)'", _unknown_section),
        (r"\AOption '([^']+)' is not accepted\Z", _unknown_section),
        (r"does not accept option '([^']+)'", _unknown_section),
        (r"Option '([^']+)' is not accepted", _unknown_option),
        (r"No module named '([^']+)'", _no_module),
        (r"the following arguments are required: (.*)", _required),
        (r"Import path (\S+) does not correspond to a subclass of (\w+)", _other_class),
        (r"invalid choice: '([^']+)' \(choose from (.*)\)", _choice),
        (r"argument --(\S+): expected", _no_value),
        (r"Not a valid subclass of (\w+)", _not_a_kind),
        (r"Expected an instantiatable class, but (\S+) is abstract", _abstract),
        (r"Unable to load config [\"'](.*?)[\"']$", _not_a_mapping),
        (r"Expected a", _wrong_value),
    ):
        if found := re.search(pattern, text, flags=re.MULTILINE):
            return tell(text, found, given)
    for path in re.findall(r"class_path '([\w.]+)'", text)[::-1]:
        if fault := unusable(path):
            return f"{given.place(_path(text), path)}: {fault[1]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _of_the_class_that_was_given(text: str) -> str:
    """The message without what is wrong with other readings of a value, if its class was given.

    Where a list of callbacks is asked for, or one, the parser tries the options on their base as well.
    """
    given = re.search(r"^( *)- Problem with given class_path '(?!lightning\.Callback')", text, re.MULTILINE)
    if given is None:
        return text
    others = rf"^{given[1]}- (?:Not a valid subclass|Problem with given class_path 'lightning\.Callback')"
    return re.sub(rf"{others}.*\n(?:{given[1]} .*\n)*", "", text, flags=re.MULTILINE)


def _path(text: str) -> list[str]:
    """The option that the message is about, without ``init_args``."""
    keys = [
        [part for part in key.split(".") if part not in ("init_args", *COMMANDS)]
        for key in re.findall(r'Parser key "([^"]+)"', text)
    ]
    path = [part for key in keys for part in key]
    nested = re.findall(r"NestedArg\(key='([^']+)'", text)
    longest = [part for part in (nested[-1].split(".") if nested else []) if part != "init_args"]
    return [*keys[0], *longest] if nested and len(longest) >= len(path) - len(keys[0]) else path


def _unrecognised(text: str, found: re.Match[str], given: Given) -> str:
    words = [word for word in found[1].split() if word.startswith("-")]
    if not words:
        return f"{found[1]}: options begin with --, and this belongs to none"
    option = given.argument(words[0].partition("=")[0])
    if len(option) > 2 and not option.startswith("--"):
        return f"{option}: options begin with two dashes; did you mean -{option}?"
    name = ".".join(option_of(option))
    known = [f"trainer.{one}" for one in _parameters(Trainer)] + [".".join(path) for path in given.paths()]
    known += ["config", "ckpt_path", "seed_everything", "print_config", "help"]
    meant = _did_you_mean(name, known, "--") or _elsewhere(name, given)
    return f"{option}: there is no such option{meant}"


def _unknown_section(text: str, found: re.Match[str], given: Given) -> str:
    path = ".".join(found.groups()).split(".")
    place = given.place(path)
    if path[0] == "trainer" and len(path) > 1:
        return (
            f"{place}: Trainer has no such option{_did_you_mean(path[1], _parameters(Trainer), 'trainer.')}"
        )
    known = ["model", "data", "trainer", "seed_everything", "ckpt_path"]
    near = difflib.get_close_matches(path[0], known, n=1)
    meant = f"; did you mean {near[0]}?" if near else _elsewhere(path[0], given)
    return f"{place}: a configuration has the sections trainer, model and data, and no {path[0]}{meant}"


def _unknown_option(text: str, found: re.Match[str], given: Given) -> str:
    # A class that is made later, such as an optimizer, is quoted after its option, others before it.
    later = re.match(
        r"\. Got value: Namespace\((?:.*, )?class_path='([\w.]+)'(?:, init_args=.*)?\)$",
        text[found.end() :].partition("\n")[0],
    )
    name, owner = found[1], [later[1]] if later else re.findall(r"class_path '([\w.]+)'", text)
    path = _path(text)
    parts = [part for part in name.split(".") if part != "init_args"]
    path = path if path[-len(parts) :] == parts else [*path, *parts]
    accepted = _parameters(resolve_name(owner[-1])) if owner else []
    class_name = owner[-1].rpartition(".")[2] if owner else "this part"
    meant = _did_you_mean(parts[0], accepted) or _elsewhere(name, given, but=path)
    if base := given.other_base(path):
        meant = f"; this is an overlay for {base}"
    listed = meant or (f"; it has {', '.join(accepted)}" if accepted else "")
    return f"{given.place(path)}: {class_name} has no option {name}{listed}"


def _no_module(text: str, found: re.Match[str], given: Given) -> str:
    class_path, path = _class_without_module(text, found), _path(text)
    full = given.naming(class_path)
    place = given.place(full if full[: len(path)] == path else path, class_path)
    package = found[1].partition(".")[0]
    return (
        f"{place}: {class_path} cannot be imported; there is no module {found[1]} in this folder or among "
        f"the installed packages; install its package (often: pip install {package}), or correct the path"
    )


def _class_without_module(text: str, found: re.Match[str]) -> str:
    """The class whose import failed: one of the missing module, else that which was named last before it.

    The message quotes every class on the way from the method to that class.
    """
    named = list(re.finditer(r"(?:class_path'?(?: |: |=)'|[Vv]alue: |val=')(\w+(?:\.\w+)+)", text))
    inside = [one[1] for one in named if f"{one[1]}.".startswith(f"{found[1].partition('.')[0]}.")]
    before = [one[1] for one in named if one.start() < found.start()]
    after = [one[1] for one in named if one.start() > found.start() and not one[1].startswith("lit_align.")]
    return (inside or after[:1] or before[-1:] or [found[1]])[-1]


def _required(text: str, found: re.Match[str], given: Given) -> str:
    owner = re.findall(r"class_path '([\w.]+)'", text)
    names = found[1].replace("fit.", "")
    if not owner:
        return f"the configuration has no {names}; give a whole one first, as in --config configs/ddpo.yaml"
    return f"{given.place(_path(text))}: {owner[-1].rpartition('.')[2]} needs {names}"


def _choice(text: str, found: re.Match[str], given: Given) -> str:
    choices = [*re.findall(r"\w+", found[2]), *TOOLS]  # in quotes, or not: that depends on Python's version
    meant = _did_you_mean(found[1], choices) or f"; the commands are {', '.join(choices)}"
    return f"there is no command {found[1]}{meant}"


def _no_value(text: str, found: re.Match[str], given: Given) -> str:
    return f"--{found[1]}: a value is missing"


def _not_a_kind(text: str, found: re.Match[str], given: Given) -> str:
    place = given.place(_path(text))
    return f"{place}: this is not of the class {found[1]}; give a class_path, or its values as a mapping"


def _abstract(text: str, found: re.Match[str], given: Given) -> str:
    _, why = unusable(found[1]) or (found[1], "this class is abstract; give one that can be made")
    return f"{given.place(given.naming(found[1]) or _path(text), found[1])}: {why}"


def _other_class(text: str, found: re.Match[str], given: Given) -> str:
    place = given.place(_path(text), found[1])
    return f"{place}: {found[1]} is not a subclass of {found[2]}; derive it from {found[2]}, or give another"


def _not_a_mapping(text: str, found: re.Match[str], given: Given) -> str:
    place = given.place(_path(text)[:1], found[1])
    return f"{place}: {found[1]!r} is not `name: value`, with a space after the colon"


def _wrong_value(text: str, found: re.Match[str], given: Given) -> str:
    path = _path(text)
    named = re.findall(r"Expected a dot import path string: (\S+)", text)
    value = _value(text, named)
    place = given.place(path, value) if value is not None else given.place(path)
    kinds = [kind for name in re.findall(r"Expected a <class '(\w+)'>", text) if (kind := KINDS.get(name))]
    kinds = [kind for kind in dict.fromkeys(kinds) if kind != "null"]
    literals = [
        word for one in re.findall(r"Literal\[([^\]]+)\]", text) for word in re.findall(r"'([^']+)'", one)
    ]
    if literals:
        meant = _did_you_mean(str(value), literals) or f"; it may be {', '.join(dict.fromkeys(literals))}"
        return f"{place}: {value!r} is not possible{meant}"
    if value is not None and (fault := unusable(str(value))):
        return f"{given.place(given.naming(fault[0]) or path, fault[0])}: {fault[1]}"
    names = {name: room for room in reversed(ROOMS) for name in vars(room) if name[0].isupper()}
    short = [name for name in names if value and name.lower() == f"{value.lower()}logger"]
    if named and (not kinds or value is None or value[:1].isupper() or "." in value or short):
        name, fitting = named[-1].rpartition(".")[2], _fitting(text)
        if name in names and name not in fitting:
            return f"{place}: {name} is not possible here; " + (
                f"it may be {', '.join(fitting)}" if fitting else f"it is a class of {names[name].__name__}"
            )
        meant = _did_you_mean(next(iter(short), name), fitting or names)
        return f"{place}: no class {named[-1]} is known{meant or '; give its import path'}"
    if kinds:
        quotes = "; put it in quotes: YAML reads no, off, 1 and the like as values" if "text" in kinds else ""
        return f"{place}: {value!r} is not {' or '.join(kinds)}{quotes}"
    return f"{place}: {value!r} cannot be used here"


def _fitting(text: str) -> list[str]:
    """The known classes that the refused option may be; none where it is not an argument of a class."""
    owners, keys = re.findall(r"given class_path '([\w.]+)'", text), re.findall(r'Parser key "(\w+)"', text)
    hint = get_type_hints(resolve_name(owners[-1]).__init__).get(keys[-1]) if owners and keys else None
    kinds = tuple(kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and kind is not str)
    known = [one for room in ROOMS for one in vars(room).values() if isinstance(one, type)]
    fitting = [one for one in known if kinds and issubclass(one, kinds) and one not in kinds]
    return list(dict.fromkeys(one.__name__ for one in fitting if not inspect.isabstract(one)))


def _value(text: str, named: Sequence[str]) -> str | None:
    """What was refused: the innermost value that the message quotes."""
    for quoted in re.findall(r"(?:Given|Got) value: (.*)", text):
        value = quoted.partition(". Got value")[0].strip("'\" ")
        if not value.startswith(("Namespace(", "NestedArg(")):
            return value
    nested = re.findall(r"val='([^']*)'", text)
    return nested[0] if nested else next(iter(named), None)


def _did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    spelt = {one.lower(): one for one in known}
    same = [spelt[name.lower()]] if name.lower() in spelt else []
    near = same or [spelt[one] for one in difflib.get_close_matches(name.lower(), spelt, n=2)]
    return f"; did you mean {' or '.join(prefix + one for one in near)}?" if near else ""


def _elsewhere(name: str, given: Given, but: Sequence[str] = ()) -> str:
    places = given.ending_with(name.rpartition(".")[2], but)
    return f"; did you mean {' or '.join(places[:2])}?" if places else ""


def _parameters(owner: Any) -> list[str]:
    return [name for name in inspect.signature(owner).parameters if name not in ("self", "args", "kwargs")]
