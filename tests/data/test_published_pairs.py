"""Preference data in the schemas in which it is published: small samples of each, read and trained on."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from lit_align.data import PairColumns, PairSource, PreferenceFiles, WebDatasetPairs
from lit_align.errors import ConfigError
from lit_align.methods import DPOModule
from tests.data.pick import greys, jpeg, module
from tests.methods.build import fit, make, trained

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COUNT = 12
"""Pairs of a sample, or groups; the winner is darker than the loser."""


def stored(value: int) -> dict[str, Any]:
    return {"bytes": jpeg(value, (16, 16)), "path": None}


def write_parquet(folder: Path, rows: list[dict[str, Any]], images: list[str]) -> str:
    """Rows with images of ``datasets`` in the columns of these names."""
    types = pa.schema([(name, IMAGE) for name in images])
    table = pa.Table.from_pylist(rows)
    for name in images:
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.array([row[name] for row in rows], types.field(name).type))
    parquet.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=5)
    return str(folder)


def files(folder: Path, *values: int) -> list[str]:
    """Names of images that are written into a folder below."""
    (folder / "images").mkdir(exist_ok=True)
    for value in values:
        (folder / "images" / f"{value}.jpg").write_bytes(jpeg(value, (16, 16)))
    return [f"images/{value}.jpg" for value in values]


def open_image_preferences(folder: Path) -> PairSource:
    rows = [
        {"prompt": f"prompt {n}", "chosen": stored(2 * n), "rejected": stored(200 - n), "label": "x"}
        for n in range(COUNT)
    ]
    return PreferenceFiles(write_parquet(folder, rows, ["chosen", "rejected"]))


def rapidata(folder: Path) -> PairSource:
    rows = []
    for n in range(COUNT):
        dark, light = stored(2 * n), stored(200 - n)
        first, second, votes = (dark, light, (9, 3)) if n % 2 else (light, dark, (3, 9))
        rows.append(
            {
                "prompt": f"prompt {n}",
                "image1": first,
                "image2": second,
                "votes_image1": votes[0],
                "votes_image2": votes[1],
                "model1": "a",
                "model2": "b",
                "detailed_results": "[]",
            }
        )
    rows.append(rows[0] | {"votes_image1": 6, "votes_image2": 5, "prompt": "nearly a tie"})
    return PreferenceFiles(write_parquet(folder, rows, ["image1", "image2"]), margin=0.2)


def rapidata_later(folder: Path) -> PairSource:
    rows = [
        {
            "prompt": f"prompt {n}",
            "image1": stored(2 * n),
            "image2": stored(200 - n),
            "weighted_results_image1_preference": 0.8,
            "weighted_results_image2_preference": 0.2,
            "weighted_results_image1_alignment": 0.1,
            "weighted_results_image2_alignment": 0.9,
        }
        for n in range(COUNT)
    ]
    return PreferenceFiles(write_parquet(folder, rows, ["image1", "image2"]))


def hpdv2_train(folder: Path) -> PairSource:
    rows = []
    for n in range(COUNT):
        dark, light = files(folder, 2 * n, 200 - n)
        names = [dark, light] if n % 2 else [light, dark]
        rows.append(
            {
                "prompt": f"prompt {n}",
                "file_path": names,
                "human_preference": [n % 2, 1 - n % 2],
                "user_hash": "x",
            }
        )
    (folder / "train.json").write_text(json.dumps(rows))
    return PreferenceFiles(str(folder / "train.json"))


def hpdv2_test(folder: Path) -> PairSource:
    rows = [
        {"prompt": f"prompt {n}", "image_path": files(folder, 200 - n, 2 * n, 100 + n), "rank": [3, 1, 3]}
        for n in range(COUNT)
    ]
    (folder / "test.json").write_text(json.dumps(rows))
    return PreferenceFiles(str(folder / "test.json"))


def hpdv3(folder: Path) -> PairSource:
    rows = []
    for n in range(COUNT):
        dark, light = files(folder, 2 * n, 200 - n)
        rows.append(
            {"prompt": f"prompt {n}", "path1": dark, "path2": light, "confidence": None, "model1": "a"}
        )
    rows[0] |= {"confidence": 0.99, "choice_dist": [12.0, 7.0]}
    (folder / "train.json").write_text(json.dumps(rows))
    return PreferenceFiles(str(folder / "train.json"))


def image_reward_db(folder: Path) -> PairSource:
    rows = []
    for n in range(COUNT):
        for value, rank in ((200 - n, 2), (2 * n, 1), (100 + n, 2)):
            (name,) = files(folder, value)
            row = {"image_path": name, "prompt_id": f"{n:06d}-1", "prompt": f"prompt {n}", "rank": rank}
            rows.append(row | {"image_amount_in_total": 3, "overall_rating": 5, "fidelity_rating": 6})
    parquet.write_table(pa.Table.from_pylist(rows), folder / "metadata-train.parquet")
    return PreferenceFiles(str(folder / "metadata-train.parquet"))


def image_reward_db_with_images(folder: Path) -> PairSource:
    """The images of a prompt lie in several row groups: pairs are put in the order of these."""
    rows = [
        {
            "image": stored(first + slope * n),
            "prompt_id": f"{n}-1",
            "prompt": f"prompt {n}",
            "rank": rank,
        }
        for first, slope, rank in ((200, -1, 2), (0, 2, 1), (100, 1, 2))
        for n in range(COUNT)
    ]
    return PreferenceFiles(write_parquet(folder, rows, ["image"]))


def own_columns(folder: Path) -> PairSource:
    rows = [{"text": f"prompt {n}", "worse": stored(200 - n), "better": stored(2 * n)} for n in range(COUNT)]
    columns = PairColumns(prompt="text", first="better", second="worse")
    return PreferenceFiles(write_parquet(folder, rows, ["worse", "better"]), columns)


def archive(folder: Path, endings: dict[str, str]) -> str:
    """Two tar archives of webdataset with the columns of Pick-a-Pic."""
    for shard in range(2):
        with tarfile.open(folder / f"train_{shard:05d}.tar", "w") as tar:
            for n in range(shard * COUNT // 2, (shard + 1) * COUNT // 2):
                dark, light = jpeg(2 * n, (16, 16)), jpeg(200 - n, (16, 16))
                columns = {
                    "caption": f"prompt {n}".encode(),
                    "jpg_0": dark if n % 2 else light,
                    "jpg_1": light if n % 2 else dark,
                    "label_0": str(float(n % 2)).encode(),
                    "has_label": b"True",
                    "are_different": b"True",
                }
                for name, ending in endings.items():
                    info = tarfile.TarInfo(f"{n:032x}.{ending}")
                    info.size = len(columns[name])
                    tar.addfile(info, io.BytesIO(columns[name]))
    return str(folder)


def webdataset(folder: Path) -> PairSource:
    names = ("are_different", "caption", "has_label", "jpg_0", "jpg_1", "label_0")
    return WebDatasetPairs(archive(folder, {name: name for name in names}))


def webdataset_of_files(folder: Path) -> PairSource:
    endings = {"caption": "original_prompt.txt", "jpg_0": "jpg_0.jpg", "jpg_1": "jpg_1.jpg"}
    return WebDatasetPairs(archive(folder, endings | {"label_0": "label_0.txt"}))


SETS: dict[str, Callable[[Path], PairSource]] = {
    made.__name__: made
    for made in (
        open_image_preferences,
        rapidata,
        rapidata_later,
        hpdv2_train,
        hpdv2_test,
        hpdv3,
        image_reward_db,
        image_reward_db_with_images,
        own_columns,
        webdataset,
        webdataset_of_files,
    )
}


@pytest.mark.parametrize("name", SETS)
def test_the_winner_of_every_pair_is_the_preferred_image(name: str, tmp_path: Path) -> None:
    source = SETS[name](tmp_path)
    data = module(source, validation_fraction=0.0, test_fraction=0.0, view="pairs", workers=1)
    seen: dict[int, set[int]] = {}
    for batch in data.train_dataloader():
        for prompt, winner in zip(batch.prompts, greys(batch.winners), strict=True):
            number = int(prompt.removeprefix("prompt "))
            assert abs(winner - 2 * number) <= 1
        assert batch.losers is not None
        assert min(greys(batch.losers)) >= 100
        for row in batch.index.tolist():
            seen.setdefault(row, set()).add(row)
    of_three = ("hpdv2_test", "image_reward_db", "image_reward_db_with_images")
    pairs = 2 * COUNT if name in of_three else COUNT
    assert len(seen) == pairs  # those of unequal rank, and without the tie
    assert source.where(0)
    assert source.fingerprint() == source.fingerprint()
    assert [row for block in source.blocks() for row in block] == list(range(len(source)))


QUICK = ("open_image_preferences", "hpdv2_test", "image_reward_db", "webdataset")
"""Each way of storing images once; the other sets differ in the names of their columns."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETS]
)
def test_each_set_trains_a_method_for_a_batch(name: str, tiny: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "data").mkdir()
    data = module(SETS[name](folder), resolution=16, view="pairs", validation_fraction=0.2, workers=1)
    policy = make(DPOModule, tiny)
    before = trained(policy)
    fit(policy, tmp_path / "run", data=data)
    assert not all(torch.equal(one, other) for one, other in zip(before, trained(policy), strict=True))


