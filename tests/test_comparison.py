import math

import pytest
import torch

from lit_align.comparison import compare, diversity


def test_compare_is_the_paired_mean_and_its_standard_error():
    before, after = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 4.0, 2.0])
    found = compare(before, after, torch.arange(4))
    differences = [1.0, 0.0, 2.0, -1.0]
    mean = sum(differences) / 4
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    assert found.difference == pytest.approx(mean)
    assert found.standard_error == pytest.approx(spread / 2)
    assert found.win_rate == pytest.approx((1 + 0.5 + 1 + 0) / 4)
    wins = [1 - 0.625, 0.5 - 0.625, 1 - 0.625, -0.625]
    assert found.win_rate_error == pytest.approx(math.sqrt(sum(w**2 for w in wins) / 3) / 2)
    assert (found.before, found.after, found.num_pairs) == (1.5, 2.0, 4)


def test_a_pair_without_a_score_is_left_out_on_both_sides():
    found = compare(torch.tensor([math.nan, 1.0, 2.0]), torch.tensor([5.0, 2.0, 3.0]), torch.arange(3))
    assert (found.before, found.after, found.num_pairs) == (1.5, 2.5, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_pairs_have_no_error_bar(count):
    assert math.isnan(compare(torch.ones(count), torch.ones(count), torch.arange(count)).standard_error)


def test_standard_error_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        before = torch.randn(64, generator=generator)
        found = compare(before, before + 0.3 + torch.randn(64, generator=generator), torch.arange(64))
        inside += abs(found.difference - 0.3) < 2 * found.standard_error
    assert 0.92 < inside / 400 < 0.98


def test_standard_error_counts_prompts_when_their_images_move_together():
    generator = torch.Generator().manual_seed(1)
    groups = torch.arange(32).repeat_interleave(4)
    inside = 0
    for _ in range(400):
        shift = 0.3 + torch.randn(32, generator=generator)[groups]  # all images of a prompt gain the same
        found = compare(torch.zeros(128), shift, groups)
        inside += abs(found.difference - 0.3) < 2 * found.standard_error
    assert 0.90 < inside / 400 < 0.98


def test_a_image_of_nan_spoils_no_other_prompt():
    images = torch.zeros(4, 3, 32, 32)
    images[0] = math.nan
    assert diversity(images, torch.tensor([0, 0, 1, 1]))[2:].tolist() == [0.0, 0.0]


def test_diversity_is_zero_for_equal_images_and_the_distance_for_flat_ones():
    images = torch.zeros(5, 3, 32, 32)
    images[1] += 0.5
    images[4] += 0.2
    found = diversity(images, torch.tensor([0, 0, 1, 1, 2]))
    assert found[:4].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
    assert found[4].isnan()


def test_diversity_of_independent_pixels_is_what_its_docstring_says():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found = diversity(images, torch.zeros(2), side=64)
    assert found.tolist() == pytest.approx([math.sqrt(1 / 6)] * 2, abs=0.01)
