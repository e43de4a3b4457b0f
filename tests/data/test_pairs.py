"""Pairs of images: which are trained on, in which order, and what rows that cannot be read do."""

import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from pyarrow import parquet

from lit_align.data import (
    Batch,
    PairBatch,
    PairSource,
    PickaPicDataModule,
    PickaPicFiles,
    PickaPicPrompts,
    PromptDataModule,
    ShapesPick,
    ShapesPromptSet,
    TablePrompts,
)
from lit_align.data.preferences.loader import PairOrder
from lit_align.errors import ConfigError
from lit_align.randomness import place
from tests.data.pick import NO_LABEL, ROWS, TIES, greys, index, jpeg, module, write
from tests.data.runs import Crash, Recorder, fit


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pick"))


# Which pairs, and what of them


@pytest.mark.parametrize("view", ["winners", "pairs"])
def test_a_batch_holds_the_winners_and_if_asked_for_the_losers(shards: Path, view: Any) -> None:
    for batch in module(PickaPicFiles(str(shards)), view=view).train_dataloader():
        numbers = batch.index.tolist()
        assert batch.prompts == [f"prompt {n // 2}" for n in numbers]
        assert greys(batch.winners) == [2 * n + n % 2 for n in numbers]
        assert batch.winners.dtype == torch.float32
        if view == "pairs":
            assert greys(cast(torch.Tensor, batch.losers)) == [2 * n + 1 - n % 2 for n in numbers]
        else:
            assert batch.losers is None


def test_some_pairs_of_a_batch() -> None:
    batch = PairBatch(["a", "b", "c"], torch.rand(3, 3, 2, 2), torch.rand(3, 3, 2, 2), torch.arange(3))
    some = batch[torch.tensor([2, 0])]
    assert (some.prompts, some.index.tolist(), len(some)) == (["c", "a"], [2, 0], 2)
    assert torch.equal(some.winners[0], batch.winners[2])
    assert some.losers is not None
    assert batch.losers is not None
    assert torch.equal(some.losers[1], batch.losers[0])


def test_ties_and_held_out_prompts_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = PickaPicFiles(str(write(tmp_path, {40: {"caption": None}, 42: {"caption": "  "}})))
    with caplog.at_level("INFO"):
        data = module(source, pairs_per_batch=1, validation_fraction=0.2, test_fraction=0.2)
    inside = [n for n in range(60) if 0.2 <= place(f"prompt {n // 2}") < 0.8]
    kept = [n for n in inside if n not in (*TIES, *NO_LABEL, 40, 42)]
    assert sorted(index(list(data.train_dataloader()))) == kept
    outside = sum(n not in (*inside, *TIES, *NO_LABEL, 40, 42) for n in range(60))
    assert (
        f"{len(kept)} of 60 pairs to train on; 3 ties or without a label, 2 without a prompt, "
        f"{outside} of held-out prompts" in caplog.text
    )


def test_prompts_to_validate_and_test_on_are_never_trained_on(shards: Path) -> None:
    data = module(
        PickaPicFiles(str(shards)), validation_fraction=0.2, test_fraction=0.2, validation_prompts=2
    )
    trained = {prompt for batch in data.train_dataloader() for prompt in batch.prompts}
    held = [
        {p for b in loader for p in b.prompts} for loader in (data.val_dataloader(), data.test_dataloader())
    ]
    assert trained
    assert all(held)
    assert not trained & held[0]
    assert not trained & held[1]
    assert not held[0] & held[1]


@pytest.mark.parametrize("distinct", [False, True])
def test_prompts_of_a_source_of_their_own_are_taken_out_of_training(distinct: bool, shards: Path) -> None:
    """All of them, also those that are not in use."""
    given = TablePrompts(pa.table({"prompt": ["prompt 3", " prompt 20 "]}), "prompt")
    given.distinct = distinct
    options: dict[str, Any] = {"validation_source": given, "validation_prompts": 1, "test_fraction": 0.0}
    data = module(PickaPicFiles(str(shards)), pairs_per_batch=1, **options)
    batches = list(data.train_dataloader())
    assert not {"prompt 3", "prompt 20"} & {prompt for batch in batches for prompt in batch.prompts}
    assert len(batches) == 60 - len({*TIES, *NO_LABEL, 6, 7, 40, 41})
    assert isinstance(next(iter(data.val_dataloader())), Batch)


