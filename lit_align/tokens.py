"""Texts that are longer than what reads them: their number of tokens, and one warning of all that are cut."""

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

Counts = Sequence[tuple[int, int]]
"""For each tokenizer that cuts a text: how many tokens the text has, and how many of them are read."""


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text has, with those that a tokenizer adds."""
    return len(tokenizer(text, verbose=False).input_ids)


def warn_of_cut(
    reader: str, tokens: Callable[[str], Counts], texts: Sequence[str], what: str = "prompts"
) -> bool:
    """Warn if some texts are longer than what is read of them; returns whether it did.

    Args:
        reader: What reads them.
        tokens: Of a text.
        texts: All that are read at this time.
        what: What they are.
    """
    counts = {text: tokens(text) for text in texts}
    found = [text for text in texts if any(there > read for there, read in counts[text])]
    if not found:
        return False
    limit = min(read for _, read in counts[found[0]])
    rank_zero_warn(
        f"{len(found)} of the first {len(texts)} {what} are longer than the {limit} tokens that {reader} "
        f"reads, and are cut, such as {found[0][:60]!r}; later ones are not counted"
    )
    return True
