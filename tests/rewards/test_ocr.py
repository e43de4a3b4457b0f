"""Words in images: the reader that comes with the package, and the closed form of the score."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from lit_align.rewards import OCR
from lit_align.rewards.ocr import distance, likeness


@pytest.fixture(scope="module")
def reader() -> OCR:
    pytest.importorskip("rapidocr")
    return OCR()


def sign(text: str) -> np.ndarray:
    image = Image.new("RGB", (256, 96), "white")
    ImageDraw.Draw(image).text((20, 30), text, fill="black", font=ImageFont.load_default(32))
    return np.asarray(image)


@pytest.mark.slow
def test_what_is_written_is_read(reader: OCR) -> None:
    image = sign("HELLO world")
    assert reader.score(image, 'a sign that says "Hello World" and "more"') == 1.0
    assert reader.score(np.zeros((32, 32, 3), np.uint8), "an empty “sign”") == 0.0
    assert reader.score(image, "a sign that says hello") is None
    session = reader.reader.text_det.session.session
    assert session.get_session_options().intra_op_num_threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("read", "wanted", "expected"),
    [
        ("hello", "hello", 1.0),
        ("he llo", "H e l l o", 1.0),
        ("say hello", "hello", 1.0),
        ("hallo", "hello", 0.8),
        ("", "hello", 0.0),
        ("completely different", "hi", 0.0),
        ("", " ", 1.0),
    ],
)
def test_likeness(read: str, wanted: str, expected: float) -> None:
    assert likeness(read, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("flaw", "lawn", 2), ("same", "same", 0)],
)
def test_edit_distance(one: str, other: str, steps: int) -> None:
    assert distance(one, other) == distance(other, one) == steps
