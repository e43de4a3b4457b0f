"""Prompts: where they come from, their splits, and the order and numbers with which they are handed out."""

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer

from lit_align.data import (
    Batch,
    CSVPrompts,
    HubPrompts,
    JSONLPrompts,
    ParquetPrompts,
    PromptDataModule,
    PromptSource,
    ShapesPrompts,
    TablePrompts,
    TextPrompts,
)
from lit_align.data.loaders import FixedLoader, Rank, RolloutLoader
from lit_align.data.splits import Permutation, PromptSet
from lit_align.errors import ConfigError
from lit_align.shapes.world import parse

ROWS = [
    {"prompt": "a cat", "level": 1},
    {"prompt": "a dog", "level": 2},
    {"prompt": "ein Bär, müde", "level": 3},
]


def table(num: int, start: int = 0) -> TablePrompts:
    numbers = list(range(start, start + num))
    return TablePrompts(pa.table({"prompt": [f"prompt {n}" for n in numbers], "number": numbers}), "prompt")


def prompt_set(num: int) -> PromptSet:
    return PromptSet(table(num), range(num), lambda prompt: True)


def module(source: PromptSource, **settings: Any) -> PromptDataModule:
    data = PromptDataModule(source, **settings)
    data.setup("fit")
    return data


def texts(prompts: PromptSet) -> set[str]:
    order = Permutation(len(prompts.rows), 0, purpose="test")
    return {prompts.source.prompt(row) for _, row in prompts.walk(order)}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


# Sources


def test_text_keeps_unusual_characters_and_drops_the_byte_order_mark(tmp_path: Path) -> None:
    source = TextPrompts(write(tmp_path / "p.txt", b"\xef\xbb\xbfa cat\r\na\xe2\x80\xa8dog\r\n"))
    assert [source.prompt(row) for row in range(len(source))] == ["a cat", "a\u2028dog"]
    assert source.columns(0) == {}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "hub"])
def test_tables_carry_their_other_columns(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / f"p.{form}")
    source: PromptSource
    if form == "csv":
        write(Path(path), "level,prompt\n" + "".join(f'{row["level"]},"{row["prompt"]}"\n' for row in ROWS))
        source = CSVPrompts(path)
    elif form == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
        source = ParquetPrompts(path)
    else:
        write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        source = JSONLPrompts(path) if form == "jsonl" else HubPrompts(str(tmp_path))
    assert [source.prompt(row) for row in range(3)] == [row["prompt"] for row in ROWS]
    assert [source.columns(row) for row in range(3)] == [{"level": row["level"]} for row in ROWS]


def test_numbers_in_a_csv_prompt_column_stay_text(tmp_path: Path) -> None:
    assert CSVPrompts(write(tmp_path / "p.csv", "prompt\n007\n")).prompt(0) == "007"


