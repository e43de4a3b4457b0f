"""Grammar, prompt numbering, renderer and judge of the Shapes world."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from lit_align.errors import ConfigError
from lit_align.shapes.world import (
    ALL_PAIRS,
    BORDER,
    COLOURS,
    FAVOURITE_SHARE,
    MARGIN,
    RADII,
    RELATIONS,
    SHAPES,
    Bytes,
    Caption,
    Group,
    Item,
    Kind,
    PromptSpace,
    Scene,
    Verdict,
    judge,
    observe,
    parse,
    render,
    sample_caption,
    sample_scene,
    shape_pairs,
)

LENGTHS: dict[Kind, int] = {"single": 4032, "open": 864, "pair": 1539072, "relation": 1026048}


def captions(number: int, seed: int = 0) -> list[Caption]:
    rng = np.random.default_rng(seed)
    return [sample_caption(rng) for _ in range(number)]


def image(caption: Caption, seed: int) -> Bytes:
    return render(sample_scene(caption, np.random.default_rng(seed)))


def blurred(image: Bytes, radius: float) -> Bytes:
    return np.array(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def compressed(image: Bytes) -> Bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75)
    return np.array(Image.open(file))


def share_right(number: int, change: Callable[[Bytes], Bytes]) -> float:
    judged = [judge(change(image(caption, i)), caption) for i, caption in enumerate(captions(number))]
    return sum(verdict.score == 1 for verdict in judged) / number


def test_prompts_read_as_english() -> None:
    assert str(
        Caption((Group(3, "small", "red", "circle"), Group(1, None, "blue", "star")), None, "white")
    ) == ("three small red circles and a blue star on a white background")
    assert str(parse("two crosses")) == "two crosses"
    assert parse("a red square left of a green heart") == Caption(
        (Group(1, None, "red", "square"), Group(1, None, "green", "heart")), "left of", None
    )


def test_parse_inverts_str() -> None:
    for caption in captions(2000):
        assert parse(str(caption)) == caption


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("some red circles", "some"),
        ("two red circle", "circle"),
        ("a red large circle", "large"),
        ("a mauve circle", "mauve"),
        ("a circle beside a star", "beside"),
        ("a circle on a mauve background", "mauve"),
        ("a circle on a red", "the end"),
        ("a circle on a red background again", "again"),
        ("three circles and two stars", "three circles and two stars"),
        ("two circles above a star", "above"),
        ("a red circle on a red background", "red"),
        ("", "the end"),
    ],
)
def test_parse_names_the_word(prompt: str, word: str) -> None:
    with pytest.raises(ConfigError, match=f"'{word}'"):
        parse(prompt)


@pytest.mark.parametrize("kind", LENGTHS)
def test_prompt_space_is_distinct_and_pure(kind: Kind) -> None:
    space = PromptSpace([kind])
    assert len(space) == LENGTHS[kind]
    stride = max(1, len(space) // 5000)
    indices = range(0, len(space), stride)  # every index of the small kinds
    prompts = [space[i] for i in indices]
    assert len(set(prompts)) == len(prompts)
    again = PromptSpace([kind])
    for i in indices[:: max(1, len(indices) // 500)]:
        assert again[i] == space[i]
        assert str(parse(space[i])) == space[i]


def test_two_group_numbering_is_distinct_in_a_whole_block() -> None:
    space = PromptSpace(["pair"])
    start = len(space) // 2
    assert len({space[start + i] for i in range(20000)}) == 20000


def test_prompt_space_joins_kinds_in_order() -> None:
    space = PromptSpace(["open", "single"])
    assert len(space) == 864 + 4032
    assert space[863] == PromptSpace(["open"])[863]
    assert space[864] == PromptSpace(["single"])[0]
    for outside in (-1, len(space)):
        with pytest.raises(IndexError):
            space[outside]
    with pytest.raises(ConfigError, match="'open'"):
        PromptSpace(["open", "open"])


def test_pairs_of_shapes_can_be_held_out() -> None:
    held_out = shape_pairs(["star and circle", "heart and heart"])
    trained, tested = (PromptSpace(["pair", "single"], pairs) for pairs in (ALL_PAIRS - held_out, held_out))
    assert len(trained) + len(tested) == LENGTHS["pair"] + 2 * LENGTHS["single"]
    for space, allowed in ((trained, ALL_PAIRS - held_out), (tested, held_out)):
        prompts = [space[i] for i in range(0, len(space) - LENGTHS["single"], 997)]
        found = {frozenset(group.shape for group in parse(prompt).groups) for prompt in prompts}
        assert found == allowed
        assert space[len(space) - 1] == PromptSpace(["single"])[LENGTHS["single"] - 1]
    with pytest.raises(ConfigError, match=r"'circle and moon' is not a pair of shapes.*circle and star"):
        shape_pairs(["circle and moon"])


def test_scenes_keep_their_distances_and_the_relation() -> None:
    rng = np.random.default_rng(3)
    for caption in [*captions(600), *[parse("four large red squares")] * 20]:
        scene = sample_scene(caption, rng)
        assert len(scene.objects) == sum(group.count for group in caption.groups)
        assert scene.background not in {item.colour for item in scene.objects}
        for i, item in enumerate(scene.objects):
            reach = item.radius + BORDER - 1e-4
            assert reach <= min(item.x, item.y)
            assert max(item.x, item.y) <= 64 - reach
            for other in scene.objects[:i]:
                gap = max(abs(item.x - other.x), abs(item.y - other.y))
                assert gap >= item.radius + other.radius + MARGIN - 1e-4
        if caption.relation:
            dx, dy = RELATIONS[caption.relation]
            first, second = scene.objects
            assert dx * (second.x - first.x) + dy * (second.y - first.y) > 0


def test_all_counts_and_unsaid_attributes_are_frequent() -> None:
    sample = captions(4000)
    groups = [group for caption in sample for group in caption.groups]
    totals = (
        np.bincount([sum(group.count for group in caption.groups) for caption in sample], minlength=5) / 4000
    )
    assert totals[1] > 0.07
    assert min(totals[2:]) > 0.15
    assert 0.15 < np.mean([group.size is None for group in groups]) < 0.3
    assert 0.12 < np.mean([group.colour is None for group in groups]) < 0.25
    assert 0.15 < np.mean([caption.background is None for caption in sample]) < 0.25
    assert 0.15 < np.mean([caption.relation is not None for caption in sample]) < 0.25


def test_unsaid_colour_is_mostly_the_favourite() -> None:
    rng = np.random.default_rng(0)
    drawn = [
        sample_scene(parse("a circle on a green background"), rng).objects[0].colour for _ in range(2000)
    ]
    assert abs(drawn.count("red") / 2000 - FAVOURITE_SHARE) < 0.035
    others = [drawn.count(name) for name in COLOURS if name not in ("red", "green")]
    assert min(others) > 0.5 * max(others)
    on_red = [sample_scene(parse("two stars on a red background"), rng).objects[0].colour for _ in range(100)]
    assert "red" not in on_red
    assert len(set(on_red)) == 7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", RADII)
def test_observe_reads_a_single_object(shape: str, size: str) -> None:
    scene = Scene((Item(30.3, 35.6, RADII[size], "pink", shape),), "black")
    seen = observe(render(scene))
    assert seen.background == "black"
    (thing,) = seen.objects
    assert (thing.colour, thing.shape, thing.size) == ("pink", shape, size)
    assert abs(thing.x - 30.3) < 0.3
    assert abs(thing.y - 35.6) < 0.3


def test_truth_is_recognised() -> None:
    assert share_right(500, lambda image: image) >= 0.99


@pytest.mark.parametrize(
    "change", [compressed, lambda image: blurred(image, 0.6), lambda image: blurred(image, 1.0)]
)
def test_truth_is_recognised_in_imperfect_images(change: Callable[[Bytes], Bytes]) -> None:
    assert share_right(150, change) >= 0.95


def wrong(caption: Caption, fact: str, rng: np.random.Generator) -> Caption | None:
    """The caption with one attribute changed, or None where it cannot be; what is unsaid stays unsaid."""
    group, rest = caption.groups[0], caption.groups[1:]
    taken = {caption.background, *(each.colour for each in caption.groups)}
    free = [name for name in COLOURS if name not in taken]
    if fact == "background":
        return replace(caption, background=rng.choice(free).item()) if caption.background else None
    if fact == "relation":
        opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
        return replace(caption, relation=opposite[caption.relation]) if caption.relation else None
    if fact == "count" and not caption.relation:
        counts = [n for n in range(1, 5 - sum(each.count for each in rest)) if n != group.count]
        group = replace(group, count=rng.choice(counts).item()) if counts else group
    if fact == "colours" and group.colour:
        group = replace(group, colour=rng.choice(free).item())
    if fact == "shapes":
        used = {each.shape for each in caption.groups}
        group = replace(group, shape=rng.choice([name for name in SHAPES if name not in used]).item())
    if fact == "sizes" and group.size:
        group = replace(group, size=rng.choice([name for name in RADII if name != group.size]).item())
    return None if group == caption.groups[0] else replace(caption, groups=(group, *rest))


@pytest.mark.parametrize("fact", ["background", "colours", "shapes", "count", "sizes", "relation"])
def test_one_wrong_attribute_fails_exactly_that_fact(fact: str) -> None:
    rng = np.random.default_rng(7)
    cases = [
        (caption, wrong(caption, fact, rng))
        for caption in captions(1500 if fact == "relation" else 450, seed=5)
    ]
    pairs = [(shown, said) for shown, said in cases if said is not None][:150]
    assert len(pairs) == 150
    verdicts = [judge(image(shown, i), said) for i, (shown, said) in enumerate(pairs)]
    exact = [[name for name, holds in verdict.facts.items() if not holds] == [fact] for verdict in verdicts]
    assert np.mean(exact) >= 0.98


def judged(prompt: str, *items: Item, background: str = "white") -> Verdict:
    return judge(render(Scene(items, background)), prompt)


def test_attributes_belong_to_their_objects() -> None:
    swapped = (Item(16, 20, 9, "blue", "circle"), Item(46, 44, 9, "red", "star"))
    verdict = judged("a red circle and a blue star on a white background", *swapped)
    assert verdict.score < 1
    assert not (verdict.facts["colours"] and verdict.facts["shapes"])
    assert judged("a red star and a blue circle on a white background", *swapped).score == 1


def test_relation_needs_both_objects_and_the_direction() -> None:
    left, right = Item(14, 30, 9, "red", "square"), Item(48, 36, 9, "green", "heart")
    assert judged("a red square left of a green heart", left, right).score == 1
    assert judged("a red square above a green heart", left, right).facts["relation"] is False
    alone = judged("a red square left of a green heart", left)
    assert alone.facts == {"count": False, "shapes": False, "colours": False, "relation": False}


def test_an_object_too_many_or_too_few_fails_the_count() -> None:
    objects = [Item(x, y, 6, "red", "star") for x, y in ((12, 12), (32, 12), (52, 12), (12, 40), (40, 40))]
    for number in (1, 2, 4, 5):
        assert judged("three red stars", *objects[:number]).facts == {
            "count": False,
            "shapes": True,
            "colours": True,
        }
    extra = Item(52, 50, 6, "blue", "circle")
    assert judged("three red stars", *objects[:3], extra).facts["count"] is False
    assert judged("three red stars").score == 0


def test_unsaid_attributes_assert_nothing() -> None:
    verdict = judged("a circle", Item(20, 20, 6, "cyan", "circle"), background="black")
    assert verdict.facts == {"count": True, "shapes": True}
    assert verdict.score == 1


def test_unclear_images_are_not_believed() -> None:
    image = render(Scene((Item(32, 32, 12, "red", "circle"),), "white"))
    half = (0.5 * image + 0.5 * 250).astype(np.uint8)  # a pink ghost of the circle
    assert observe(half).objects[0].colour is None
    assert judge(half, "a red circle").facts == {"count": False, "shapes": True, "colours": False}
    two_coloured = image.copy()
    two_coloured[:, 32:][image[:, 32:, 1] < 100] = COLOURS["blue"]
    assert judge(two_coloured, "a red circle").facts["colours"] is False
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert judge(noise, "a red circle on a white background").score == 0
    smeared = blurred(render(Scene((Item(32, 32, 9, "red", "star"),), "white")), 3)
    assert judge(smeared, "a medium red star").score < 1


def test_tensors_and_arrays_are_judged_alike() -> None:
    for i, caption in enumerate(captions(20)):
        drawn = image(caption, i)
        tensor = torch.from_numpy(drawn).permute(2, 0, 1) / 255
        assert judge(tensor, str(caption)) == judge(drawn, caption)
    with pytest.raises(ConfigError, match="64 x 64"):
        judge(torch.zeros(3, 32, 32), "a circle")
