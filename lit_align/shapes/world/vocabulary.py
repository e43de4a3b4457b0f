"""The words of the world, and the words of a prompt that the bundled models were never taught."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from lit_align.shapes import PIPELINE
from lit_align.shapes.world.grammar import COLOURS, COUNTS, RADII, RELATIONS, SHAPES, Group

EXAMPLES = 5
"""Words that a warning shows."""


def words() -> list[str]:
    """Every word of the world's captions, sorted."""
    plurals = [str(Group(2, None, None, shape)) for shape in SHAPES]
    return sorted(
        set(" ".join([*COUNTS, *RADII, *COLOURS, *SHAPES, *plurals, *RELATIONS, "and on background"]).split())
    )


def unknown_words(prompt: str) -> list[str]:
    """Words and signs of a prompt that no caption has, each once, in their order.

    The tokenizer knows every word of a caption as one token and spells others by letters, whose embeddings
    were never trained. As the tokenizer does, this ignores case.
    """
    found = re.findall(r"\w+|[^\w\s]", prompt.lower())
    return [word for word in dict.fromkeys(found) if word not in _known()]


def is_shapes_vocabulary(vocabulary: Mapping[str, int]) -> bool:
    """Whether a tokenizer's vocabulary is that of the bundled pipeline, as of every model trained from it."""
    bundled = json.loads((PIPELINE / "tokenizer" / "tokenizer.json").read_text("utf-8"))
    return dict(vocabulary) == bundled["model"]["vocab"]


def untaught(prompts: Iterable[str]) -> str | None:
    """A warning about prompts with words that the bundled models were never taught; None without any."""
    unknown = [unknown_words(prompt) for prompt in prompts]
    foreign = [those for those in unknown if those]
    if not foreign:
        return None
    examples = list(dict.fromkeys(word for those in foreign for word in those))[:EXAMPLES]
    return (
        f"{len(foreign)} of {len(unknown)} prompts have words that the bundled Shapes model was never taught "
        f"({', '.join(examples)}): it draws something else for them; use prompts of its grammar (see "
        "lit_align/shapes/README.md) or another model under backbone.pretrained"
    )


@lru_cache(maxsize=1)
def _known() -> frozenset[str]:
    return frozenset(words())
