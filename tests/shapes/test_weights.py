"""The shipped weights, held against floors well below what was measured when they were made."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from jsonargparse import CLI

from lit_align.shapes import CLIP, PIPELINE
from lit_align.shapes.recipe.__main__ import main
from lit_align.shapes.recipe.pictures import mutate, numpy_rng, words
from lit_align.shapes.recipe.quality import Sampling, clip_quality, draw, rates, sample, vae_quality
from lit_align.shapes.recipe.tokenizer import make_tokenizer
from lit_align.shapes.world import judge, parse


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folders_are_small() -> None:
    files = [file for folder in (PIPELINE, CLIP) for file in folder.rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= 25e6


def test_the_pipeline_loads_in_float32_as_it_is(pipeline: StableDiffusionPipeline) -> None:
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert pipeline.safety_checker is None
    assert pipeline.vae.config.scaling_factor == 1.0
    scheduler = pipeline.scheduler.config
    assert (scheduler.clip_sample, scheduler.set_alpha_to_one, scheduler.steps_offset) == (False, False, 1)


def test_every_word_is_one_token(pipeline: StableDiffusionPipeline) -> None:
    assert all(len(pipeline.tokenizer.tokenize(word)) == 1 for word in words())


def test_a_mutation_is_read_and_is_wrong() -> None:
    captions, images = draw(64, 5, "mutations")
    wrong = [mutate(caption, numpy_rng(number, "test")) for number, caption in enumerate(captions)]
    assert all(str(parse(caption)) == caption for caption in wrong)
    fooled = [judge(image, caption).score == 1 for image, caption in zip(images, wrong, strict=True)]
    assert sum(fooled) <= 2  # an unsaid size may happen to fit


def test_words_outside_the_world_fall_back_to_pieces() -> None:
    tokenizer = make_tokenizer(["red", "green", "green"])
    ids = tokenizer("red zebra").input_ids
    assert ids[1] == tokenizer.convert_tokens_to_ids("red</w>")
    assert len(ids) > 4


def test_reconstructions(pipeline: StableDiffusionPipeline) -> None:
    quality = vae_quality(pipeline.vae, 32, 3)
    assert quality["dB"] > 33
    assert quality["whole"] > 0.8
    assert quality["score"] > 0.94


def test_the_latent_is_standardised(pipeline: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        latents = pipeline.vae.encode(draw(64, 4, "vae")[1] * 2 - 1).latent_dist.mean
    assert latents.mean((0, 2, 3)).abs().max() < 0.3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.2


def test_clip_prefers_the_true_caption() -> None:
    quality = clip_quality(CLIP, 200, 3)
    assert quality["beats one changed fact"] > 0.7
    assert quality["caption of a picture, R@1"] > 0.5


def test_samples_follow_their_prompts(pipeline: StableDiffusionPipeline) -> None:
    captions, _ = draw(64, 3, "samples")
    shares = rates(sample(pipeline, captions, Sampling(10, 1.0, 3.0), 3), captions)
    assert shares["background"] > 0.8
    assert shares["colours"] > 0.5
    assert shares["count"] > 0.3
    assert shares["score"] > 0.42


@pytest.mark.slow
def test_the_whole_recipe_runs(tmp_path: Path) -> None:
    arguments = "--steps 2 --minutes 5 --num_pictures 64 --num_latents 64 --num_samples 2 --num_processes 1"
    CLI(main, as_positional=False, args=["--out", str(tmp_path), *arguments.split()])
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    assert sample(pipeline, ["a red circle"], Sampling(2, 1.0, 1.0), 0).shape == (1, 3, 64, 64)
    assert (tmp_path / "quality" / "samples.png").exists()
