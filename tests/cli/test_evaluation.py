"""Overlays of published prompt sets, each on tiny files of the layout that it is distributed in."""

import csv
import json
import sys
from pathlib import Path

import pytest

from lit_align.cli import main

ROOT = Path(__file__).parents[2]
BANK = "{brightness: {class_path: Brightness}, redness: {class_path: Redness}}"


def parti_prompts() -> list[str]:
    rows = [
        ("Prompt", "Category", "Challenge", "Note"),
        ('"STOP" painted on a wall', "World Knowledge", "Writing & Symbols", ""),
        ("a bear, and a bee", "Animals", "Quantity", "two"),
    ]
    Path("PartiPrompts.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return [row[0] for row in rows[1:]]


def hpdv2() -> list[str]:
    Path("benchmark").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        Path(f"benchmark/{style}.json").write_text(json.dumps([f"a {style} of a dog"]))
    return [f"a {style} of a dog" for style in ("anime", "concept-art", "paintings", "photo")]


def drawbench() -> list[str]:
    rows = [("A red colored car.", "Colors"), ("One cat, and two dogs.", "Counting")]
    with Path("drawbench.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Prompts", "Category"), *rows])
    return [row[0] for row in rows]


def geneval() -> list[str]:
    circle, star = (
        {"class": "circle", "count": 1},
        {"class": "star", "count": 1, "position": ["left of", 0]},
    )
    rows = [
        {"tag": "single_object", "include": [circle], "prompt": "a circle"},
        {"tag": "position", "include": [circle, star], "prompt": "a star left of a circle"},
        {"tag": "counting", "include": [circle | {"count": 2}], "exclude": [circle | {"count": 3}]}
        | {"prompt": "two circles"},
    ]
    Path("evaluation_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(row["prompt"]) for row in rows]


SETS = {
    "parti_prompts": (parti_prompts, 1632),
    "hpdv2": (hpdv2, 3200),
    "drawbench": (drawbench, 200),
    "geneval": (geneval, 553),
}


def test_every_overlay_is_here():
    assert {path.stem for path in (ROOT / "configs" / "eval").glob("*.yaml")} == {*SETS, "distance"}


@pytest.mark.parametrize(("name", "method"), [*((name, "ddpo") for name in SETS), ("drawbench", "dpo")])
def test_a_method_is_tested_on_a_published_set(name, method, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    write, published = SETS[name]
    wanted = write()
    arguments = [
        *("--config", str(ROOT / "configs" / f"{method}.yaml")),
        *("--config", str(ROOT / "configs" / "eval" / f"{name}.yaml")),
        "--trainer.accelerator=cpu",
        f"--model.backbone.pretrained={tiny}",
        "--model.sampler.num_steps=2",
        "--model.sampler.noisy_steps=2",
        f"--model.rewards.rewards={BANK}",
        "--model.rewards.weights={brightness: 1.0}",
        "--data.test_images_per_prompt=1",
    ]
    if name == "geneval":
        arguments += [
            "--model.rewards.rewards.geneval=GenEval",
            "--model.rewards.rewards.geneval.pretrained=shapes",
        ]
    with pytest.warns(UserWarning, match=f"test_prompts is {published}"):
        main(["test", *arguments])
    (result,) = tmp_path.glob("logs/*/version_0/test.json")
    metrics = json.loads(result.read_text())["metrics"]
    assert metrics["reward"]["num_pairs"] == len(wanted)
    assert ("reward/geneval" in metrics) == (name == "geneval")
    page = result.with_name("report.html").read_text()
    kept = [json.loads(line)["prompt"] for line in (result.parent / "test_images/metadata.jsonl").open()]
    assert sorted(kept) == sorted(wanted)
    assert page.count("<figure") == len(wanted)
