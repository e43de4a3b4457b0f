"""``pairs``: from the images of ``predict`` and a bank to preference data that DPO and SPIN read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_align.cli.bank import read_bank
from lit_align.cli.pairs import pairs_command
from lit_align.data import FolderPairs
from lit_align.errors import ConfigError
from lit_align.methods import DPOModule, SPINModule
from tests.data.pick import greys, module
from tests.methods.build import fit, make, trained

BANK = """
rewards:
  light: {class_path: Brightness}
  mine: {class_path: FunctionReward, init_args: {function: tests.cli.test_pairs_command.worth, scope: group}}
weights: {light: 1.0, mine: 1000.0}
"""


def worth(images: Any, prompts: Any, groups: Any, worth: Any) -> Any:
    """The data's own number, and one for each image of a prompt: a broken one has none."""
    assert len(set(zip(groups.tolist(), prompts, strict=True))) == len(set(prompts))
    return [value if value is None else float(value) for value in worth]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six prompts of three images, as predict writes them; brighter images have more reward."""
    folder, lines = tmp_path / "predictions", []
    folder.mkdir()
    for number in range(18):
        prompt, level = number // 3, 40 * (number % 3) + number
        name = f"{number:06d}.png"
        Image.new("RGB", (16, 16), (level,) * 3).save(folder / name)
        row = {"file_name": name, "prompt": f"prompt {prompt}", "seed": 0, "index": number}
        row |= {"reward": None if number == 17 else float(level), "worth": -number if number != 16 else None}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    (tmp_path / "bank.yaml").write_text(BANK)
    return folder


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_and_the_worst_of_each_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs_command([str(folder)])
    made = rows(folder / "pairs.jsonl")
    assert [row["image_0"] for row in made[:2]] == ["000002.png", "000005.png"]
    assert [row["image_1"] for row in made[:2]] == ["000000.png", "000003.png"]
    assert made[5]["image_0"] == "000016.png"  # the image without a score is in no pair
    assert "6 of 6 prompts" in capsys.readouterr().out
    source = FolderPairs(str(folder / "pairs.jsonl"))
    data = module(source, view="pairs", validation_fraction=0.0, test_fraction=0.0, pairs_per_batch=6)
    batch = next(iter(data.train_dataloader()))
    assert all(a > b for a, b in zip(greys(batch.winners), greys(batch.losers), strict=True))


def test_a_bank_scores_with_groups_and_columns(folder: Path, tmp_path: Path) -> None:
    pairs_command([str(folder), "--rewards", str(tmp_path / "bank.yaml"), "--all", "--batch", "4"])
    made = rows(folder / "pairs.jsonl")
    assert len(made) == 3 * 5 + 1
    assert made[0] | {"score_0": 0, "score_1": 0} == {
        "prompt": "prompt 0", "image_0": "000000.png", "image_1": "000001.png", "label_0": 1,
        "score_0": 0, "score_1": 0,
    }  # fmt: skip
    assert made[0]["score_0"] - made[0]["score_1"] == pytest.approx(1000, rel=1e-3)


def test_a_table_above_the_folder_and_a_margin(folder: Path, tmp_path: Path) -> None:
    pairs_command([str(folder), "--out", str(tmp_path / "some.jsonl"), "--all", "--margin", "41"])
    made = rows(tmp_path / "some.jsonl")
    assert made[0]["image_0"] == "predictions/000002.png"
    assert len(made) == 5  # 82 of each prompt, 41 between neighbours
    assert len(FolderPairs(str(tmp_path / "some.jsonl"))) == 5


@pytest.mark.parametrize("method", [DPOModule, SPINModule])
def test_what_is_made_trains(method: Any, folder: Path, tiny: Path, tmp_path: Path) -> None:
    pairs_command([str(folder)])
    view = "pairs" if method is DPOModule else "winners"
    options = {"resolution": 16, "validation_fraction": 0.2, "workers": 1, "pairs_per_batch": 2}
    data = module(FolderPairs(str(folder / "pairs.jsonl")), view=view, **options)
    policy = make(method, tiny)
    before = trained(policy)
    fit(policy, tmp_path / "run", data=data)
    assert not all(torch.equal(one, other) for one, other in zip(before, trained(policy), strict=True))


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        ("", ["--out", "/elsewhere/pairs.jsonl"], "relative to its folder; give a file in"),
        ("", ["--margin", "500"], "no prompt has two images whose scores differ by more than 500"),
        ("there", [], "is there already"),
        ("gone", [], r"has no metadata.jsonl .*give the predictions/ folder"),
        ("no reward", [], "has no reward; give a bank under --rewards"),
        ("broken", [], "a line has no file_name and prompt"),
        ("no image", ["--rewards", "bank.yaml"], "000003.png cannot be read"),
        ("", ["--rewards", "nothing.yaml"], "--rewards nothing.yaml: there is no such file"),
    ],
)
def test_what_cannot_work(
    change: str, arguments: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    file = folder / "metadata.jsonl"
    if change == "there":
        (folder / "pairs.jsonl").touch()
    elif change == "gone":
        file.unlink()
    elif change == "no reward":
        file.write_text(file.read_text().replace('"reward"', '"rewards"'))
    elif change == "broken":
        file.write_text('{"prompt": "x"}\n')
    elif change == "no image":
        (folder / "000003.png").unlink()
    with pytest.raises(ConfigError, match=said):
        pairs_command([str(folder), *arguments])


# The file of a bank

WHOLE = """
model:
  init_args:
    rewards: {class_path: RewardBank, init_args: {rewards: {red: {class_path: Redness}}, weights: {red: 2}}}
"""


@pytest.mark.parametrize(
    "text",
    [
        "rewards: {red: {class_path: Redness}}\nweights: {red: 2}",
        "class_path: RewardBank\ninit_args: {rewards: {red: {class_path: Redness}}, weights: {red: 2}}",
        "rewards:\n  class_path: RewardBank\n  init_args: {rewards: {red: Redness}, weights: {red: 2}}",
        WHOLE,
    ],
)
def test_forms_of_a_bank(text: str, tmp_path: Path) -> None:
    (tmp_path / "bank.yaml").write_text(text)
    assert read_bank(str(tmp_path / "bank.yaml")).weights == {"red": 2.0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rewards: {red: {class_path: Redness}}", "there is no bank in it; give rewards"),
        ("data: {}", "there is no bank in it"),
        (
            "rewards: {red: {class_path: Rednes}}\nweights: {red: 1}",
            "no class Rednes is known; did you mean Redn",
        ),
        ("rewards: {red: {class_path: Redness}}\nweights: {blue: 1}", "weights names 'blue'"),
        (
            "rewards: {c: {class_path: ColourFraction, init_args: {color: x}}}\nweights: {c: 1}",
            "no option color",
        ),
        ("rewards: [", "not valid YAML"),
    ],
)
def test_files_that_hold_no_bank(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bank.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_bank(str(tmp_path / "bank.yaml"))
