"""Prompt sets beyond memory: files mapped from a cache, and the index that tells their splits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from lit_align.data import (
    Animals,
    HubPrompts,
    ParquetPrompts,
    PromptDataModule,
    PromptSource,
    TablePrompts,
)
from lit_align.data.loading import Rank
from lit_align.data.prompts import index as indexing
from lit_align.data.prompts.index import index
from lit_align.data.prompts.loaders import RolloutLoader
from lit_align.data.prompts.sets import PromptSet
from lit_align.data.splits import Permutation, find, prompt_keys
from lit_align.errors import ConfigError
from lit_align.randomness import place

TEXTS = [f"prompt {n}" for n in range(300)]
ROWS = [*TEXTS, "", " ", *TEXTS[:50], f"  {TEXTS[7]} "]
"""300 prompts, 2 rows without one and 51 that repeat one."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sources keep their index on disk, as large ones do; returns the folder of the indices."""
    monkeypatch.setattr(indexing, "ON_DISK", 0)
    return tmp_path / "cache" / "lit_align"


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as shards of a folder and gives its path."""

    def write(prompts: list[str] = ROWS, shards: int = 3, name: str = "shards") -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        size = -(-len(prompts) // shards)
        for number in range(shards):
            part = prompts[number * size : (number + 1) * size]
            rows = pa.table({"prompt": part, "number": list(range(len(part)))})
            pyarrow.parquet.write_table(rows, folder / f"{number}.parquet")
        return str(folder)

    return write


def texts(prompts: PromptSet) -> list[str]:
    order = Permutation(len(prompts.rows), 0, purpose="test")
    return [prompts.source.prompt(row).strip() for _, row in prompts.walk(order)]


def ready(source: PromptSource, **settings: Any) -> PromptDataModule:
    data = PromptDataModule(source, **{"prompts_per_batch": 4, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


# The index


def test_the_index_keeps_the_first_row_of_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexing, "CHUNK", 100)
    found = index(TablePrompts(pa.table({"prompt": ROWS}), "prompt"))
    assert sorted(found.rows.tolist()) == list(range(300))
    assert (found.empty, found.repeated) == (2, 51)
    assert np.all(found.keys[1:] > found.keys[:-1])
    assert [place(ROWS[row]) for row in found.rows] == sorted(map(place, TEXTS))


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.95, 1.0])
def test_a_window_is_what_the_places_say(share: float) -> None:
    found = index(TablePrompts(pa.table({"prompt": ROWS}), "prompt"))
    exact = place(ROWS[int(found.rows[100])])  # a boundary that a prompt lies on belongs to what is above it
    for low, high in ((0.0, share), (share, 1.0), (share, share), (0.0, exact), (exact, 1.0)):
        rows = found.rows[found.window(low, high)].tolist()
        assert sorted(rows) == [row for row in range(300) if low <= place(ROWS[row]) < high]


def test_keys_are_found_and_others_are_not() -> None:
    keys = np.sort(prompt_keys(TEXTS))
    (key,) = prompt_keys(["prompt 7"])
    assert find(keys, np.array([key])).tolist() == [keys.tolist().index(key)]
    assert len(find(keys, prompt_keys(["prompt 300", "x", ""]))) == 0
    assert len(find(keys[:0], keys)) == 0
    assert np.array_equal(*(prompt_keys([spelt]) for spelt in ("a caf\u00e9", "a cafe\u0301")))
    assert len(find(keys, np.array([2**64 - 1], np.uint64))) == 0


def test_splits_of_the_index_are_those_of_the_prompts_one_by_one(parquet: Callable[..., str]) -> None:
    class OneByOne(TablePrompts):
        distinct = True

    plain = OneByOne(pa.table({"prompt": TEXTS}), "prompt")
    settings = {"validation_fraction": 0.2, "test_fraction": 0.1, "test_source": Animals()}
    indexed, asked = ready(ParquetPrompts(parquet()), **settings), ready(plain, **settings)
    for name in ("train", "validation", "test"):
        assert sorted(texts(indexed._sets[name])) == sorted(texts(asked._sets[name]))
    assert len(indexed.train_dataloader()) == len(asked.train_dataloader())


# On disk


def test_all_is_the_same_in_memory_and_on_disk(parquet: Callable[..., str], on_disk: Path) -> None:
    path, before = parquet(), pa.total_allocated_bytes()
    mapped = ready(ParquetPrompts(path))
    assert pa.total_allocated_bytes() - before < 1 << 20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexing, "ON_DISK", 1000)
        read = ready(ParquetPrompts(path))
    for name in ("train", "validation", "test"):
        assert texts(mapped._sets[name]) == texts(read._sets[name])
    for one, other in zip(mapped.train_dataloader(), read.train_dataloader(), strict=True):
        assert (one.prompts, one.columns) == (other.prompts, other.columns)


def test_the_rows_of_a_split_are_mapped_from_the_disk(parquet: Callable[..., str], on_disk: Path) -> None:
    rows: Any = ready(ParquetPrompts(parquet()))._sets["train"].rows
    (file,) = on_disk.iterdir()
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if file.name in line]
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    assert any(low <= rows.ctypes.data < high for low, high in ends)
    assert not rows.flags.writeable


def test_the_index_is_made_once(
    parquet: Callable[..., str],
    on_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = parquet()
    first = texts(ready(ParquetPrompts(path))._sets["train"])
    monkeypatch.setattr(indexing, "prompt_keys", lambda prompts: pytest.fail("indexed again"))
    with caplog.at_level("INFO"):
        assert texts(ready(ParquetPrompts(path))._sets["train"]) == first
    assert "2 empty and 51 repeated prompts dropped, 300 left" in caplog.text
    assert len(list(on_disk.iterdir())) == 1


def test_other_files_or_another_column_have_an_index_of_their_own(
    parquet: Callable[..., str], on_disk: Path, tmp_path: Path
) -> None:
    index(ParquetPrompts(path := parquet()))
    assert len(index(ParquetPrompts(parquet(TEXTS[:9])))) == 9  # the same names
    two = pa.table({"prompt": TEXTS, "caption": [f"{text}, at night" for text in TEXTS]})
    pyarrow.parquet.write_table(two, tmp_path / "two.parquet")
    names = {
        ParquetPrompts(str(tmp_path / "two.parquet"), column).fingerprint() for column in two.column_names
    }
    assert len({*names, ParquetPrompts(path).fingerprint()}) == 3


def test_an_index_that_was_not_finished_is_none(
    parquet: Callable[..., str], on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ParquetPrompts(parquet())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            index(source)
    assert not list(on_disk.iterdir())
    assert len(index(source)) == 300


def test_two_processes_may_index_at_once(
    parquet: Callable[..., str], on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, made = ParquetPrompts(parquet()), indexing._make
    other = []

    def slow(source: PromptSource) -> indexing.Index:
        monkeypatch.setattr(indexing, "_make", made)
        other.append(index(source))  # which begins and ends meanwhile
        return made(source)

    monkeypatch.setattr(indexing, "_make", slow)
    assert index(source).rows.tolist() == other[0].rows.tolist()
    assert len(list(on_disk.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named(
    parquet: Callable[..., str], on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ParquetPrompts(parquet())
    on_disk.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match=r"index of .*shards.* HF_DATASETS_CACHE"):
        index(source)


def test_a_dataset_without_files_has_its_index_in_memory(
    tmp_path: Path, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.IN_MEMORY_MAX_SIZE", 1 << 20)
    (folder := tmp_path / "data").mkdir()
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    source = HubPrompts(str(folder))
    assert source.fingerprint() is None
    assert len(index(source)) == 300
    assert not on_disk.exists()


def test_slices_of_a_dataset_have_an_index_each(tmp_path: Path, on_disk: Path) -> None:
    (folder := tmp_path / "data").mkdir()
    (folder / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    parts = [HubPrompts(str(folder), split) for split in ("train[:20]", "train[20:40]")]
    keys = [index(part).keys for part in parts]
    assert [len(part) for part in keys] == [20, 20]
    assert len(np.intersect1d(*keys)) == 0


# Order, ranks and resuming


def loaders(source: PromptSource, **settings: Any) -> list[RolloutLoader]:
    prompts = ready(source, **settings)._sets["train"]
    return [RolloutLoader(prompts, 4, 2, 8, rank=Rank(number, 2)) for number in range(2)]


def test_ranks_share_a_mapped_set_without_overlap(parquet: Callable[..., str], on_disk: Path) -> None:
    source = ParquetPrompts(parquet())
    seen = [[p for batch in loader for p in batch.prompts[::2]] for loader in loaders(source)]
    assert len(set(seen[0])) == len(set(seen[1])) == 16
    assert not set(seen[0]) & set(seen[1])
    whole = RolloutLoader(ready(source)._sets["train"], 4, 2, 8)
    assert {p for batch in whole for p in batch.prompts} == {*seen[0], *seen[1]}


def test_a_pass_over_a_mapped_set_reaches_every_training_prompt_once(
    parquet: Callable[..., str], on_disk: Path
) -> None:
    data = ready(ParquetPrompts(parquet()), prompts_per_batch=1, images_per_prompt=1)
    seen = [p for batch in data.train_dataloader() for p in batch.prompts]
    inside = [text for text in TEXTS if 0.05 <= place(text) < 0.95]
    assert sorted(seen) == sorted(inside)


def test_a_mapped_set_goes_on_where_it_was_left(parquet: Callable[..., str], on_disk: Path) -> None:
    path = parquet()
    whole = list(ready(ParquetPrompts(path), batches_per_epoch=20).train_dataloader())
    left = ready(ParquetPrompts(path), batches_per_epoch=20).train_dataloader()
    batches = iter(left)
    first = [next(batches) for _ in range(7)]
    rest = ready(ParquetPrompts(path), batches_per_epoch=13).train_dataloader()
    rest.load_state_dict(left.state_dict())
    assert [batch.prompts for batch in (*first, *rest)] == [batch.prompts for batch in whole]


def test_another_fraction_on_resume_is_a_warning(parquet: Callable[..., str]) -> None:
    path = parquet()
    state = ready(ParquetPrompts(path)).train_dataloader().state_dict()
    with pytest.warns(UserWarning, match=r"300 usable prompts, 300 when .* to draw from"):
        ready(ParquetPrompts(path), test_fraction=0.3).train_dataloader().load_state_dict(state)


def test_prompts_of_mapped_sources_are_removed_from_training(
    parquet: Callable[..., str], on_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, other = ParquetPrompts(parquet()), ParquetPrompts(parquet([*TEXTS[250:], "new"], name="other"))
    with caplog.at_level("INFO"):
        data = ready(source, test_source=other, prompts_per_batch=1, images_per_prompt=1)
    assert "50 prompts removed" in caplog.text
    seen = {p for batch in data.train_dataloader() for p in batch.prompts}
    assert seen == {text for text in TEXTS[:250] if place(text) < 0.95}
    assert len(data.train_dataloader()) == len(seen)
