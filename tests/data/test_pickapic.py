"""Pick-a-Pic: what is read of its files, which pairs are trained on, in which order, and what bad rows do."""

import io
import json
import pickle
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from PIL import Image
from pyarrow import parquet

from lit_align.data import (
    Batch,
    FolderPairs,
    PairBatch,
    PairSource,
    PickaPicDataModule,
    PickaPicFiles,
    PickaPicHub,
    PickaPicPrompts,
    PromptDataModule,
    ShapesPick,
    ShapesPromptSet,
    TablePrompts,
)
from lit_align.data.pair_loader import PairOrder
from lit_align.data.pairs import UnreadableImage, decode
from lit_align.errors import ConfigError
from lit_align.randomness import place
from lit_align.shapes import PICK
from lit_align.shapes.recipe.preferences import SCHEMA

SHARDS, GROUPS, ROWS = 3, 4, 5
TIES = (7, 31)
NO_LABEL = (12,)


def jpeg(value: int, size: tuple[int, int] = (8, 8), form: str = "JPEG") -> bytes:
    """One grey."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, form, quality=100)
    return file.getvalue()


def row(number: int) -> dict[str, Any]:
    """The images of row n are the greys 2n and 2n + 1; the second is preferred in odd rows."""
    return {
        "caption": f"prompt {number // 2}",
        "jpg_0": jpeg(2 * number),
        "jpg_1": jpeg(2 * number + 1),
        "label_0": 0.5 if number in TIES else float(number % 2 == 0),
        "label_1": 0.5 if number in TIES else float(number % 2),
        "has_label": number not in NO_LABEL,
    }


def write(folder: Path, changes: dict[int, dict[str, Any]] | None = None) -> Path:
    """Sixty rows in three shards of four row groups of five rows, in the order and types of Pick-a-Pic."""
    size = GROUPS * ROWS
    rows = [row(number) | (changes or {}).get(number, {}) for number in range(SHARDS * size)]
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        table = pa.Table.from_pylist(rows[shard * size : (shard + 1) * size], SCHEMA)
        parquet.write_table(
            table, folder / f"train-{shard:05d}-of-{SHARDS:05d}-abc.parquet", row_group_size=ROWS
        )
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pick"))


def module(source: PairSource | None, **settings: Any) -> PickaPicDataModule:
    defaults: dict[str, Any] = {"pairs_per_batch": 4, "resolution": 8, "validation_prompts": 1}
    held_out: dict[str, Any] = {"validation_fraction": 0.1, "test_fraction": 0.1, "test_prompts": 1}
    data = PickaPicDataModule(source, **(defaults | held_out | settings))
    data.setup("fit")
    return data


def index(batches: list[PairBatch]) -> list[int]:
    return [number for batch in batches for number in batch.index.tolist()]


def greys(images: torch.Tensor) -> list[int]:
    return (images * 255).round().mean((1, 2, 3)).int().tolist()


# Files


def test_rows_are_those_of_the_files(shards: Path) -> None:
    source = PickaPicFiles(str(shards), row_groups=2)
    assert len(source) == 60
    assert [source.prompt(n) for n in range(60)] == [f"prompt {n // 2}" for n in range(60)]
    assert [source.image(n, side) for n in range(60) for side in (0, 1)] == [jpeg(n) for n in range(120)]
    undecided = [n for n in range(60) if source.label(n) not in (0, 1)]
    assert undecided == sorted(TIES + NO_LABEL)
    assert [len(block) for block in source.blocks()] == [ROWS] * SHARDS * GROUPS
    assert source.where(33).startswith("row 13 of ")
    assert source.where(33).endswith("train-00001-of-00003-abc.parquet")


def test_files_reach_a_spawned_process(shards: Path) -> None:
    source = PickaPicFiles(str(shards))
    first = source.image(0, 0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.image(0, 0) == first
    assert len(copy) == len(source)


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/train-*.parquet", "file://{}"])
def test_files_are_found_by_folder_pattern_and_url(shards: Path, form: str) -> None:
    assert len(PickaPicFiles(form.format(shards))) == 60
    assert len(PickaPicFiles(str(shards / "train-00001-of-00003-abc.parquet"))) == 20


def test_files_that_are_not_local_are_read_where_they_lie(shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    for file in shards.glob("*.parquet"):
        memory.pipe(f"/pick/{file.name}", file.read_bytes())
    try:
        far, near = PickaPicFiles("memory://pick/train-*.parquet"), PickaPicFiles(str(shards))
        assert [far.image(n, 1) for n in range(60)] == [near.image(n, 1) for n in range(60)]
        assert [far.prompt(n) for n in range(60)] == [near.prompt(n) for n in range(60)]
    finally:
        memory.rm("/pick", recursive=True)


class Hub(MemoryFileSystem):
    """Stands in for the hub's file system."""

    protocol = ("hf",)
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/")


