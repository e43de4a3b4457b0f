"""The interface of preference data: numbered pairs of images, in any storage."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from lit_align.data.images import UnreadableImage
from lit_align.data.prompts import PromptSource
from lit_align.errors import ConfigError

HeldOut = Literal["validation", "test"]

LOOKED_AT = 16
"""Rows whose images are read to tell whether they are others than before."""


class PairSource(ABC):
    """Numbered pairs of images of one prompt, with a label; YAML can name a subclass of yours too.

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
        """1 where the first image is preferred, 0 where the second is; any other number is a tie."""

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
        """Changes with prompts, labels and :meth:`images_are`; caches on disk are named by it."""
        digest = hashlib.sha256(f"{self} {self.images_are()}".encode())
        for row in range(len(self)):
            digest.update(f"{self.prompt(row)}\n{self.label(row)}\n".encode())
        return digest.hexdigest()

    def images_are(self) -> str:
        """Changes with the images, as far as a few of them say; of files their times and sizes say more."""
        digest = hashlib.sha256()
        for row in range(0, len(self), math.ceil(len(self) / LOOKED_AT) or 1):
            for side in (0, 1):
                with suppress(UnreadableImage, TypeError):  # it will be reported when its turn comes
                    digest.update(self.image(row, side))
        return digest.hexdigest()

    def held_out(self, split: HeldOut) -> PromptSource | None:
        """The prompts to validate or test on that come with the pairs, if any do."""
        return None

    def __str__(self) -> str:
        """What error messages call this source."""
        return type(self).__name__


def read_label(value: Any, where: str) -> float:
    """A label as it is stored, NaN where there is none.

    Raises:
        ConfigError: It is none.
    """
    try:
        label = math.nan if value in (None, "") else float(value)
    except (TypeError, ValueError):
        label = math.inf
    if not math.isnan(label) and label not in (0.0, 0.5, 1.0):
        raise ConfigError(
            f"{where}: '{value}' is not a label: give 1 where the first is preferred, 0, or 0.5 for a tie"
        )
    return label


def states_of(folder: Path, names: Iterable[str]) -> str:
    """A hash of the sizes and times of some files, which changes with what is in them."""
    digest = hashlib.sha256()
    for name in names:
        with suppress(OSError, ValueError):  # it will be reported when its turn comes
            state = (folder / name).stat()
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class PickaPicPrompts(PromptSource):
    """The prompts of preference data alone, for methods that sample their own images.

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
