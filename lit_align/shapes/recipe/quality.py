"""How good the weights are: ``python -m lit_align.shapes.recipe.quality --out DIR``; minutes on one CPU.

Everything is measured on fresh captions and scenes, drawn with another seed than the training images; the
judge of the world is exact.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from jsonargparse import CLI
from torch import Tensor
from transformers import CLIPTokenizer

from lit_align.shapes import FLOW_PIPELINE, PICK, WEIGHTS
from lit_align.shapes.recipe.aesthetic import aesthetic_quality
from lit_align.shapes.recipe.classifier import classifier_quality
from lit_align.shapes.recipe.clip import embed_images, embed_texts, load_clip, tokenize
from lit_align.shapes.recipe.detector import detector_quality
from lit_align.shapes.recipe.images import as_images, has_frame, mutate, numpy_rng
from lit_align.shapes.recipe.pipeline import load_pipeline
from lit_align.shapes.recipe.preference import preference_quality
from lit_align.shapes.recipe.report import write_grid, write_table
from lit_align.shapes.world import (
    FAVOURITE,
    PromptSpace,
    judge,
    observe,
    parse,
    render,
    sample_caption,
    sample_scene,
)

FACTS = ("background", "colours", "shapes", "count", "sizes", "relation")


@dataclass(frozen=True)
class Sampling:
    """One way to sample: DDIM steps, eta, guidance."""

    steps: int
    eta: float
    guidance: float


CELLS = (
    *(Sampling(10, 1.0, guidance) for guidance in (1.0, 1.5, 2.0, 3.0, 5.0)),
    *(Sampling(10, 0.0, guidance) for guidance in (1.0, 3.0)),
    *(Sampling(steps, 1.0, 3.0) for steps in (5, 20)),
)
RECOMMENDED = Sampling(10, 1.0, 1.0)
"""Guidance shows no more facts of the shipped denoiser, and costs twice as much."""
CEILING = (RECOMMENDED, Sampling(10, 1.0, 3.0))
"""How the denoiser is sampled that has seen clean captions alone: what could be shown without lies."""
FLOW_CELLS = (
    *(Sampling(10, 0.0, guidance) for guidance in (1.0, 1.5, 2.0, 3.0, 5.0)),
    *(Sampling(steps, 0.0, 1.0) for steps in (5, 20)),
)
FLOW_RECOMMENDED = Sampling(10, 0.0, 1.0)
FLOW_CEILING = (FLOW_RECOMMENDED, Sampling(10, 0.0, 3.0))
PARTS = {
    "pipeline": ("samples", CELLS, RECOMMENDED),
    "clean": ("samples, clean captions alone", CEILING, RECOMMENDED),
    "flow": ("flow samples", FLOW_CELLS, FLOW_RECOMMENDED),
    "flow_clean": ("flow samples, clean captions alone", FLOW_CEILING, FLOW_RECOMMENDED),
}
"""For each folder: its table, how it is sampled, and how that is recommended. The clean ones do not ship."""
FRESH = 1000
"""Fresh renders on which CLIP and the reward models are measured."""


def draw(num: int, seed: int, purpose: str) -> tuple[list[str], Tensor]:
    """Captions of the training distribution with a true image of each, ``(num, 3, 64, 64)`` in [0, 1]."""
    rng = numpy_rng(seed, purpose)
    captions = [sample_caption(rng) for _ in range(num)]
    pixels = np.stack([render(sample_scene(caption, rng)) for caption in captions])
    return [str(caption) for caption in captions], as_images(pixels)


def rates(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Shares of images that have a fact right, if their caption asserts it; ``whole``: all facts right."""
    verdicts = [judge(image, caption) for image, caption in zip(images, captions, strict=True)]
    held = {fact: [verdict.facts[fact] for verdict in verdicts if fact in verdict.facts] for fact in FACTS}
    shares = {fact: float(np.mean(values)) for fact, values in held.items() if values}
    whole = np.array([verdict.score == 1 for verdict in verdicts])
    kinds = np.array(
        [2 if (said := parse(caption)).relation else len(said.groups) - 1 for caption in captions]
    )
    for number, kind in enumerate(("one group", "two groups", "relations")):
        if (kinds == number).any():
            shares[f"whole, {kind}"] = float(whole[kinds == number].mean())
    return {
        **shares,
        "score": float(np.mean([verdict.score for verdict in verdicts])),
        "whole": float(whole.mean()),
    }


@torch.no_grad()
def vae_quality(vae: AutoencoderKL, num: int, seed: int) -> dict[str, float]:
    """Decibels of reconstructions, and the share that the judge still finds exactly right."""
    captions, images = draw(num, seed, "vae")
    latents = vae.encode(images * 2 - 1).latent_dist.mean
    output = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    decibels = -10 * (output - images).square().mean((1, 2, 3)).log10()
    overall = -10 * (output - images).square().mean().log10()
    return {
        "dB": float(overall),
        "dB, worst of 20": float(decibels.quantile(0.05)),
        **rates(output, captions),
    }


@torch.no_grad()
def clip_quality(folder: Path, num: int, seed: int) -> dict[str, float]:
    """Retrieval among ``num``, and the share of captions that beat a version with one fact changed."""
    model, tokenizer = load_clip(folder), CLIPTokenizer.from_pretrained(folder)
    captions, images = draw(num, seed, "clip")
    rng = numpy_rng(seed, "mutations")
    wrong = [mutate(caption, rng) for caption in captions]
    seen = embed_images(model, images)
    right, false = (embed_texts(model, tokenize(tokenizer, texts)) for texts in (captions, wrong))
    cosines, own = seen @ right.T, torch.arange(num)
    return {
        "caption of an image, R@1": float((cosines.argmax(1) == own).float().mean()),
        "image of a caption, R@1": float((cosines.argmax(0) == own).float().mean()),
        "beats one changed fact": float((cosines.diagonal() > (seen * false).sum(1)).float().mean()),
        "cosine, own": float(cosines.diagonal().mean()),
        "cosine, another's": float((cosines.sum() - cosines.diagonal().sum()) / (num * (num - 1))),
    }


