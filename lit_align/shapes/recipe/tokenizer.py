"""The tokenizer: CLIP's byte-level BPE with merges that make every word of the world one token."""

from collections.abc import Iterable
from itertools import pairwise

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

POSITIONS = 24
"""Tokens a caption is padded or cut to."""

END = "</w>"
START_TOKEN, END_TOKEN = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(words: Iterable[str]) -> CLIPTokenizer:
    """Build a tokenizer in which each of ``words`` is one token; other text falls back to pieces and bytes.

    Args:
        words: Lower-case words of ASCII letters.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + END for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = _apply([*word[:-1], word[-1] + END], merges)
        while len(pieces) > 1:
            # The first two pieces become a token; older merges keep their rank, so words that were done stay
            # done.
            merges.append((pieces[0], pieces[1]))
            pieces = _apply(pieces, merges)
    tokens += dict.fromkeys(left + right for left, right in merges)
    # The specials come last: transformers reads an end-of-text id of 2 as "an old checkpoint" and pools
    # elsewhere.
    vocabulary = {
        token: index for index, token in enumerate([*dict.fromkeys(tokens), START_TOKEN, END_TOKEN])
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)


def _apply(pieces: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: merge the pair of the lowest rank until none is left."""
    rank = {merge: index for index, merge in enumerate(merges)}
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in rank]
        if not pairs:
            return pieces
        best = min(pairs, key=rank.__getitem__)
        merged: list[str] = []
        index = 0
        while index < len(pieces):
            joined = tuple(pieces[index : index + 2]) == best
            merged.append("".join(best) if joined else pieces[index])
            index += 2 if joined else 1
        pieces = merged
