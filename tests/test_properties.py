"""What must hold for any input: of readers, indices, orders, splits, schedules, samplers and advantages."""

import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lit_align.advantages import Advantages, BatchAdvantages, GroupAdvantages, PerPromptAdvantages
from lit_align.data import CSVPrompts, JSONLPrompts
from lit_align.data.images import UnreadableImage, decode
from lit_align.data.loading import Rank
from lit_align.data.preferences.loader import PairOrder
from lit_align.data.prompts.index import index
from lit_align.data.prompts.sets import PromptSet
from lit_align.data.prompts.sources import TablePrompts
from lit_align.data.splits import Permutation, find, prompt_keys
from lit_align.errors import ConfigError
from lit_align.randomness import one_spelling, place
from lit_align.samplers import DDIM, DiffusionSchedule
from tests.corpus.files import image
from tests.pipelines import SCHEDULE

settings.register_profile(
    "here",
    max_examples=25,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("here")

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
PROMPTS = st.lists(TEXT, min_size=1, max_size=30)
NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


# ---- readers


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
@given(at=st.floats(0, 1), byte=st.integers(0, 255), keep=st.floats(0.2, 1))
def test_an_image_with_a_wrong_byte_is_one_or_is_skipped(form: str, at: float, byte: int, keep: float):
    data = bytearray(image(form, (12, 8)))
    data[min(int(at * len(data)), len(data) - 1)] = byte
    try:
        found = decode(bytes(data[: int(keep * len(data))]), 8)
    except UnreadableImage:
        return
    assert found.shape == (3, 8, 8)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@given(st.binary(max_size=200))
def test_bytes_are_an_image_or_are_skipped(data: bytes):
    with pytest.raises(UnreadableImage):
        decode(data, 8)


@given(PROMPTS)
def test_a_table_gives_back_its_prompts(prompts: list[str]):
    source = TablePrompts(pa.table({"prompt": prompts, "row": list(range(len(prompts)))}), "prompt")
    assert source.prompts(range(len(prompts))) == prompts
    assert [source.columns(row)["row"] for row in range(len(source))] == list(range(len(prompts)))


@settings(max_examples=15)
@given(PROMPTS)
def test_csv_gives_back_what_was_quoted(prompts: list[str]):
    import csv

    prompts = [prompt.replace("\r", " ") for prompt in prompts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["prompt"], *([one] for one in prompts)])
        found = CSVPrompts(str(path))
        assert found.prompts(range(len(found))) == prompts


@settings(max_examples=15)
@given(st.binary(max_size=120))
def test_any_bytes_are_a_csv_or_an_error(data: bytes):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.csv"
        path.write_bytes(b"prompt\n" + data)
        try:
            assert len(CSVPrompts(str(path))) > 0
        except ConfigError as error:
            told = str(error)
        else:
            told = ""
        assert "\n" not in told


@settings(max_examples=8)
@given(st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | TEXT, lambda s: st.lists(s, max_size=3)))
def test_any_json_lines_are_read_or_an_error(value: object):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder) / "cache")
        path = Path(folder) / "p.jsonl"
        path.write_text(json.dumps({"prompt": "a", "value": value}) + "\n", encoding="utf-8")
        try:
            assert JSONLPrompts(str(path)).prompt(0) == "a"
            told = ""
        except ConfigError as error:
            told = str(error)
        assert "\n" not in told


# ---- index, splits, orders


@given(PROMPTS)
def test_an_index_has_each_prompt_once_at_its_first_row(prompts: list[str]):
    source = TablePrompts(pa.table({"prompt": prompts}), "prompt")
    texts = [one_spelling(prompt.strip()) for prompt in prompts]
    wanted = list(dict.fromkeys(filter(None, texts)))
    if not wanted:
        with pytest.raises(ConfigError):
            index(source)
        return
    found = index(source)
    first = {prompt: row for row, prompt in reversed(list(enumerate(texts)))}
    assert sorted(found.rows.tolist()) == sorted(first[prompt] for prompt in wanted)
    assert found.empty + found.repeated + len(found) == len(prompts)
    places = [place(prompts[row].strip()) for row in found.rows]
    assert places == sorted(places)
    assert np.array_equal(found.keys[find(found.keys, np.sort(prompt_keys(wanted)))], found.keys)


@given(PROMPTS, st.floats(0, 1), st.floats(0, 1))
def test_splits_are_disjoint_and_whole(prompts: list[str], one: float, two: float):
    if not any(prompt.strip() for prompt in prompts):
        return
    low, high = sorted((one, two))
    every = PromptSet(TablePrompts(pa.table({"prompt": prompts}), "prompt"))
    parts = [every.split(0.0, low), every.split(low, high), every.split(high, 1.0)]
    rows = [row for part in parts for row in np.asarray(part.rows).tolist()]
    assert sorted(rows) == sorted(np.asarray(every.rows).tolist())
    assert sum(part.count() for part in parts) == every.count()
    for part in parts:
        assert all(part.accepts(part.prompt(int(row))) for row in part.rows)


