"""Published prompt sets, in small files of the schema that each is distributed in, and the 45 animals."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from lit_align.data import (
    Animals,
    CSVPrompts,
    JSONLPrompts,
    JSONPrompts,
    ParquetPrompts,
    PromptDataModule,
    PromptSource,
    TextPrompts,
    TSVPrompts,
)
from lit_align.data.prompts.index import index
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.rewards import FunctionReward, RewardBank
from tests.methods.build import fit, make, trained


def prompts(source: PromptSource) -> list[str]:
    return [source.prompt(row) for row in range(len(source))]


def test_hpdv2_train_is_a_list_of_pairs(tmp_path: Path) -> None:
    pairs: list[dict[str, Any]] = [
        {"human_preference": [1, 0], "prompt": text, "image_path": ["1.jpg", "2.jpg"], "user_hash": "a1"}
        for text in ("A small dog.", "A small dog.", "Ein müder Bär, 猫")
    ]
    (tmp_path / "train.json").write_text(json.dumps(pairs))
    source = JSONPrompts(str(tmp_path / "train.json"))
    assert prompts(source) == [pair["prompt"] for pair in pairs]
    assert source.columns(1)["image_path"] == ["1.jpg", "2.jpg"]
    assert (len(index(source)), index(source).repeated) == (2, 1)


def test_hpdv2_benchmark_is_a_list_of_texts_a_style(tmp_path: Path) -> None:
    styles = ("anime", "concept-art", "paintings", "photo")
    for style in styles:
        (tmp_path / f"{style}.json").write_text(json.dumps([f"A {style} of a dog.", f"A {style} of a cat."]))
    assert prompts(JSONPrompts(str(tmp_path / "photo.json"))) == ["A photo of a dog.", "A photo of a cat."]
    assert len(JSONPrompts(str(tmp_path))) == len(JSONPrompts(str(tmp_path / "*.json"))) == 8


def test_pickapic_has_a_caption_in_each_of_many_pairs(tmp_path: Path) -> None:
    captions = ["a cat", "a cat", "a dog", "", "a cat"]
    for shard in range(2):
        pairs = {
            "are_different": [True] * 5,
            "best_image_uid": ["u"] * 5,
            "caption": captions if shard == 0 else [f"{caption} in space" for caption in captions],
            "jpg_0": [b"\xff\xd8"] * 5,
            "jpg_1": [b"\xff\xd8"] * 5,
            "label_0": [1.0, 0.0, 0.5, 1.0, 0.0],
            "ranking_id": list(range(5)),
        }
        pyarrow.parquet.write_table(pa.table(pairs), tmp_path / f"train-{shard:05d}-of-00002.parquet")
    source = ParquetPrompts(str(tmp_path / "train-*.parquet"), "caption", keep=[])
    found = index(source)
    assert source.columns(0) == {}
    assert {source.prompt(int(row)).strip() for row in found.rows} == {
        "a cat", "a dog", "a cat in space", "a dog in space", "in space"
    }  # fmt: skip
    assert (found.empty, found.repeated) == (1, 4)


def test_diffusiondb_has_a_prompt_per_image(tmp_path: Path) -> None:
    images = {
        "image_name": ["a.png", "b.png", "c.png"],
        "prompt": ["ultrarealistic fox, 8 k", "ultrarealistic fox, 8 k", "a castle "],
        "part_id": pa.array([1, 1, 2], pa.uint16()),
        "seed": pa.array([7, 8, 9], pa.uint32()),
        "cfg": pa.array([7.0, 7.0, 12.0], pa.float32()),
        "timestamp": pa.array([0, 1, 2], pa.timestamp("us", "UTC")),
        "prompt_nsfw": pa.array([0.1, 0.1, 0.9], pa.float32()),
    }
    pyarrow.parquet.write_table(pa.table(images), tmp_path / "metadata.parquet")
    source = ParquetPrompts(str(tmp_path / "metadata.parquet"), keep=["prompt_nsfw"])
    assert len(index(source)) == 2
    assert source.columns(2) == {"prompt_nsfw": pytest.approx(0.9)}


def test_partiprompts_are_not_quoted(tmp_path: Path) -> None:
    rows = [
        ("bond", "Abstract", "Basic", "Concepts with several meanings"),
        ('"G I G G L E" painted on a wall', "Illustrations", "Writing & Symbols", ""),
        ('a sign that says "Deep" at the edge', "World Knowledge", "Writing & Symbols", 'see: "a note"'),
        ('"an open quote', "Arts", "Basic", ""),
        ("the word 'START'", "Illustrations", "Writing & Symbols", ""),
    ]
    lines = ["Prompt\tCategory\tChallenge\tNote", *("\t".join(row) for row in rows)]
    (file := tmp_path / "PartiPrompts.tsv").write_text("\n".join(lines) + "\n")
    source = TSVPrompts(str(file), "Prompt")
    assert prompts(source) == [row[0] for row in rows]
    assert source.columns(2) == {
        "Category": "World Knowledge", "Challenge": "Writing & Symbols", "Note": 'see: "a note"'
    }  # fmt: skip


def test_drawbench_is_quoted_where_it_must_be(tmp_path: Path) -> None:
    text = 'Prompts,Category\nA red colored car.,Colors\n"A sign, that says ""Hello"".",Text\n'
    (file := tmp_path / "drawbench.csv").write_text(text)
    source = CSVPrompts(str(file), "Prompts")
    assert prompts(source) == ["A red colored car.", 'A sign, that says "Hello".']
    assert source.columns(1) == {"Category": "Text"}


@pytest.mark.parametrize(("source", "name"), [(TSVPrompts, "p.tsv"), (CSVPrompts, "p.csv")])
def test_the_column_that_was_meant_is_named(tmp_path: Path, source: Any, name: str) -> None:
    (file := tmp_path / name).write_text("Prompts\na cat\n")
    with pytest.raises(ConfigError, match=rf"{name} has no column 'prompt', .* mean column: Prompts\?"):
        source(str(file))


# The animals


def test_the_animals_are_those_of_the_papers() -> None:
    names = prompts(Animals())
    assert len(set(names)) == len(names) == 45
    assert (names[0], names[15], names[-1]) == ("cat", "raccoon", "kangaroo")


@pytest.mark.parametrize(
    ("template", "ant"),
    [
        ("A painting of a {animal}", "A painting of a ant"),
        ("A painting of {an animal}", "A painting of an ant"),
        ("{an animal} riding a bike", "an ant riding a bike"),
    ],
)
def test_templates_name_the_animal(template: str, ant: str) -> None:
    assert prompts(Animals(template))[20] == ant


@pytest.mark.parametrize("template", ["a cat", "", "a {name}", "a {animal", "a {}", "{animal.colour}"])
def test_a_template_without_an_animal_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"template of Animals is .*\{an animal\}") as caught:
        Animals(template)
    assert f"'{template}'" in str(caught.value)


def test_all_animals_can_be_trained_on() -> None:
    data = PromptDataModule(Animals(), prompts_per_batch=45, validation_fraction=0.0, test_fraction=0.0)
    data.setup("fit")
    assert len(set(next(iter(data.train_dataloader())).prompts)) == 45


# Folders of prompts for reinforcement learning


def test_flow_grpo_folders_are_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text('a sign that says "Hello"\na cat\n')
    (tmp_path / "test.txt").write_text("a dog\n")
    (tmp_path / "validation.txt").write_text("a bird\n")
    data = PromptDataModule(
        TextPrompts(str(tmp_path / "train.txt")),
        test_source=TextPrompts(str(tmp_path / "test.txt")),
        validation_source=TextPrompts(str(tmp_path / "validation.txt")),
        prompts_per_batch=2,
        images_per_prompt=1,
    )
    data.setup("fit")
    assert set(next(iter(data.train_dataloader())).prompts) == {'a sign that says "Hello"', "a cat"}
    assert next(iter(data.test_dataloader())).prompts[0] == "a dog"
    with pytest.raises(ConfigError, match=r"several splits, such as .* and .*: give one of them"):
        TextPrompts(str(tmp_path))


def test_geneval_metadata_keeps_what_is_asked_for(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
        {
            "tag": "position",
            "include": [
                {"class": "dog", "count": 1},
                {"class": "chair", "count": 1, "position": ["left of", 0]},
            ],
            "prompt": "a photo of a chair left of a dog",
        },
        {
            "tag": "counting",
            "include": [{"class": "clock", "count": 3}],
            "exclude": [{"class": "clock", "count": 4}],
            "prompt": "a photo of three clocks",
        },
        {
            "tag": "color_attr",
            "include": [{"class": "cup", "count": 1, "color": "red"}],
            "prompt": "a photo of a red cup",
        },
    ]
    (tmp_path / "train_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JSONLPrompts(str(tmp_path / "train_metadata.jsonl"))
    assert prompts(source) == [row["prompt"] for row in rows]
    for number, row in enumerate(rows):
        columns = source.columns(number)
        given = [
            {name: value for name, value in one.items() if value is not None} for one in columns["include"]
        ]
        assert (columns["tag"], given) == (row["tag"], row["include"])


def test_geneval_2_keeps_its_questions(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "two dogs on a bench",
            "atom_count": 3,
            "vqa_list": [["How many dogs are there?", "two"], ["Is there a bench?", "Yes"]],
            "skills": ["count", "object"],
        },
        {"prompt": "a cat", "atom_count": 1, "vqa_list": [["Is there a cat?", "Yes"]], "skills": ["object"]},
    ]
    (tmp_path / "geneval2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JSONLPrompts(str(tmp_path / "geneval2.jsonl"))
    assert [source.columns(n)["vqa_list"] for n in range(2)] == [row["vqa_list"] for row in rows]


def test_t2i_compbench_has_a_file_for_each_skill_and_split(tmp_path: Path) -> None:
    for skill in ("color", "3d_spatial"):
        (tmp_path / f"{skill}_train.txt").write_text(f"a {skill} prompt\nanother {skill} prompt\n")
        (tmp_path / f"{skill}_val.txt").write_text(f"a held-out {skill} prompt\n")
    assert len(TextPrompts(str(tmp_path / "*_train.txt"))) == 4
    with pytest.raises(ConfigError, match="several splits"):
        TextPrompts(str(tmp_path))


def test_flow_factory_rows_may_lack_a_key(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "a cat", "negative_prompt": "blurry"}\n{"prompt": "a dog"}\n'
    )
    source = JSONLPrompts(str(tmp_path / "prompts.jsonl"))
    assert [source.columns(n)["negative_prompt"] for n in range(2)] == ["blurry", None]


def test_a_folder_of_one_split_is_read_whole(tmp_path: Path) -> None:
    for name in ("animals.txt", "testimony.txt", "training.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    assert len(TextPrompts(str(tmp_path))) == 3


def counted(images: Any, prompts: Any, **columns: Any) -> Any:
    """Reads the data's columns, as GenEval does."""
    asked = columns.get("include") or columns.get("vqa_list") or [[""]] * len(prompts)
    return images.mean((1, 2, 3)) + torch.tensor([float(len(entries)) for entries in asked])