def sample(
    pipeline: DiffusionPipeline, prompts: Sequence[str], way: Sampling, seed: int, batch_size: int = 64
) -> Tensor:
    """Images ``(N, 3, 64, 64)`` in [0, 1]; the first noise of image i is the same whatever the way.

    A flow model draws no other noise: ``way.eta`` is not for it.
    """
    model: Any = pipeline
    options: dict[str, Any] = {"eta": way.eta}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        # Equal steps, of which the last is no shorter; and no tokens in place of T5's.
        options = {"sigmas": np.linspace(1, 1 / way.steps, way.steps).tolist(), "max_sequence_length": 0}
    images = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(part))]
        result = model(
            part,
            num_inference_steps=way.steps,
            guidance_scale=way.guidance,
            generator=generators,
            output_type="pt",
            **options,
        )
        images.append(result.images)
    return torch.cat(images).float()


def open_bias(images: Tensor) -> float:
    """Share of red among the objects of clear colour, in images of prompts that name no colour."""
    colours = [thing.colour for image in images for thing in observe(image).objects if thing.colour]
    return colours.count(FAVOURITE) / max(1, len(colours))


def open_prompts(num: int, seed: int) -> list[str]:
    """Prompts of one group without a colour; none on a red background, where red is impossible."""
    space, rng = PromptSpace(["open"]), numpy_rng(seed, "open")
    prompts = [space[int(i)] for i in rng.permutation(len(space))]
    return [prompt for prompt in prompts if FAVOURITE not in prompt][:num]


def measure_samples(
    folder: Path, ways: Sequence[Sampling], recommended: Sampling, captions: Sequence[str], seed: int
) -> tuple[list[dict[str, float]], Tensor]:
    """One row of shares per way of sampling, and the images of the recommended way.

    Args:
        folder: The pipeline's.
        ways: How to sample.
        recommended: One of these.
        captions: N prompts.
        seed: Of the noise.
    """
    pipeline = load_pipeline(folder)
    sample(pipeline, captions[:8], recommended, seed)  # the first call is slower
    cells = []
    for way in ways:
        start = time.process_time()
        images = sample(pipeline, captions, way, seed)
        seconds = (time.process_time() - start) * 64 / len(captions)
        framed = float(has_frame(images).float().mean())
        cells.append(
            {**asdict(way), **rates(images, captions), "framed": framed, "CPU-seconds of 64": seconds}
        )
        print({name: round(value, 3) for name, value in cells[-1].items()}, flush=True)
        if way == recommended:
            shown = images
    return cells, shown


def measure_reward_models(
    weights: Path, pairs: Path, images: Tensor, captions: Sequence[str], seed: int
) -> dict[str, dict[str, float]]:
    """How far each reward model agrees with the world, on fresh renders and on these generated images."""
    return {
        "aesthetic": aesthetic_quality(weights / "aesthetic", weights / "clip", images, FRESH, seed),
        "preference": preference_quality(weights / "preference", pairs, images, captions),
        "preference: CLIP before": preference_quality(weights / "clip", pairs, images, captions),
        "detector": detector_quality(weights / "detector", images, captions, FRESH, seed),
        "classifier": classifier_quality(weights / "classifier", images, captions, FRESH, seed),
    }


def measure(
    out: Path,
    weights: Path = WEIGHTS,
    flow: Path = FLOW_PIPELINE,
    pairs: Path = PICK,
    num_samples: int = 256,
    seed: int = 1,
) -> None:
    """Measure everything, by default of the shipped models.

    Args:
        out: Folder for ``quality.json``, ``quality.md`` and grids of images.
        weights: Folder with ``pipeline``, ``clip`` and the reward models; where ``clean`` and ``flow_clean``
            are there, the denoisers before they saw captions that are wrong, these are measured too.
        flow: Folder of the flow model.
        pairs: Preference pairs that no model was trained on: a Parquet file, or a folder of them.
        num_samples: Captions per way of sampling.
        seed: Of captions, scenes and noise.
    """
    captions, _ = draw(num_samples, seed, "samples")
    rows, shown = {}, {}
    places = {name: weights / name for name in PARTS} | {"flow": flow}
    for name, (part, ways, recommended) in PARTS.items():
        if places[name].exists():
            rows[part], shown[name] = measure_samples(places[name], ways, recommended, captions, seed)
    prompts = open_prompts(num_samples, seed)
    pipeline = load_pipeline(weights / "pipeline")
    report = {
        "vae": vae_quality(pipeline.vae, num_samples, seed),
        "clip": clip_quality(weights / "clip", FRESH, seed),
        **measure_reward_models(weights, pairs, shown["pipeline"], captions, seed),
        "red in open prompts": open_bias(sample(pipeline, prompts, RECOMMENDED, seed)),
        "captions": num_samples,
        **rows,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "quality.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    write_table(out / "quality.md", report)
    for name, file in {"pipeline": "samples.png", "flow": "flow.png"}.items():
        if name in shown:
            write_grid(out / file, shown[name], captions)


if __name__ == "__main__":
    CLI(measure, as_positional=False)
