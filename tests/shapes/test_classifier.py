"""The colour classifier: balanced data, its folder; and the shipped weights against floors."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTForImageClassification

from lit_align.shapes import CLASSIFIER
from lit_align.shapes.recipe.classifier import (
    balanced_scene,
    classifier_quality,
    colours_of,
    majority,
    make_classifier,
    make_vit,
)
from lit_align.shapes.recipe.quality import draw
from lit_align.shapes.recipe.seeing import images_of
from lit_align.shapes.recipe.training import Budget
from lit_align.shapes.world import COLOURS, Item, Scene


def test_the_colours_are_balanced() -> None:
    scenes = [balanced_scene(0, number) for number in range(1600)]
    for votes in (Counter(colours_of(scenes).tolist()), Counter(scene.background for scene in scenes)):
        assert len(votes) == len(COLOURS)
        assert all(150 < vote < 250 for vote in votes.values())  # 200, and 3.8 standard deviations
    assert all(len({item.colour for item in scene.objects}) == 1 for scene in scenes)
    assert all(scene.objects[0].colour != scene.background for scene in scenes)


def test_the_majority_is_more_than_half() -> None:
    def seen(*colours: str) -> str | None:
        places = ((14.0, 14.0), (44.0, 14.0), (14.0, 44.0), (44.0, 44.0))
        objects = [Item(x, y, 9.0, colour, "square") for (x, y), colour in zip(places, colours, strict=False)]
        return majority(images_of([Scene(tuple(objects), "white")])[0])

    assert seen("red", "blue", "red") == "red"
    assert seen("red", "red", "blue", "blue") is None
    assert seen() is None


def test_the_folder_is_a_transformers_model(tmp_path: Path) -> None:
    make_classifier(tmp_path, Budget(5, steps=2), "32-true", 0)
    model = ViTForImageClassification.from_pretrained(tmp_path / "classifier")
    assert model.dtype == torch.float32
    assert model.config.id2label == dict(enumerate(COLOURS))
    captions, images = draw(8, 0, "classifier")
    assert "colour right" in classifier_quality(tmp_path / "classifier", images, captions, 8, 0)


@pytest.mark.slow
def test_it_learns() -> None:
    torch.manual_seed(0)
    model = make_vit()
    scenes = [balanced_scene(0, number) for number in range(16)]
    pixels, colours = images_of(scenes) * 2 - 1, colours_of(scenes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(pixels).logits, colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_the_shipped_classifier() -> None:
    captions, images = draw(100, 5, "classifier")
    quality = classifier_quality(CLASSIFIER, images, captions, 300, 3)
    assert quality["colour right"] > 0.93
    assert quality["samples, colour agrees"] > 0.93  # true images in place of samples
