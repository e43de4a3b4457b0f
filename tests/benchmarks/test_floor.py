import math
import sys
from pathlib import Path

import pytest

from tests.benchmarks.floor import main

ROOT = Path(__file__).parents[2]
PROMPTS, IMAGES = 2, 2
STEPS, REPLAYED = 5, 2  # steps of an image, and those of the four with noise that an update replays


@pytest.mark.slow
def test_alignprop_counts_attached_predictions_and_decodings_with_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["floor"])
    sizes = ["--rounds", "1", "--prompts", "4", "--images", "1", "--sizes", "4", "--cpu_time"]
    options = [
        "--trainer.accelerator=cpu",
        "--model.backbone.checkpointing=none",  # no prediction is made twice
        "--model.truncation=FixedWindow",
        "--model.truncation.init_args.steps=2",
        "--model.sampler.init_args.num_steps=3",
        "--model.sampler.init_args.noisy_steps=3",
    ]
    metrics = main(["--config", str(ROOT / "configs" / "alignprop.yaml"), *sizes, *options])
    (update,) = (row for row in metrics["parts"] if row["calls"])
    counted = {call["kind"]: (call["rows"], call["seen"]) for call in update["calls"]}
    assert counted == {"forward": (4, 4), "gradient": (8, 8), "decode gradient": (4, 4)}
    assert metrics["other_calls"] == {}


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("dpo", "sft")]


@pytest.mark.parametrize("method", ["spin", *SLOW])
def test_the_floor_counts_the_calls_on_pairs(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["floor"])
    sizes = ["--rounds", "1", "--prompts", "3", "--images", "1", "--sizes", "4", "--cpu_time"]
    options = ["--trainer.accelerator=cpu", "--model.optimisation.micro_batch=2"]
    if method == "spin":
        options += ["--model.steps=1", "--model.sampler.num_steps=3", "--model.sampler.noisy_steps=null"]
    metrics = main(["--config", str(ROOT / "configs" / f"{method}.yaml"), *sizes, *options])
    counted = {
        (row["part"], call["kind"]): (call["rows"], call["seen"])
        for row in metrics["parts"]
        for call in row["calls"]
    }
    compared = {("update", "gradient"): (6, 6), ("update", "forward"): (6, 6)}
    expected = {
        "spin": {("opponent's images", "forward"): (9, 9)} | compared,
        "dpo": compared,
        "sft": {("update", "gradient"): (3, 3)},
    }
    assert counted == expected[method]
    assert metrics["other_calls"] == {}


GUIDED = pytest.param(2, marks=pytest.mark.slow)


@pytest.mark.parametrize("width", [1, GUIDED], ids=["no guidance", "guidance"])
def test_the_floor_counts_the_calls_of_a_real_rollout_batch(width: int, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["floor"])
    metrics = main(
        [
            *(
                "--rounds",
                "1",
                "--prompts",
                str(PROMPTS),
                "--images",
                str(IMAGES),
                "--sizes",
                "4",
                "--cpu_time",
            ),
            "--trainer.accelerator=cpu",
            f"--model.sampling.guidance={float(width)}",
            f"--model.sampler.init_args={{num_steps: {STEPS}, noisy_steps: 4}}",
        ]
    )
    images = PROMPTS * IMAGES
    counted = {
        (row["part"], call["kind"]): (call["rows"], call["seen"])
        for row in metrics["parts"]
        for call in row["calls"]
    }
    expected = {
        ("sampling", "forward"): width * images * STEPS,
        ("sampling", "decode"): images,
        ("updates", "gradient"): width * images * REPLAYED,
        ("KL of the step", "forward"): width
        * PROMPTS,  # a step of each: less than one pair of eight is no pair
    }
    assert counted == {part: (rows, rows) for part, rows in expected.items()}
    assert metrics["other_calls"] == {}
    # No upper bound: that is a matter of the machine. CPU time, since other processes would slow either side.
    ratio = metrics["rollout batch"]["ratio"]
    assert math.isfinite(ratio)
    assert ratio > 0.9
    assert all(size > 0 for size in (metrics["bytes"] | metrics["peak_bytes"]).values())
    assert not list(tmp_path.iterdir())
