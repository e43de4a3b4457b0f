"""CPU time to the same held-out reward on Shapes, each side as its authors recommend it.

Both sides train the bundled pipeline on the rewards of our configuration, and never on the held-out prompts.
Ours is ``configs/ddpo.yaml`` or ``configs/alignprop.yaml``, with more validations; TRL's settings are those
of its example scripts, and its defaults where they say nothing. Each is measured with the sampling it trains
with, which is how its user would sample: so the two pretrained rewards differ, and a level counts only if it
is above both. A curve is held-out reward against the CPU seconds of training: starts, imports and
measurements are not in it.

Ours runs first, to its end. TRL runs until it has our best reward or ``--budget`` times our seconds. Both can
be stopped at any time and go on when the command is repeated; a finished cell is kept.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from lit_align.data import PromptDataModule, ShapesPrompts
from lit_align.files import write
from lit_align.shapes import PIPELINE, WEIGHTS_HASH
from tests.benchmarks.harness.plan import ROOT
from tests.benchmarks.harness.record import commit, curves
from tests.benchmarks.harness.run import alone, checkpoint_of, ended
from tests.benchmarks.peers.turns import versions

Point = tuple[float, int, float]
"""CPU seconds of training, images, held-out reward."""

CLOCK = '{"class_path": "tests.benchmarks.peers.our_side.CpuClock"}'

OURS = {
    # As shipped; a validation every two rollout batches instead of eight, or every two of sixteen.
    "ddpo": ("--trainer.max_epochs=12", "--trainer.limit_train_batches=2"),
    "alignprop": ("--trainer.max_epochs=16", "--trainer.limit_train_batches=2"),
}

TRL: dict[str, dict[str, Any]] = {
    # examples/scripts/ddpo.py; the rest are DDPOConfig's defaults: guidance 5, eta 1, lr 3e-4, clip 1e-4.
    "ddpo": {
        "sample_num_steps": 50,
        "sample_batch_size": 6,
        "train_batch_size": 3,
        "sample_num_batches_per_epoch": 4,
        "train_gradient_accumulation_steps": 1,
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": 32,
    },
    # examples/scripts/alignprop.py: 128 images an update on four GPUs, which are 16 steps of 8 here. The rest
    # are AlignPropConfig's defaults: guidance 5, eta 1, lr 1e-3, a random window.
    "alignprop": {"sample_num_steps": 50, "train_batch_size": 8, "train_gradient_accumulation_steps": 16},
}

EVERY = {"ddpo": 10, "alignprop": 1}
"""Epochs of TRL between measurements."""

TRAIN = 4096
"""Training prompts of TRL: a sample, without the held-out ones."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the race."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--budget", type=float, default=6.0, help="most CPU seconds of TRL, in ours")
    parser.add_argument("--epochs", type=int, help="most epochs of TRL; the budget alone if not given")
    parser.add_argument("--with", nargs="+", default=[], dest="also", help="option=value for our fits")
    parser.add_argument("--held_out", type=int, default=64, help="held-out prompts, four images each")
    parser.add_argument("--work", type=Path, default=ROOT / "logs" / "peer", help="folder for the runs")
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "benchmarks" / "results" / "peer")


def held_out(config: Path, count: int) -> list[str]:
    """The prompts that our validation uses."""
    data = _data(config, count)
    data.setup("validate")
    prompts = [prompt for batch in data.fixed("validation", "give more prompts") for prompt in batch.prompts]
    return list(dict.fromkeys(prompts))


def _data(config: Path, count: int) -> PromptDataModule:
    given = yaml.safe_load(config.read_text())["data"]["init_args"]
    source = ShapesPrompts(**given["source"]["init_args"])
    return PromptDataModule(source, validation_prompts=count, validation_images_per_prompt=4)


