"""Rewards of sets: closed forms, credits against brute force, expected gradients, missing classes."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from lit_align.errors import ConfigError
from lit_align.rewards import (
    BatchStatisticalParity,
    PairwiseDiversity,
    RewardBank,
    SetReward,
    StatisticalParity,
)
from lit_align.rewards.distribution import Credit
from lit_align.shapes.recipe.classifier import balanced_caption, colours_of
from lit_align.shapes.recipe.images import numpy_rng
from lit_align.shapes.recipe.seeing import images_of
from lit_align.shapes.world import COLOURS, sample_scene


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier of four classes that tells images by how bright they are: 0, 1/3, 2/3 or 1."""
    folder = tmp_path_factory.mktemp("four")
    names = {0: "dark", 1: "dim", 2: "light", 3: "bright"}
    config = ViTConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=8,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


class ByBrightness(StatisticalParity):
    """The likeliest class is the brightness, sure to 90 %; a grey of 0.5 has no clear class."""

    def _likely(self, images: Tensor) -> Tensor:
        level = images.mean(dim=(1, 2, 3))
        right = torch.nn.functional.one_hot((3 * level).round().long(), 4).float()
        unclear = (level - 0.5).abs()[:, None] < 0.01
        return torch.where(unclear, torch.full_like(right, 0.25), 0.9 * right + 0.025)


def images(classes: list[int | None]) -> Tensor:
    levels = [0.5 if number is None else number / 3 for number in classes]
    return torch.tensor(levels).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def parity(
    folder: str, classes: list[int | None], groups: list[int] | None = None, **options: object
) -> Tensor:
    reward = ByBrightness(folder, **options)
    numbers = None if groups is None else torch.tensor(groups)
    return reward(images(classes), [""] * len(classes), numbers)


def test_the_extremes_of_four_classes(four: str) -> None:
    """The numbers of the paper's sixteen images of four tones."""
    even: list[int | None] = [0, 1, 2, 3] * 4
    assert parity(four, even, credit="shared").tolist() == [0.0] * 16
    one: list[int | None] = [2] * 16
    assert parity(four, one, credit="shared").tolist() == pytest.approx([-(0.75**0.5)] * 16)
    assert parity(four, one, credit="shared", squared=True).tolist() == pytest.approx([-0.75] * 16)
    target = {"light": 1.0}
    assert parity(four, one, credit="shared", target=target).tolist() == [0.0] * 16


def test_the_square_is_a_count_of_like_pairs(four: str) -> None:
    classes: list[int | None] = [0, 0, 0, 1, 2, 2, 0, 1]
    like = sum(a == b for a, b in itertools.product(classes, classes))
    found = parity(four, classes, credit="shared", squared=True)
    assert found.tolist() == pytest.approx([-(like / 64 - 0.25)] * 8)


@pytest.mark.parametrize("credit", ["shared", "leave_one_out"])
def test_permuting_a_group_permutes_its_credit(four: str, credit: Credit) -> None:
    classes: list[int | None] = [0, 0, 3, 1, 2, 2, None, 1]
    groups, order = [4, 4, 4, 4, 9, 9, 9, 9], [3, 1, 0, 2, 7, 6, 4, 5]
    plain = parity(four, classes, groups, credit=credit)
    moved = parity(four, [classes[i] for i in order], [groups[i] for i in order], credit=credit)
    assert torch.equal(moved.nan_to_num(9), plain[order].nan_to_num(9))


def test_images_without_a_class_are_no_members(four: str) -> None:
    """They have no score, and the others have what they would have without them."""
    classes: list[int | None] = [0, None, 1, 1, None, 3]
    for credit in ("shared", "leave_one_out"):
        found = parity(four, classes, credit=credit)
        assert found.isnan().tolist() == [False, True, False, False, True, False]
        rest = parity(four, [0, 1, 1, 3], credit=credit)
        assert torch.equal(found[found.isfinite()], rest)
    assert parity(four, [0, None, None], credit="shared").isnan().all()  # one alone says nothing
    ignoring = parity(four, [0, 0, 1, 2], credit="shared", squared=True, ignore=["dark"])
    assert ignoring.nan_to_num(9).tolist() == pytest.approx([9, 9, -1 / 6, -1 / 6])


def test_what_is_reported_of_a_set_is_its_own_value_whatever_the_credit(four: str) -> None:
    drawn, groups = images([0, 0, 0, 1, 2, None, 1, 3]), torch.tensor([5, 5, 5, 5, 7, 7, 7, 7])
    for kind in (ByBrightness(four), PairwiseDiversity("shapes")):
        bank = RewardBank({"set": kind}, {"set": 2.0})
        found = bank(drawn, ["a star"] * 8, groups)
        assert torch.equal(found.total.nan_to_num(9), (2 * kind(drawn, ["a star"] * 8, groups)).nan_to_num(9))
        kind.credit = "shared"
        worth = kind(drawn, ["a star"] * 8, groups)
        assert torch.equal(found.report["reward/set"].nan_to_num(9), worth.nan_to_num(9))
        assert torch.equal(found.report["reward"].nan_to_num(9), (2 * worth).nan_to_num(9))
        assert found.report["reward"].nanmean() != pytest.approx(float(found.total.nanmean()), abs=1e-3)


