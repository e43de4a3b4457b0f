"""Stored images as tensors. Their files come from outside: what they may cost is limited here.

An image is decoded only if its header says that it is of a format in :data:`FORMATS` and of at most
:data:`MAX_PIXELS`, and its file is read only if it is a regular one inside of the data's folder. Of an
animation the first image is taken.
"""

import io
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_align.errors import ConfigError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")
"""What data sets hold. Pillow knows more, among them formats that it hands to other programs (PostScript)."""

MAX_PIXELS = 50_000_000
"""Of one image, more than a camera of 45 megapixels gives. Decoding takes about 10 bytes a pixel, in each of
``workers`` threads; 22 kB of PNG can hold an image that takes 4 GB."""

MAX_BYTES = 2**27
"""Of one image's file, 128 MiB: about the largest that :data:`MAX_PIXELS` need without compression."""

BITS, PHOTOMETRIC = 258, 262
"""Numbers of TIFF tags."""


class UnreadableImage(Exception):
    """The bytes of one image are missing or cannot be decoded; the message says what is wrong with them."""


def read_inside(folders: Sequence[Path], name: str) -> bytes:
    """The bytes of a data set's file.

    Args:
        folders: Where it may lie, at any depth; links that lead out of them are not followed.
        name: The file, relative to the first folder.

    Raises:
        UnreadableImage: There is none, it is outside, no regular file, or larger than :data:`MAX_BYTES`.
    """
    try:
        path = (folders[0] / name).resolve()
        if not any(path.is_relative_to(folder.resolve()) for folder in folders):
            raise UnreadableImage(f"'{name[:200]}' is outside of {folders[0]}")
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait until somebody writes into it
            raise UnreadableImage(f"'{name[:200]}' is not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # a link to itself is the last
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UnreadableImage(f"'{name[:200]}' cannot be read ({reason})") from error
    check_bytes(len(data))
    return data


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
        data: A file of one of the :data:`FORMATS`.
        resolution: Height and width of the result in pixels, or one number for both.

    Returns:
        ``(3, height, width)`` float32 in [0, 1].

    Raises:
        UnreadableImage: The file is cut short, no image, too large, or in a mode whose white is not known.
    """
    check_bytes(len(data))
    height, width = height_and_width(resolution)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_pixels(*opened.size)
            image = _to_rgb(ImageOps.exif_transpose(opened), opened)
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    except Exception as error:  # Pillow's decoders raise whatever the bytes lead to
        if isinstance(error, UnreadableImage):
            raise
        what = str(error).split("\n")[0].split("<_io")[0].strip() or type(error).__name__
        raise UnreadableImage(what) from error
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def check_bytes(count: int) -> None:
    """Refuse an image's file of more than :data:`MAX_BYTES`."""
    if count > MAX_BYTES:
        raise UnreadableImage(f"its file has more than {MAX_BYTES >> 20} MiB")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} x {height} pixels are more than {MAX_PIXELS // 10**6} million")


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
