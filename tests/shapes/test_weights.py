"""The shipped weights, held against floors well below what was measured when they were made."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from jsonargparse import CLI
from pyarrow import parquet

from lit_align.rewards import AestheticScore
from lit_align.rewards.clip import CLIPCosine
from lit_align.shapes import (
    CLIP,
    FLOW_PIPELINE,
    FLOW_WEIGHTS_HASH,
    PICK,
    PIPELINE,
    PREFERENCE,
    PROMPTS,
    WEIGHTS,
    WEIGHTS_HASH,
)
from lit_align.shapes.recipe.__main__ import main
from lit_align.shapes.recipe.images import has_frame, mutate, numpy_rng
from lit_align.shapes.recipe.pipeline import digest, load_pipeline
from lit_align.shapes.recipe.preference import preference_quality
from lit_align.shapes.recipe.preferences import SCHEMA
from lit_align.shapes.recipe.quality import Sampling, clip_quality, draw, rates, sample, vae_quality
from lit_align.shapes.recipe.tokenizer import make_tokenizer
from lit_align.shapes.world import judge, parse, words


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_everything_that_ships_is_small() -> None:
    folders = (WEIGHTS, FLOW_PIPELINE, PICK.parent, PROMPTS)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) <= 40e6


def test_the_weights_are_those_that_every_result_names() -> None:
    assert digest(WEIGHTS) == WEIGHTS_HASH


def test_so_are_those_of_the_flow_model() -> None:
    assert digest(FLOW_PIPELINE) == FLOW_WEIGHTS_HASH


@pytest.mark.parametrize("folder", [CLIP, PREFERENCE], ids=lambda folder: folder.name)
def test_our_rewards_prepare_images_as_the_training_did(folder: Path) -> None:
    images = draw(4, 6, "preprocess")[1]
    assert torch.allclose(CLIPCosine(str(folder)).preprocess(images), images * 2 - 1, atol=1e-6)


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
    # It was standardised on the scenes of before, where objects stood anywhere.
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.25


def test_clip_prefers_the_true_caption() -> None:
    quality = clip_quality(CLIP, 200, 3)
    assert quality["beats one changed fact"] > 0.9
    assert quality["caption of an image, R@1"] > 0.9


def test_samples_follow_their_prompts_where_the_model_was_careful(pipeline: StableDiffusionPipeline) -> None:
    captions, _ = draw(64, 3, "samples")
    images = sample(pipeline, captions, Sampling(10, 1.0, 1.0), 3)
    careless = has_frame(images)
    assert 0.35 < careless.float().mean() < 0.7
    two = {
        kind: rates(images[rows], [captions[i] for i in rows.nonzero()[:, 0].tolist()])
        for kind, rows in (("careless", careless), ("careful", ~careless))
    }
    assert min(shares["background"] for shares in two.values()) > 0.9
    assert two["careful"]["score"] > 0.5
    assert two["careful"]["score"] > two["careless"]["score"] + 0.15
    assert two["careful"]["colours"] > 0.4
    assert two["careful"]["shapes"] > 0.4


@pytest.mark.slow  # with other weights test_reward_models.py measures the same
def test_the_preference_model_prefers_as_the_utility_does() -> None:
    captions, images = draw(64, 3, "preference")
    before, after = (preference_quality(folder, PICK, images, captions) for folder in (CLIP, PREFERENCE))
    assert after["pairs, by utility"] > max(0.75, before["pairs, by utility"] + 0.01)
    assert after["pairs, as labelled"] > max(0.72, before["pairs, as labelled"] + 0.01)
    assert after["utility, generated, Pearson"] > before["utility, generated, Pearson"]


def test_the_aesthetic_head_knows_blur_from_a_crisp_image() -> None:
    images = draw(128, 3, "aesthetic")[1]
    blurred = F.interpolate(F.avg_pool2d(images, 4), 64, mode="bilinear")
    score = AestheticScore(pretrained="shapes")
    assert (score(images, []) > score(blurred, [])).float().mean() > 0.8


def test_pairs_that_ship_are_read_as_pick_a_pic_is() -> None:
    table = parquet.read_table(PICK)
    assert table.num_rows == 1000
    assert table.schema.equals(SCHEMA)
    labels = table.column("label_0").to_pylist()
    assert set(labels) == {0.0, 0.5, 1.0}
    assert 0.4 < labels.count(1.0) / (labels.count(1.0) + labels.count(0.0)) < 0.6


@pytest.mark.slow
def test_the_whole_recipe_runs(tmp_path: Path) -> None:
    sizes = "--num_images 64 --num_latents 64 --num_samples 2 --num_pairs 24"
    budget = "--steps 2 --minutes 5 --num_processes 1"
    CLI(main, as_positional=False, args=["--out", str(tmp_path), *sizes.split(), *budget.split()])
    for name in ("pipeline", "flow"):
        drawn = sample(load_pipeline(tmp_path / name), ["a red circle"], Sampling(2, 1.0, 1.0), 0)
        assert drawn.shape == (1, 3, 64, 64)
    assert "\nflow samples:\n" in (tmp_path / "quality" / "quality.md").read_text()
    assert {file.name for file in (tmp_path / "quality").glob("*.png")} == {"samples.png", "flow.png"}
