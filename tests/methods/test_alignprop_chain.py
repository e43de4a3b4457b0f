"""The chains of AlignProp on linear-Gaussian toys, where gradients are known in closed form; truncations."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods.alignprop import (
    FixedWindow,
    GaussianWindow,
    LowVariance,
    NoTruncation,
    OneShot,
    PerStep,
    Truncation,
    UniformWindow,
)
from lit_align.methods.alignprop.chain import differentiable_rollout, last_step_again
from lit_align.methods.alignprop.module import reward_loss
from lit_align.randomness import generator
from lit_align.samplers import NoiseSchedule, Sampler


class ConstantSchedule(NoiseSchedule):
    """``x = α x0 + σ ε`` at every timestep."""

    def __init__(self, signal: float, noise: float) -> None:
        self.num_train_timesteps = 1
        self.levels = signal, noise

    def alpha(self, t: float | Tensor) -> Tensor:
        return torch.tensor(self.levels[0], dtype=torch.float64)

    def sigma(self, t: float | Tensor) -> Tensor:
        return torch.tensor(self.levels[1], dtype=torch.float64)

    def basis(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("nothing here asks what a prediction means")

    def draw_t(self, draws: object) -> Tensor:
        raise AssertionError("nothing here is trained on drawn timesteps")


class LinearSampler(Sampler):
    """``x' = a x + prediction + s z``: the toy chains; a clean state is noised to ``α x + σ ε``."""

    def __init__(
        self, num_steps: int, factor: float, std: float, levels: tuple[float, float] = (1.0, 0.0)
    ) -> None:
        self.schedule = ConstantSchedule(*levels)
        self.num_steps = num_steps
        self.timesteps = torch.arange(num_steps).flip(0)
        self.stochastic = torch.full((num_steps,), std > 0)
        self.factor, self.std = factor, std

    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        return GaussianStep(self.factor * x + prediction, torch.tensor(self.std))


def window(length: int, num_steps: int, images: int = 1) -> Tensor:
    return (torch.arange(num_steps) >= num_steps - length)[:, None].expand(-1, images)


# ---- closed forms


@pytest.mark.parametrize("length", range(6))
def test_a_window_of_k_steps_sees_the_first_k_terms_of_the_linear_gaussian_chain(length):
    """``dJ/dθ = -2 (E x_N - c) b (1 + a + ... + a^(K-1))``: the full gradient for K = N, biased below."""
    a, b, s, c, n, images = 0.9, 0.3, 0.4, 1.5, 5, 20_000
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(images, 1, dtype=torch.float64, generator=draw)
    end, _ = differentiable_rollout(
        lambda x, k: b * theta * torch.ones_like(x),
        LinearSampler(n, a, s),
        noise,
        window(length, n, images),
        draw,
    )
    reward = -(end - c).square().mean()
    sums = [(1 - a**terms) / (1 - a) for terms in range(n + 1)]
    expected = -2 * (b * 0.7 * sums[n] - c) * b * sums[length]
    if length == 0:
        assert not reward.requires_grad
        return
    (gradient,) = torch.autograd.grad(reward, theta)
    assert gradient.item() == pytest.approx(expected, abs=4 * 2.4 / math.sqrt(images))
    assert {1: 0.384017, 2: 0.729633, 5: 1.572590}.get(length, expected) == pytest.approx(expected, abs=1e-6)


def gradient_of_the_multiplying_chain(attached: Tensor) -> float:
    """Gradient of ``x_N`` where ``x' = a x + b θ x``: each attached step's Jacobian reaches all before it."""
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    sampler, noise = LinearSampler(len(attached), 0.9, 0.0), torch.ones(1, 1, dtype=torch.float64)
    end, _ = differentiable_rollout(lambda x, k: -0.3 * theta * x, sampler, noise, attached[:, None])
    return torch.autograd.grad(end.sum(), theta)[0].item() if end.requires_grad else 0.0


