"""``pairs``: from the images of ``predict`` and a bank to preference data that DPO and SPIN read."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_align.cli import main
from lit_align.cli.bank import read_bank
from lit_align.cli.pairs import pairs_command
from lit_align.data import FolderPairs, PromptDataModule, ShapesPrompts, ShapesPromptSet
from lit_align.errors import ConfigError
from lit_align.methods import DPOModule, SPINModule
from tests.data.pick import greys, module
from tests.methods.build import fit, make, trained

ROOT = Path(__file__).parents[2]

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


def test_a_pipe_that_nobody_reads(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after ``| head``: one line, and no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as ended:
            main(["pairs", str(folder)])
    assert ended.value.code == 141
    assert capsys.readouterr().err.startswith("lit_align: nobody reads what this prints")


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


SMALL = """
trainer:
  accelerator: cpu
  max_epochs: 1
  limit_train_batches: 1
  limit_val_batches: 1
  limit_predict_batches: 2
  enable_progress_bar: false
model: {init_args: {sampler: {init_args: {num_steps: 2, noisy_steps: 1}}}}
data: {init_args: {validation_prompts: 2, validation_images_per_prompt: 1, eval_batch: 16}}
"""


def commands_of_the_page() -> list[list[str]]:
    """``predict``, ``pairs`` and ``fit``, each with its arguments."""
    page = (ROOT / "lit_align" / "data" / "README.md").read_text()
    lines = re.findall(r"^python -m lit_align (?:predict|pairs|fit) .*", page, re.MULTILINE)
    return [shlex.split(line, comments=True)[3:] for line in lines]


def source_of(command: list[str], option: str) -> Any:
    """The set of prompts that a command gives."""
    assert command[command.index(f"--data.{option}") + 1] == "ShapesPromptSet"
    return ShapesPromptSet(command[command.index(f"--data.{option}.name") + 1])  # type: ignore[arg-type]


def test_the_prompts_of_the_page_are_trained_on_and_not_tested_on(tmp_path: Path) -> None:
    predict, _, dpo = commands_of_the_page()
    drawn = PromptDataModule(ShapesPrompts(["pair"]), predict_source=source_of(predict, "predict_source"))
    drawn.setup("predict")
    prompts = [prompt for batch in drawn.predict_dataloader() for prompt in dict.fromkeys(batch.prompts)]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"image_0": "a.png", "image_1": "a.png", "label_0": 1}
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row | {"prompt": prompt}) + "\n" for prompt in prompts))
    sources = {name: source_of(dpo, name) for name in ("validation_source", "test_source")}
    data = module(
        FolderPairs(str(table)), pairs_per_batch=64, validation_prompts=64, test_prompts=128, **sources
    )
    assert len(data.train_dataloader()) == len(prompts) // 64 == 2048 // 64
    held_out = [
        p for loader in (data.val_dataloader(), data.test_dataloader()) for b in loader for p in b.prompts
    ]
    assert len(set(held_out)) == 64 + 128
    assert not set(held_out) & set(prompts)


@pytest.mark.slow
def test_the_commands_of_the_page_make_pairs_that_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In small: two steps, and 4 of the prompts."""
    predict, pairs, dpo = commands_of_the_page()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "bank.yaml").write_text("rewards: {light: {class_path: Brightness}}\nweights: {light: 1.0}")
    (tmp_path / "small.yaml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    ddpo = ["--config", "small.yaml", "--data.images_per_prompt", "2", "--data.prompts_per_batch", "2"]
    main(["fit", "--config", "configs/ddpo.yaml", *ddpo, "--trainer.limit_val_batches", "0"])
    main([*predict[:3], *ddpo, *predict[3:]])
    main(pairs)
    main([*dpo[:3], "--config", "small.yaml", "--data.pairs_per_batch", "4", *dpo[3:]])
    assert "4 of 4 pairs to train on" in capsys.readouterr().out
    assert list(Path("logs/dpo/version_0").glob("checkpoints/*.ckpt"))


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
        (
            "another size",
            ["--rewards", "bank.yaml"],
            r"several sizes .*000003.png has 16 x 24 pix.*; make them",
        ),
        ("", ["--margin=-1"], "equal scores would make pairs; give 0 or more"),
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
    elif change == "another size":
        Image.new("RGB", (16, 24)).save(folder / "000003.png")
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
        ("rewards: {red: {class_path: Redness}}", "it has no bank; give rewards"),
        ("data: {}", "it has no bank"),
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
