"""The comparison with TRL: our side does the counted work, and the verdicts are those of their numbers.

What needs TRL runs where LIT_ALIGN_PEER names the Python of an environment that has it.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.cli import main as lit_align
from lit_align.errors import ConfigError
from lit_align.rewards import Redness
from tests.benchmarks.harness.plan import ROOT
from tests.benchmarks.harness.run import CellFailed
from tests.benchmarks.peer import check, main, parse, receive, start
from tests.benchmarks.peers.our_side import REDNESS, arguments
from tests.benchmarks.peers.race import (
    CLOCK,
    EVERY,
    OURS,
    TRL,
    curve,
    held_out,
    report,
    rewards,
    time_to,
    training,
    verdict,
)
from tests.benchmarks.peers.shown import summary, warnings_of
from tests.benchmarks.peers.turns import Work, redness

PEER = os.environ.get("LIT_ALIGN_PEER")
needs_trl = pytest.mark.skipif(
    PEER is None,
    reason="LIT_ALIGN_PEER: the Python of an environment with TRL 0.23.1 (tests/benchmarks/README.md)",
)

IMAGES, PROMPTS, STEPS, BATCH, ATTACHED = 8, 4, 3, 4, 2
SIZES = [f"--images={IMAGES}", f"--prompts={PROMPTS}", f"--steps={STEPS}", f"--batch={BATCH}"]

DDPO_ROWS = {
    "denoiser": 2 * IMAGES * STEPS
    + 2 * PROMPTS,  # sampling, and the KL at a step of each prompt's first image
    "denoiser with gradient": 2 * IMAGES * STEPS,
    "decoder": IMAGES,
}
ALIGNPROP_ROWS = {
    "denoiser": 2 * IMAGES * (STEPS - ATTACHED),
    "denoiser with gradient": 2
    * 2
    * IMAGES
    * ATTACHED,  # forward, and again in the backward pass, as the decoder
    "decoder with gradient": 2 * IMAGES,
}
TRL_ROWS = {
    "ddpo": DDPO_ROWS | {"denoiser": 2 * IMAGES * STEPS},
    "alignprop": {
        "denoiser with gradient": 2 * IMAGES * (STEPS + ATTACHED),
        "decoder with gradient": IMAGES,
    },
}


@pytest.fixture
def work(tiny: Path, tmp_path: Path) -> Work:
    """Two rounds, of which one is measured, on a tiny model."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a {colour} circle" for colour in ("red", "green", "blue", "yellow")))
    return Work("ddpo", str(tiny), str(prompts), IMAGES, STEPS, 5.0, 4, BATCH, ATTACHED, rounds=1)


def test_the_reward_of_both_sides_is_ours():
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(redness(images), Redness()(images, ["", "", ""]))


