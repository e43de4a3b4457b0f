"""Shapes-Pick, pairs in Pick-a-Pic's form: ``python -m lit_align.shapes.recipe.pick --out DIR --pairs N``.

Each caption of the training distribution gets four images, and each two of them make a pair. As those of
Pick-a-Pic come from several models, an image is by one of five, with the shares of ``MODELS``: the pipeline
sampled well, without guidance or in fewer steps, and the renderer, which stands for a stronger model, right
or wrong in one fact. :mod:`~lit_align.shapes.recipe.preferences` says how pairs are judged.

100,000 pairs need 66,700 images: about 0.9 CPU-hours (21,000 pairs took 11 minutes) and 190 MB (1.8 kB a
pair). Everything is a pure function of the seed and the number of the prompt. A caption may be drawn again,
and prompts held out from reward models occur: who trains one must skip them.
"""

from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionPipeline
from jsonargparse import CLI
from rich.progress import Progress

from lit_align.errors import ConfigError
from lit_align.randomness import derive_seed
from lit_align.shapes import PIPELINE
from lit_align.shapes.recipe.images import mutate
from lit_align.shapes.recipe.preferences import IMAGES, PAIRS, Row, compare, counted_rng, show, write_pairs
from lit_align.shapes.recipe.quality import Sampling, sample
from lit_align.shapes.world import Bytes, parse, render, sample_caption, sample_scene

SAMPLERS = {
    "shapes-10-steps-guidance-3": Sampling(10, 1.0, 3.0),
    "shapes-10-steps-guidance-1": Sampling(10, 1.0, 1.0),
    "shapes-5-steps-guidance-3": Sampling(5, 1.0, 3.0),
}
RENDERER, WRONG = "renderer", "renderer-one-fact-wrong"
MODELS = {**dict(zip(SAMPLERS, (0.25, 0.2, 0.2), strict=True)), RENDERER: 0.2, WRONG: 0.15}
"""Share of the images by each model."""

BLOCK = 16  # prompts sampled together; fixed, because an image's last bits depend on its batch
SHARD = 1664  # prompts of a file (9,984 pairs)


def make_pick(out: Path, pairs: int, seed: int = 0, pipeline: Path = PIPELINE) -> None:
    """Write ``out/pick/seed-S-pairs-A-to-B.parquet``, 9,984 pairs a file; files that are there are kept.

    Args:
        out: Working folder of the recipe.
        pairs: How many.
        seed: Of everything.
        pipeline: Pipeline folder, by default the shipped one. Delete ``out/pick`` when it changes.

    Raises:
        ConfigError: For no pairs, or where ``out/pick`` holds files of another seed or number of pairs.
    """
    step, size = BLOCK * len(PAIRS), SHARD * len(PAIRS)
    starts = range(0, pairs, size)
    names = [f"seed-{seed}-pairs-{a:08d}-to-{min(a + size, pairs):08d}.parquet" for a in starts]
    folder = _claim(out / "pick", names)
    model = StableDiffusionPipeline.from_pretrained(pipeline)
    model.set_progress_bar_config(disable=True)
    with Progress() as bar:
        task = bar.add_task("pairs", total=pairs)
        for start, name in zip(starts, names, strict=True):
            end, rows = min(start + size, pairs), list[Row]()
            if not (folder / name).exists():
                for block in range(start // step, ceil(end / step)):
                    rows += make_block(model, seed, block)
                    bar.update(task, completed=min(start + len(rows), end))
                write_pairs(folder / name, rows[: end - start])
            bar.update(task, completed=end)


def _claim(folder: Path, names: Sequence[str]) -> Path:
    """The folder, made if need be, with no other data in it."""
    if not names:
        raise ConfigError("--pairs 0 makes no data; give at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    if strange := sorted({file.name for file in folder.glob("*.parquet")} - set(names)):
        raise ConfigError(
            f"'{folder}' holds '{strange[0]}', which is of another seed or number of pairs; "
            "delete it, or give another --out."
        )
    return folder


def make_block(pipeline: StableDiffusionPipeline, seed: int, block: int) -> list[Row]:
    """The pairs of 16 prompts, those of one prompt after another."""
    numbers = range(block * BLOCK, (block + 1) * BLOCK)
    captions = {number: str(sample_caption(counted_rng(seed, "caption", number))) for number in numbers}
    models = {number: draw_models(counted_rng(seed, "models", number)) for number in numbers}
    pixels: dict[tuple[int, int], Bytes] = {}
    for model in MODELS:
        keys = [(n, place) for n in numbers for place in range(IMAGES) if models[n][place] == model]
        if model not in SAMPLERS:
            pixels |= {key: _drawn(captions[key[0]], model, counted_rng(seed, "scene", *key)) for key in keys}
        elif keys:
            noise = derive_seed(seed, f"pick {model}", block) >> 23  # `sample` multiplies it by a million
            images = sample(pipeline, [captions[number] for number, _ in keys], SAMPLERS[model], noise)
            drawn = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
            pixels |= dict(zip(keys, drawn, strict=True))
    rows = []
    for number, caption in captions.items():
        shown = [
            show(pixels[number, place], caption, model, (seed, number, place))
            for place, model in enumerate(models[number])
        ]
        rows += compare(shown, caption, seed, number)
    return rows


def draw_models(rng: np.random.Generator) -> list[str]:
    """Who makes the images of one prompt."""
    names = list(MODELS)
    return [names[i] for i in rng.choice(len(names), IMAGES, p=list(MODELS.values()))]


def _drawn(caption: str, model: str, rng: np.random.Generator) -> Bytes:
    return render(sample_scene(parse(mutate(caption, rng) if model == WRONG else caption), rng))


if __name__ == "__main__":
    CLI(make_pick, as_positional=False)
