"""What an update of PRDP takes at one time: peak memory against images and steps, with one micro-batch size.

    python -m tests.benchmarks.two_passes [--micro_batch 16] [--pretrained shapes]

A cell is two updates on ``B`` images (two a prompt) of ``T`` steps: the reference's log-ratios, the second
pass of the first update, and both passes of the other. It has a process of its own, since an allocator keeps
what it once had. Memory is the peak above what the loaded model and the stored chains take; the chains, which
grow with B and T, are given apart. They are random numbers: what they hold changes no memory.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lit_align.backbones import StableDiffusionBackbone
from lit_align.methods import Optimisation, PRDPModule, Sampling
from lit_align.methods.metrics import Loss, Metrics
from lit_align.replay import Replay
from lit_align.rewards import Redness, RewardBank
from lit_align.rollout import Trajectory
from lit_align.samplers import DDIM
from tests.benchmarks.machine import each_alone, machine, now, peak_above, peak_bytes, reset_peak

SIZES = ((4, 5), (16, 20), (64, 50))
"""Images and steps of the cells."""


def measure(options: argparse.Namespace, images: int, steps: int) -> dict[str, Any]:
    """Peak bytes and seconds of two updates on so many images of so many steps."""
    module = PRDPModule(
        StableDiffusionBackbone(options.pretrained),
        partial(DDIM, num_steps=steps, eta=1.0),
        RewardBank({"redness": Redness()}, {"redness": 1.0}),
        inner_epochs=2,
        optimisation=Optimisation(micro_batch=options.micro_batch),
        sampling=Sampling(guidance=1.0, batch=options.micro_batch, seed=0),
    ).to(options.device)
    cond = module.backbone.encode([f"{i // 2} blue squares" for i in range(images)])
    policy = module.backbone.policy(module.sampler, cond, module.sampling.guidance)
    states = torch.randn(steps + 1, images, *module.backbone.latent_shape, device=module.device)
    replay = Replay(policy, Trajectory(states, states[1:].clone(), torch.zeros(steps, images)))
    rewards = torch.arange(float(images), dtype=torch.float64).view(-1, 2)
    module.update = accumulate  # type: ignore[method-assign]
    reset_peak()
    before, started = peak_bytes(), now(module, cpu_time=module.device.type == "cpu")
    old, _ = module._compare(replay)
    module._learn(replay, old.view(*rewards.shape, -1), rewards)
    seconds = now(module, cpu_time=module.device.type == "cpu") - started
    chains = (states.numel() * 2 - states[0].numel()) * states.element_size()
    found = {"images": images, "steps": steps, "peak_bytes": peak_above(before), "chain_bytes": chains}
    return found | {"seconds": seconds, "machine": machine(module)}


def accumulate(losses: Sequence[Loss], scale: float = 1.0) -> Metrics:
    """Differentiate as an update does, without its optimizer step, which needs a Trainer."""
    for compute in losses:
        loss, _ = compute()
        loss.backward()
    return {}


def show(cells: Sequence[dict[str, Any]], micro_batch: int) -> None:
    """Print the table: a row for each cell."""
    table = Table(title=f"Two updates of PRDP in micro-batches of {micro_batch} (image, step) pairs")
    for header in ("images", "steps", "MB", "MB of stored chains", "seconds"):
        table.add_column(header, justify="right")
    for cell in cells:
        megabytes = [f"{cell[name] / 1e6:,.1f}" for name in ("peak_bytes", "chain_bytes")]
        table.add_row(str(cell["images"]), str(cell["steps"]), *megabytes, f"{cell['seconds']:.1f}")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; returns the cells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--micro_batch", type=int, default=16, help="(image, step) pairs of a backward pass")
    parser.add_argument("--pretrained", default="shapes", help="a pipeline's folder or hub id")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the metrics")
    options = parser.parse_args(arguments)
    cells = each_alone(partial(measure, options, *size) for size in SIZES)
    show(cells, options.micro_batch)
    if options.out:
        options.out.write_text(json.dumps(cells, indent=2))
    return cells


if __name__ == "__main__":
    main()