def training(config: Path, kept_out: Sequence[str], seed: int) -> list[str]:
    """Random prompts of the same kind that are not held out."""
    source, others = _data(config, 1).source, set(kept_out)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(source), (TRAIN + len(others),), generator=draw).tolist()
    prompts = (source.prompt(row) for row in rows)
    return [prompt for prompt in prompts if prompt not in others][:TRAIN]


def rewards(config: Path) -> dict[str, tuple[str, dict[str, Any], float]]:
    """The rewards that a configuration trains on: class, options and weight by name."""
    bank = yaml.safe_load(config.read_text())["model"]["init_args"]["rewards"]["init_args"]
    return {
        name: (bank["rewards"][name]["class_path"], bank["rewards"][name].get("init_args", {}), weight)
        for name, weight in bank["weights"].items()
    }


def run_ours(method: str, seed: int, folder: Path, options: argparse.Namespace) -> list[Point]:
    """Bring our run to its end, from wherever it stands; returns its curve."""
    config = ROOT / "configs" / f"{method}.yaml"
    arguments = [
        f"--config={config}",
        *OURS[method],
        f"--data.init_args.validation_prompts={options.held_out}",
        *(f"--{option}" for option in options.also),
        f"--seed_everything={seed}",
        f"--trainer.callbacks+={CLOCK}",
    ]
    print_of = hashlib.sha256(json.dumps([arguments, config.read_text(), WEIGHTS_HASH]).encode()).hexdigest()
    run, made_by = folder / "version_0", folder / "fingerprint"
    if not made_by.exists() or made_by.read_text() != print_of:
        shutil.rmtree(run, ignore_errors=True)
    if (checkpoint := checkpoint_of(run)) is None:
        (folder / "done").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write(made_by, print_of)
    if not (folder / "done").exists():
        logger = (f"save_dir={folder.parent}", f"name={folder.name}", "version=version_0")
        _launch(
            [
                *(sys.executable, "-m", "lit_align", "fit", *arguments),
                *(f"--trainer.logger.init_args.{option}" for option in logger),
                "--trainer.enable_progress_bar=false",
                *([f"--ckpt_path={checkpoint}"] if checkpoint else []),
            ],
            folder / "log",
        )
        write(folder / "done", "")
    return curve(run)


def curve(run: Path) -> list[Point]:
    """The curve of our run, from its events."""
    found = curves(run, "perf/cpu_seconds", "val/reward")
    seconds = dict(found["perf/cpu_seconds"])
    return [(seconds[images], images, reward) for images, reward in found["val/reward"]]


def run_trl(
    method: str, seed: int, folder: Path, options: argparse.Namespace, ours: Sequence[Point]
) -> list[Point]:
    """Bring TRL's run to its end, from wherever it stands; returns its curve."""
    config = ROOT / "configs" / f"{method}.yaml"
    prompts = held_out(config, options.held_out)
    settings = {
        "method": method,
        "pipeline": str(PIPELINE),
        "seed": seed,
        "config": TRL[method],
        "rewards": rewards(config),
        "train": training(config, prompts, seed),
        "held_out": prompts,
        "images_per_prompt": 4,
        "every": EVERY[method],
        "sample_batch": 64,
    }
    # A run may go on to a larger budget; with other settings it is another run.
    print_of = hashlib.sha256(json.dumps([settings, WEIGHTS_HASH]).encode()).hexdigest()
    made_by = folder / "fingerprint"
    if not made_by.exists() or made_by.read_text() != print_of:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write(made_by, print_of)
    end = {"seconds": options.budget * ours[-1][0], "target": max(reward for _, _, reward in ours)}
    end["epochs"] = sys.maxsize if options.epochs is None else options.epochs
    write(folder / "settings.json", json.dumps(settings | end))
    command = [options.trl, "-m", "tests.benchmarks.peers.trl_side", "race"]
    _launch([*command, str(folder / "settings.json"), str(folder)], folder / "log")
    return [(s, i, r) for s, i, r in json.loads((folder / "curve.json").read_text())]


