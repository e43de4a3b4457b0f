"""The prompt sets that ship: what is in them, and that the recipe makes them."""

from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
from pyarrow import parquet

from lit_align.data import PromptDataModule, ShapesPrompts, ShapesPromptSet
from lit_align.data.prompts.shapes import SetName
from lit_align.errors import ConfigError
from lit_align.shapes import PROMPTS
from lit_align.shapes.recipe.images import held_out
from lit_align.shapes.recipe.prompts import HELD_OUT_KINDS, LARGE, make_prompts
from lit_align.shapes.world import parse

COUNTS = {"small": 45, "large": 120_000, "open": 789, "pairs": 2_048, "validation": 512, "test": 512}


@pytest.fixture(scope="module")
def sets() -> dict[str, list[str]]:
    """Read with the source that a run reads them with."""
    sources = {name: ShapesPromptSet(name) for name in get_args(SetName)}
    return {name: [source.prompt(row) for row in range(len(source))] for name, source in sources.items()}


def kind(prompt: str) -> str:
    caption = parse(prompt)
    if len(caption.groups) == 2:
        return "relation" if caption.relation else "pair"
    return "single" if caption.groups[0].colour else "open"


def test_counts_and_no_prompt_twice(sets: dict[str, list[str]]) -> None:
    assert {name: len(prompts) for name, prompts in sets.items()} == COUNTS
    everything = [prompt for prompts in sets.values() for prompt in prompts]
    assert len(set(everything)) == len(everything)


def test_only_two_sets_are_held_out_and_they_are_the_splits_of_the_data_module(sets: dict[str, list[str]]):
    for name, prompts in sets.items():
        assert {held_out(prompt) for prompt in prompts} == {name in ("validation", "test")}
    data = PromptDataModule(ShapesPrompts(["single", "pair"]))
    data.setup("validate")
    for split in ("validation", "test"):
        asked = [prompt for prompt in sets[split] if kind(prompt) in ("single", "pair")]
        assert all(data._sets[split].accepts(prompt) for prompt in asked)


def test_an_unknown_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="no set 'huge' of Shapes prompts; give one of small, large"):
        ShapesPromptSet("huge")  # type: ignore[arg-type]


@pytest.mark.slow  # what ships changes with the recipe alone, which the next test makes again
def test_every_prompt_is_read_and_of_its_kind(sets: dict[str, list[str]]) -> None:
    assert Counter(map(kind, sets["large"])) == LARGE
    for split in ("validation", "test"):
        assert Counter(map(kind, sets[split])) == HELD_OUT_KINDS
    assert set(map(kind, sets["open"])) == {"open"}
    assert set(map(kind, sets["pairs"])) == {"pair"}
    assert all([group.count for group in parse(prompt).groups] == [1, 1] for prompt in sets["pairs"])
    looks = {(group.colour, group.shape) for prompt in sets["small"] for group in parse(prompt).groups}
    assert len(looks) == len(sets["small"])


@pytest.mark.slow
def test_the_recipe_makes_what_ships(tmp_path: Path) -> None:
    make_prompts(tmp_path)
    for file in PROMPTS.iterdir():
        again = tmp_path / file.name
        if file.suffix == ".txt":
            assert again.read_bytes() == file.read_bytes()
        else:  # other versions of Arrow may write other bytes
            assert parquet.read_table(again).equals(parquet.read_table(file))
    assert sum(file.stat().st_size for file in PROMPTS.iterdir()) < 1.5e6
