"""Prompts of two objects, made from a list of names."""

from typing import Any, ClassVar

from lit_align.data.prompts.sources import PromptSource, TextPrompts
from lit_align.errors import ConfigError

RELATIONS = ("and", "next to", "near", "on side of", "beside")
"""What joins the two objects of a prompt (arXiv 2401.12244, section 4.3)."""


class ObjectPairs(PromptSource):
    """Every ordered pair of different objects, joined by each relation: ``a dog next to an apple``.

    450 objects and the five published relations make 1,010,250 prompts, none of which is stored. The articles
    are ours. The column ``objects`` holds the two names, for :class:`lit_align.rewards.ObjectPresence`.

    Args:
        path: A text file with one object a line; those to test on stand in a file of their own.
        relations: What joins them.

    Raises:
        ConfigError: The file cannot be read, names an object twice, or fewer than two; or no relation.
    """

    distinct: ClassVar[bool] = True

    def __init__(self, path: str, relations: tuple[str, ...] = RELATIONS) -> None:
        lines = TextPrompts(path)
        self._objects = [name.strip() for name in lines.prompts(range(len(lines))) if name.strip()]
        if len(set(self._objects)) < max(2, len(self._objects)):
            raise ConfigError(f"{path} must name at least two objects, one a line, and none of them twice")
        if not relations:
            raise ConfigError("relations of ObjectPairs is empty: give words that join two objects")
        self.path, self.relations = path, tuple(relations)

    def __len__(self) -> int:
        return len(self._objects) * (len(self._objects) - 1) * len(self.relations)

    def prompt(self, row: int) -> str:
        first, second = self._pair(row)
        relation = self.relations[row % len(self.relations)]
        return f"{_article(first)} {first} {relation} {_article(second)} {second}"

    def columns(self, row: int) -> dict[str, Any]:
        return {"objects": list(self._pair(row))}

    def _pair(self, row: int) -> tuple[str, str]:
        first, second = divmod(row // len(self.relations), len(self._objects) - 1)
        return self._objects[first], self._objects[second + (second >= first)]

    def __str__(self) -> str:
        return f"pairs of the objects in {self.path}"


def _article(name: str) -> str:
    return "an" if name[0].lower() in "aeiou" else "a"
