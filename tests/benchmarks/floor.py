"""How near a method comes to its floor: a real run, against the denoiser calls that its algorithm must make.

    python -m tests.benchmarks.floor [--config configs/ddpo.yaml] [--rounds 5] [any option of lit_align fit]

The *floor* of a part of a rollout batch is the time of its bare calls alone, in the same process and with the
same weights: ``unet(x, t, encoder_hidden_states)`` without gradient, the same forward and backward to the
trained weights, and ``vae.decode``. No sampler, noise, log-probability, text encoder, loss, optimiser or file
is in it. The batch size is ours or the fastest of ``--sizes``, whichever takes less time per row. A row is
one (image, step) evaluation; guidance makes two of it. Rewards call no denoiser: their floor is 0.

Batches and floors take turns, and both are medians over the rounds, so that a busy machine slows both. The
batches are those of ``lit_align fit`` on one device, without validation; the first one warms up and is not
timed. A batch of ``prompts * images`` pairs is the rollout batch of a method that learns from pairs; SPIN
needs ``--model.steps 1`` and more iterations than rounds, so that each plays. A new method adds a
function to ``calls.py``.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lit_align.cli import main as lit_align

DDPO = Path(__file__).parents[2] / "configs" / "ddpo.yaml"


def measure(options: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Run ``lit_align fit`` with the timer; returns what it measured."""
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "floor.json"
        timer = {
            "class_path": "tests.benchmarks.timer.FloorTimer",
            "init_args": {"out": str(out), "sizes": options.sizes, "cpu_time": options.cpu_time},
        }
        lit_align(
            [
                "fit",
                f"--config={options.config}",
                f"--trainer.logger.init_args.save_dir={folder}",
                *_sizes(options),
                "--trainer.max_epochs=1",
                f"--trainer.limit_train_batches={options.rounds + 1}",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                *overrides,
                f"--trainer.callbacks+={json.dumps(timer)}",
            ]
        )
        metrics: dict[str, Any] = json.loads(out.read_text())
    command = f"--config {options.config} --prompts {options.prompts} --images {options.images}"
    return {"command": " ".join([command, f"--rounds {options.rounds}", *overrides])} | metrics


def _sizes(options: argparse.Namespace) -> list[str]:
    """The options for the size of a rollout batch; a pair takes the place of an image."""
    data = yaml.safe_load(Path(options.config).read_text())["data"]["class_path"]
    if data.endswith("PickaPicDataModule"):
        return [f"--data.init_args.pairs_per_batch={options.prompts * options.images}"]
    return [
        f"--data.init_args.prompts_per_batch={options.prompts}",
        f"--data.init_args.images_per_prompt={options.images}",
    ]


def show(metrics: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"{metrics['method']}: a rollout batch, medians")
    for header in ("", "rows in bare calls", "seconds", "floor", "ratio"):
        table.add_column(header, justify="right" if header else "left")

    def add(name: str, calls: str, seconds: float, floor: float) -> None:
        ratio = f"{seconds / floor:.3f}" if floor else ""
        table.add_row(name, calls, f"{seconds:.3f}", f"{floor:.3f}" if floor else "", ratio)

    for row in metrics["parts"]:
        calls = ", ".join(f"{call['rows']} {call['kind']}" for call in row["calls"])
        add(row["part"], calls, row["seconds"], row["floor"])
    table.add_section()
    floor = metrics["rollout batch"]["floor"]
    add("without rewards", "", metrics["without_rewards"]["seconds"], floor)
    add("rollout batch", "", metrics["rollout batch"]["seconds"], floor)
    console = Console()
    console.print(table)
    for name in ("machine", "fastest", "other_calls"):
        told = ", ".join(f"{key} {value}" for key, value in metrics[name].items())
        console.print(f"{name:<12} {told}", soft_wrap=True, highlight=False)
    for name in ("peak_bytes", "bytes"):
        told = ", ".join(f"{key} {value / 1e6:,.2f} MB" for key, value in metrics[name].items())
        console.print(f"{name.partition('_')[0]:<12} {told}", soft_wrap=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", default=DDPO, help="a shipped configuration of a method")
    parser.add_argument("--rounds", type=int, default=5, help="rollout batches that are timed")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of a rollout batch")
    parser.add_argument("--images", type=int, default=8, help="images of each")
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="batches to try")
    parser.add_argument(
        "--cpu_time", action="store_true", help="CPU seconds instead of the clock's: on a busy CPU"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the metrics")
    options, overrides = parser.parse_known_args(arguments)
    metrics = measure(options, overrides)
    show(metrics)
    if options.out:
        options.out.write_text(json.dumps(metrics, indent=2))
    return metrics


if __name__ == "__main__":
    main()
