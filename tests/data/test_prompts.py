"""Prompts: their splits, and the order and numbers with which they are handed out."""

from collections import Counter, UserDict
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lit_align.data import Batch, PromptDataModule, PromptSource, ShapesPrompts, TablePrompts
from lit_align.data.loading import Rank
from lit_align.data.prompts.loaders import FixedLoader, RolloutLoader
from lit_align.data.prompts.sets import PromptSet
from lit_align.data.splits import Permutation
from lit_align.errors import ConfigError
from lit_align.shapes.world import parse
from tests.data.runs import Crash, Recorder, fit


def table(num: int, start: int = 0) -> TablePrompts:
    numbers = list(range(start, start + num))
    return TablePrompts(pa.table({"prompt": [f"prompt {n}" for n in numbers], "number": numbers}), "prompt")


def prompt_set(num: int) -> PromptSet:
    return PromptSet(table(num))


def module(source: PromptSource, **settings: Any) -> PromptDataModule:
    data = PromptDataModule(source, **settings)
    data.setup("fit")
    return data


def texts(prompts: PromptSet) -> set[str]:
    order = Permutation(len(prompts.rows), 0, purpose="test")
    return {prompts.source.prompt(row) for _, row in prompts.walk(order)}


# Splits


def test_splits_are_disjoint_complete_and_of_the_size_asked_for() -> None:
    data = module(table(4000), validation_fraction=0.1, test_fraction=0.2)
    parts = [texts(data._sets[name]) for name in ("train", "validation", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 4000
    # Binomial: three standard errors of a share of 4000 are below 0.02.
    assert [len(part) / 4000 for part in parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


def test_a_prompt_keeps_its_split_when_rows_are_added_or_a_fraction_changes() -> None:
    small, large = module(table(500)), module(table(900, start=-200))
    other = module(table(500), validation_fraction=0.3)
    known = texts(PromptSet(table(500)))
    for name in ("train", "validation", "test"):
        assert texts(large._sets[name]) & known == texts(small._sets[name])
    assert texts(other._sets["test"]) == texts(small._sets["test"])
    assert texts(other._sets["validation"]) > texts(small._sets["validation"])


def test_prompts_of_other_sources_are_removed_from_training(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = module(table(100), validation_source=table(30, start=90), test_source=table(20, start=-10))
    assert texts(data._sets["train"]) == {f"prompt {n}" for n in range(10, 90)}
    assert "20 prompts removed" in caplog.text
    assert {p for b in data.val_dataloader() for p in b.prompts} == {f"prompt {n}" for n in range(90, 120)}
    few = module(table(100), validation_source=table(30, start=90), validation_prompts=2, test_fraction=0.0)
    assert texts(few._sets["train"]) == {f"prompt {n}" for n in range(90)}  # without those not in use too


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_test_says_that_its_prompts_may_have_been_trained_on(stage: str, caplog: Any) -> None:
    """A test set that is given at the test alone could not be kept out of the training."""
    data = PromptDataModule(table(100), test_source=table(20, start=90))
    with caplog.at_level("INFO"):
        data.setup(stage)
    assert "10 prompts removed" in caplog.text
    told = "a run that was fitted without it may have been trained on them" in caplog.text
    assert told == (stage == "test")


def handed_out(loader: FixedLoader) -> list[str]:
    return [prompt for batch in loader for prompt in dict.fromkeys(batch.prompts)]


@pytest.mark.parametrize(
    "source", [table(300), ShapesPrompts(["pair"]), ShapesPrompts(["relation"])], ids=str
)
@pytest.mark.parametrize("test_prompts", [24, 128])
def test_no_prompt_that_is_validated_on_is_tested_on(source: PromptSource, test_prompts: int) -> None:
    given = {"validation_prompts": 64, "test_prompts": test_prompts}
    alone = module(ShapesPrompts(["open"]), test_source=source, **given | {"test_prompts": 192})
    data = module(ShapesPrompts(["open"]), validation_source=source, test_source=source, **given)
    validated, tested = handed_out(data.val_dataloader()), handed_out(data.test_dataloader())
    assert [*validated, *tested] == handed_out(alone.test_dataloader())[: 64 + test_prompts]


def test_a_test_source_without_the_validated_prompts_stays_as_it_is() -> None:
    alone = module(table(300), test_source=table(200, start=1000))
    data = module(table(300), validation_source=table(200, start=900), validation_prompts=200)
    tested = handed_out(alone.test_dataloader())
    with_both = module(
        table(300), validation_source=table(80, start=2000), test_source=table(200, start=1000)
    )
    assert handed_out(with_both.test_dataloader()) == tested
    assert not set(handed_out(data.val_dataloader())) & set(handed_out(data.test_dataloader()))


def test_a_test_source_of_which_validation_leaves_too_few_says_so() -> None:
    data = module(table(100), validation_source=table(80), test_source=table(80), validation_prompts=70)
    with pytest.warns(UserWarning, match=r"has 10 besides the 70 that are validated on: 10 are used"):
        assert len(handed_out(data.test_dataloader())) == 10
    data = module(table(100), validation_source=table(50), test_source=table(50))
    remedy = r"0 test prompts for 1 rank, of 50 in all, 50 of which are validated on: give data.test_source"
    with pytest.warns(UserWarning, match="50 are used"):
        data.val_dataloader()
    with pytest.raises(ConfigError, match=remedy):
        data.test_dataloader()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompts_per_batch": 20}, ["prompts_per_batch is 20", "only 18"]),
        ({"prompts_per_batch": 0}, ["prompts_per_batch is 0"]),
        ({"validation_fraction": 1.0}, ["validation_fraction is 1.0"]),
        ({"validation_fraction": 0.6, "test_fraction": 0.5}, ["validation_fraction", "test_fraction", "1.1"]),
        ({"eval_batch": 2}, ["validation_images_per_prompt is 4", "eval_batch", "2"]),
    ],
)
def test_settings_that_cannot_work_say_why(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        module(table(18), **{"validation_fraction": 0.0, "test_fraction": 0.0, **settings})
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_empty_split_names_the_fraction(split: str) -> None:
    data = module(ShapesPrompts(["pair"]), validation_fraction=0.0, test_fraction=0.0)
    remedy = rf"raise data.{split}_fraction( to at least 0.01)?, or give data.{split}_source"
    with pytest.raises(ConfigError, match=remedy):
        data.val_dataloader() if split == "validation" else data.test_dataloader()


def one_prompt(**settings: Any) -> PromptDataModule:
    return module(TablePrompts(pa.table({"prompt": ["a cat"]}), "prompt"), **settings)


def test_the_messages_for_a_single_prompt_lead_to_a_run() -> None:
    with pytest.raises(ConfigError, match=r"only 1 training prompt: lower it to at most 1,"):
        one_prompt()
    with pytest.raises(
        ConfigError, match=r"has 1 prompt, and none .* left to train on: .*fraction to 0, and"
    ):
        one_prompt(prompts_per_batch=1, validation_fraction=0.99, test_fraction=0)
    data = one_prompt(prompts_per_batch=1, validation_fraction=0, test_fraction=0)
    for loader, remedy in (
        (data.val_dataloader, "give data.validation_source prompts of its own"),
        (data.test_dataloader, "give data.test_source prompts of its own, or set data.test_split to train"),
        (data.predict_dataloader, "give data.predict_source"),
    ):
        with pytest.raises(ConfigError, match=rf"for 1 rank, of 1 in all: {remedy}$"):
            loader()
    with pytest.raises(ConfigError, match=r"validation_source .* prompts that it does not have"):
        one_prompt(prompts_per_batch=1, validation_source=data.source)
    given = {"validation_source": table(1), "validation_prompts": 1, "predict_source": table(1)}
    data = one_prompt(prompts_per_batch=1, **given, test_split="train", test_prompts=1)
    loaders = (
        data.train_dataloader(),
        data.val_dataloader(),
        data.test_dataloader(),
        data.predict_dataloader(),
    )
    assert [next(iter(loader)).prompts[0] for loader in loaders] == ["a cat", "prompt 0", "a cat", "prompt 0"]


def test_fewer_prompts_than_asked_for_is_a_warning() -> None:
    data = module(table(100), validation_source=table(10, start=1000))
    with pytest.warns(UserWarning, match="validation_prompts is 64.* 10 are used"):
        assert sum(len(batch) for batch in data.val_dataloader()) == 40


# Order and numbers


def test_columns_reach_every_image_of_their_prompt() -> None:
    batch = next(iter(module(table(40), images_per_prompt=3, prompts_per_batch=4).train_dataloader()))
    assert len(batch) == 12
    assert [f"prompt {number}" for number in batch.columns["number"]] == batch.prompts


def test_columns_that_are_not_kept_stay_behind() -> None:
    rows = pa.table({"prompt": ["a"], "style": ["ink"], "image": [b"large"]})
    kept = [TablePrompts(rows, "prompt", keep=keep).columns(0) for keep in (["style"], [], None)]
    assert kept == [{"style": "ink"}, {}, {"style": "ink", "image": b"large"}]


class Own(PromptSource):
    """As a user may write one."""

    def __init__(self, texts: Sequence[Any], columns: Callable[[int], Any] = lambda row: {}) -> None:
        self.texts, self._columns = texts, columns

    def __len__(self) -> int:
        return len(self.texts)

    def prompt(self, row: int) -> str:
        return cast(str, self.texts[row])

    def columns(self, row: int) -> Any:
        return self._columns(row)


def test_rows_have_columns_of_the_same_names() -> None:
    prompts = PromptSet(Own("ab", lambda row: {"odd" if row % 2 else "even": row}))
    with pytest.raises(
        ConfigError,
        match=r"the columns of row 0 are .*, of row 1 .*; give all rows a dict with the same names",
    ):
        prompts.batch([0, 1], [0, 1], 1)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 5, 1000, 1024, 4097])
def test_a_permutation_reaches_every_number_once(size: int) -> None:
    order = Permutation(size, 7, 3, purpose="test")
    assert sorted(order[position] for position in range(size)) == list(range(size))


def test_permutations_of_different_keys_are_uniform() -> None:
    for size, num_keys in ((3, 3000), (101, 3000)):
        firsts = Counter(Permutation(size, 0, key, purpose="test")[size // 2] for key in range(num_keys))
        statistic = sum((firsts[n] - num_keys / size) ** 2 for n in range(size)) / (num_keys / size)
        assert statistic < (size - 1) + 5 * (2 * (size - 1)) ** 0.5  # mean and deviation of chi-square


def test_a_pass_visits_every_prompt_once_and_the_next_one_in_another_order() -> None:
    loader = RolloutLoader(prompt_set(20), 4, 2, batches_per_epoch=5)
    passes = [[p for batch in loader for p in batch.prompts[::2]] for _ in range(3)]
    assert all(len(p) == len(set(p)) == 20 for p in passes)
    assert passes[0] != passes[1] != passes[2] != passes[0]


def test_a_rollout_batch_never_holds_a_prompt_twice() -> None:
    for batch in RolloutLoader(prompt_set(7), 4, 1, batches_per_epoch=40):
        assert len(set(batch.prompts)) == 4


def test_numbers_are_unique_over_the_run_and_images_of_a_prompt_stand_together() -> None:
    loader = RolloutLoader(prompt_set(9), 4, 3, batches_per_epoch=3)
    batches = [batch for _ in range(3) for batch in loader]
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(9 * 4 * 3))
    assert torch.equal(torch.cat([b.groups for b in batches]), torch.arange(9 * 4).repeat_interleave(3))
    for batch in batches:
        assert len(set(zip(batch.groups.tolist(), batch.prompts, strict=True))) == 4


def test_the_order_depends_on_the_seed_alone() -> None:
    data = module(table(60), seed=0, images_per_prompt=1)

    def order(seed: int) -> list[str]:
        data.seed = seed
        data.setup("fit")
        return [prompt for batch in data.train_dataloader() for prompt in batch.prompts]

    assert order(0) == order(0) != order(1)


def test_loaders_that_are_asked_for_by_hand() -> None:
    """A KeyError, and an assertion."""
    asked, made = PromptDataModule(table(60)), module(table(60))
    assert [len(one.train_dataloader()) for one in (asked, made)] == [len(made.train_dataloader())] * 2
    assert list(PromptDataModule(table(60)).val_dataloader().rows) == list(made.val_dataloader().rows)


def test_settings_that_are_set_after_the_prompts_were_split() -> None:
    """They were passed over: the fit went on with the prompts and the shares of before."""
    data = module(table(400))
    data.validation_fraction, data.source = 0.5, table(200)
    data.setup("fit")
    assert (data._sets["train"].source, data._sets["train"].usable) == (data.source, 200)
    assert len(texts(data._sets["validation"])) == pytest.approx(100, abs=30)
    data.prompts_per_batch = 0
    with pytest.raises(ConfigError, match=r"data\.prompts_per_batch is 0"):
        data.setup("fit")


def test_what_is_no_source_and_what_is_no_batch() -> None:
    with pytest.raises(ConfigError, match=r"data\.source: \['a star'\] is not of the class PromptSource"):
        PromptDataModule(["a star"])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"PromptDataModule gives a str as a batch, .*Batch\(prompts"):
        module(table(60)).transfer_batch_to_device("a star", torch.device("cpu"), 0)


def joined(parts: list[Batch]) -> list[tuple[int, int, str, Any]]:
    """The images of all parts in their global order."""
    return sorted(
        row
        for part in parts
        for row in zip(
            part.index.tolist(), part.groups.tolist(), part.prompts, part.columns["number"], strict=True
        )
    )


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_rollout_batches_of_one(world: int) -> None:
    alone = RolloutLoader(prompt_set(30), 4, 3, 6)
    ranks = [RolloutLoader(prompt_set(30), 4, 3, 6, rank=Rank(r, world)) for r in range(world)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert joined(parts) == joined([whole])


def test_ranks_share_the_fixed_prompts_without_padding() -> None:
    prompts = prompt_set(22)
    alone = FixedLoader(prompts, prompts.rows, 2, 6)
    ranks = [FixedLoader(prompts, prompts.rows, 2, 3, Rank(r, 2)) for r in range(2)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert joined(parts) == joined([whole])
        assert len(parts[0]) == len(parts[1])
    assert torch.equal(torch.cat([b.index for b in alone]), torch.arange(44))
    assert len(alone) == len(list(alone)) == len(ranks[0]) == 4


def set_up_and_load(data: PromptDataModule, name: str) -> None:
    data.setup("fit")
    data.val_dataloader() if name == "validation_prompts" else data.predict_dataloader()


@pytest.mark.parametrize("name", ["prompts_per_batch", "validation_prompts", "predict_source"])
def test_what_the_ranks_cannot_share_is_refused_with_both_numbers(name: str) -> None:
    settings: dict[str, Any] = {"predict_source": table(16)} if name == "predict_source" else {name: 16}
    data = PromptDataModule(table(400), **{"prompts_per_batch": 9, **settings})
    data.trainer = cast(Any, SimpleNamespace(distributed_sampler_kwargs={"rank": 0, "num_replicas": 3}))
    with pytest.raises(ConfigError, match=rf"data\.{name} \w+ 16.* 3 ranks.*multiple"):
        set_up_and_load(data, name)


def test_predict_follows_the_order_of_its_source() -> None:
    data = PromptDataModule(table(50), predict_source=table(5), test_images_per_prompt=2, eval_batch=4)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [p for b in batches for p in b.prompts[::2]] == [f"prompt {n}" for n in range(5)]
    assert [len(batch) for batch in batches] == [4, 4, 2]


def test_the_test_can_be_on_the_prompts_that_a_run_trains_on_first() -> None:
    settings = {"images_per_prompt": 2, "prompts_per_batch": 5, "test_prompts": 10, "seed": 3}
    data = module(table(200), **settings)
    first, second = list(data.train_dataloader())[:2]
    seen = module(table(200), **settings, test_split="train")
    assert seen.test_dataloader().rows == [int(p.split()[1]) for p in (first.prompts + second.prompts)[::2]]
    assert not set(seen.test_dataloader().rows) & set(data.test_dataloader().rows)
    with pytest.raises(ConfigError, match=r"test_split is 'seen': give test or train"):
        module(table(200), **settings, test_split="seen")


def test_millions_of_prompts_start_at_once() -> None:
    start = perf_counter()
    source = ShapesPrompts(["pair", "relation"])
    data = module(source)
    first = next(iter(data.train_dataloader()))
    held_out = {
        p for loader in (data.val_dataloader(), data.test_dataloader()) for b in loader for p in b.prompts
    }
    assert perf_counter() - start < 1
    assert len(source) > 1_000_000
    assert len(first) == 128
    assert len(held_out) == 192
    assert len(data.train_dataloader()) == int(len(source) * 0.9) // 16


# Through a Trainer


def fitted(folder: Path, num_epochs: int, *callbacks: Callback, **settings: Any) -> Recorder:
    data = PromptDataModule(table(34), images_per_prompt=2, prompts_per_batch=5)
    return fit(folder, data, *callbacks, max_epochs=num_epochs, **settings)


@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_resumed_run_sees_what_the_whole_run_sees(tmp_path: Path, limit: float, stop: int) -> None:
    whole = fitted(tmp_path / "whole", 4, limit_train_batches=limit)
    cut = fitted(tmp_path / "cut", 4, Crash(stop), limit_train_batches=limit)
    newest = tmp_path / "cut" / f"step={stop}.ckpt"
    rest = fitted(tmp_path / "rest", 4, limit_train_batches=limit, ckpt_path=newest)
    assert cut.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)
    index = [number for _, _, numbers in whole.seen for number in numbers]
    assert index == list(range(len(index)))
    assert len(whole.seen) == 4 * (6 if limit == 1.0 else limit)
    assert whole.validated > 0


def test_max_steps_and_a_longer_fit_continue_too(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "whole", 3)
    first = fitted(tmp_path / "first", 3, max_steps=8)
    rest = fitted(tmp_path / "rest", 3, ckpt_path=tmp_path / "first" / "step=8.ckpt")
    assert first.seen + rest.seen == whole.seen


def test_reloading_the_loaders_every_epoch_changes_nothing(tmp_path: Path) -> None:
    whole = fitted(tmp_path / "a", 3)
    assert fitted(tmp_path / "b", 3, reload_dataloaders_every_n_epochs=1).seen == whole.seen


def test_predict_runs_through_a_trainer(tmp_path: Path) -> None:
    data = PromptDataModule(table(50), predict_source=table(5), test_images_per_prompt=2, eval_batch=4)
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    parts = trainer.predict(Recorder(), datamodule=data)
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("name", "value"), [("prompts_per_batch", 6), ("images_per_prompt", 1), ("seed", 1)])
def test_a_resume_with_other_settings_is_refused(name: str, value: int) -> None:
    state = module(table(40), images_per_prompt=2, prompts_per_batch=5).train_dataloader().state_dict()
    other = module(table(40), **{"images_per_prompt": 2, "prompts_per_batch": 5, name: value})
    with pytest.raises(ConfigError, match=rf"data\.{name} is {value}, .* set it back"):
        other.train_dataloader().load_state_dict(state)


def test_a_resume_with_more_prompts_warns() -> None:
    state = module(table(40)).train_dataloader().state_dict()
    with pytest.warns(UserWarning, match="50 usable prompts, 40 when"):
        module(table(50)).train_dataloader().load_state_dict(state)


def test_shapes_prompts_hold_out_pairs_of_shapes():
    pair, held_out = "circle and star", ShapesPrompts(["pair"], only=["star and circle"])
    rest = ShapesPrompts(["pair"], without=[pair])
    assert len(rest) + len(held_out) == len(ShapesPrompts(["pair"]))
    for source, there in ((rest, False), (held_out, True)):
        rows = range(0, len(source), len(source) // 200)
        shapes = [{group.shape for group in parse(source.prompt(row)).groups} for row in rows]
        assert all((found == {"circle", "star"}) is there for found in shapes)
    with pytest.raises(ConfigError, match="leave no pair"):
        ShapesPrompts(["pair"], only=[pair], without=[pair])
    with pytest.raises(ConfigError, match="add pair or relation"):
        ShapesPrompts(["open"], without=[pair])
    with pytest.raises(ConfigError, match="not a pair of shapes"):
        ShapesPrompts(["pair"], without=["circle"])


class Lazy(Own):
    """Its prompts come one by one."""

    def prompts(self, rows: Sequence[int]) -> Any:
        return (self.texts[row] for row in rows)


def test_prompts_and_columns_of_other_types_are_read() -> None:
    sizes = {"images_per_prompt": 1, "prompts_per_batch": 2, "validation_fraction": 0.0, "test_fraction": 0.0}
    (batch,) = module(Lazy("ab", lambda row: UserDict({"row": row})), **sizes).train_dataloader()
    assert sorted(zip(batch.prompts, batch.columns["row"], strict=True)) == [("a", 0), ("b", 1)]


TEXTS = [f"prompt {row}" for row in range(20)]


@pytest.mark.parametrize(
    ("source", "told"),
    [
        *(
            (Own([one] * 20), f"Own: the prompt of row 0 is {shown}; give a text for every row")
            for one, shown in ((float("nan"), "nan"), (None, "None"), (b"a cat", "b'a cat'"))
        ),
        (Own(TEXTS, lambda row: None), r"the columns of row \d+ are None, of row .*; give all rows a dict"),
        (
            Own(TEXTS, lambda row: {"c": 1} if row % 2 else {}),
            r"are \{.*\}, of row \d+ \{.*\}; give all rows",
        ),
    ],
)
def test_a_source_of_ones_own_that_gives_something_else_is_told(source: Own, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        list(module(source, images_per_prompt=2, prompts_per_batch=5).train_dataloader())