def test_a_hub_id_names_the_shards_of_one_split(shards: Path) -> None:
    real = fsspec.get_filesystem_class("hf")
    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        for split in ("train", "validation", "validation_unique"):
            for file in shards.glob("*.parquet"):
                name = file.name.replace("train", split)
                Hub().pipe(f"/datasets/me/pick/data/{name}", file.read_bytes())
        source = PickaPicHub("me/pick", split="validation")
        assert len(source) == 60
        assert source.where(0) == "row 0 of /datasets/me/pick/data/validation-00000-of-00003-abc.parquet"
        with pytest.raises(
            ConfigError, match=r"hf://datasets/me/pick/data/test-\*.parquet has no Parquet file"
        ):
            PickaPicHub("me/pick", split="test")
    finally:
        fsspec.register_implementation("hf", real, clobber=True)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """What is read of Parquet files: rows read, row group (-1 for all) and columns."""
    seen: list[tuple[str, int, tuple[str, ...]]] = []
    one, everything = parquet.ParquetFile.read_row_group, parquet.ParquetFile.read

    def read_row_group(self: Any, number: int, columns: list[str]) -> Any:
        table = one(self, number, columns=columns)
        seen.append((str(table["jpg_0"][0].as_py()), number, tuple(columns)))
        return table

    def read(self: Any, columns: list[str]) -> Any:
        seen.append(("", -1, tuple(columns)))
        return everything(self, columns=columns)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(parquet.ParquetFile, "read", read)
    return seen


@pytest.mark.parametrize("row_groups", [1, 3, 20])
def test_a_pass_reads_each_row_group_once_and_holds_a_few(
    shards: Path, reads: list[tuple[str, int, tuple[str, ...]]], row_groups: int
) -> None:
    source = PickaPicFiles(str(shards), row_groups)
    data = module(source, workers=1, validation_fraction=0.0, test_fraction=0.0, pairs_per_batch=3)
    light = {name for _, _, columns in reads for name in columns}
    assert light == {"caption", "label_0", "has_label"}
    reads.clear()
    for _ in data.train_dataloader():
        assert len(source._held) <= row_groups
    assert len(reads) == len(set(reads)) == SHARDS * GROUPS
    assert {columns for _, _, columns in reads} == {("jpg_0", "jpg_1")}


def test_the_shipped_sample_is_read_in_the_true_schema() -> None:
    assert parquet.read_schema(PICK).names == SCHEMA.names
    data = PickaPicDataModule(pairs_per_batch=50)
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert len(loader) == 847 // 50  # 134 ties, 19 pairs of the sets to validate and test on
    assert batch.winners.shape == (50, 3, 64, 64)
    truth = parquet.read_table(PICK).to_pylist()
    for number, prompt, winner in zip(batch.index.tolist(), batch.prompts, batch.winners, strict=True):
        side = 0 if truth[number]["label_0"] == 1 else 1
        assert truth[number]["caption"] == prompt
        assert torch.equal(winner, decode(truth[number][f"jpg_{side}"], 64))


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


def test_prompts_of_a_source_of_their_own_are_taken_out_of_training(shards: Path) -> None:
    given = TablePrompts(pa.table({"prompt": ["prompt 3", " prompt 20 "]}), "prompt")
    data = module(PickaPicFiles(str(shards)), pairs_per_batch=1, validation_source=given, test_fraction=0.0)
    batches = list(data.train_dataloader())
    assert not {"prompt 3", "prompt 20"} & {prompt for batch in batches for prompt in batch.prompts}
    assert len(batches) == 60 - len({*TIES, *NO_LABEL, 6, 7, 40, 41})
    assert isinstance(next(iter(data.val_dataloader())), Batch)


def test_shapes_pick_validates_and_tests_on_the_shipped_sets() -> None:
    data = PickaPicDataModule(validation_images_per_prompt=1, test_images_per_prompt=1)
    data.setup("fit")
    trained = {prompt for _, prompt in data.train_rows(0, len(data.train_dataloader()))}
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
    blocks = [range(10 * b, 10 * b + 10) for b in range(num_blocks)]
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
    rows = list(data.train_rows(3, 17))
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
    rows = [list(data.train_rows(0, 5)) for data in pair]
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
    with pytest.raises(ConfigError, match=r"no image of .* can be read; the last one: "):
        next(iter(module(source).train_dataloader()))


