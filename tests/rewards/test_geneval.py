"""Dense composition by a detector: closed forms on boxes that are given, and on true images of Shapes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ImageColor
from torch import Tensor, nn

from lit_align.data import JSONLPrompts
from lit_align.errors import ConfigError
from lit_align.rewards import GenEval
from lit_align.rewards.detectors import Detector, Found
from lit_align.rewards.geneval import COLOURS, overlap, relations
from lit_align.shapes.world import parse, render, sample_scene


class Sees(Detector):
    """Detections that are given: boxes by the name of the object, the same in every image."""

    def __init__(self, **boxes: Any) -> None:
        super().__init__()
        self.given = boxes

    def forward(self, images: Any, objects: Any) -> list[Tensor]:
        raise NotImplementedError

    def boxes(self, images: Any, objects: Any, threshold: float) -> list[dict[str, Found]]:
        def found(name: str) -> Found:
            given = self.given.get(name, [])
            return Found(
                torch.tensor([sure for sure, _ in given]), torch.tensor([box for _, box in given]).view(-1, 4)
            )

        return [{name: found(name) for name in names} for names in objects]


LEFT, RIGHT, LOW = [2.0, 20.0, 20.0, 40.0], [44.0, 22.0, 60.0, 38.0], [4.0, 46.0, 20.0, 62.0]


@pytest.fixture(scope="module")
def judge() -> GenEval:
    return GenEval("shapes", "shapes")


def score(judge: GenEval, include: list[dict[str, Any]], tag: str = "x", **boxes: Any) -> float:
    judge.detector = Sees(**boxes)
    image = torch.full((1, 3, 64, 64), 0.5)
    image[..., :32], image[..., 32:] = (
        torch.tensor([0.0, 0, 1])[:, None, None],
        torch.tensor([1.0, 1, 0])[:, None, None],
    )  # blue on the left, yellow on the right
    return float(judge(image, [""], columns={"include": [include], "tag": [tag]}))


DOGS = [(0.95, LEFT), (0.5, RIGHT)]


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ([{"class": "dog", "count": 2}], 1.0),
        ([{"class": "dog", "count": 1}], 0.0),
        ([{"class": "dog", "count": 4}], 0.5),
        ([{"class": "cow", "count": 2}], 0.0),
        ([{"class": "dog", "count": 2}, {"class": "cow", "count": 1}], 0.5),
        ([{"class": "dog", "count": 3, "color": "blue"}], (2 / 3 + 0) / 2),
        ([{"class": "cat", "count": 1, "color": None, "position": None}], 1.0),
        ([{"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["below", 0]}], 2 / 3),
        ([{"class": "cat", "count": 1}, {"class": "cow", "count": 1, "position": ["above", 0]}], 1 / 3),
        ([{"class": "cow", "count": 1}, {"class": "cat", "count": 1, "position": ["below", 0]}], 1 / 3),
        ([{"class": "fox", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}], 1.0),
        ([{"class": "fox", "count": 1}, {"class": "cat", "count": 1, "position": ["right of", 0]}], 2 / 3),
    ],
)
def test_closed_forms(judge: GenEval, include: list[dict[str, Any]], expected: float) -> None:
    found = score(judge, include, dog=DOGS, cat=[(0.9, LOW)], fox=[(0.9, [44.0, 46.0, 60.0, 62.0])])
    assert found == pytest.approx(expected)


def test_thresholds_and_overlaps(judge: GenEval) -> None:
    two = [{"class": "dog", "count": 2}]
    assert score(judge, two, dog=[*DOGS, (0.29, LOW)]) == 1.0
    assert score(judge, two, "counting", dog=DOGS) == 0.5  # .5 is below .9
    twice = [(0.9, LEFT), (0.8, [3.0, 20.0, 20.0, 40.0]), (0.7, RIGHT)]
    assert score(judge, two, dog=twice) == 0.5
    judge.overlap = 0.5
    assert score(judge, two, dog=twice) == 1.0
    judge.overlap = 1.0


def test_boxes() -> None:
    assert overlap(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2])) == pytest.approx(1 / 3)
    assert overlap(torch.tensor([0.0, 0, 1, 1]), torch.tensor([2.0, 2, 3, 3])) == 0
    left, right = torch.tensor(LEFT), torch.tensor(RIGHT)
    assert (relations(left, right), relations(right, left)) == ({"left of"}, {"right of"})
    assert relations(left, torch.tensor(LOW)) == {"above"}
    assert relations(torch.tensor([0.0, 0, 9, 9]), torch.tensor([1.0, 1, 9, 9])) == set()
    assert relations(torch.tensor([0.0, 0, 2, 2]), torch.tensor([50.0, 50, 52, 52])) == {"left of", "above"}


class ByColour(nn.Module):
    """Embeds an image by its mean colour, and a text by the colour that it names."""

    def embed_images(self, images: Tensor) -> Tensor:
        return F.normalize(images.mean(dim=(2, 3)) - 0.4, dim=1)

    def embed(self, texts: list[str]) -> Tensor:
        named = [next(colour for colour in COLOURS if f" {colour}" in text) for text in texts]
        colours = [torch.tensor(ImageColor.getrgb(colour)) / 255 for colour in named]
        return F.normalize(torch.stack(colours) - 0.4, dim=1)


@pytest.mark.parametrize(("colour", "expected"), [("blue", 0.75), ("yellow", 0.75), ("green", 0.5)])
def test_colours_are_those_of_the_boxes(judge: GenEval, colour: str, expected: float) -> None:
    """One of two objects is blue, the other yellow: terms 1 and 1 - |2 - found| / 2."""
    clip, judge.clip = judge.clip, ByColour()  # type: ignore[assignment]
    assert score(judge, [{"class": "dog", "count": 2, "color": colour}], dog=DOGS) == expected
    one = [{"class": "cat", "count": 1, "color": "blue"}]
    assert score(judge, one, cat=[(0.9, LOW)]) == 1.0
    judge.clip = clip


def test_true_images_of_shapes_score_high_and_others_low() -> None:
    """Numbers and positions; the bundled CLIP was never taught the words for colours."""
    prompts = {
        "a red circle and a blue star": [("circle", 1, None), ("star", 1, None)],
        "two green squares": [("square", 2, None)],
        "a yellow heart left of a pink cross": [("cross", 1, None), ("heart", 1, ["left of", 0])],
        "three white triangles": [("triangle", 3, None)],
        "a black circle above a red square": [("square", 1, None), ("circle", 1, ["above", 0])],
    }
    names = ("class", "count", "position")
    asked = [[dict(zip(names, one, strict=True)) for one in entries] for entries in prompts.values()]
    rng = np.random.default_rng(0)
    images = [torch.from_numpy(render(sample_scene(parse(prompt), rng))) for prompt in prompts]
    pixels = torch.stack(images).permute(0, 3, 1, 2) / 255
    judge = GenEval("shapes", "shapes", threshold=0.5)
    assert judge.domain == "shapes"
    assert judge(pixels, [""] * 5, columns={"include": asked}).mean() > 0.9
    assert judge(pixels.roll(1, 0), [""] * 5, columns={"include": asked}).mean() < 0.3


def test_metadata_of_geneval_is_read_as_it_is_published(judge: GenEval, tmp_path: Path) -> None:
    rows = [
        {"tag": "two_object", "include": [{"class": "dog", "count": 2}], "prompt": "two dogs"},
        {
            "tag": "position",
            "include": [
                {"class": "dog", "count": 2},
                {"class": "cat", "count": 1, "position": ["below", 0]},
            ],
            "prompt": "a photo of a cat below dogs",
        },
        {
            "tag": "colors",
            "include": [{"class": "cat", "count": 1, "color": "blue"}],
            "exclude": [{"class": "cat", "count": 2}],
            "prompt": "a blue cat",
        },
    ]
    (tmp_path / "train_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JSONLPrompts(str(tmp_path / "train_metadata.jsonl"))
    columns = {name: [source.columns(row)[name] for row in range(3)] for name in ("include", "tag")}
    judge.detector = Sees(dog=[(0.9, LEFT)] * 2, cat=[(0.9, LOW)])
    judge.overlap = 1.0
    scores = judge(torch.full((3, 3, 64, 64), 0.5), [""] * 3, columns=columns)
    assert scores[:2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (None, "no column 'include'; its columns: none"),
        ({"tag": ["x"]}, "its columns: tag. Set column"),
        ({"include": [["dog"]]}, r"holds 'dog'; give \{class: dog, count: 2\}"),
        ({"include": [[{"class": "dog", "count": 0}]]}, "holds"),
        ({"include": [[{"class": "dog", "count": "2"}]]}, "holds"),
        ({"include": [[{"class": "dog", "count": 1, "position": ["above", 0]}]]}, "holds the position"),
        (
            {
                "include": [
                    [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left", 0]}]
                ]
            },
            r"holds the position \['left', 0\]; give a place, one of left of, right of",
        ),
        (
            {"include": [[{"class": "dog", "count": 1, "color": "grey"}]]},
            "holds the color 'grey', which no object is found to have; give one of red, orange",
        ),
    ],
)
def test_columns_that_cannot_be_understood(judge: GenEval, columns: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        judge(torch.rand(1, 3, 64, 64), [""], columns=columns)
    with pytest.raises(ConfigError, match=said):
        judge.check_columns(columns or {})


def test_counts_of_numpy_are_counts(judge: GenEval) -> None:
    judge.check_columns({"include": [[{"class": "dog", "count": np.int64(2)}]]})


def test_a_prompt_that_asks_for_nothing_has_no_score(judge: GenEval) -> None:
    columns = {"include": [[], None]}
    assert judge(torch.rand(2, 3, 64, 64), ["", ""], columns=columns).isnan().all()


def test_a_share_is_from_0_to_1() -> None:
    with pytest.raises(ConfigError, match="threshold is 3; give a share"):
        GenEval("shapes", "shapes", threshold=3)
