"""Stored images as tensors."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_align.errors import ConfigError

BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
"""What Pillow raises for files that it cannot decode."""

BITS, PHOTOMETRIC = 258, 262
"""Numbers of TIFF tags."""


class UnreadableImage(Exception):
    """The bytes of one image are missing or cannot be decoded; the message says what is wrong with them."""


def height_and_width(resolution: int | Sequence[int]) -> tuple[int, int]:
    """What a resolution stands for: both sides, or one number for both.

    Raises:
        ConfigError: It is no such thing.
    """
    sides = [resolution, resolution] if isinstance(resolution, int) else list(resolution)
    if len(sides) != 2 or min(sides) < 1:
        raise ConfigError(
            f"data.resolution is {resolution}: give height and width in pixels, or one number for both"
        )
    return sides[0], sides[1]


def decode(data: bytes, resolution: int | Sequence[int]) -> Tensor:
    """A stored image, scaled so that its shorter side fits and cropped to its centre.

    Scaled with a bilinear filter, the default of torchvision's ``Resize`` in the published training scripts.
    Pillow widens the filter when it makes images smaller, so nothing aliases. An image of the right size is
    not changed. Transparency is dropped, as those scripts do.

    Args:
        data: A file that Pillow reads.
        resolution: Height and width of the result in pixels, or one number for both.

    Returns:
        ``(3, height, width)`` float32 in [0, 1].

    Raises:
        UnreadableImage: The file is cut short, no image, or in a mode whose white is not known.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = _to_rgb(ImageOps.exif_transpose(opened), opened)
    except BROKEN as error:
        what = str(error).split("\n")[0].split("<_io")[0].strip() or type(error).__name__
        raise UnreadableImage(what) from error
    height, width = height_and_width(resolution)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def _to_rgb(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Eight bits a channel; ``opened`` is the file that the image came from.

    Pillow clips values of more than eight bits instead of scaling them, so those of 16 bits are scaled here.
    """
    if image.mode[0] not in "IF":
        return image.convert("RGB")
    tags = getattr(opened, "tag_v2", {})
    plain = tags.get(BITS, (16,)) == (16,) and tags.get(PHOTOMETRIC, 1) == 1
    known = {"PNG": "I;16", "TIFF": "I;16", "JPEG2000": "I;16", "PPM": "I"}.get(opened.format or "")
    if known is None or not image.mode.startswith(known) or not plain:
        raise ValueError(f"{opened.format} in mode {image.mode} has no known white: save it with 8 bits")
    grey = np.round(np.asarray(image).astype(np.float64) * (255 / 65535)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
