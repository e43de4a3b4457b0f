"""Captioned images: renders that show what their captions say, and folders of images."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lit_align.data import HubImages, ShapesRenders
from lit_align.errors import ConfigError
from lit_align.shapes.world import judge


def test_renders_show_their_captions_and_are_functions_of_the_row() -> None:
    source = ShapesRenders(["single", "pair", "relation"])
    rows = [0, 1000, 4031, 500_000, len(source) - 1]
    images, captions = source.batch(rows)
    assert images.shape == (5, 3, 64, 64)
    assert images.dtype == torch.float32
    assert all(judge(image, caption).score == 1 for image, caption in zip(images, captions, strict=True))
    again = ShapesRenders(["single", "pair", "relation"])
    assert torch.equal(again.image(rows[3]), images[3])
    assert again.caption(rows[3]) == captions[3]


def test_kinds_must_be_named() -> None:
    with pytest.raises(ConfigError, match="kinds"):
        ShapesRenders([])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        Image.fromarray(np.full((20, 30, 3), 80 * number, np.uint8)).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,image {number}" for number in range(3)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    return tmp_path


def test_a_folder_of_images(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = HubImages(str(folder), resolution=16)
    images, captions = source.batch([2, 0])
    assert len(source) == 3
    assert captions == ["image 2", "image 0"]
    assert torch.equal(images[0], torch.full((3, 16, 16), 160 / 255))
    with pytest.raises(ConfigError, match="no column 'caption'"):
        HubImages(str(folder), text="caption")


def test_columns_of_any_name_and_a_missing_image(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(path := tmp_path / "black.png")
    rows = {"image": [{"bytes": path.read_bytes(), "path": None}, None], "words": ["black", "nothing"]}
    path.unlink()
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    source = HubImages(str(tmp_path), resolution=16, image="image", text="words")
    images, captions = source.batch([0])
    assert captions == ["black"]
    assert not images.any()
    with pytest.raises(ConfigError, match="row 1"):
        source.image(1)


def test_several_captions_of_an_image_are_none(tmp_path: Path) -> None:
    rows = {"image": [{"bytes": b"", "path": None}], "captions": [["a cat", "one cat"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(ConfigError, match=r"column 'captions' of .* not text: set text to a column with one"):
        HubImages(str(tmp_path), text="captions")


def test_a_broken_image_is_named(folder: Path) -> None:
    source = HubImages(str(folder), resolution=16)
    (folder / "1.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match="row 1"):
        source.image(1)


def test_an_unknown_dataset_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        HubImages(str(tmp_path / "nowhere"))
