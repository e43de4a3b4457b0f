"""Preference data in files: what is read of them, and what cannot be."""

import json
import pickle
from pathlib import Path
from typing import Any, ClassVar, cast

import fsspec
import pyarrow as pa
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import dataset, parquet

from lit_align.data import FolderPairs, PickaPicDataModule, PickaPicFiles, PickaPicHub, PreferenceFiles
from lit_align.data.images import UnreadableImage, decode
from lit_align.errors import ConfigError
from lit_align.shapes import PICK
from lit_align.shapes.recipe.preferences import SCHEMA
from tests.data.pick import GROUPS, NO_LABEL, ROWS, SHARDS, TIES, greys, jpeg, module, write


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pick"))


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
def test_files_are_found_by_folder_pattern_and_url(shards: Path, form: str, tmp_path: Path) -> None:
    (place := tmp_path / "pairs [v2]").symlink_to(shards)
    assert len(PickaPicFiles(str(place))) == 60
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


class Spy:
    """A file or a row group that notes what is read of it."""

    def __init__(self, part: Any, seen: list[tuple[str, int, tuple[str, ...]]]) -> None:
        self._part, self._seen = part, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def split_by_row_group(self) -> list["Spy"]:
        return [Spy(part, self._seen) for part in self._part.split_by_row_group()]

    def to_table(self, columns: list[str]) -> pa.Table:
        self._seen.append((self.path, self.row_groups[0].id, tuple(columns)))
        return self._part.to_table(columns=columns)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """What is read of Parquet files: file, row group and columns."""
    seen: list[tuple[str, int, tuple[str, ...]]] = []

    class Format(dataset.ParquetFileFormat):
        def make_fragment(self, *arguments: Any, **options: Any) -> Any:
            return Spy(super().make_fragment(*arguments, **options), seen)

    monkeypatch.setattr(dataset, "ParquetFileFormat", Format)
    return seen


@pytest.mark.parametrize("row_groups", [1, 3, 20])
def test_a_pass_reads_each_row_group_once_and_holds_a_few(
    shards: Path, reads: list[tuple[str, int, tuple[str, ...]]], row_groups: int
) -> None:
    source = PickaPicFiles(str(shards), row_groups)
    light = {name for _, _, columns in reads for name in columns}
    assert light == {"caption", "label_0", "has_label"}
    reads.clear()
    data = module(source, workers=1, validation_fraction=0.0, test_fraction=0.0, pairs_per_batch=3)
    assert len(reads) == 1  # of the pair that is tried, which comes first
    for _ in data.train_dataloader():
        assert source._rows.group.cache_info().currsize <= row_groups
    assert len(reads) == len(set(reads)) == SHARDS * GROUPS
    assert {columns for _, _, columns in reads} == {("jpg_0", "jpg_1")}


def test_the_shipped_sample_is_read_in_the_true_schema() -> None:
    assert parquet.read_schema(PICK).names == SCHEMA.names
    data = PickaPicDataModule(pairs_per_batch=50)
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    assert len(loader) == 892 // 50  # 92 ties, 16 pairs of the sets to validate and test on
    assert batch.winners.shape == (50, 3, 64, 64)
    truth = parquet.read_table(PICK).to_pylist()
    for number, prompt, winner in zip(batch.index.tolist(), batch.prompts, batch.winners, strict=True):
        side = 0 if truth[number]["label_0"] == 1 else 1
        assert truth[number]["caption"] == prompt
        assert torch.equal(winner, decode(truth[number][f"jpg_{side}"], 64))


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


def changed(**values: Any) -> list[dict[str, Any]]:
    return [TABLE[0] | values, *TABLE[1:]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (changed(label_0="left"), ["row 0", "'label_0'", "'left' is not a label", "1 where the first"]),
        (changed(label_0=2), ["is not a label"]),
        (changed(label_0=0.8), ["'0.8' is not a label", "0.5 for a tie"]),
        (changed(image_1="c.png"), ["'image_1'", "'c.png' cannot be read", "relative to"]),
        ([{"prompt": "a", "image_0": "a.png", "winner": 1}], ["no column 'image_1'", "image_0, winner"]),
        (
            [{"prompt": "a", "image_0": "a.png", "image_1": "b.png", "label_1": 1}],
            ["no column 'label_0'", "set label to one", "1 where the first image is preferred"],
        ),
    ],
)
def test_a_table_that_cannot_work_says_why(tmp_path: Path, rows: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FolderPairs(folder_table(tmp_path, "csv", rows))
    for word in words:
        assert word in str(caught.value)


def test_one_column_for_both_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="first and second are both 'image_0'"):
        FolderPairs(folder_table(tmp_path, "csv"), second="image_0")


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pairs.txt ends in '.txt': give a table \*.csv or \*.jsonl"):
        FolderPairs(str(tmp_path / "pairs.txt"))