def test_the_two_randomisations_differ_where_predictions_depend_on_the_state():
    n, rate = 6, 0.9 - 0.3 * 0.7
    whole = gradient_of_the_multiplying_chain(torch.full((n,), True))
    assert whole == pytest.approx(n * -0.3 * rate ** (n - 1))
    assert whole == pytest.approx(-0.281526, abs=1e-6)
    contiguous = [gradient_of_the_multiplying_chain(torch.arange(n) >= u) for u in range(n + 1)]
    # A detached prediction leaves the factor a of the sampler's arithmetic in the chain, not a + bθ: only a
    # window keeps the Jacobians after every attached step whole.
    assert contiguous[n - 1] == pytest.approx(-0.046921, abs=1e-6)
    assert sum(contiguous) / (n + 1) == pytest.approx(-0.140763, abs=1e-6)
    per_step = 0.0
    for choice in itertools.product([False, True], repeat=n):
        chances = [(k + 1) / (n + 1) if on else (n - k) / (n + 1) for k, on in enumerate(choice)]
        per_step += math.prod(chances) * gradient_of_the_multiplying_chain(torch.tensor(choice))
    assert per_step == pytest.approx(-0.163844, abs=1e-6)


def expected_gradients_of_the_linear_chain() -> tuple[Tensor, float]:
    """What each attached step adds to ``dJ/dθ`` of the chain above, in sampling order; and their sum."""
    a, b, c, n = 0.9, 0.3, 1.5, 5
    mean = b * 0.7 * (1 - a**n) / (1 - a)
    terms = -2 * (mean - c) * b * a ** torch.arange(n - 1, -1, -1, dtype=torch.float64)
    return terms, float(terms.sum())


@pytest.mark.parametrize("kind", ["window", "per step"])
def test_random_truncations_bias_the_linear_chain_by_their_chances(kind):
    """Predictions do not depend on the state: only how often each step is attached matters."""
    terms, whole = expected_gradients_of_the_linear_chain()
    truncation = UniformWindow() if kind == "window" else PerStep()
    drawn = lengths(truncation, 5, draws=1000)

    def gradient(attached: Tensor) -> float:
        """Of the mean image: noise enters a chain whose predictions know no state linearly."""
        theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        noise = torch.zeros(1, 1, dtype=torch.float64)
        end, _ = differentiable_rollout(
            lambda x, k: 0.3 * theta * torch.ones_like(x),
            LinearSampler(5, 0.9, 0.0),
            noise,
            attached[:, None],
        )
        return float(torch.autograd.grad(-(end - 1.5).square().sum(), theta)[0])

    choices, counts = drawn.unique(dim=0, return_counts=True)
    mean = sum(gradient(choice) * int(count) for choice, count in zip(choices, counts, strict=True)) / 1000
    chances = torch.arange(1, 6) / (5.0 if kind == "window" else 6.0)
    chances[-1] = 1
    assert mean == pytest.approx(float((chances * terms).sum()), abs=0.03)
    assert {"window": 1.009513, "per step": 0.841261 + float(terms[-1]) / 6}[kind] == pytest.approx(
        float((chances * terms).sum()), abs=1e-6
    )
    assert mean < 0.7 * whole


