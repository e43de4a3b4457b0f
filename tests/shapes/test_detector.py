"""The detector: exact matching, the set loss, boxes; and the shipped weights against floors."""

import shutil
from itertools import permutations
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import YolosForObjectDetection

from lit_align.shapes import DETECTOR
from lit_align.shapes.recipe.detector import (
    box,
    detector_quality,
    draw_scene,
    make_detector,
    make_yolos,
    render_quality,
    targets,
)
from lit_align.shapes.recipe.images import held_out
from lit_align.shapes.recipe.matching import NONE, match, overlaps, set_loss
from lit_align.shapes.recipe.quality import draw
from lit_align.shapes.recipe.seeing import images_of, soften
from lit_align.shapes.recipe.training import Budget
from lit_align.shapes.world import IMAGE_SIDE, MAX_OBJECTS, SHAPES, Item, Scene


def test_matching_is_the_cheapest_of_all() -> None:
    cost = torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(0))
    owners = match(cost)
    for table, chosen in zip(cost, owners.tolist(), strict=True):
        cheapest = min(
            sum(table[token, number] for number, token in enumerate(tokens))
            for tokens in permutations(range(6), 3)
        )
        assert len(set(chosen)) == 3
        assert_close(sum(table[token, number] for number, token in enumerate(chosen)), cheapest)


def test_absent_objects_take_no_token_that_another_needs() -> None:
    cost = torch.zeros(1, 4, 3)
    cost[0, :, 1] = torch.tensor([3.0, 2.0, 1.0, 2.0])  # only the second object is there
    assert match(cost)[0, 1] == 2


