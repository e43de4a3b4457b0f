"""What preference data is to the rest: numbered pairs of images, whatever they are stored in."""

import hashlib
import io
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lit_align.data.sources import PromptSource

HeldOut = Literal["validation", "test"]


class UnreadableImage(Exception):
    """The bytes of one image are missing or cannot be decoded; the message says what is wrong with them."""


class PairSource(ABC):
    """Numbered pairs of images of one prompt, with a verdict; a subclass of yours can be named in YAML too.

    Several threads read images at the same time.

    Attributes:
        mixed: How many blocks a training order draws from at a time (see :meth:`blocks`).
    """

    mixed: int = 1

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, ties included."""

    @abstractmethod
    def prompt(self, row: int) -> str:
        """The prompt of a row, ``0 <= row < len(self)``; empty where there is none."""

    @abstractmethod
    def label(self, row: int) -> float:
        """1 where the first image is preferred, 0 where the second is; anything else is no verdict."""

    @abstractmethod
    def image(self, row: int, side: int) -> bytes:
        """The encoded image of a row, the first (``side`` 0) or the second.

        Raises:
            UnreadableImage: It is not there.
        """

    def blocks(self) -> Sequence[range]:
        """The rows, in runs that are read as a whole; the training order reads each run once a pass."""
        return [range(len(self))]

    def where(self, row: int) -> str:
        """Where a row is stored, for messages."""
        return f"row {row} of {self}"

    def fingerprint(self) -> str:
        """Changes with prompts, verdicts and :meth:`images_are`; what is kept on disk is named by it."""
        digest = hashlib.sha256(f"{self} {self.images_are()}".encode())
        for row in range(len(self)):
            digest.update(f"{self.prompt(row)}\n{self.label(row)}\n".encode())
        return digest.hexdigest()

    def images_are(self) -> str:
        """Changes with the images, as far as that can be told without reading them."""
        return ""

    def held_out(self, split: HeldOut) -> PromptSource | None:
        """The prompts to validate or test on that come with the pairs, if any do."""
        return None

    def __str__(self) -> str:
        """What error messages call this source."""
        return type(self).__name__


class PickaPicPrompts(PromptSource):
    """The prompts of preference data alone, for methods that make their own images.

    Args:
        pairs: The preference data; no image of it is read.
    """

    def __init__(self, pairs: PairSource) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def prompt(self, row: int) -> str:
        return self.pairs.prompt(row)

    def __str__(self) -> str:
        return f"prompts of {self.pairs}"


def decode(data: bytes, resolution: int) -> Tensor:
    """A stored image, scaled so that its shorter side fits and cropped to its centre.

    Scaled with a bilinear filter, as torchvision's ``Resize`` does by default and with it the published
    training scripts; Pillow widens it when it makes images smaller, so nothing aliases. An image of the
    right size stays as it is.

    Args:
        data: A file that Pillow reads.
        resolution: Height and width of the result, in pixels.

    Returns:
        ``(3, resolution, resolution)`` float32 in [0, 1].

    Raises:
        UnreadableImage: It is cut short or no image.
    """
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        what = str(error).split("\n")[0].split("<_io")[0].strip() or type(error).__name__
        raise UnreadableImage(what) from error
    if image.size != (resolution, resolution):
        image = ImageOps.fit(image, (resolution, resolution), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
