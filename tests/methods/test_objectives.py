import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.gaussian import GaussianStep
from lit_align.methods.objectives import (
    denoising_error,
    error_margin,
    implicit_accuracy,
    logistic_loss,
    trajectory_margin,
)


def errors(count: int = 4, size: int = 6) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(size, generator=draw, dtype=torch.float64) for _ in range(count)]


def test_the_error_is_a_mean_over_elements_in_float32():
    prediction, target = torch.full((2, 4, 8, 8), 3.0, dtype=torch.bfloat16), torch.ones(2, 4, 8, 8)
    error = denoising_error(prediction, target)
    assert error.dtype == torch.float32
    assert error.tolist() == [4.0, 4.0]


def test_the_loss_is_log_2_where_policy_and_reference_agree():
    winner, loser = errors(2)
    margin = error_margin(winner, winner, loser, loser, 2000.0)
    assert torch.equal(margin, torch.zeros_like(margin))
    assert logistic_loss(margin).tolist() == [math.log(2)] * len(margin)
    assert implicit_accuracy(margin).tolist() == [0.5] * len(margin)


def test_equals_the_released_loss_of_diffusion_dpo():
    """Its formula: errors stacked winners first, ``-0.5 * beta * (model_diff - ref_diff)``."""
    winner, winner_reference, loser, loser_reference = errors()
    model, reference = torch.cat([winner, loser]), torch.cat([winner_reference, loser_reference])
    model_w, model_l = model.chunk(2)
    reference_w, reference_l = reference.chunk(2)
    inside = -0.5 * 5000.0 * ((model_w - model_l) - (reference_w - reference_l))
    loss = logistic_loss(error_margin(winner, winner_reference, loser, loser_reference, 5000.0))
    torch.testing.assert_close(loss, -logsigmoid(inside))


def test_beta_of_means_is_2_d_times_that_of_sums():
    size, draw = (3, 4, 8, 8), torch.Generator().manual_seed(1)
    tensors = [torch.randn(size, generator=draw, dtype=torch.float64) for _ in range(5)]
    *predictions, target = tensors
    sums = [(prediction - target).square().flatten(1).sum(1) for prediction in predictions]
    means = [denoising_error(prediction, target) for prediction in predictions]
    by_sums = 0.06 * ((sums[2] - sums[3]) - (sums[0] - sums[1]))
    torch.testing.assert_close(error_margin(*means, 2 * 256 * 0.06), by_sums)


def test_swapping_winner_and_loser_turns_the_sign():
    winner, winner_reference, loser, loser_reference = errors()
    margin = error_margin(winner, winner_reference, loser, loser_reference, 100.0)
    swapped = error_margin(loser, loser_reference, winner, winner_reference, 100.0)
    assert torch.equal(margin, -swapped)
    assert torch.equal(implicit_accuracy(margin), 1 - implicit_accuracy(swapped))
    chains = torch.stack(errors(5)), torch.stack(errors(5)).flip(0)
    assert torch.equal(trajectory_margin(*chains, 3.0), -trajectory_margin(*chains[::-1], 3.0))


def test_the_loss_of_the_mean_over_steps_is_at_most_the_mean_loss():
    """Jensen: the step-wise objective bounds that of whole trajectories from above."""
    draw = torch.Generator().manual_seed(2)
    steps, pairs = 10, 500
    winner, loser = (torch.randn(steps, pairs, generator=draw, dtype=torch.float64) for _ in range(2))
    exact = logistic_loss(trajectory_margin(winner, loser, 1.0))
    stepwise = logistic_loss(trajectory_margin(winner[None] * steps, loser[None] * steps, 1.0)).mean(0)
    assert bool((exact <= stepwise).all())
    assert bool((exact < stepwise - 1e-3).any())
    same = winner[:1].expand(steps, -1), loser[:1].expand(steps, -1)
    torch.testing.assert_close(
        logistic_loss(trajectory_margin(*same, 1.0)),
        logistic_loss(trajectory_margin(same[0][:1] * steps, same[1][:1] * steps, 1.0)),
    )


def next_mean(data: float, opponent: float, strength: float) -> float:
    """The mean of the unit Gaussian that minimises the game's loss, by quadrature and bisection."""
    x = torch.linspace(-9, 11, 251, dtype=torch.float64)[:, None]
    std = torch.ones(1, dtype=torch.float64)

    def gaussian(mean: Tensor) -> GaussianStep:
        return GaussianStep(mean.expand_as(x), std)

    real, fake = (gaussian(torch.tensor(mean)).log_prob(x).exp() for mean in (data, opponent))
    joint = real[:, None] * fake[None, :]

    def slope(mean: float) -> float:
        theta = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
        ratio = gaussian(theta).log_ratio(gaussian(torch.tensor(opponent)), x)
        winner, loser = ratio[:, None].expand_as(joint), ratio[None, :].expand_as(joint)
        margin = trajectory_margin(winner.flatten()[None], loser.flatten()[None], strength)
        loss = (logistic_loss(margin) * joint.flatten()).sum() / joint.sum()
        return torch.autograd.grad(loss, theta)[0].item()

    low, high = opponent - 6.0, opponent + 6.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return (low + high) / 2


@pytest.mark.parametrize("strength", [1.0, 2.0, 4.0])
def test_a_game_of_gaussians_moves_by_the_inverse_of_lambda(strength: float):
    """``mu_{k+1} = mu_k + (mu_data - mu_k) / lambda``: at once for 1, geometrically above."""
    data, mean = 1.5, 0.0
    for _ in range(3):
        expected = mean + (data - mean) / strength
        mean = next_mean(data, mean, strength)
        assert mean == pytest.approx(expected, abs=1e-5)


def test_data_that_the_opponent_makes_itself_leave_it_where_it_is():
    assert next_mean(0.7, 0.7, 1.0) == pytest.approx(0.7, abs=1e-6)