@pytest.mark.parametrize("data", [jpeg(9)[:-150], jpeg(9, form="PNG")[:45], b"", b"GIF89a"])
def test_what_is_no_whole_image_is_not_decoded(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(data, 8)


# Images


def test_images_are_scaled_to_their_shorter_side_and_cropped_to_their_centre() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 17:43] = 255  # the middle third, and what the filter sees beyond
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    assert torch.equal(decode(file.getvalue(), 10), torch.ones(3, 10, 10))


def test_scaling_down_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    assert (decode(file.getvalue(), 16) - 0.5).abs().max() < 0.05


def test_a_image_of_the_right_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert torch.equal((decode(file.getvalue(), 8) * 255).byte().permute(1, 2, 0), torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_kinds_of_images_become_rgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "TIFF")
    assert decode(file.getvalue(), 8).shape == (3, 8, 8)


# A folder of one's own

TABLE = [
    {"prompt": "a cat", "image_0": "a.png", "image_1": "b.png", "label_0": 1},
    {"prompt": "a dog, asleep", "image_0": "b.png", "image_1": "a.png", "label_0": 0},
    {"prompt": "a tie", "image_0": "b.png", "image_1": "a.png", "label_0": 0.5},
    {"prompt": "a bird", "image_0": "a.png", "image_1": "gone.png", "label_0": 0},
]


def folder_table(folder: Path, form: str, rows: list[dict[str, Any]] = TABLE) -> str:
    for name, value in (("a.png", 10), ("b.png", 20)):
        (folder / name).write_bytes(jpeg(value, form="PNG"))
    lines = [json.dumps(row) for row in rows]
    if form == "csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    (folder / f"pairs.{form}").write_text("\n".join(lines) + "\n")
    return str(folder / f"pairs.{form}")


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_folder_with_a_table(tmp_path: Path, form: str) -> None:
    source = FolderPairs(folder_table(tmp_path, form))
    assert [source.label(n) for n in range(4)] == [1.0, 0.0, 0.5, 0.0]
    assert source.prompt(1) == "a dog, asleep"
    data = module(source, view="pairs", pairs_per_batch=3, validation_fraction=0.0, test_fraction=0.0)
    with pytest.warns(UserWarning, match=r"row 3 of .* 'gone.png' cannot be read \(No such file"):
        (batch,) = data.train_dataloader()
    assert set(batch.index.tolist()) <= {0, 1}
    assert greys(batch.winners) == [10] * 3
    assert greys(cast(torch.Tensor, batch.losers)) == [20] * 3


def test_names_of_digits_stay_names(tmp_path: Path) -> None:
    (tmp_path / "0001").write_bytes(jpeg(10, form="PNG"))
    (tmp_path / "0002").write_bytes(jpeg(20, form="PNG"))
    (tmp_path / "pairs.csv").write_text("prompt,image_0,image_1,label_0\na cat,0001,0002,1\n")
    assert len(FolderPairs(str(tmp_path / "pairs.csv")).image(0, 1)) > 0


def test_images_that_were_made_anew_are_other_images(tmp_path: Path) -> None:
    table = folder_table(tmp_path, "csv")
    first = FolderPairs(table).fingerprint()
    assert FolderPairs(table).fingerprint() == first
    (tmp_path / "a.png").write_bytes(jpeg(30, form="PNG"))
    assert FolderPairs(table).fingerprint() != first


def test_a_photograph_stands_as_its_camera_says() -> None:
    image, file = Image.new("RGB", (16, 8), "white"), io.BytesIO()
    image.paste("black", (0, 0, 8, 8))  # the left half
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees to the right
    image.save(file, "JPEG", exif=tags, quality=95)
    upright = decode(file.getvalue(), 8).mean(0)
    assert upright[0].max() < 0.1 < 0.9 < upright[-1].min()