def last_step_gradients(images: int, copies: int, std: float, levels: tuple[float, float]) -> Tensor:
    """Each image's ``dR/dθ`` of DRaFT-LV, mean over its ends: ``x' = (a + b θ) x + s z``, ``R = -x'²``."""
    sampler, draw = LinearSampler(1, 0.5, std, levels), torch.Generator().manual_seed(0)
    # A weight for each image, so that one backward pass gives each its own gradient.
    theta = torch.full((images, 1), 0.7, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(images, 1, dtype=torch.float64, generator=draw)

    def predict(x: Tensor, k: int) -> Tensor:
        return 0.3 * theta * x

    end, _ = differentiable_rollout(predict, sampler, noise, window(1, 1, images), draw)
    ends = last_step_again(predict, sampler, end, copies, draw)
    return torch.autograd.grad(-ends.square().sum() / (1 + copies), theta)[0][:, 0]


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("noised", [1.0, 2.0], ids=["matching noise", "too much noise"])
def test_re_noised_copies_keep_the_expectation_and_lower_the_variance(copies, noised):
    """``E g = -2 b (a + b θ) E x²``, where x² is 1 in the chain and ``α² V + σ²`` after noise is added."""
    std, images, slope = 0.6, 40_000, 0.5 + 0.3 * 0.7
    signal = 0.5
    sigma = math.sqrt(noised - signal**2 * (slope**2 + std**2))
    gradients = last_step_gradients(images, copies, std, (signal, sigma))
    expected = -2 * 0.3 * slope * (1 + copies * noised) / (1 + copies)
    assert gradients.mean().item() == pytest.approx(expected, abs=4 * gradients.std().item() / 200)
    if noised == 1:  # where the noise leads back to where the last step began, this is DRaFT-1
        assert expected == pytest.approx(-2 * 0.3 * slope)
        alone = last_step_gradients(images, 0, std, (signal, sigma)).std()
        assert gradients.std() < {1: 0.8, 4: 0.6}[copies] * alone


def test_copies_noised_back_to_where_they_came_from_change_nothing():
    """No noise, and the clean state scaled back: every copy is the last step itself, cut from the chain."""
    slope = 0.5 + 0.3 * 0.7
    for copies in (0, 1, 3):
        found = last_step_gradients(50, copies, 0.0, (1 / slope, 0.0))
        torch.testing.assert_close(found, last_step_gradients(50, 0, 0.0, (1.0, 0.0)))


@pytest.mark.parametrize("target", [None, 2.0])
def test_the_loss_pulls_up_or_towards_its_target(target):
    rewards = torch.tensor([1.0, 3.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(reward_loss(rewards, target).sum(), rewards)
    assert gradient.tolist() == ([-1.0, -1.0] if target is None else [-1.0, 1.0])


def test_above_its_ceiling_an_image_gives_no_gradient():
    rewards = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = reward_loss(rewards, ceiling=2.0)
    (gradient,) = torch.autograd.grad(loss.sum(), rewards)
    assert gradient.tolist() == [-1.0, 0.0]
    assert torch.equal(loss + 2, torch.relu(2 - rewards))


# ---- truncations


def lengths(truncation: Truncation, num_steps: int, draws: int = 2000) -> Tensor:
    return torch.stack([truncation.attached(num_steps, generator(0, "test", i)) for i in range(draws)])


def test_windows_are_contiguous_and_as_long_as_they_say():
    for truncation, low, high, mean in (
        (NoTruncation(), 10, 10, 10.0),
        (FixedWindow(3), 3, 3, 3.0),
        (UniformWindow(), 1, 10, 5.5),
        (UniformWindow(2, 4), 2, 4, 3.0),
        (LowVariance(), 1, 1, 1.0),
        (GaussianWindow(5.0, 1.0), 1, 10, 5.5),  # rounding up adds a half
    ):
        drawn = lengths(truncation, 10)
        assert bool((drawn[:, 1:] >= drawn[:, :-1]).all()), "once attached, attached to the end"
        counts = drawn.sum(1)
        assert low <= counts.min() <= counts.max() <= high
        assert counts.double().mean().item() == pytest.approx(mean, abs=0.25)


def test_per_step_draws_have_the_marginals_of_a_uniform_threshold():
    shares = lengths(PerStep(), 9).double().mean(0)
    expected = torch.arange(1, 10) / 10
    expected[-1] = 1
    torch.testing.assert_close(shares, expected.double(), atol=0.05, rtol=0)


def test_one_shot_attaches_one_late_step():
    drawn = lengths(OneShot(1, 3), 9, draws=100)
    assert drawn.sum(1).tolist() == [1] * 100
    assert drawn.any(0).tolist() == [False] * 6 + [True] * 3


def test_no_copies_are_refused_with_the_name_of_what_has_none():
    with pytest.raises(ConfigError, match=r"copies is 0.*FixedWindow"):
        LowVariance(0)


@pytest.mark.parametrize(
    "truncation",
    [
        FixedWindow(0),
        FixedWindow(5),
        UniformWindow(0),
        UniformWindow(3, 2),
        GaussianWindow(8),
        OneShot(1, 10),
    ],
)
def test_sizes_that_the_sampler_does_not_have_are_refused(truncation):
    with pytest.raises(ConfigError, match="truncation"):
        truncation.attached(4, generator(0, "test"))