SETS: dict[str, tuple[str, Any]] = {
    "ocr/train.txt": ('a sign "HI {n}"\n', TextPrompts),
    "geneval/train_metadata.jsonl": (
        '{{"tag": "position", "include": [{{"class": "dog", "count": 1}}, '
        '{{"class": "cat", "count": 1, "position": ["above", 0]}}], "prompt": "a cat above {n} dogs"}}\n',
        JSONLPrompts,
    ),
    "geneval2.jsonl": (
        '{{"prompt": "{n} cats", "atom_count": 2, "vqa_list": [["How many?", "{n}"]], "skills": ["x"]}}\n',
        JSONLPrompts,
    ),
    "color_train.txt": ("a red book and {n} yellow vases\n", TextPrompts),
}


@pytest.mark.parametrize(
    "name", [name if "geneval/" in name else pytest.param(name, marks=pytest.mark.slow) for name in SETS]
)
def test_each_set_trains_a_method_for_a_batch(name: str, tiny: Path, tmp_path: Path) -> None:
    line, source = SETS[name]
    (file := tmp_path / name).parent.mkdir(exist_ok=True)
    file.write_text("".join(line.format(n=n) for n in range(24)))
    options: dict[str, Any] = {"validation_fraction": 0.2, "test_fraction": 0.2, "prompts_per_batch": 4}
    data = PromptDataModule(source(str(file)), images_per_prompt=2, **options)
    policy = make(DDPOModule, tiny, rewards=RewardBank({"it": FunctionReward(counted)}, {"it": 1.0}))
    before = trained(policy)
    fit(policy, tmp_path / "run", data=data)
    assert not all(torch.equal(one, other) for one, other in zip(before, trained(policy), strict=True))
