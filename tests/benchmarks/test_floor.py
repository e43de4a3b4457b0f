import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.floor import main

CONFIGS = Path(__file__).parents[2] / "configs"
PROMPTS, IMAGES = 2, 2
STEPS, REPLAYED = 5, 2  # steps of an image, and those of the four with noise that an update replays

Counted = dict[tuple[str, str], tuple[int, int]]
"""By part and kind of call the rows that the floor counts, and those that were seen."""
Floor = Callable[..., tuple[Counted, dict[str, Any]]]


@pytest.fixture
def floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Floor:
    """One round of so many prompts and images: what was counted, and all that was measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["floor"])

    def measure(prompts: int, images: int, *options: str) -> tuple[Counted, dict[str, Any]]:
        sizes = f"--rounds 1 --prompts {prompts} --images {images} --sizes 4 --cpu_time".split()
        metrics = main([*sizes, "--trainer.accelerator=cpu", *options])
        assert metrics["other_calls"] == {}
        calls = [(row["part"], call) for row in metrics["parts"] for call in row["calls"]]
        return {(part, call["kind"]): (call["rows"], call["seen"]) for part, call in calls}, metrics

    return measure


@pytest.mark.slow
def test_alignprop_counts_attached_predictions_and_decodings_with_a_gradient(floor: Floor):
    counted, _ = floor(
        4,
        1,
        f"--config={CONFIGS / 'alignprop.yaml'}",
        "--model.backbone.checkpointing=none",  # no prediction is made twice
        "--model.truncation=FixedWindow",
        "--model.truncation.init_args.steps=2",
        "--model.sampler.init_args.num_steps=3",
        "--model.sampler.init_args.noisy_steps=3",
    )
    expected = {"forward": (4, 4), "gradient": (8, 8), "decode gradient": (4, 4)}
    assert {kind: rows for (_, kind), rows in counted.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spin", "dpo", "sft"])
def test_the_floor_counts_the_calls_on_pairs(method: str, floor: Floor):
    options = [f"--config={CONFIGS / method}.yaml", "--model.optimisation.micro_batch=2"]
    if method == "spin":
        options += ["--model.steps=1", "--model.sampler.num_steps=3", "--model.sampler.noisy_steps=null"]
    counted, _ = floor(3, 1, *options)
    compared = {("update", "gradient"): (6, 6), ("update", "forward"): (6, 6)}
    expected = {
        "spin": {("opponent's images", "forward"): (9, 9)} | compared,
        "dpo": compared,
        "sft": {("update", "gradient"): (3, 3)},
    }
    assert counted == expected[method]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2], ids=["no guidance", "guidance"])
def test_the_floor_counts_the_calls_of_a_real_rollout_batch(width: int, floor: Floor, tmp_path: Path):
    guidance = f"--model.sampling.guidance={float(width)}"
    steps = f"--model.sampler.init_args={{num_steps: {STEPS}, noisy_steps: 4}}"
    counted, metrics = floor(PROMPTS, IMAGES, guidance, steps)
    images = PROMPTS * IMAGES
    expected = {
        ("sampling", "forward"): width * images * STEPS,
        ("sampling", "decode"): images,
        ("updates", "gradient"): width * images * REPLAYED,
        # A step of each prompt: less than one pair of eight is no pair.
        ("KL of the step", "forward"): width * PROMPTS,
    }
    assert counted == {part: (rows, rows) for part, rows in expected.items()}
    # No upper bound: that is a matter of the machine. CPU time, since other processes would slow either side.
    ratio = metrics["rollout batch"]["ratio"]
    assert math.isfinite(ratio)
    assert ratio > 0.9
    assert all(size > 0 for size in (metrics["bytes"] | metrics["peak_bytes"]).values())
    assert not list(tmp_path.iterdir())
