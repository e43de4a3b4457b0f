"""How the aesthetic head and the preference model are made: loss, reading of pairs, degradations, figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from lit_align.errors import ConfigError
from lit_align.rewards import AestheticScore, PickScore
from lit_align.shapes import CLIP
from lit_align.shapes.recipe import preference
from lit_align.shapes.recipe.aesthetic import (
    aesthetic_quality,
    degrade,
    fresh_renders,
    make_aesthetic,
    make_head,
    on_laions_scale,
)
from lit_align.shapes.recipe.agreement import agreement
from lit_align.shapes.recipe.clip import Contrast
from lit_align.shapes.recipe.clip import load_clip as load
from lit_align.shapes.recipe.images import Images, as_images, draw_images, held_out
from lit_align.shapes.recipe.preference import (
    SCALE,
    PreferenceStage,
    make_preference,
    preference_loss,
    preference_quality,
    preference_scores,
    read_pairs,
)
from lit_align.shapes.recipe.preferences import compare, show, write_pairs
from lit_align.shapes.recipe.training import Budget
from lit_align.shapes.world import render, sample_caption, sample_scene


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe folder with 48 images, 12 prompts with six pairs each, and the shipped CLIP."""
    folder, rng, rows = tmp_path_factory.mktemp("recipe"), np.random.default_rng(0), []
    draw_images(folder / "images", 48, 0)
    (folder / "clip").symlink_to(CLIP)
    for number in range(12):
        caption = sample_caption(rng)
        pixels = [degrade(render(sample_scene(caption, rng)), rng) for _ in range(4)]
        shown = [show(image, str(caption), "renderer", (0, number, i)) for i, image in enumerate(pixels)]
        rows += compare(shown, str(caption), 0, number)
    (folder / "pick").mkdir()
    write_pairs(folder / "pick" / "pairs.parquet", rows)
    return folder


@pytest.fixture(scope="module")
def taught(out: Path) -> Path:
    """The same folder with a preference model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preference, "DRAWN", 16)
        make_preference(out, Budget(minutes=5.0, steps=4), "32-true", 0)
    return out


def test_loss_is_the_divergence_from_the_labels() -> None:
    scores = torch.tensor([[2.0, 2.0], [0.0, 3.0], [1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    p = 1 / (1 + np.exp(-1.0))
    expected = [0.0, np.log1p(np.exp(-3.0)), 0.5 * np.log(0.5 / p) + 0.5 * np.log(0.5 / (1 - p))]
    assert preference_loss(scores, labels).tolist() == pytest.approx(expected, abs=1e-12)


def test_pairs_are_read_once_and_held_out_prompts_are_not(out: Path) -> None:
    everything, training = (read_pairs(out / "pick", for_training=trains) for trains in (False, True))
    assert len(everything.captions) == 72
    assert everything.pixels.shape == (48, 64, 64, 3)
    assert set(training.captions) == {c for c in everything.captions if not held_out(c)}
    assert len(training.captions) < 72
    assert torch.equal(everything.labels.sum(1), torch.ones(72))
    place = everything.places[1, 1]  # the second pair is of the first and the third image
    assert torch.equal(
        everything.images(place[None])[0, :, 5, 6] * 255, torch.tensor(everything.pixels[2, 5, 6])
    )
    with pytest.raises(ConfigError, match="no preference pairs"):
        read_pairs(out / "images", for_training=True)


def test_a_batch_counts_each_prompt_alike(out: Path) -> None:
    pairs = read_pairs(out / "pick" / "pairs.parquet", for_training=True)
    contrast = Contrast(Images(out / "images", 0), CLIPTokenizer.from_pretrained(CLIP))
    stage = PreferenceStage(load(CLIP), pairs, contrast, 0, Budget(1.0))
    del stage.rows[0][2:]  # one prompt has fewer pairs
    with torch.no_grad():
        scores, labels, shares = stage.compare([0, 3])
    assert shares.sum() == pytest.approx(1.0)
    loss, parts, scale = (shares * preference_loss(scores, labels)).sum(), [], load(CLIP).logit_scale.exp()
    for number in (0, 3):
        rows = stage.rows[number]
        images = pairs.images(pairs.places[rows].flatten())
        cosines = preference_scores(CLIP, images, [stage.prompts[number]] * len(images)).view(-1, 2) / scale
        parts.append(preference_loss(SCALE * cosines, pairs.labels[rows]).mean())
    torch.testing.assert_close(loss, torch.stack(parts).mean().detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_preferences_are_learnt_and_the_folder_is_pickscores(taught: Path) -> None:
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    captions = ["a red circle", "two blue squares", "a cyan heart", "a star"]
    before, after = (
        preference_quality(taught / name, taught / "pick", images, captions)
        for name in ("clip", "preference")
    )
    assert after["pairs, loss"] < before["pairs, loss"] - 0.01
    reward = PickScore(str(taught / "preference"))
    expected = preference_scores(taught / "preference", images, captions)
    torch.testing.assert_close(reward(images, captions), expected, rtol=1e-3, atol=1e-2)
    assert reward.scale == pytest.approx(SCALE, rel=0.1)  # its own, which 4 steps hardly move


@pytest.mark.slow
def test_a_head_is_learnt_and_the_reward_reads_it(taught: Path) -> None:
    make_aesthetic(taught, Budget(minutes=5.0, steps=200), "32-true", 0)
    state = load_file(taught / "aesthetic" / "model.safetensors")
    assert set(state) == {f"layers.{n}.{part}" for n in (0, 2, 4, 6, 7) for part in ("weight", "bias")}
    images = as_images(fresh_renders(60, 7))
    quality = aesthetic_quality(taught / "aesthetic", taught / "clip", images, 60, 7)
    assert quality["renders, Pearson"] > 0.25
    assert quality["generated, Pearson"] == pytest.approx(quality["renders, Pearson"], abs=1e-6)
    reward = AestheticScore(str(taught / "aesthetic" / "model.safetensors"), str(taught / "preference"))
    assert reward(images, [""] * 60).std() > 0


def test_the_head_has_laions_layers() -> None:
    kinds = [type(layer).__name__ for layer in make_head()["layers"]]
    assert kinds == ["Linear", "Dropout"] * 3 + ["Linear", "Linear"]


def test_degradations_cover_the_scale_and_repeat() -> None:
    rng = np.random.default_rng(0)
    image = render(sample_scene(sample_caption(rng), rng))
    changed = [degrade(image, np.random.default_rng(i)) for i in range(60)]
    scores = [on_laions_scale(one) for one in changed]
    assert 1 <= min(scores) < 4
    assert max(scores) == pytest.approx(on_laions_scale(image), abs=0.3)
    assert np.array_equal(changed[3], degrade(image, np.random.default_rng(3)))
    assert all(one.dtype == np.uint8 for one in changed)


def test_agreement_of_ranks_and_values() -> None:
    assert agreement([1, 2, 3, 4], [1, 8, 27, 64], "it")["it, Spearman"] == pytest.approx(1.0)
    assert agreement([1, 2, 3, 4], [1, 8, 27, 64], "it")["it, Pearson"] == pytest.approx(0.9514, abs=1e-4)
    tied = agreement([1, 1, 2, 3], [4, 3, 2, 1], "it")["it, Spearman"]  # ranks 1.5 1.5 3 4 and 4 3 2 1
    assert tied == pytest.approx(-0.9487, abs=1e-4)


def test_training_images_are_allowed(out: Path) -> None:
    images = Images(out / "images", 0)
    assert not any(held_out(images.captions[number]) for number in images.allowed().tolist())
