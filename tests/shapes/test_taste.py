"""Aesthetics and utility of Shapes images: what they reward, what they punish, and their bounds."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from lit_align.shapes.world import (
    AESTHETIC_WEIGHT,
    Bytes,
    Item,
    Scene,
    aesthetics,
    judge,
    render,
    sample_caption,
    sample_scene,
    utility,
)
from lit_align.shapes.world.observation import _pixels
from lit_align.shapes.world.taste import _lab


def images(number: int) -> list[Bytes]:
    rng = np.random.default_rng(0)
    return [render(sample_scene(sample_caption(rng), rng)) for _ in range(number)]


def disc(x: float = 32.0, colour: str = "red", background: str = "white") -> Bytes:
    return render(Scene((Item(x, 32.0, 10.0, colour, "circle"),), background))


def blurred(image: Bytes, radius: float) -> Bytes:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def pale(image: Bytes, keep: float) -> Bytes:
    return np.rint(255 - (255.0 - image) * keep).astype(np.uint8)


def noisy(image: Bytes, sigma: float) -> Bytes:
    noise = np.random.default_rng(1).normal(0, sigma, image.shape)
    return np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("change", "degrees", "loss"), [(blurred, (0, 1, 2, 4), 0.2), (pale, (1, 0.5, 0.25, 0.1), 0.2)]
)
def test_every_image_loses_with_blur_and_paleness(change, degrees, loss: float) -> None:
    for image in images(20):
        scores = [aesthetics(change(image, degree)) for degree in degrees]
        assert np.all(np.diff(scores) < 0.01), scores
        assert scores[-1] < scores[0] - loss


def test_noise_is_no_sharpness() -> None:
    scores = np.array([[aesthetics(noisy(image, sigma)) for sigma in (0, 8, 24)] for image in images(20)])
    assert np.all(np.diff(scores.mean(0)) < -0.05)


def test_contrasted_colours_are_better() -> None:
    assert aesthetics(disc(colour="blue", background="yellow")) > aesthetics(disc(colour="cyan")) + 0.05


def test_balance_is_better_wherever_the_objects_are() -> None:
    items = [Item(x, 32.0, 8.0, "red", "square") for x in (12.0, 32.0, 52.0)]
    left, middle, _ = (aesthetics(render(Scene((item,), "white"))) for item in items)
    both = aesthetics(render(Scene((items[0], items[2]), "white")))
    assert both == pytest.approx(middle, abs=0.05)
    assert left < middle - 0.1


def test_it_changes_little_by_little() -> None:
    steps = np.diff([aesthetics(disc(x)) for x in np.arange(12, 52, 0.5)])
    assert np.abs(steps).max() < 0.02


def test_bounds_on_any_image() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    flat = np.full((64, 64, 3), 90, np.uint8)
    checks = np.indices((64, 64)).sum(0)[..., None] % 2 * np.full(3, 255)
    for image in (noise, checks.astype(np.uint8), disc(), disc(x=5)):
        assert 0 <= aesthetics(image) <= 1
    assert aesthetics(flat) < 1e-6
    assert aesthetics(noise) < 0.5 < aesthetics(disc())


def test_bytes_and_tensors_alike() -> None:
    for image in images(3):
        tensor = torch.from_numpy(image).permute(2, 0, 1) / 255
        assert aesthetics(tensor) == pytest.approx(aesthetics(image))


def test_distances_are_those_of_cielab() -> None:
    known = {
        (255, 255, 255): (100, 0, 0),
        (255, 0, 0): (53.24, 80.09, 67.2),
        (0, 0, 255): (32.3, 79.2, -107.9),
    }
    for pixel, lab in known.items():
        measured = _lab(_pixels(np.full((64, 64, 3), pixel, np.uint8)))[0, 0] - (16, 0, 0)
        assert measured == pytest.approx(lab, abs=0.15)


def test_utility_adds_facts_and_taste() -> None:
    prompt = "a red circle on a white background"
    assert utility(disc(), prompt) == judge(disc(), prompt).score + AESTHETIC_WEIGHT * aesthetics(disc())
    assert utility(blurred(disc(), 0.7), prompt) > utility(disc(), "a blue square on a cyan background")