@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_an_order_has_every_row_once(size: int, seed: int, number: int):
    order = Permutation(size, seed, number, purpose="test")
    assert sorted(order[i] for i in range(size)) == list(range(size))
    again = Permutation(size, seed, number, purpose="test")
    assert [order[i] for i in range(size)] == [again[i] for i in range(size)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 99))
def test_an_order_of_pairs_has_every_row_once_and_so_have_its_spares(sizes: list[int], mixed: int, seed: int):
    ends = np.cumsum(sizes)
    blocks = [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    order = PairOrder(blocks, mixed, seed, 0)
    assert sorted(order[i] for i in range(len(order))) == list(range(int(ends[-1])))
    assert sorted(order.spares(len(order) // 2)) == list(range(int(ends[-1])))


@given(st.integers(1, 5), st.integers(1, 9))
def test_ranks_share_rows_without_a_rest(world: int, each: int):
    rows = list(range(100, 100 + world * each))
    shares = [Rank(number, world).share(rows)[1] for number in range(world)]
    assert sorted(row for share in shares for row in share) == rows
    assert {len(share) for share in shares} == {each}


# ---- schedules and samplers

TYPES = st.sampled_from(["epsilon", "v_prediction", "sample"])


def config(kind: str) -> dict[str, object]:
    return SCHEDULE | {"prediction_type": kind, "clip_sample": False}


@given(TYPES, st.integers(1, 998), st.integers(0, 2**31))
def test_the_right_prediction_gives_back_the_clean_state(kind: str, t: int, seed: int):
    schedule, draw = DiffusionSchedule(config(kind)), torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64).unbind()
    x, right = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    torch.testing.assert_close(schedule.predict_x0(x, right, t), x0, rtol=1e-6, atol=1e-6)
    assert math.isclose(float(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2), 1.0)


@given(TYPES, st.integers(1, 60), st.floats(0, 1), st.integers(0, 2**31))
def test_every_step_is_a_finite_gaussian(kind: str, steps: int, eta: float, seed: int):
    sampler, draw = DDIM(config(kind), steps, eta), torch.Generator().manual_seed(seed)
    x, prediction = torch.randn(2, 1, 3, 4, 4, generator=draw).unbind()
    assert (sampler.timesteps.diff() < 0).all()
    for k in {0, steps // 2, steps - 1}:
        step = sampler.step(x, prediction, k)
        assert step.mean.isfinite().all()
        assert (step.std >= 0).all()
        assert bool((step.std.square() > 0).all()) == bool(sampler.stochastic[k])


@given(st.floats() | st.integers(-5, 2000), st.integers(-3, 3000))
def test_a_sampler_works_or_says_why_not(eta: float, steps: int):
    try:
        sampler = DDIM(config("epsilon"), steps, eta)
    except ConfigError:
        return
    assert math.isfinite(eta)
    assert sampler.step(torch.zeros(1, 1), torch.ones(1, 1), 0).mean.isfinite().all()


# ---- advantages

NORMALISERS = [BatchAdvantages, GroupAdvantages, lambda: PerPromptAdvantages(4, 2)]


@pytest.mark.parametrize("make", NORMALISERS)
@given(rewards=st.lists(NUMBERS, min_size=1, max_size=24), data=st.data())
def test_advantages_are_finite_bounded_and_0_without_a_score(make, rewards, data):
    normalise: Advantages = make()
    groups = torch.tensor(
        data.draw(st.lists(st.integers(0, 3), min_size=len(rewards), max_size=len(rewards)))
    )
    given_rewards, prompts = torch.tensor(rewards), [f"prompt {group}" for group in groups.tolist()]
    for _ in range(2):  # a history too
        found = normalise(given_rewards, groups, prompts)
        assert found.isfinite().all()
        assert (found.abs() <= normalise.clip).all()
        assert (found[~given_rewards.isfinite()] == 0).all()


@pytest.mark.parametrize("make", NORMALISERS[:2])
@given(rewards=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=24), shift=st.floats(-9, 9))
def test_advantages_do_not_see_what_is_added_to_all_rewards(make, rewards: list[float], shift: float):
    groups, prompts = torch.zeros(len(rewards), dtype=torch.long), ["a"] * len(rewards)
    one = torch.tensor(rewards, dtype=torch.float64)
    if one.std(correction=0) < 1e-3:  # below, rounding is divided by nothing
        return
    moved, found = (make()(given, groups, prompts) for given in (one + shift, one))
    torch.testing.assert_close(moved, found, rtol=1e-4, atol=1e-4)
