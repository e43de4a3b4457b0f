"""What a gradient through the sampler costs: peak memory and time against K, with and without checkpointing.

    python -m tests.benchmarks.memory [--steps 1 2 5 10] [--images 16] [--guidance 1] [--pretrained shapes]

A cell is one micro-batch: a chain whose last K predictions are attached, decoding, the CLIP score and the
backward pass to an adapter. Each cell has a process of its own, since an allocator keeps what it once had.
Memory is the peak above what the loaded models take: of the GPU's tensors, or resident. Time is that of the
second of two turns: of the CPU, or on a GPU of the clock.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from lit_align.backbones import StableDiffusionBackbone
from lit_align.data import Batch
from lit_align.methods import AlignPropModule, Sampling
from lit_align.methods.alignprop import FixedWindow
from lit_align.rewards import CLIPScore, RewardBank
from lit_align.samplers import DDIM
from tests.benchmarks.machine import each_alone, machine, now, peak_above, peak_bytes, reset_peak

Checkpointing = Literal["none", "prediction"]


def measure(options: argparse.Namespace, steps: int, checkpointing: Checkpointing) -> dict[str, Any]:
    """Peak bytes and seconds of one micro-batch whose last ``steps`` predictions are attached."""
    module = AlignPropModule(
        StableDiffusionBackbone(options.pretrained, checkpointing=checkpointing),
        partial(DDIM, num_steps=max(options.steps), eta=1.0),
        RewardBank({"clip": CLIPScore("shapes")}, {"clip": 1.0}),
        FixedWindow(steps),
        sampling=Sampling(guidance=options.guidance, seed=0),
    ).to(options.device)
    index = torch.arange(options.images)
    batch = Batch([f"a red circle and {i} blue squares" for i in index.tolist()], index, index=index)
    cond = module.backbone.encode(batch.prompts)
    attached = torch.arange(max(options.steps)) >= max(options.steps) - steps
    reset_peak()
    before = peak_bytes()
    for _ in range(2):
        started = now(module, cpu_time=module.device.type == "cpu")
        latents, _ = module.differentiable_sample(batch, cond, attached[:, None].expand(-1, len(batch)))
        module.rewards(module.backbone.decode(latents), batch.prompts).total.sum().backward()
        seconds = now(module, cpu_time=module.device.type == "cpu") - started
    peak = peak_above(before)
    cell = {"steps": steps, "checkpointing": checkpointing, "peak_bytes": peak, "seconds": seconds}
    return cell | {"machine": machine(module)}


def show(cells: Sequence[dict[str, Any]], images: int) -> None:
    """Print the table: a row for each K."""
    table = Table(title=f"A micro-batch of {images} images, the last K predictions attached")
    for header in ("K", "MB", "seconds", "MB, checkpointed", "seconds, checkpointed"):
        table.add_column(header, justify="right")
    for steps in sorted({cell["steps"] for cell in cells}):
        both = sorted((c for c in cells if c["steps"] == steps), key=lambda cell: cell["checkpointing"])
        metrics = [f for c in both for f in (f"{c['peak_bytes'] / 1e6:,.0f}", f"{c['seconds']:.2f}")]
        table.add_row(str(steps), *metrics)
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; returns the cells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 5, 10], help="K; the chain has the most"
    )
    parser.add_argument("--images", type=int, default=16, help="images of the micro-batch")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--pretrained", default="shapes", help="a pipeline's folder or hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the metrics")
    options = parser.parse_args(arguments)
    kinds = product(("none", "prediction"), options.steps)
    cells = each_alone(partial(measure, options, steps, checkpointing) for checkpointing, steps in kinds)
    show(cells, options.images)
    if options.out:
        options.out.write_text(json.dumps(cells, indent=2))
    return cells


if __name__ == "__main__":
    main()
