"""Seconds per image of the fused policy against one model: same process, same batch, in turns.

    python -m tests.benchmarks.fused [--objectives 2] [--images 16] [--rounds 5] [--cpu_time]

``one`` is the policy of a single expert, ``fused`` that of all of them at even weights, ``one random`` the
approximation that follows one expert a step. All sample the same noise, without decoding. They are medians
over the rounds; fusing ``m`` experts makes ``m`` calls of the denoiser a step, so that ``m`` is the floor of
the ratio.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from lit_align.backbones import LoRA, StableDiffusionBackbone
from lit_align.gaussian import Policy
from lit_align.methods.msdda.fusion import FusedPolicy, RandomExpertPolicy, draw_choices
from lit_align.rollout import rollout
from lit_align.samplers import DDIM
from tests.benchmarks.machine import machine, now


class Place:
    """Where the clock looks for a device."""

    device = torch.device("cpu")


def policies(options: argparse.Namespace, backbone: StableDiffusionBackbone) -> dict[str, Policy]:
    """What is timed, by name."""
    sampler = backbone.make_sampler(partial(DDIM, num_steps=options.steps))
    cond = backbone.encode([f"a star number {i}" for i in range(options.images)])
    experts = [
        backbone.policy(sampler, cond, options.guidance, f"expert{i}") for i in range(options.objectives)
    ]
    even = [1 / options.objectives] * options.objectives
    draws = [torch.Generator().manual_seed(i) for i in range(options.images)]
    choices = draw_choices(even, options.steps, draws)
    return {
        "one": experts[0],
        "fused": FusedPolicy(experts, even),
        "one random": RandomExpertPolicy(experts, choices),
    }


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print; returns the metrics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pretrained", default="shapes")
    for name, default in {"objectives": 2, "images": 16, "rounds": 5, "steps": 10, "rank": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds, on a busy machine")
    options = parser.parse_args(arguments)
    backbone = StableDiffusionBackbone(options.pretrained, lora=LoRA(options.rank, options.rank))
    for i in range(options.objectives):
        backbone.weight_sets.add(f"expert{i}")
    timed, seconds = policies(options, backbone), defaultdict(list)
    noise = torch.randn(options.images, *backbone.latent_shape)
    for turn in range(options.rounds + 1):
        for name, policy in timed.items():
            started = now(Place, options.cpu_time)
            rollout(policy, noise, options.steps, torch.Generator().manual_seed(0))
            if turn:  # the first only warms up
                seconds[name].append(now(Place, options.cpu_time) - started)
    medians = {name: median(values) / options.images for name, values in seconds.items()}
    ratios = {name: value / medians["one"] for name, value in medians.items()}
    metrics = {"seconds_per_image": medians, "ratio": ratios, "options": vars(options)}
    metrics |= {"machine": machine(Place)}
    print(json.dumps(metrics, indent=1))
    return metrics


if __name__ == "__main__":
    main()