def test_shapes_pick_validates_and_tests_on_the_shipped_sets() -> None:
    data = PickaPicDataModule(validation_images_per_prompt=1, test_images_per_prompt=1)
    data.setup("fit")
    trained = {prompt for _, prompt in data.train_dataloader().rows(0, len(data.train_dataloader()))}
    for loader, shipped in (
        (data.val_dataloader(), ShapesPromptSet("validation")),
        (data.test_dataloader(), ShapesPromptSet("test")),
    ):
        prompts = {shipped.prompt(row) for row in range(len(shipped))}
        assert {prompt for batch in loader for prompt in batch.prompts} <= prompts
        assert not trained & prompts


def test_the_prompts_alone(shards: Path) -> None:
    source = PickaPicPrompts(PickaPicFiles(str(shards)))
    data = PromptDataModule(source, prompts_per_batch=4, validation_fraction=0.1, test_fraction=0.1)
    data.setup("fit")
    prompts = [prompt for batch in data.train_dataloader() for prompt in batch.prompts[::8]]
    assert set(prompts) <= {f"prompt {n}" for n in range(30)}
    assert len(prompts) == len(set(prompts))


# Order


def order(num_blocks: int, mixed: int, number: int = 0, seed: int = 0) -> list[int]:
    blocks = [np.arange(10 * b, 10 * b + 10) for b in range(num_blocks)]
    turns = PairOrder(blocks, mixed, seed, number)
    return [turns[position] for position in range(len(turns))]


