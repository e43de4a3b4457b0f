"""Words that the bundled models were never taught, against their tokenizer."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from lit_align.shapes import PIPELINE
from lit_align.shapes.world import sample_caption, unknown_words, untaught, words


def test_a_caption_has_no_unknown_word() -> None:
    rng = np.random.default_rng(0)
    prompts = [str(sample_caption(rng)) for _ in range(200)]
    assert untaught(prompts) is None
    assert untaught([]) is None
    assert unknown_words("Two RED Circles left of a Star") == []


def test_known_words_are_those_that_the_tokenizer_holds_as_one_token() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(PIPELINE / "tokenizer")
    assert [tokenizer.tokenize(word) for word in words()] == [[f"{word}</w>"] for word in words()]
    assert all(len(tokenizer.tokenize(word)) > 1 for word in ("elephant", "five", "circled", "the"))


@pytest.mark.parametrize("word", ["elephant", "circled", "five", "purple", "the", "x", "3", ".", "—"])
def test_other_words_and_signs_are_unknown(word: str) -> None:
    assert unknown_words(f"a red circle {word} a star {word}") == [word]


def test_the_warning_counts_prompts_and_shows_words() -> None:
    prompts = ["an elephant in a library", "a red circle", "a red elephant", "a blue star"]
    assert unknown_words(prompts[0]) == ["an", "elephant", "in", "library"]
    said = untaught(prompts)
    assert said is not None
    assert said.startswith("2 of 4 prompts have words that the bundled Shapes model was never taught (an, ")
    assert "another model under backbone.pretrained" in said