def test_columns_reach_every_image_of_their_prompt() -> None:
    batch = next(iter(module(table(40), images_per_prompt=3, prompts_per_batch=4).train_dataloader()))
    assert len(batch) == 12
    assert [f"prompt {number}" for number in batch.columns["number"]] == batch.prompts


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: TextPrompts(str(d / "none.txt")), ["none.txt", "does not exist", "check"]),
        (lambda d: CSVPrompts(str(d)), ["folder", "path of a file"]),
        (lambda d: TextPrompts(write(d / "p.txt", "")), ["p.txt", "empty"]),
        (lambda d: ParquetPrompts(write(d / "p.parquet", "no")), ["p.parquet", "not Parquet"]),
        (lambda d: TextPrompts(write(d / "p.txt", b"a\nb\xe4r")), ["not UTF-8", "0xe4", "line 2"]),
        (lambda d: CSVPrompts(write(d / "p.csv", b"prompt\nb\xe4r")), ["not UTF-8", "line 2"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "promt,level\na,1\n")), ["promt, level", "column: promt"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt\n")), ["no rows"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt,level\na,b,c\n")), ["p.csv", "not CSV"]),
        (lambda d: CSVPrompts(write(d / "p.csv", "prompt,prompt\na,b\n")), ["two columns"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", "a cat\n")), ["p.jsonl", "not JSON lines"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", '{"prompt": 3}\n')), ["int64", "not text"]),
        (lambda d: JSONLPrompts(write(d / "p.jsonl", '{"text": "a"}\n'), "zzz"), ["'zzz'", "text"]),
        (lambda d: HubPrompts(str(d / "nobody")), ["nobody", "check the name", "local file"]),
        (lambda d: ShapesPrompts([]), ["kinds", "empty", "single"]),
        (lambda d: module(TextPrompts(write(d / "p.txt", " \n\n"))), ["p.txt", "no usable prompt"]),
    ],
)
def test_a_source_that_cannot_work_says_why(tmp_path: Path, make: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make(tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_and_repeated_prompts_are_dropped_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "p.txt", "a cat\n\n a cat \na dog\n  \na cat\n")
    with caplog.at_level("INFO"):
        data = module(TextPrompts(path), validation_fraction=0, test_fraction=0, prompts_per_batch=2)
    assert "2 empty and 2 repeated prompts dropped, 2 left" in caplog.text
    assert set(next(iter(data.train_dataloader())).prompts) == {"a cat", "a dog"}


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
    known = texts(PromptSet(table(500), range(500), lambda prompt: True))
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
    with pytest.raises(ConfigError, match=f"raise data.{split}_fraction"):
        data.val_dataloader() if split == "validation" else data.test_dataloader()


def test_fewer_prompts_than_asked_for_is_a_warning() -> None:
    data = module(table(100), validation_source=table(10, start=1000))
    with pytest.warns(UserWarning, match="validation_prompts is 64.* 10 are used"):
        assert sum(len(batch) for batch in data.val_dataloader()) == 40


# Order and numbers


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


def test_a_collection_never_holds_a_prompt_twice() -> None:
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
    def order(seed: int) -> list[str]:
        return [
            p for b in module(table(60), seed=seed, images_per_prompt=1).train_dataloader() for p in b.prompts
        ]

    assert order(0) == order(0) != order(1)


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
def test_ranks_share_the_collections_of_one(world: int) -> None:
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


class Recorder(LightningModule):
    """Records what it sees and takes one optimizer step a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = []
        self.validated = 0

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, tuple(batch.prompts), tuple(batch.index.tolist())))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(((self.weight - batch.index.float().mean()) ** 2).sum())
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += len(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[int]:
        return batch.index.tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Crash(Callback):
    """Raises at the start of a batch, as a killed process would end."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


def fit(folder: Path, num_epochs: int, *callbacks: Callback, **settings: Any) -> Recorder:
    recorder, data = Recorder(), PromptDataModule(table(34), images_per_prompt=2, prompts_per_batch=5)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=num_epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1), *callbacks],
        **settings,
    )
    crashes = any(isinstance(callback, Crash) for callback in callbacks)
    with pytest.raises(RuntimeError, match=r"^killed$") if crashes else nullcontext():
        trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return recorder


@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_resumed_run_sees_what_the_whole_run_sees(tmp_path: Path, limit: float, stop: int) -> None:
    whole = fit(tmp_path / "whole", 4, limit_train_batches=limit)
    cut = fit(tmp_path / "cut", 4, Crash(stop), limit_train_batches=limit)
    newest = tmp_path / "cut" / f"step={stop}.ckpt"
    rest = fit(tmp_path / "rest", 4, limit_train_batches=limit, ckpt_path=newest)
    assert cut.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)
    index = [number for _, _, numbers in whole.seen for number in numbers]
    assert index == list(range(len(index)))
    assert len(whole.seen) == 4 * (6 if limit == 1.0 else limit)
    assert whole.validated > 0


def test_max_steps_and_a_longer_fit_continue_too(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", 3)
    first = fit(tmp_path / "first", 3, max_steps=8)
    rest = fit(tmp_path / "rest", 3, ckpt_path=tmp_path / "first" / "step=8.ckpt")
    assert first.seen + rest.seen == whole.seen


def test_reloading_the_loaders_every_epoch_changes_nothing(tmp_path: Path) -> None:
    whole = fit(tmp_path / "a", 3)
    assert fit(tmp_path / "b", 3, reload_dataloaders_every_n_epochs=1).seen == whole.seen


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
    with pytest.raises(ConfigError, match="no pair of shapes"):
        ShapesPrompts(["pair"], without=["circle"])