@pytest.mark.parametrize("mixed", [1, 3, 20])
def test_a_pass_visits_every_row_once_and_mixes_few_blocks_at_a_time(mixed: int) -> None:
    turns = order(8, mixed)
    assert sorted(turns) == list(range(80))
    window = 10 * min(mixed, 8)
    for start in range(0, 80, window):
        assert len({number // 10 for number in turns[start : start + window]}) <= mixed
    assert turns not in (sorted(turns), order(8, mixed, number=1), order(8, mixed, seed=1))


def test_the_mean_place_of_every_row_over_many_passes_is_the_middle() -> None:
    places = np.array([np.argsort(order(4, 2, number)) for number in range(400)])
    standard_error = 40 / 12**0.5 / 400**0.5
    assert np.abs(places.mean(0) - 19.5).max() < 4 * standard_error


def test_passes_follow_each_other_and_drop_what_fills_no_batch(shards: Path) -> None:
    data = module(
        PickaPicFiles(str(shards)), validation_fraction=0.0, test_fraction=0.0, batches_per_epoch=28
    )
    loader = data.train_dataloader()
    batches = list(loader)
    assert loader.state_dict()["rows"] == 57
    first, second = index(batches[:14]), index(batches[14:])
    assert len(set(first)) == len(set(second)) == 56
    assert first != second


def test_rows_name_the_coming_pairs(shards: Path) -> None:
    data = module(PickaPicFiles(str(shards)), batches_per_epoch=20)
    rows = list(data.train_dataloader().rows(3, 17))
    batches = list(data.train_dataloader())[3:]
    assert rows == [
        pair for batch in batches for pair in zip(batch.index.tolist(), batch.prompts, strict=True)
    ]


def on_rank(data: PickaPicDataModule, rank: int, world: int) -> PickaPicDataModule:
    place = {"rank": rank, "num_replicas": world}
    data.trainer = cast(Trainer, SimpleNamespace(distributed_sampler_kwargs=place))
    data.setup("fit")
    return data


def test_ranks_share_the_batches_of_one(tmp_path: Path) -> None:
    source = PickaPicFiles(str(write(tmp_path, {9: {"jpg_0": b"", "jpg_1": None}})))
    alone = module(source, view="pairs")
    pair = [on_rank(module(source, view="pairs"), rank, 2) for rank in range(2)]
    with pytest.warns(UserWarning, match="row 9 of"):
        whole = list(alone.train_dataloader())
    with pytest.warns(UserWarning, match="row 9 of"):
        parts = [list(data.train_dataloader()) for data in pair]
    for one, left, right in zip(whole, *parts, strict=True):
        for part, rows in ((left, torch.tensor([0, 2])), (right, torch.tensor([1, 3]))):
            assert part.prompts == one[rows].prompts
            assert torch.equal(part.index, one[rows].index)
            assert torch.equal(part.winners, one[rows].winners)
    rows = [list(data.train_dataloader().rows(0, 5)) for data in pair]
    assert [row for row, _ in rows[0]] == index(parts[0][:5])
    assert [row for row, _ in rows[1]] == index(parts[1][:5])


@pytest.mark.parametrize("workers", [1, 4])
def test_the_number_of_threads_changes_nothing(shards: Path, workers: int) -> None:
    one = list(module(PickaPicFiles(str(shards))).train_dataloader())
    other = list(module(PickaPicFiles(str(shards)), workers=workers).train_dataloader())
    assert index(one) == index(other)
    assert all(torch.equal(a.winners, b.winners) for a, b in zip(one, other, strict=True))


def test_a_loader_goes_on_where_its_state_was_taken(shards: Path) -> None:
    whole = module(PickaPicFiles(str(shards)), batches_per_epoch=30).train_dataloader()
    batches = list(whole)
    cut = module(PickaPicFiles(str(shards)), batches_per_epoch=30).train_dataloader()
    seen = list(islice(cut, 17))
    rest = module(PickaPicFiles(str(shards)), batches_per_epoch=13).train_dataloader()
    rest.load_state_dict(cut.state_dict())
    assert cut.state_dict()["batches"] == 17
    assert index(seen + list(rest)) == index(batches)
    assert rest.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("name", "value"), [("pairs_per_batch", 5), ("seed", 1)])
def test_a_resume_with_other_settings_is_refused(shards: Path, name: str, value: int) -> None:
    state = module(PickaPicFiles(str(shards))).train_dataloader().state_dict()
    other = module(PickaPicFiles(str(shards)), **{name: value}).train_dataloader()
    with pytest.raises(ConfigError, match=rf"data\.{name} is {value}, .* set it back"):
        other.load_state_dict(state)


def test_a_resume_with_other_pairs_warns(shards: Path) -> None:
    state = module(PickaPicFiles(str(shards))).train_dataloader().state_dict()
    other = module(PickaPicFiles(str(shards)), test_fraction=0.0).train_dataloader()
    with pytest.warns(UserWarning, match="pairs to train on, .* when the checkpoint"):
        other.load_state_dict(state)


# Rows that cannot be read

BAD = {
    3: {"jpg_0": jpeg(1)[:200], "jpg_1": jpeg(1)[:200]},
    14: {"jpg_0": b"no image", "jpg_1": b"no image"},
    22: {"jpg_0": None, "jpg_1": None},
    45: {"jpg_0": b"", "jpg_1": b""},
}


def test_bad_rows_are_reported_with_shard_and_row_and_replaced(tmp_path: Path) -> None:
    folder = write(tmp_path, BAD)
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    good = module(PickaPicFiles(str(write(tmp_path / "good"))), **whole, batches_per_epoch=28)
    data = module(PickaPicFiles(str(folder)), **whole, batches_per_epoch=28)
    with pytest.warns(UserWarning, match="is skipped") as warned:
        batches = list(data.train_dataloader())
    text = " ".join(str(w.message) for w in warned)
    for number in BAD:
        shard = f"train-{number // 20:05d}-of-00003-abc.parquet is skipped"
        assert text.count(f"row {number % 20} of {folder / shard}") == 1  # once, though its turn comes twice
    assert data.train_dataloader().unreadable.keys() == BAD.keys()
    for a, b in zip(index(list(good.train_dataloader())), index(batches), strict=True):
        assert b not in BAD
        assert a == b or a in BAD
        if a in BAD:
            assert {a // ROWS, b // ROWS} <= {n // ROWS for n in index(batches)}


def test_bad_rows_leave_ranks_resumes_and_announcements_in_step(tmp_path: Path) -> None:
    source = PickaPicFiles(str(write(tmp_path, BAD)))
    whole, late = (module(source, batches_per_epoch=20).train_dataloader() for _ in range(2))
    with pytest.warns(UserWarning, match="is skipped"):
        batches = list(whole)
    with pytest.warns(UserWarning, match="is skipped"):
        announced = list(late.rows(0, 20))
    late.load_state_dict(whole.state_dict() | {"batches": 9})
    rest = index(list(islice(late, 11)))
    assert [number for number, _ in announced] == index(batches)
    assert rest == index(batches)[36:]


def test_a_damaged_row_group_does_not_end_a_run(tmp_path: Path) -> None:
    folder = write(tmp_path)
    file = folder / "train-00001-of-00003-abc.parquet"
    places = parquet.ParquetFile(file).metadata.row_group(2)
    data = bytearray(file.read_bytes())
    for column in range(places.num_columns):
        if places.column(column).path_in_schema == "jpg_0":
            start = places.column(column).dictionary_page_offset or places.column(column).data_page_offset
            data[start : start + 60] = bytes(60)
    file.write_bytes(data)
    source = PickaPicFiles(str(folder), row_groups=1)
    with pytest.warns(UserWarning, match=r"row 1\d of .* row group 2 is damaged"):
        batches = list(module(source, validation_fraction=0.0, test_fraction=0.0).train_dataloader())
    assert len(batches) == 57 // 4
    assert not {30, 31, 32, 33, 34} & set(index(batches))


def test_images_none_of_which_can_be_read_are_an_error(tmp_path: Path) -> None:
    source = PickaPicFiles(str(write(tmp_path, {n: {"jpg_0": b"x", "jpg_1": b"x"} for n in range(60)})))
    with pytest.raises(
        ConfigError, match=r"none of \d\d pairs of .* that were tried can be read, the last row "
    ):
        module(source)


def test_a_data_set_that_is_damaged_at_its_start_is_read(tmp_path: Path) -> None:
    good = set(range(35, 43))
    bad = {n: {"jpg_0": b"x", "jpg_1": b"x"} for n in range(60) if n not in good}
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0}
    data = module(PickaPicFiles(str(write(tmp_path, bad))), batches_per_epoch=12, **whole)
    with pytest.warns(UserWarning, match="skipped") as warned:
        batches = list(data.train_dataloader())
    assert set(index(batches)) <= good
    told = [str(w.message) for w in warned]
    assert "later ones are only counted" in next(text for text in told if "only counted" in text)
    assert [text.partition(" of ")[0] for text in told if "are skipped so far" in text] == ["40"]


# What cannot work


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"view": "losers"}, ["data.view is 'losers'", "winners", "pairs"]),
        ({"pairs_per_batch": 0}, ["data.pairs_per_batch is 0"]),
        ({"resolution": 0}, ["data.resolution is 0"]),
        ({"workers": 0}, ["data.workers is 0"]),
        ({"pairs_per_batch": 100}, ["data.pairs_per_batch is 100", "only ", "pairs to train on", "lower it"]),
        (
            {"validation_fraction": 0.999, "test_fraction": 0.0, "pairs_per_batch": 1},
            ["has 0 pairs to train on"],
        ),
        ({"eval_batch": 1}, ["data.validation_images_per_prompt is 4"]),
    ],
)
def test_settings_that_cannot_work_say_why(shards: Path, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        module(PickaPicFiles(str(shards)), **settings)
    for word in words:
        assert word in str(caught.value)


def test_ties_alone_are_told_as_such(tmp_path: Path) -> None:
    source = PickaPicFiles(str(write(tmp_path, {row: {"label_0": 0.5} for row in range(60)})))
    with pytest.raises(
        ConfigError, match=r"0 pairs to train on: all 60 are ties or without a label; give pairs"
    ):
        module(source)


class Own(PairSource):
    """As a user may write one."""

    def __init__(self, label: Any = 1.0, image: Any = b"") -> None:
        self.said, self.stored = label, image

    def __len__(self) -> int:
        return 4

    def prompt(self, row: int) -> str:
        return "a cat"

    def label(self, row: int) -> float:
        return cast(float, self.said)

    def image(self, row: int, side: int) -> bytes:
        return cast(bytes, self.stored if side else jpeg(0))


def test_a_source_with_other_images_has_another_cache() -> None:
    """A source that a user wrote says nothing of its images: prompts and labels are those of any round."""
    assert Own(image=jpeg(1)).fingerprint() == Own(image=jpeg(1)).fingerprint()
    assert Own(image=jpeg(1)).fingerprint() != Own(image=jpeg(2)).fingerprint()
    assert Own(image=None).fingerprint()  # which is refused when its turn comes


def test_what_a_source_returns_is_understood_or_refused() -> None:
    whole = {"validation_fraction": 0.0, "test_fraction": 0.0, "pairs_per_batch": 4}
    for label in (True, "0", np.float32(1)):
        batch = next(
            iter(module(Own(label, memoryview(jpeg(255))), **whole, view="pairs").train_dataloader())
        )
        assert batch.losers is not None
        assert bool(batch.winners.mean() > batch.losers.mean()) is (str(label) == "0")
    with pytest.raises(
        ConfigError, match=r"Own has a label that is not a number \(.*left.*\): give 1, 0 or 0.5"
    ):
        module(Own("left"), **whole)
    with pytest.raises(
        ConfigError, match=r"the image of row . of Own is a Image: give the bytes of its file"
    ):
        module(Own(image=Image.new("RGB", (64, 64))), **whole, view="pairs")


def test_the_messages_for_pairs_of_held_out_prompts_lead_to_a_run(shards: Path) -> None:
    source = PickaPicFiles(str(shards))
    with pytest.raises(ConfigError, match=r"all of held-out prompts .* give data.validation_source and data"):
        module(source, pairs_per_batch=4, validation_fraction=0.0, test_fraction=0.999)
    data = module(source, pairs_per_batch=4, validation_fraction=0.0, test_fraction=0.0)
    for split, loader in (("validation", data.val_dataloader), ("test", data.test_dataloader)):
        with pytest.raises(ConfigError, match=rf"raise data.{split}_fraction to at least") as caught:
            loader()
        share = re.search(r"at least ([\d.]+)", str(caught.value))
        assert share
        raised = {"validation_fraction": 0.0, "test_fraction": 0.0, f"{split}_fraction": float(share[1])}
        enough = module(source, pairs_per_batch=4, **raised)
        assert len(enough.val_dataloader() if split == "validation" else enough.test_dataloader())
    low = [number for number in range(30) if place(f"prompt {number}") < 0.4]
    few = TablePrompts(pa.table({"prompt": [f"prompt {number}" for number in low]}), "prompt")
    prompts = PromptDataModule(few, prompts_per_batch=1, validation_fraction=0.05, test_fraction=0.0)
    prompts.setup("fit")
    with pytest.raises(ConfigError, match=r"in all: give data.validation_source"):  # half would not help
        prompts.val_dataloader()
    other = TablePrompts(pa.table({"prompt": ["another", "one more"]}), "prompt")
    data = module(source, pairs_per_batch=4, validation_source=other, test_source=other, validation_prompts=1)
    assert len(list(data.train_dataloader()))
    assert len(list(data.val_dataloader())) == len(list(data.test_dataloader())) == 1


def test_what_the_ranks_cannot_share_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.pairs_per_batch is 4, which 3 ranks cannot share equally"):
        on_rank(module(PickaPicFiles(str(shards))), 0, 3)


# Through a Trainer


def fitted(folder: Path, source: PairSource, *callbacks: Callback, **settings: Any) -> Recorder:
    sizes = {"pairs_per_batch": 6, "resolution": 8, "validation_prompts": 2, "test_prompts": 2}
    data = PickaPicDataModule(source, **sizes, validation_fraction=0.2)
    return fit(folder, data, *callbacks, **({"max_epochs": 3} | settings))


@pytest.mark.filterwarnings("ignore:.*is skipped")
@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("stop", [2, 9])
def test_a_resumed_run_sees_what_the_whole_run_sees(tmp_path: Path, limit: float, stop: int) -> None:
    source = PickaPicFiles(str(write(tmp_path / "data", BAD)), row_groups=2)
    whole = fitted(tmp_path / "whole", source, limit_train_batches=limit)
    cut = fitted(tmp_path / "cut", source, Crash(stop), limit_train_batches=limit)
    newest = tmp_path / "cut" / f"step={stop}.ckpt"
    rest = fitted(tmp_path / "rest", source, limit_train_batches=limit, ckpt_path=newest)
    assert cut.seen + rest.seen == whole.seen
    assert torch.equal(rest.weight, whole.weight)
    assert len(whole.seen) >= 12
    assert whole.validated > 0


class SeenToFile(Callback):
    """Writes what a process has seen where the test can read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {"seen": cast(Recorder, pl_module).seen, "weight": cast(Recorder, pl_module).weight.detach()}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    source = PickaPicFiles(str(write(tmp_path / "data", BAD)), row_groups=2)
    fitted(tmp_path, source, SeenToFile(tmp_path), max_epochs=2)
    whole = torch.load(tmp_path / "0.pt")
    fitted(tmp_path, source, SeenToFile(tmp_path), max_epochs=2, devices=2, strategy="ddp_spawn")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert len(whole["seen"]) > 6
    for one, *shares in zip(whole["seen"], *(part["seen"] for part in parts), strict=True):
        assert [one[2][rank::2] for rank in range(2)] == [share[2] for share in shares]
    for part in parts:
        assert torch.allclose(part["weight"], whole["weight"], atol=1e-6)


def test_the_default_source_is_shapes_pick() -> None:
    assert isinstance(PickaPicDataModule().source, ShapesPick)