@pytest.mark.parametrize(("method", "rows"), [("ddpo", DDPO_ROWS), ("alignprop", ALIGNPROP_ROWS)])
def test_our_side_does_the_counted_work_in_turns(
    method: str, rows: dict[str, int], work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    end, others = Pipe()
    for _ in range(work.rounds + 1):
        end.send_bytes(b"go")  # which waits in the pipe
    threads = torch.get_num_threads()
    lit_align(arguments(replace(work, method=method), os.dup(others.fileno()), tmp_path))
    torch.set_num_threads(threads)
    introduced, *rounds = (json.loads(end.recv_bytes()) for _ in range(work.rounds + 2))
    assert introduced["threads"] == 1
    assert introduced["trained"] > 0
    for one in rounds:
        assert one["rows"] == rows
        assert one["seconds"] > 0
        assert one["peak_bytes"] >= one["resident_bytes"] > 0
        assert -1 < one["reward"] < 1
    assert not end.poll()  # nothing was said beside
    (written,) = tmp_path.glob(f"{method}/version_0/config.yaml")
    assert "noisy_steps: 3" in written.read_text()  # all of them


def test_sizes_that_the_sides_cannot_share_are_refused():
    def given(*sizes: str) -> argparse.Namespace:
        return parse(["speed", "--trl=python", *sizes])

    check(given())
    check(given("--method", "alignprop", "--prompts=2"))  # one update: any number of prompts
    for sizes, told in {
        ("--images=60",): "--batch 16",
        ("--prompts=7",): "--prompts 7",
        ("--prompts=2",): "4 updates",
        ("--attached=21",): "--steps, 20",
        ("--rounds=0",): "--rounds 0: give at least 1",
        ("--batch=0",): "--batch 0: give at least 1",
    }.items():
        with pytest.raises(ConfigError, match=told):
            check(given(*sizes))


def test_a_python_that_is_not_there_is_said_in_a_sentence(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"peer: --trl .*/python: there is no such program"):
        main(["speed", f"--trl={tmp_path / 'python'}"])


def test_a_run_of_the_race_that_fails_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(_options: argparse.Namespace) -> None:
        raise CellFailed("ended with status 1")

    monkeypatch.setattr("tests.benchmarks.peers.race.run", fails)
    with pytest.raises(SystemExit, match="peer: ended with status 1"):
        main(["race", f"--trl={sys.executable}"])


def side(seconds: list[float], **changes: Any) -> dict[str, Any]:
    rounds = [
        {"seconds": s, "peak_bytes": 10 * s, "resident_bytes": 5.0, "reward": 0.1, "rows": {"denoiser": 4}}
        for s in seconds
    ]
    return {"versions": {"torch": "2"}, "trained": 7, "threads": 1, "rounds": rounds} | changes


def test_ratios_are_those_of_neighbouring_rounds_without_the_first():
    told = {"ours": side([99.0, 2.0, 4.0, 9.0]), "trl": side([1.0, 4.0, 4.0, 6.0])}
    seconds = summary(told)["seconds"]
    assert seconds == {"ours": 4.0, "trl": 4.0, "ratio": 1.0, "lowest": 0.5, "highest": 1.5}
    assert summary(told)["rows"] == {"denoiser": {"ours": 4, "trl": 4}}
    assert warnings_of(told) == []
    unfair = {"ours": side([1.0]), "trl": side([1.0], versions={"torch": "1"}, trained=8, threads=2)}
    assert len(warnings_of(unfair)) == 3


def test_a_side_that_ends_early_says_why(work: Work, tmp_path: Path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho No module named trl\nexit 1\n")
    python.chmod(0o755)
    (place := tmp_path / "trl").mkdir()
    end, others = Pipe()
    process = start("trl", work, str(python), others, place)
    others.close()
    with pytest.raises(RuntimeError, match=r"side of trl(.|\n)*No module named trl"):
        receive(end, process, place / "log")
    assert process.returncode == 1


OUR_CURVE = [(0.0, 0, 1.0), (10.0, 64, 2.0), (20.0, 128, 3.0)]


def test_the_time_to_a_level_lies_between_two_points():
    assert time_to(OUR_CURVE, 2.5) == 15.0
    assert time_to(OUR_CURVE, 1.0) == 0.0
    assert time_to(OUR_CURVE, 3.1) is None
    dip = [(0.0, 0, 1.0), (1.0, 1, 0.5), (2.0, 2, 1.5)]
    assert time_to(dip, 1.25) == 1.75  # the way back up
    assert time_to(dip, 0.75) == 0.0  # it began above


def test_the_verdict_takes_a_level_above_both_starts():
    slow = [(0.0, 0, 1.5), (100.0, 24, 2.0), (200.0, 48, 1.0)]
    told = verdict(OUR_CURVE, slow)
    assert (told["level"], told["ours"], told["trl"], told["ratio"]) == (2.0, 10.0, 100.0, 0.1)
    assert told["below"] == 20.0 / 200.0
    fast = [(0.0, 0, 1.0), (10.0, 24, 5.0)]
    told = verdict(OUR_CURVE, fast)
    assert (told["level"], told["ratio"], told["below"]) == (3.0, 4.0, None)
    ahead = [(0.0, 0, 4.0), (10.0, 24, 5.0)]  # its pretrained reward is above all of ours
    assert verdict(OUR_CURVE, ahead)["ratio"] is None
    worse = [(0.0, 0, 2.0), (10.0, 64, 1.5)]  # training made ours worse: nothing to say of its time
    assert verdict(worse, [(0.0, 0, 1.0), (10.0, 24, 1.2)])["below"] is None
    tables = report([{"method": "ddpo", "seed": 1, "verdict": verdict(OUR_CURVE, slow)}])
    assert tables.row_count == 1


def test_the_race_trains_on_our_rewards_and_never_on_held_out_prompts():
    assert set(OURS) == set(TRL) == set(EVERY) == {"ddpo", "alignprop"}
    config = ROOT / "configs" / "ddpo.yaml"
    kept = held_out(config, 8)
    assert len(set(kept)) == 8
    prompts = training(config, [*kept, training(config, kept, 1)[0]], 1)
    assert len(prompts) == 4096
    assert not set(prompts) & set(kept)
    assert prompts != training(config, kept, 2)
    found = rewards(config)
    assert found == {"truth": ("ShapesTruth", {}, 1.0), "clip": ("CLIPScore", {"pretrained": "shapes"}, 2.0)}


@pytest.mark.slow
def test_our_curve_is_the_held_out_reward_against_training_time_and_resumes(
    tiny: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["lit_align"])

    def fit(epochs: int, *more: str) -> list[tuple[float, int, float]]:
        validation = (
            "{source: {class_path: TextPrompts, init_args: {path: PATH}}, validation_fraction: 0.5, "
            "test_fraction: 0.0, prompts_per_batch: 1, images_per_prompt: 2, validation_prompts: 1, "
            "validation_images_per_prompt: 2}"
        ).replace("PATH", work.prompts)
        lit_align(
            [
                "fit",
                f"--config={ROOT / 'configs' / 'ddpo.yaml'}",
                f"--model.backbone.pretrained={tiny}",
                f"--model.rewards.init_args={REDNESS}",
                "--model.sampler.init_args={num_steps: 2, noisy_steps: 1}",
                "--model.updates=1",
                f"--data.init_args={validation}",
                f"--trainer.max_epochs={epochs}",
                "--trainer.limit_train_batches=1",
                "--trainer.accelerator=cpu",
                f"--trainer.logger.init_args.save_dir={tmp_path}",
                "--trainer.enable_progress_bar=false",
                f"--trainer.callbacks+={CLOCK}",
                *more,
            ]
        )
        return curve(tmp_path / "ddpo" / "version_0")

    first = fit(1)
    assert [images for _, images, _ in first] == [0, 2]
    both = fit(2, "--ckpt_path=last")
    assert both[:2] == first
    (start_, one, two) = (seconds for seconds, _, _ in both)
    assert start_ == 0.0
    assert 0 < one < two  # the seconds of the first run are in those of the second


@needs_trl
@pytest.mark.parametrize("method", ["ddpo", "alignprop"])
def test_both_sides_do_the_same_work(method: str, tiny: Path, tmp_path: Path):
    assert PEER is not None
    out = tmp_path / "peer.json"
    options = [f"--attached={ATTACHED}", "--rounds=1", f"--pipeline={tiny}", f"--out={out}"]
    main(["speed", f"--trl={PEER}", f"--method={method}", *SIZES, *options])
    found = json.loads(out.read_text())[method]
    assert found["sides"]["trl"]["rounds"][1]["rows"] == TRL_ROWS[method]
    assert warnings_of(found["sides"]) == []


@needs_trl
@pytest.mark.parametrize("method", ["ddpo", "alignprop"])
def test_a_race_of_trl_goes_on_as_if_it_had_not_been_stopped(method: str, tmp_path: Path):
    assert PEER is not None
    own = {
        "ddpo": {
            "sample_batch_size": 2,
            "train_batch_size": 1,
            "sample_num_batches_per_epoch": 1,
            "per_prompt_stat_tracking": True,
            "per_prompt_stat_tracking_min_count": 1,
        },
        "alignprop": {"train_batch_size": 1, "truncated_rand_backprop_minmax": [0, 2]},
    }
    settings: dict[str, Any] = {
        "method": method,
        "pipeline": str(ROOT / "lit_align" / "shapes" / "weights" / "pipeline"),
        "seed": 1,
        "config": own[method] | {"sample_num_steps": 2},
        "rewards": {"redness": ["Redness", {}, 1.0]},
        "train": ["a red circle", "a blue star"],
        "held_out": ["a green square"],
        "images_per_prompt": 1,
        "every": 1,
        "sample_batch": 1,
        "seconds": 1e9,
    }

    def race(name: str, *counts: int) -> list[list[float]]:
        (folder := tmp_path / name).mkdir()
        for count in counts:  # epochs after which it stops
            (folder / "settings.json").write_text(json.dumps(settings | {"target": 1e9, "epochs": count}))
            command = [PEER, "-m", "tests.benchmarks.peers.trl_side", "race"]
            environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            given = [*command, str(folder / "settings.json"), str(folder)]
            subprocess.run(given, cwd=ROOT, env=environment, check=True, capture_output=True)
        assert "trl" in json.loads((folder / "versions.json").read_text())
        return [point[1:] for point in json.loads((folder / "curve.json").read_text())]

    assert race("whole", 2) == race("parts", 1, 2)