# What cannot be read


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"a": 1}], {}, "has the columns a, which belong to no known set"),
        ([{"jpg_0": "a", "jpg_1": "b"}], {}, "of Pick-a-Pic: read it with PickaPicFiles"),
        (
            [{"prompt": "x", "path1": "gone.jpg", "path2": "b"}],
            {},
            r"'gone.jpg' cannot be read.*under folder",
        ),
        ([{"prompt": "x", "path1": "../a.jpg", "path2": "b"}], {}, "is outside of"),
        ([{"prompt": "x", "file_path": ["a"], "human_preference": [1, 0]}], {}, "1 images .* and 2 numbers"),
        ([{"prompt": "x", "file_path": "a", "human_preference": [1, 0]}], {}, "'a' is not a list"),
        ([{"prompt": "x", "file_path": ["a"], "human_preference": [1]}], {}, "has no pairs"),
        ([{"prompt": "x", "image_path": ["a", "b"], "rank": ["1st", "2nd"]}], {}, "'1st' is not a number"),
        ([{"prompt": "x", "image_0": "a", "image_1": "b", "label_0": 3}], {}, "3.* is not a label: give 1"),
        (
            [{"prompt": one, "prompt_id": "7", "image": "a", "rank": 1} for one in ("x", "y")],
            {},
            "rows 0 and 1 of .* have the prompt_id '7' and different prompts",
        ),
        (
            [{"prompt": "x", "prompt_id": None, "image": "a", "rank": rank} for rank in (1, 2)],
            {},
            "row 0 of .*, column 'prompt_id': it is empty",
        ),
        (
            [{"prompt": "x", "image1": "a", "image2": "b", "votes_image1": 1, "votes_image2": -2}],
            {},
            "column 'votes_image2': -2 is not a number of votes",
        ),
        (
            [{"prompt": "x", "path1": "a", "path2": "b", "label": 0}],
            {},
            "of which the first would be the preferred image, and label: say under columns",
        ),
        ([{"prompt": 3, "path1": "a", "path2": "b"}], {}, "prompt names a column of int64, not text"),
        ([{"prompt": "x", "path1": "a", "path2": "b"}], {"margin": 2}, "margin is 2"),
        ([{"prompt": "x", "path1": "a", "path2": "b"}], {"margin": 0.2}, "has no votes: take it out"),
        ([{"prompt": "x", "path1": "a", "path2": "b"}], {"row_groups": 0}, "row_groups is 0"),
        (
            [{"prompt": "x", "a": "a", "b": "b"}],
            {"columns": PairColumns(first="a", second="c")},
            "no column 'c'",
        ),
    ],
)
def test_tables_that_cannot_be_read(
    rows: list[dict[str, Any]], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (file := tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match=said):
        PreferenceFiles(str(file), **options)


def test_a_winner_has_so_much_more_of_all_votes_than_the_other() -> None:
    columns = PairColumns(first="a", second="b", first_votes="for a", second_votes="for b")
    table = pa.table({"prompt": ["x"] * 5, "for a": [6, 4, 11, 5, 0], "for b": [4, 6, 9, 5, None]})
    for margin, labels in ((0.0, "101--"), (0.1, "101--"), (0.2, "10---"), (0.21, "-----")):
        found = [pair.label for pair in columns.pairs(table, margin, "table")]
        assert "".join("-" if label != label else f"{label:.0f}" for label in found) == labels


def test_columns_that_make_no_pairs() -> None:
    with pytest.raises(ConfigError, match="columns: first make no pairs; give prompt and one of these: "):
        PairColumns(first="a")
    with pytest.raises(ConfigError, match="columns: nothing make no pairs"):
        PairColumns()
    with pytest.raises(ConfigError, match="first and second are both a"):
        PairColumns(first="a", second="a")


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a table: give a file or a pattern of .parquet"):
        PreferenceFiles(str(tmp_path))
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "a.csv").write_text("a\n")
    with pytest.raises(ConfigError, match=r"holds .json and .csv files"):
        PreferenceFiles(str(tmp_path))