def test_a_target_of_unequal_shares_is_overshot_by_as_much_as_is_said(four: str) -> None:
    """Over all draws of four images, and from the moments of sixteen."""
    wanted = {"dark": 0.7, "dim": 0.1, "light": 0.1, "bright": 0.1}
    reward = ByBrightness(four, squared=True, credit="shared", target=wanted)
    least = (4 * reward.target - 1 / 4) / 3
    assert float(expected_gradient(reward, reward.target.log(), 4).norm()) > 0.05
    assert float(expected_gradient(reward, least.log(), 4).norm()) < 1e-12
    count, target = 16, torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64)
    shares = target.clone().requires_grad_()
    expected = ((shares * (1 - shares)) / count + (shares - target).square()).sum()
    (slope,) = torch.autograd.grad(expected, shares)
    assert float((slope - slope.mean()).norm()) > 0.04
    least = ((count * target - 1 / 4) / (count - 1)).requires_grad_()
    expected = ((least * (1 - least)) / count + (least - target).square()).sum()
    (slope,) = torch.autograd.grad(expected, least)
    assert float((slope - slope.mean()).norm()) < 1e-12
    assert least.tolist() == pytest.approx([0.73, 0.09, 0.09, 0.09])


def toy(squared: bool, credit: Credit, four: str) -> SetReward:
    return ByBrightness(four, squared=squared, credit=credit)


@pytest.mark.parametrize("squared", [False, True])
def test_leave_one_out_equals_brute_force(four: str, squared: bool) -> None:
    shared, credit = toy(squared, "shared", four), toy(squared, "leave_one_out", four)
    classes = torch.randint(4, (9,), generator=torch.Generator().manual_seed(3))
    features = torch.nn.functional.one_hot(classes, 4).double()
    features[4] = torch.nan
    groups = torch.tensor([7, 7, 7, 7, 7, 1, 1, 1, 7])
    found, _ = credit.credits(features, groups)
    for row in range(9):
        others = torch.arange(9) != row
        whole = shared.credits(features, groups)[0][row]
        fewer, _ = shared.credits(features[others], groups[others])
        without = fewer[groups[others] == groups[row]].nanmean()  # shared: the same for all of the set
        torch.testing.assert_close(found[row], whole - without, equal_nan=True)


def diversity(embeddings: Tensor) -> float:
    count = len(embeddings)
    pairs = itertools.combinations(range(count), 2)
    return float(torch.stack([1 - embeddings[i] @ embeddings[j] for i, j in pairs]).mean())