def _launch(command: list[str], log: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("ab") as file:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        ).returncode
    if status:
        raise ended(f"ended with status {status}", log)


def time_to(curve: Sequence[Point], level: float) -> float | None:
    """CPU seconds until the held-out reward is first at a level, between two points on a line."""
    if curve[0][2] >= level:
        return curve[0][0]
    for (before, _, low), (after, _, high) in pairwise(curve):
        if low < level <= high:
            return before + (after - before) * (level - low) / (high - low)
    return None


def verdict(ours: Sequence[Point], trl: Sequence[Point]) -> dict[str, Any]:
    """CPU seconds of both sides to the highest reward that both had, and a bound of the ratio at our best.

    Returns:
        ``level``, ``ours``, ``trl`` and ``ratio``, all None without a level above both pretrained rewards;
        ``below``: where TRL never had our best reward, the ratio there is below this; None if our best is
        the pretrained reward, which takes no time.
    """
    best = {side: max(reward for _, _, reward in points) for side, points in (("ours", ours), ("trl", trl))}
    found: dict[str, Any] = dict.fromkeys(("level", "ours", "trl", "ratio", "below"))
    found |= {"start": [ours[0][2], trl[0][2]], "best": [best["ours"], best["trl"]]}
    level = min(best.values())
    if level > max(ours[0][2], trl[0][2]):
        times = time_to(ours, level), time_to(trl, level)
        assert times[0] is not None, "it had this reward"
        assert times[1], "it had this reward, and not at its start"
        found |= {"level": level, "ours": times[0], "trl": times[1], "ratio": times[0] / times[1]}
    if max(best["trl"], ours[0][2]) < best["ours"]:
        ours_best = time_to(ours, best["ours"])
        assert ours_best is not None
        found["below"] = ours_best / trl[-1][0]
    return found


def report(results: Sequence[dict[str, Any]]) -> Table:
    """The table of all cells."""
    table = Table(title="CPU time to the same held-out reward on Shapes")
    headers = ("method", "seed", "start, ours and TRL", "best, ours and TRL", "level", "ours", "TRL", "ratio")
    for header in (*headers, "at our best"):
        table.add_column(header)
    for one in results:
        told = one["verdict"]
        pairs = (f"{a:.3f}, {b:.3f}" for a, b in (told["start"], told["best"]))
        if told["level"] is None:
            common = ("none above both starts", "", "", "")
        else:
            common = (
                f"{told['level']:.3f}",
                f"{told['ours']:.0f} s",
                f"{told['trl']:.0f} s",
                f"{told['ratio']:.3f}",
            )
        below = "" if told["below"] is None else f"< {told['below']:.3f}"
        table.add_row(one["method"], str(one["seed"]), *pairs, *common, below)
    return table


def run(options: argparse.Namespace) -> None:
    """Run all cells and print the table."""
    results = []
    for method in options.method:
        for seed in options.seeds:
            name = f"{method}_seed{seed}"
            with alone(options.work.absolute() / name):
                ours = run_ours(method, seed, options.work.absolute() / name / "ours", options)
                trl = run_trl(method, seed, options.work.absolute() / name / "trl", options, ours)
            result = {"method": method, "seed": seed, "verdict": verdict(ours, trl), "ours": ours, "trl": trl}
            result |= {"budget": options.budget, "trl_settings": TRL[method], "our_settings": OURS[method]}
            result |= {"with": options.also, "held_out": options.held_out, "versions": versions()}
            theirs = options.work.absolute() / name / "trl" / "versions.json"
            result |= {"trl_versions": json.loads(theirs.read_text())}
            result |= {"commit": commit(), "shapes_weights": WEIGHTS_HASH}
            options.out.mkdir(parents=True, exist_ok=True)
            write(options.out / f"{name}.json", json.dumps(result, indent=1) + "\n")
            results.append(result)
    Console().print(report(results))
