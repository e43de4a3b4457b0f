"""JPEG sizes, colours and the Shapes judge against what they must be."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.errors import ConfigError
from lit_align.rewards import (
    Brightness,
    ColourFraction,
    JPEGCompressibility,
    JPEGIncompressibility,
    Redness,
    ShapesTruth,
)
from lit_align.shapes.recipe.images import as_images
from lit_align.shapes.world import parse, render, sample_scene


@pytest.mark.parametrize("quality", [95, 50])
def test_jpeg_bytes_are_those_of_pil(quality: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 32, 3), dtype=np.uint8)
    images = as_images(pixels)
    sizes = []
    for image in pixels:
        path = tmp_path_factory.mktemp("jpeg") / "it.jpg"
        Image.fromarray(image).save(path, quality=quality)
        sizes.append(path.stat().st_size / 1000)
    assert JPEGIncompressibility(quality)(images, ["", ""]).tolist() == pytest.approx(sizes, rel=1e-6)
    assert JPEGCompressibility(quality)(images, ["", ""]).tolist() == pytest.approx(
        [-s for s in sizes], rel=1e-6
    )


def test_pixels_are_rounded_and_clamped() -> None:
    def size(value: float) -> float:
        return float(JPEGIncompressibility()(torch.full((1, 3, 64, 64), value), [""]))

    file = BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "JPEG", quality=95)
    assert size(127.6 / 255) == pytest.approx(file.tell() / 1000)
    assert size(1.7) == size(1.0)
    assert size(-0.2) == size(0.0)


def image(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("rgb", "score"), [((1, 0, 0), 1), ((0, 1, 1), -1), ((0.4, 0.4, 0.4), 0), ((0.5, 0.2, 0), 0.4)]
)
def test_redness(rgb: tuple[float, ...], score: float) -> None:
    assert Redness()(image(*rgb), [""]).item() == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(("rgb", "score"), [((1, 1, 1), 1), ((0, 0, 0), 0), ((0, 1, 0), 0.587)])
def test_brightness(rgb: tuple[float, ...], score: float) -> None:
    assert Brightness()(image(*rgb), [""]).item() == pytest.approx(score, abs=1e-6)


def test_colour_fraction_counts_pixels_softly() -> None:
    blue = ColourFraction("blue", width=0.5)
    images = image(0, 0, 1).clone()
    assert blue(images, [""]).item() == pytest.approx(1)
    images[..., :2] = torch.tensor([0.0, 0.0, 0.5]).view(1, 3, 1, 1)  # half of the pixels, one width away
    assert blue(images, [""]).item() == pytest.approx(0.75)
    assert ColourFraction("#0000ff", width=0.5)(images, [""]).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("colour", "width", "said"), [("rouge", 0.25, "'rouge'"), ("red", 0.0, "width is 0.0")]
)
def test_colour_fraction_refuses(colour: str, width: float, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ColourFraction(colour, width)


def test_truth_knows_right_from_wrong() -> None:
    prompts = ["a large red circle on a blue background", "two small green squares on a white background"]
    rng = np.random.default_rng(0)
    shown = np.stack([render(sample_scene(parse(prompt), rng)) for prompt in prompts])
    images = as_images(shown)
    assert ShapesTruth()(images, prompts).tolist() == [1, 1]
    assert ShapesTruth(whole=True)(images, prompts).tolist() == [1, 1]
    wrong = "a large yellow circle on a blue background"
    share = ShapesTruth()(images[:1], [wrong]).item()
    assert 0 < share < 1
    assert ShapesTruth(whole=True)(images[:1], [wrong]).item() == 0


def test_truth_refuses_other_prompts() -> None:
    with pytest.raises(ConfigError, match=r"only knows prompts of the Shapes world.*'a photo of a dog'"):
        ShapesTruth()(torch.rand(1, 3, 64, 64), ["a photo of a dog"])


def test_truth_refuses_other_sizes() -> None:
    with pytest.raises(ConfigError, match="64 x 64 pixels, and was given 48 x 32"):
        ShapesTruth()(torch.rand(1, 3, 32, 48), ["a red circle"])