def changed(**values: Any) -> list[dict[str, Any]]:
    return [TABLE[0] | values, *TABLE[1:]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (changed(label_0="left"), ["row 0", "'label_0'", "'left' is no label", "1 where the first"]),
        (changed(label_0=2), ["is no label"]),
        (changed(label_0=0.8), ["'0.8' is no label", "0.5 for a tie"]),
        (changed(image_1="c.png"), ["'image_1'", "'c.png' cannot be read", "relative to"]),
        ([{"prompt": "a", "image_0": "a.png", "winner": 1}], ["no column 'image_1'", "image_0, winner"]),
    ],
)
def test_a_table_that_cannot_work_says_why(tmp_path: Path, rows: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FolderPairs(folder_table(tmp_path, "csv", rows))
    for word in words:
        assert word in str(caught.value)


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs.txt ends in '.txt': give a table \*.csv or \*.jsonl"):
        FolderPairs(str(tmp_path / "pairs.txt"))


# What cannot work


def test_missing_and_wrong_columns_are_named(tmp_path: Path) -> None:
    table = parquet.read_table(PICK)
    parquet.write_table(table.rename_columns({"jpg_0": "jpeg_0"}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet has no column 'jpg_0' \(is it 'jpeg_0'\?\), only are_"):
        PickaPicFiles(str(tmp_path / "a.parquet"))
    wrong = table.set_column(table.column_names.index("jpg_1"), "jpg_1", table["image_0_url"])
    parquet.write_table(wrong, tmp_path / "b.parquet")
    with pytest.raises(ConfigError, match=r"column 'jpg_1' of .*b.parquet holds string, not encoded images"):
        PickaPicFiles(str(tmp_path / "b.parquet"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no Parquet file: give a file"):
        PickaPicFiles(str(tmp_path))
    with pytest.raises(ConfigError, match=r"gone.parquet has no Parquet file"):
        PickaPicFiles(str(tmp_path / "gone.parquet"))
    (tmp_path / "cut.parquet").write_bytes(PICK.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cut.parquet is no Parquet file that can be read \(.*\): load it"):
        PickaPicFiles(str(tmp_path / "cut.parquet"))


def test_a_folder_with_several_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "test_unique-00000-of-00001-abc.parquet").write_bytes(PICK.read_bytes())
    with pytest.raises(ConfigError, match=r"several splits \(test_unique, train\): give a pattern"):
        PickaPicFiles(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"view": "losers"}, ["data.view is 'losers'", "winners", "pairs"]),
        ({"pairs_per_batch": 0}, ["data.pairs_per_batch is 0"]),
        ({"resolution": 0}, ["data.resolution is 0"]),
        ({"workers": 0}, ["data.workers is 0"]),
        ({"pairs_per_batch": 100}, ["data.pairs_per_batch is 100", "only ", "pairs to train on", "lower it"]),
        ({"validation_fraction": 0.999, "test_fraction": 0.0, "pairs_per_batch": 1}, ["has only 0 pairs"]),
        ({"eval_batch": 1}, ["data.validation_images_per_prompt is 4"]),
    ],
)
def test_settings_that_cannot_work_say_why(shards: Path, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        module(PickaPicFiles(str(shards)), **settings)
    for word in words:
        assert word in str(caught.value)


def test_what_the_ranks_cannot_share_is_refused(shards: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.pairs_per_batch is 4, which 3 ranks cannot share equally"):
        on_rank(module(PickaPicFiles(str(shards))), 0, 3)


# Through a Trainer


class Recorder(LightningModule):
    """Records what it sees and takes one optimizer step a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(3))
        self.seen: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = []
        self.validated = 0

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        self.seen.append((self.current_epoch, tuple(batch.prompts), tuple(batch.index.tolist())))
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        self.manual_backward(((self.weight - batch.winners.mean((0, 2, 3))) ** 2).sum())
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += len(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Crash(Callback):
    """Raises at the start of a batch, as a killed process would end."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("killed")


def fit(folder: Path, source: PairSource, *callbacks: Callback, **settings: Any) -> Recorder:
    recorder = Recorder()
    data = PickaPicDataModule(
        source, pairs_per_batch=6, resolution=8, validation_prompts=2, test_prompts=2, validation_fraction=0.2
    )
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=settings.pop("max_epochs", 3),
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


@pytest.mark.filterwarnings("ignore:.*is skipped")
@pytest.mark.parametrize("limit", [1.0, 4])
@pytest.mark.parametrize("stop", [2, 9])
def test_a_resumed_run_sees_what_the_whole_run_sees(tmp_path: Path, limit: float, stop: int) -> None:
    source = PickaPicFiles(str(write(tmp_path / "data", BAD)), row_groups=2)
    whole = fit(tmp_path / "whole", source, limit_train_batches=limit)
    cut = fit(tmp_path / "cut", source, Crash(stop), limit_train_batches=limit)
    newest = tmp_path / "cut" / f"step={stop}.ckpt"
    rest = fit(tmp_path / "rest", source, limit_train_batches=limit, ckpt_path=newest)
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
    fit(tmp_path, source, SeenToFile(tmp_path), max_epochs=2)
    whole = torch.load(tmp_path / "0.pt")
    fit(tmp_path, source, SeenToFile(tmp_path), max_epochs=2, devices=2, strategy="ddp_spawn")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert len(whole["seen"]) > 6
    for one, *shares in zip(whole["seen"], *(part["seen"] for part in parts), strict=True):
        assert [one[2][rank::2] for rank in range(2)] == [share[2] for share in shares]
    for part in parts:
        assert torch.allclose(part["weight"], whole["weight"], atol=1e-6)


def test_the_default_source_is_shapes_pick() -> None:
    assert isinstance(PickaPicDataModule().source, ShapesPick)
