"""What a denoiser could show: ``python -m lit_align.shapes.recipe.capability --out DIR``.

The claim is that captions that lie spoil what a model shows, and not what it can show. The test of it: its
images of two groups are judged, with and without guidance; then an adapter is trained for two CPU-minutes on
true renders whose captions are honest, and its images are judged again.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from jsonargparse import CLI
from peft import LoraConfig

from lit_align.shapes import PIPELINE
from lit_align.shapes.recipe.clip import tokenize
from lit_align.shapes.recipe.following import WAY
from lit_align.shapes.recipe.images import numpy_rng
from lit_align.shapes.recipe.quality import draw, rates, sample
from lit_align.shapes.recipe.training import Budget
from lit_align.shapes.recipe.unet import UNetStage
from lit_align.shapes.world import PromptSpace

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 5.0)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2", "proj_in", "proj_out"]
RENDERS = 12_000
RATE, RANK = 1e-3, 16


def two_groups(num: int, seed: int) -> list[str]:
    """Prompts of two groups."""
    space = PromptSpace(["pair"])
    return [space[int(i)] for i in numpy_rng(seed, "capability").integers(len(space), size=num)]


def judged(
    pipeline: StableDiffusionPipeline, prompts: list[str], guidance: float, seed: int
) -> dict[str, float]:
    """Shares of facts that the images show."""
    return rates(sample(pipeline, prompts, replace(WAY, guidance=guidance), seed), prompts)


def elicit(pipeline: StableDiffusionPipeline, minutes: float, seed: int) -> int:
    """Train an adapter on true renders with honest captions; the number of steps.

    Args:
        pipeline: Gets the adapter.
        minutes: CPU-minutes.
        seed: Of captions, renders and noise.
    """
    captions, images = draw(RENDERS, seed, "renders")
    with torch.no_grad():
        latents = torch.cat(
            [pipeline.vae.encode(part * 2 - 1).latent_dist.mean.half() for part in images.split(250)]
        )
    tokens, empty = tokenize(pipeline.tokenizer, captions), tokenize(pipeline.tokenizer, [""])[0]
    unet: Any = pipeline.unet
    unet.set_attn_processor(AttnProcessor())
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    stage = UNetStage(pipeline.text_encoder, unet, latents, tokens, empty, Budget(minutes), lies=True)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    torch.manual_seed(seed)
    started, steps = time.process_time(), 0
    while (spent := (time.process_time() - started) / 60 / minutes) < 1:
        optimizer.param_groups[0]["lr"] = RATE * (1 - spent)
        with torch.autocast("cpu", torch.bfloat16):
            errors = stage.errors(torch.randint(RENDERS, (64,)))
        optimizer.zero_grad()
        errors.mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        steps += 1
    return steps


def main(
    out: Path, pipeline: Path = PIPELINE, minutes: float = 2.0, num_samples: int = 256, seed: int = 4
) -> None:
    """Measure, train the adapter, measure again.

    Args:
        out: Folder for ``capability.json``.
        pipeline: Pipeline folder, by default the shipped one.
        minutes: CPU-minutes of training.
        num_samples: Images for each figure.
        seed: Of everything.
    """
    model = StableDiffusionPipeline.from_pretrained(pipeline)
    model.set_progress_bar_config(disable=True)
    prompts = two_groups(num_samples, seed)
    report: dict[str, Any] = {
        f"guidance {guidance:g}": judged(model, prompts, guidance, seed) for guidance in GUIDANCES
    }
    report["steps"] = elicit(model, minutes, seed)
    report["adapter, guidance 1"] = judged(model, prompts, 1.0, seed)
    out.mkdir(parents=True, exist_ok=True)
    (out / "capability.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    for name, shares in report.items():
        print(
            name,
            {fact: round(share, 3) for fact, share in shares.items()} if isinstance(shares, dict) else shares,
        )


if __name__ == "__main__":
    CLI(main, as_positional=False)
