"""Captioned images, for the loss of pre-training: numbered, and each a pure function of its number."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lit_align.data.files import check_columns
from lit_align.data.hub import load_hub
from lit_align.data.images import UnreadableImage, decode, read_inside
from lit_align.errors import ConfigError, first_line
from lit_align.randomness import derive_seed
from lit_align.shapes.world import Kind, PromptSpace, render, sample_scene


class CaptionedImages(ABC):
    """Numbered images with captions; YAML can name a subclass of yours too."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def caption(self, row: int) -> str:
        """The caption of a row, ``0 <= row < len(self)``."""

    @abstractmethod
    def image(self, row: int) -> Tensor:
        """The image of a row, ``(3, H, W)`` float32 in [0, 1], of one size for all rows."""

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Images ``(B, 3, H, W)`` and captions of some rows."""
        return torch.stack([self.image(row) for row in rows]), [self.caption(row) for row in rows]


class ShapesRenders(CaptionedImages):
    """True images of the Shapes world: one for each caption, drawn when it is asked for.

    The shipped pipeline was trained on such images. They have its bias: an object whose colour a caption
    leaves open is red in 70 % of them.

    Args:
        kinds: Which kinds of caption, each of "single", "open", "pair", "relation" at most once.

    Raises:
        ConfigError: A kind is unknown or there twice, or none is given.
    """

    def __init__(self, kinds: list[Kind]) -> None:
        self._space = PromptSpace(kinds)

    def __len__(self) -> int:
        return len(self._space)

    def caption(self, row: int) -> str:
        return self._space[row]

    def image(self, row: int) -> Tensor:
        rng = np.random.default_rng(derive_seed(0, "render", row))
        drawn = render(sample_scene(self._space.caption(row), rng))
        return torch.from_numpy(drawn).permute(2, 0, 1).float() / 255


class HubImages(CaptionedImages):
    """A dataset with images and captions, of the Hugging Face hub or in a folder.

    Args:
        name: The hub id, or a folder that ``datasets.load_dataset`` reads, such as one with images and a
            ``metadata.csv`` of the columns ``file_name`` and ``text``.
        resolution: Height and width in pixels, or one number for both; images are scaled and cropped to
            their centre.
        split: Which of the dataset's own splits to read.
        image: The column with the images.
        text: The column with the captions.
        subset: Which of the dataset's configurations to read, where it has several.

    Raises:
        ConfigError: The dataset cannot be read or has no such column; on reading, for a broken image.
    """

    def __init__(
        self,
        name: str,
        resolution: int | tuple[int, int] = 512,
        split: str = "train",
        image: str = "image",
        text: str = "text",
        subset: str | None = None,
    ) -> None:
        import datasets  # .3 s: only those who read from the hub should wait for it
        from huggingface_hub.constants import HF_HUB_CACHE

        rows = load_hub(name, split, subset)
        for argument, column in (("image", image), ("text", text)):
            check_columns(rows.column_names, [column], f"dataset {name}", argument)
        if getattr(kind := rows.features[text], "dtype", None) not in ("string", "large_string"):
            raise ConfigError(
                f"column '{text}' of dataset {name} holds {kind}, not text: set text to a column with one "
                "caption for each image"
            )
        self.name, self.resolution, self._image, self._text = name, resolution, image, text
        try:
            self._rows = rows.cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise ConfigError(
                f"column '{image}' of dataset {name} holds no images ({first_line(error)}): set image to the "
                "column that does"
            ) from error
        own = [Path(name)] if Path(name).is_dir() else []
        caches = (datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE)
        self._folders = [*own, *map(Path, caches)]  # where the images of files may lie

    def __len__(self) -> int:
        return len(self._rows)

    def caption(self, row: int) -> str:
        return self._rows[row][self._text] or ""

    def image(self, row: int) -> Tensor:
        stored = self._rows[row][self._image] or {"bytes": None, "path": None}
        try:
            if (data := stored["bytes"]) is None and stored["path"]:
                data = read_inside(self._folders, stored["path"])
            return decode(data or b"", self.resolution)
        except UnreadableImage as error:
            raise ConfigError(
                f"row {row} of dataset {self.name} is not a readable image ({first_line(error)}): remove it"
            ) from error
