"""Stored images as tensors: size, colours, and what is no image."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.data.images import UnreadableImage, decode
from tests.data.pick import jpeg


@pytest.mark.parametrize("data", [jpeg(9)[:-150], jpeg(9, form="PNG")[:45], b"", b"GIF89a"])
def test_what_is_no_whole_image_is_not_decoded(data: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode(data, 8)


def test_images_are_scaled_to_their_shorter_side_and_cropped_to_their_centre() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 17:43] = 255  # the middle third, and what the filter sees beyond
    file = io.BytesIO()
    Image.fromarray(wide).save(file, "PNG")
    assert torch.equal(decode(file.getvalue(), 10), torch.ones(3, 10, 10))


def test_scaling_down_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    file = io.BytesIO()
    Image.fromarray(stripes).save(file, "PNG")
    assert (decode(file.getvalue(), 16) - 0.5).abs().max() < 0.05


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    assert torch.equal((decode(file.getvalue(), 8) * 255).byte().permute(1, 2, 0), torch.from_numpy(pixels))


def stored(image: Image.Image, form: str, **settings: Any) -> bytes:
    image.save(file := io.BytesIO(), form, **settings)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB"])
def test_every_mode_becomes_rgb_of_the_same_colour(mode: str) -> None:
    colour = Image.new("RGB", (8, 8), (200, 100, 50))
    image = decode(stored(colour.convert(mode), "TIFF"), 8).mean((1, 2))
    expected = torch.tensor((124, 124, 124) if mode in ("L", "LA") else (200, 100, 50)) / 255
    assert torch.allclose(image, expected, atol=0.011)  # a palette has steps


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000", "PPM"])
def test_grey_of_sixteen_bits_is_scaled_by_value(form: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode(stored(Image.fromarray(ramp), form), 8)
    assert torch.allclose(image, torch.from_numpy(ramp / 65535).float().expand(3, 8, 8), atol=1 / 255)


def test_numbers_whose_white_is_not_known_are_no_image() -> None:
    for image in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 9, np.int32)):
        with pytest.raises(
            UnreadableImage, match=r"TIFF in mode [FI] has no known white: save it with 8 bits"
        ):
            decode(stored(Image.fromarray(image), "TIFF"), 8)
    negative = stored(Image.fromarray(np.full((8, 8), 9, np.uint16)), "TIFF", tiffinfo={262: 0})
    with pytest.raises(UnreadableImage, match="no known white"):
        decode(negative, 8)


def test_a_photograph_stands_as_its_camera_says() -> None:
    image, file = Image.new("RGB", (16, 8), "white"), io.BytesIO()
    image.paste("black", (0, 0, 8, 8))  # the left half
    tags = Image.Exif()
    tags[0x0112] = 6  # turn by 90 degrees to the right
    image.save(file, "JPEG", exif=tags, quality=95)
    upright = decode(file.getvalue(), 8).mean(0)
    assert upright[0].max() < 0.1 < 0.9 < upright[-1].min()
