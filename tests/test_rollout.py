"""The sampling loop on a linear-Gaussian chain, where the objective and its gradient are known in closed
form."""

import math

import pytest
import torch
from torch import Tensor

from lit_align.gaussian import GaussianStep, Policy
from lit_align.rollout import Trajectory, rollout

# x_{k+1} = DECAY x_k + PUSH theta + STD z_k, x_0 ~ N(0, 1), reward -(x_N - TARGET)^2
NUM_STEPS, DECAY, PUSH, STD, TARGET = 5, 0.9, 0.3, 0.4, 1.5
OBJECTIVE, GRADIENT = -1.306797, 1.572590
NUM_SAMPLES = 40_000


def chain(theta: Tensor) -> Policy:
    def policy(x: Tensor, k: int | Tensor) -> GaussianStep:
        return GaussianStep(DECAY * x + PUSH * theta, torch.full((1, 1), STD, dtype=x.dtype))

    return policy


def sample(theta: Tensor, num_samples: int = NUM_SAMPLES) -> Trajectory:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)
    return rollout(chain(theta), noise, NUM_STEPS, generator)


def replay(theta: Tensor, trajectory: Trajectory) -> Tensor:
    """Log-probabilities (T, B) of stored states under another parameter."""
    policy, states = chain(theta), trajectory.states.detach()
    return torch.stack([policy(states[k], k).log_prob(states[k + 1]) for k in range(NUM_STEPS)])


def test_pathwise_gradient_is_exact_for_each_noise() -> None:
    theta = torch.full((), 0.7, dtype=torch.float64, requires_grad=True)
    last = sample(theta).states[-1].squeeze(1)
    reward = -(last - TARGET).square()
    (gradient,) = torch.autograd.grad(reward.mean(), theta)
    geometric = sum(DECAY**k for k in range(NUM_STEPS))
    per_sample = -2 * (last.detach() - TARGET) * PUSH * geometric
    torch.testing.assert_close(gradient, per_sample.mean(), rtol=1e-10, atol=1e-10)
    assert abs(reward.mean().item() - OBJECTIVE) < 4 * reward.std().item() / math.sqrt(NUM_SAMPLES)
    assert abs(gradient.item() - GRADIENT) < 4 * per_sample.std().item() / math.sqrt(NUM_SAMPLES)


def test_score_function_gradient_is_unbiased() -> None:
    theta = torch.full((), 0.7, dtype=torch.float64)
    with torch.no_grad():
        trajectory = sample(theta)
    advantage = -(trajectory.states[-1].squeeze(1) - TARGET).square() - OBJECTIVE
    noise = (trajectory.states[1:] - trajectory.means) / STD
    per_sample = advantage * (noise.squeeze(2) * PUSH / STD).sum(0)
    current = theta.clone().requires_grad_()
    log_probs = replay(current, trajectory)
    (score,) = torch.autograd.grad((advantage * log_probs.sum(0)).mean(), current, retain_graph=True)
    ratios = (log_probs - trajectory.log_probs).exp()
    (importance,) = torch.autograd.grad((advantage * ratios).sum(0).mean(), current)
    torch.testing.assert_close(score, per_sample.mean(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(importance, score, rtol=1e-9, atol=1e-9)
    assert abs(score.item() - GRADIENT) < 4 * per_sample.std().item() / math.sqrt(NUM_SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_replay_of_stored_states_gives_the_stored_log_probs(dtype: torch.dtype) -> None:
    """Float32 states whatever goes in and whatever the policy computes in: ratios of a replay are exactly
    1."""

    def policy(x: Tensor, k: int | Tensor) -> GaussianStep:
        return GaussianStep((0.9 * x).to(dtype), torch.full((1, 1, 1), 0.02))

    trajectory = rollout(policy, torch.randn(4, 3, 8).to(dtype), 6)
    assert {trajectory.states.dtype, trajectory.means.dtype, trajectory.log_probs.dtype} == {torch.float32}
    for k in range(6):
        step = policy(trajectory.states[k], k)
        assert torch.equal(step.mean, trajectory.means[k])
        assert torch.equal(step.log_prob(trajectory.states[k + 1]), trajectory.log_probs[k])


def test_shapes_and_a_deterministic_last_step() -> None:
    def policy(x: Tensor, k: int | Tensor) -> GaussianStep:
        return GaussianStep(0.5 * x, torch.full((1, 1, 1, 1), 0.0 if k == 2 else 1.0))

    noise = torch.randn(2, 4, 8, 8)
    trajectory = rollout(policy, noise, 3)
    assert trajectory.states.shape == (4, 2, 4, 8, 8)
    assert trajectory.means.shape == (3, 2, 4, 8, 8)
    assert trajectory.log_probs.shape == (3, 2)
    assert torch.equal(trajectory.states[0], noise)
    assert torch.equal(trajectory.states[3], trajectory.means[2])
    assert trajectory.log_probs[2].tolist() == [0, 0]
    assert (trajectory.log_probs[:2] != 0).all()


def test_the_log_prob_of_a_sample_has_the_expectation_of_the_entropy() -> None:
    num_elements = 16_384
    trajectory = rollout(
        lambda x, k: GaussianStep(x, torch.full((1, 1), 0.02)), torch.zeros(8, num_elements), 2
    )
    mean = (trajectory.log_probs / num_elements).mean().item()
    expected = -0.5 - math.log(0.02) - 0.5 * math.log(2 * math.pi)
    assert abs(mean - expected) < 5 * math.sqrt(0.5 / (16 * num_elements))


def test_one_generator_per_image_makes_images_independent_of_their_batch() -> None:
    def run(*seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return rollout(
            lambda x, k: GaussianStep(0.9 * x, torch.ones(1, 1)), torch.ones(len(seeds), 6), 4, generators
        ).states

    assert torch.equal(run(1, 2, 3)[:, 2:], run(3))


def test_the_chain_needs_no_gradient() -> None:
    theta = torch.full((), 0.7, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        trajectory = sample(theta, 2)
    assert not trajectory.states.requires_grad
    assert sample(theta, 2).means.requires_grad