# What cannot work


@pytest.mark.parametrize("others", [["chosen", "rejected"], ["jpg_0", "jpg_1", "label_1", "has_label"]])
def test_other_schemas_are_told_what_is_needed_and_no_near_name(tmp_path: Path, others: list[str]) -> None:
    columns = {"caption": ["a"]} | {name: [b"x"] for name in others}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"only caption, .*label_0 \(1 where jpg_0 is preferred") as caught:
        PickaPicFiles(str(tmp_path))
    assert "did you mean" not in str(caught.value)


def test_images_as_datasets_stores_them_are_read(tmp_path: Path) -> None:
    image = {"bytes": jpeg(7), "path": None}
    rows = {"caption": ["a", "b"], "jpg_0": [image] * 2, "jpg_1": [image, None], "label_0": [1, 0]}
    parquet.write_table(pa.table(rows), tmp_path / "a.parquet")
    source = PickaPicFiles(str(tmp_path))
    assert source.image(0, 0) == jpeg(7)
    with pytest.raises(UnreadableImage, match="there is none"):
        source.image(1, 1)


def test_labels_of_another_kind_are_refused(tmp_path: Path) -> None:
    changes = {7: {"label_0": 2.0}, 12: {"label_0": 9.0}}  # row 12 has no label at all
    with pytest.raises(ConfigError, match=r"'label_0' of .* holds 2 in row 7: save it with 1 where"):
        PickaPicFiles(str(write(tmp_path, changes)))


def test_missing_and_wrong_columns_are_named(tmp_path: Path) -> None:
    table = parquet.read_table(PICK)
    parquet.write_table(table.rename_columns({"jpg_0": "jpeg_0"}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet has no column 'jpg_0', only are_.*: save it with"):
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
    with pytest.raises(
        ConfigError, match=r"cut.parquet is not a Parquet file that can be read \(.*\): load it"
    ):
        PickaPicFiles(str(tmp_path / "cut.parquet"))


def test_a_folder_with_several_splits_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "test_unique-00000-of-00001-abc.parquet").write_bytes(PICK.read_bytes())
    with pytest.raises(ConfigError, match=r"several splits \(test_unique, train\): give a pattern"):
        PickaPicFiles(str(tmp_path))
    (other := tmp_path / "by-name").mkdir()
    for name in ("train", "test"):
        (other / f"{name}.parquet").write_bytes(PICK.read_bytes())
    (other / "._train.parquet").write_bytes(b"of a program")
    with pytest.raises(ConfigError, match=r"several splits, such as test.parquet and train.parq"):
        PickaPicFiles(str(other))
    assert len(PickaPicFiles(str(other / "train*.parquet"))) == 1000
    (other / "test.parquet").unlink()
    assert len(PickaPicFiles(str(other))) == 1000


@pytest.mark.parametrize(
    ("text", "binary"),
    [
        (pa.string_view(), pa.binary_view()),
        (pa.dictionary(pa.int32(), pa.string()), pa.large_binary()),
        (pa.large_string(), pa.binary()),
    ],
    ids=str,
)
def test_prompts_and_images_as_other_programs_store_them(
    tmp_path: Path, text: pa.DataType, binary: pa.DataType
) -> None:
    prompts = (
        pa.array(["a cat"]).dictionary_encode() if pa.types.is_dictionary(text) else pa.array(["a cat"], text)
    )
    images = {name: pa.array([name.encode()], binary) for name in ("chosen", "rejected")}
    parquet.write_table(pa.table({"prompt": prompts, **images}), tmp_path / "p.parquet")
    source = PreferenceFiles(str(tmp_path / "p.parquet"))
    assert (source.prompt(0), source.image(0, 0), source.image(0, 1)) == ("a cat", b"chosen", b"rejected")