@pytest.mark.parametrize(
    ("first", "second", "iou", "giou"),
    [
        ((0.5, 0.5, 0.2, 0.4), (0.5, 0.5, 0.2, 0.4), 1.0, 1.0),
        ((0.25, 0.5, 0.5, 1.0), (0.75, 0.5, 0.5, 1.0), 0.0, 0.0),  # side by side: the hull is the union
        ((0.1, 0.5, 0.2, 1.0), (0.9, 0.5, 0.2, 1.0), 0.0, -0.6),  # 3/5 of the hull lie between them
        ((0.5, 0.5, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), 0.25, 0.25),  # one inside the other
        ((0.25, 0.25, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 1 / 7, 1 / 7 - 2 / 9),  # a quarter in common
    ],
)
def test_generalised_iou(
    first: tuple[float, ...], second: tuple[float, ...], iou: float, giou: float
) -> None:
    for one, other in ((first, second), (second, first)):
        values = torch.stack(overlaps(torch.tensor(one), torch.tensor(other)))
        assert_close(values, torch.tensor([iou, giou]), atol=1e-6, rtol=0)


def _answers(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Perfect logits and boxes, in tokens 7, 6, ...; and the truth."""
    shapes, boxes = targets(scenes)
    logits = torch.full((len(scenes), 8, NONE + 1), -20.0)
    logits[..., NONE] = 20.0
    places = torch.full((len(scenes), 8, 4), 0.5)
    order = [7, 6, 5, 4]
    logits[:, order] = -20 + 40 * torch.nn.functional.one_hot(shapes, NONE + 1).float()
    places[:, order] = torch.where((shapes < NONE)[..., None], boxes, places[:, order])
    return logits, places, shapes, boxes


def test_a_perfect_answer_costs_nothing_in_any_order() -> None:
    logits, places, shapes, boxes = _answers([draw_scene(0, number) for number in range(16)])
    assert set_loss(logits, places, shapes, boxes)["loss"].abs() < 1e-4
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert set_loss(logits[:, shuffled], places[:, shuffled], shapes, boxes)["loss"].abs() < 1e-4


def test_every_kind_of_error_costs() -> None:
    logits, places, shapes, boxes = _answers([draw_scene(0, 3)])
    assert set_loss(logits, places + torch.tensor([0.05, 0, 0, 0]), shapes, boxes)["l1"] > 0.04
    assert set_loss(logits.roll(1, dims=2), places, shapes, boxes)["class"] > 10
    twice = torch.cat([logits[:, 4:], logits[:, 4:]], dim=1)  # every object twice
    again = torch.cat([places[:, 4:], places[:, 4:]], dim=1)
    assert set_loss(twice, again, shapes, boxes)["class"] > 1


def test_a_image_without_objects_has_a_loss() -> None:
    shapes, boxes = targets([Scene((), "white")])
    parts = set_loss(torch.zeros(1, 8, NONE + 1), torch.full((1, 8, 4), 0.5), shapes, boxes)
    assert parts["l1"] == parts["giou"] == 0
    assert_close(parts["loss"], torch.tensor(NONE + 1.0).log())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_box_holds_exactly_the_drawing(shape: str) -> None:
    item = Item(30.0, 34.0, 12.0, "black", shape)
    ink = (images_of([Scene((item,), "white")])[0] < 0.6).any(0)
    ys, xs = ink.nonzero().unbind(1)
    low, high = torch.stack([xs.min(), ys.min()]), torch.stack([xs.max(), ys.max()]) + 1
    x, y, width, height = (IMAGE_SIDE * value for value in box(item))
    assert_close(torch.tensor([x - width / 2, y - height / 2]), low.float(), atol=1.2, rtol=0)
    assert_close(torch.tensor([x + width / 2, y + height / 2]), high.float(), atol=1.2, rtol=0)


def test_scenes_are_a_function_of_their_number() -> None:
    assert draw_scene(0, 5) == draw_scene(0, 5)
    assert len({draw_scene(0, number) for number in range(50)}) == 50
    shapes, boxes = targets([draw_scene(0, number) for number in range(50)])
    assert shapes.shape == (50, MAX_OBJECTS)
    assert ((boxes >= 0) & (boxes <= 1)).all()
    mixed = (shapes < NONE).sum(1) > 2
    assert any(len(set(row.tolist()) - {NONE}) > 2 for row in shapes[mixed])  # more shapes than a caption has


def test_no_scene_is_drawn_of_a_held_out_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "lit_align.shapes.recipe.detector.held_out", lambda prompt: asked.append(prompt) or held_out(prompt)
    )
    for number in range(60):
        draw_scene(0, number)
        assert not held_out(asked[-1])
    assert len(asked) > 60  # some were, and were drawn again


def test_softening_keeps_the_image_and_changes_it() -> None:
    images = images_of([draw_scene(0, number) for number in range(8)])
    soft = soften(images, torch.Generator().manual_seed(0))
    assert soft.min() >= 0
    assert soft.max() <= 1
    assert 0.005 < (soft - images).abs().mean() < 0.12
    assert torch.equal(soft, soften(images, torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe folder with a detector that has hardly learnt."""
    out = tmp_path_factory.mktemp("recipe")
    make_detector(out, Budget(5, steps=1), "32-true", 0)
    return out


@pytest.mark.slow
def test_the_folder_is_a_transformers_model(made: Path) -> None:
    model = YolosForObjectDetection.from_pretrained(made / "detector")
    assert model.dtype == torch.float32
    assert model.config.id2label == dict(enumerate(SHAPES))
    assert (made / "detector" / "model.safetensors").stat().st_size <= 2e6
    captions, images = draw(4, 0, "detector")
    assert all(0 <= value <= 1 for value in render_quality(model, 8, 0).values() if value == value)
    assert "samples, count agrees" in detector_quality(made / "detector", images, captions, 4, 0)


@pytest.mark.slow
def test_a_further_round_begins_with_the_last_weights(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "detector", tmp_path / "detector")
    first = YolosForObjectDetection.from_pretrained(tmp_path / "detector").state_dict()
    make_detector(tmp_path, Budget(5, steps=1), "32-true", 1)
    second = YolosForObjectDetection.from_pretrained(tmp_path / "detector").state_dict()
    for name, weight in first.items():
        assert_close(second[name], weight, atol=1e-3, rtol=1e-2)  # another seed begins far from there


@pytest.mark.slow
def test_it_learns() -> None:
    torch.manual_seed(0)
    model = make_yolos()
    scenes = [draw_scene(0, number) for number in range(8)]
    pixels, truth = images_of(scenes) * 2 - 1, targets(scenes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(60):
        output = model(pixels)
        losses.append(set_loss(output.logits, output.pred_boxes, *truth)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_the_shipped_detector() -> None:
    captions, images = draw(75, 5, "detector")
    quality = detector_quality(DETECTOR, images, captions, 150, 3)
    assert quality["count right"] > 0.88
    assert quality["found"] > 0.9
    assert quality["IoU of the found"] > 0.75
    assert quality["shape of the found right"] > 0.85
    assert quality["samples, count agrees"] > 0.88  # true images in place of samples
    assert quality["samples, shape agrees"] > 0.85