def test_diversity_and_its_credit_equal_brute_force(clip_folder: Path) -> None:
    images = torch.rand(5, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    shared, credit = PairwiseDiversity(str(clip_folder), "shared"), PairwiseDiversity(str(clip_folder))
    unit = shared.features(images)
    whole = diversity(unit)
    assert whole > 1e-3
    assert shared(images, [""] * 5).tolist() == pytest.approx([whole] * 5)
    without = [diversity(unit[torch.arange(5) != row]) for row in range(5)]
    assert credit(images, [""] * 5).tolist() == pytest.approx([whole - less for less in without], abs=1e-6)
    assert credit(images[:2], [""] * 2).isnan().all()  # without one there is no pair left
    assert shared(images[:1].expand(4, -1, -1, -1), [""] * 4).tolist() == pytest.approx([0] * 4, abs=1e-6)


def expected_gradient(reward: SetReward, logits: Tensor, count: int) -> Tensor:
    """Of the policy gradient ``sum_i credit_i grad log p(a_i)``, over all sets of ``count`` classes."""
    likely, total = logits.softmax(0), torch.zeros_like(logits)
    groups = torch.zeros(count, dtype=torch.long)
    for classes in itertools.product(range(4), repeat=count):
        shown = torch.nn.functional.one_hot(torch.tensor(classes), 4).double()
        chance = likely[list(classes)].prod()
        total += chance * (reward.credits(shown, groups)[0][:, None] * (shown - likely)).sum(0)
    return total


def test_both_credits_have_the_gradient_of_the_square_up_to_one_minus_one_over_n(four: str) -> None:
    logits = torch.tensor([0.5, -0.3, 0.1, 0.9], dtype=torch.float64, requires_grad=True)
    (wanted,) = torch.autograd.grad(-logits.softmax(0).square().sum(), logits)
    for count in (2, 4):
        for credit in ("shared", "leave_one_out"):
            found = expected_gradient(toy(True, credit, four), logits.detach(), count)
            torch.testing.assert_close(found, (1 - 1 / count) * wanted)


@pytest.mark.parametrize("squared", [False, True])
def test_the_even_policy_is_a_stationary_point(four: str, squared: bool) -> None:
    for credit in ("shared", "leave_one_out"):
        found = expected_gradient(toy(squared, credit, four), torch.zeros(4, dtype=torch.float64), 4)
        assert found.abs().max() < 1e-12


def test_leave_one_out_has_a_fraction_of_the_variance(four: str) -> None:
    """Of the gradient from sixteen images, the batch's mean as baseline: 3.5 times less here."""
    logits = torch.tensor([0.5, -0.3, 0.1, 0.9], dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    sets = torch.multinomial(logits.softmax(0), 16 * 400, True, generator=draws)
    shown, groups = torch.nn.functional.one_hot(sets, 4).double(), torch.arange(400).repeat_interleave(16)
    variance = []
    for credit in ("shared", "leave_one_out"):
        credits, _ = toy(True, credit, four).credits(shown, groups)
        centred = (credits - credits.mean())[:, None] * (shown - logits.softmax(0))
        gradients = centred.view(400, 16, 4).sum(1)
        variance.append(gradients.var(0).sum())
    assert variance[0] > 3 * variance[1]


def test_the_shipped_classifier_on_true_images() -> None:
    rng = numpy_rng(5, "parity")
    scenes = [sample_scene(balanced_caption(rng), rng) for _ in range(48)]
    images, groups = images_of(scenes), torch.arange(3).repeat_interleave(16)
    reward = StatisticalParity("shapes", credit="shared")
    shares = torch.stack([colours_of(scenes).view(3, 16) == number for number in range(len(COLOURS))], -1)
    wanted = -(shares.double().mean(1) - 1 / len(COLOURS)).norm(dim=1)
    found = reward(images, [""] * 48, groups).view(3, 16)
    assert (found[:, 0] - wanted).abs().max() < 0.05  # an image in a hundred may be misread
    whole = BatchStatisticalParity("shapes", credit="shared")(images, [""] * 48, groups)
    assert whole.unique().numel() == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"target": {"dark": 0.5, "purple": 0.5}}, "purple"),
        ({"target": {"dark": 0.5}}, "sum to 1"),
        ({"target": {}}, "sum to 1"),
        ({"target": {"dark": 1.5, "dim": -0.5}}, "at least 0"),
        ({"target": {"dark": 1.0}, "ignore": ["dark"]}, "ignored"),
        ({"ignore": ["dark", "dim", "light"]}, "fewer than two"),
        ({"credit": "half"}, "leave_one_out"),
    ],
)
def test_refuses_what_cannot_work(four: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        StatisticalParity(four, **options)


def test_a_classifier_of_ones_own_is_read_with_its_processor(four: str) -> None:
    """The real path through transformers: another size of image, another number of classes."""
    with pytest.raises(ConfigError, match="not a probability"):
        StatisticalParity(four, min_confidence=1.5)
    reward = StatisticalParity(four, min_confidence=0)
    images = torch.rand(4, 3, 30, 20, generator=torch.Generator().manual_seed(0))
    assert reward.features(images).shape == (4, 4)
    assert reward(images, [""] * 4).isfinite().all()


def gather_and_score(rank: int, folder: str, file: str) -> None:
    torch.set_num_threads(1)  # a forked process would wait for the threads of its parent, which it has not
    torch.distributed.init_process_group("gloo", f"file://{file}.meeting", rank=rank, world_size=2)
    features = torch.load(file)
    reward: BatchStatisticalParity = BatchStatisticalParity(folder)
    reward.features = lambda images: features[rank::2]  # type: ignore[method-assign, assignment]
    images = torch.zeros(len(features) // 2, 3, 8, 8)
    torch.save(reward(images, [""] * len(images)), f"{file}.{rank}")
    torch.distributed.destroy_process_group()


def test_a_batch_of_two_processes_is_one_batch(four: str, tmp_path: Path) -> None:
    features = torch.nn.functional.one_hot(torch.tensor([0, 1, 1, 3, 0, 0, 2, 1]), 4).double()
    features[3] = torch.nan
    file = str(tmp_path / "features.pt")
    torch.save(features, file)
    torch.multiprocessing.start_processes(gather_and_score, (four, file), nprocs=2, start_method="fork")
    found = torch.stack([torch.load(f"{file}.{rank}") for rank in range(2)], 1).flatten()
    wanted = BatchStatisticalParity(four).credits(features, torch.zeros(8, dtype=torch.long))[0].float()
    assert torch.equal(found.nan_to_num(9), wanted.nan_to_num(9))