def test_tables_of_several_folders_need_one_for_the_images(tmp_path: Path) -> None:
    """Else ``pairs`` of two runs would all have the images of the first, whose names are the same."""
    for number in range(2):
        (run := tmp_path / f"version_{number}").mkdir()
        for side in range(2):
            (run / f"{side}.jpg").write_bytes(jpeg(number, (16, 16)))
        row = {"prompt": f"prompt {number}", "image_0": "0.jpg", "image_1": "1.jpg", "label_0": 1}
        (run / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(
        ConfigError, match=r"several folders, such as .*version_0 and .*version_1, and names of"
    ):
        PreferenceFiles(f"{tmp_path}/version_*/pairs.jsonl")
    assert len(PreferenceFiles(f"{tmp_path}/version_1/pairs.jsonl")) == 1
    assert len(PreferenceFiles(f"{tmp_path}/version_*/pairs.jsonl", folder=f"{tmp_path}/version_0")) == 2


def test_names_and_prompts_of_digits_stay_text_in_a_csv(tmp_path: Path) -> None:
    for name in ("0001", "0002"):
        (tmp_path / name).write_bytes(jpeg(int(name), (16, 16)))
    (file := tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n1984,0001,0002\n")
    source = PreferenceFiles(str(file))
    assert (source.prompt(0), source.image(0, 1)) == ("1984", jpeg(2, (16, 16)))


def test_keys_of_an_archive_that_lack_a_member_are_told(tmp_path: Path) -> None:
    archive(tmp_path, {name: name for name in ("caption", "jpg_0", "jpg_1", "label_0")})
    with tarfile.open(tmp_path / "train_00001.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("half.jpg_0"))
        tar.addfile(tarfile.TarInfo("readme.txt"))
    with pytest.warns(
        UserWarning, match=r"1 key with some .* such as key half of .*, left out; 12 pairs read"
    ):
        assert len(WebDatasetPairs(str(tmp_path))) == COUNT


def test_archives_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "train.tar").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"train.tar is not a tar archive that can be read"):
        WebDatasetPairs(str(tmp_path))
    archive(tmp_path, {"caption": "text", "jpg_0": "0.jpg", "jpg_1": "1.jpg", "label_0": "label"})
    with pytest.raises(ConfigError, match=r"has no pairs: no key has members that end in jpg_0 or jpg_0.jpg"):
        WebDatasetPairs(str(tmp_path / "train_*.tar"))
