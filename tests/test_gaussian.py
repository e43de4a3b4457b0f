"""GaussianStep against torch.distributions and closed forms; fuse against the identities of a product of
Gaussians."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lit_align.gaussian import GaussianStep, fuse

SHAPE = (3, 2, 4, 4)
STDS = {"scalar": (1, 1, 1, 1), "per image": (3, 1, 1, 1), "per element": SHAPE}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_step(seed: int, std_shape: tuple[int, ...] = (3, 1, 1, 1)) -> GaussianStep:
    return GaussianStep(draw(*SHAPE, seed=seed), draw(*std_shape, seed=seed + 100).abs() + 0.1)


@pytest.mark.parametrize("std_shape", STDS.values(), ids=STDS.keys())
def test_densities_agree_with_torch(std_shape: tuple[int, ...]) -> None:
    p, q, x = make_step(1, std_shape), make_step(2, std_shape), draw(*SHAPE, seed=3)
    reference_p, reference_q = Normal(p.mean, p.std.expand(SHAPE)), Normal(q.mean, q.std.expand(SHAPE))
    log_p, log_q = (one.log_prob(x).flatten(1).sum(1) for one in (reference_p, reference_q))
    torch.testing.assert_close(p.log_prob(x), log_p, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(p.log_ratio(q, x), log_p - log_q, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        p.kl(q), kl_divergence(reference_p, reference_q).flatten(1).sum(1), rtol=1e-12, atol=1e-12
    )


def test_gradients_agree_with_finite_differences() -> None:
    x, other = draw(2, 3, seed=5), GaussianStep(draw(2, 3, seed=6), draw(2, 1, seed=7).abs() + 0.5)
    mean, std = draw(2, 3, seed=8).requires_grad_(), (draw(2, 1, seed=9).abs() + 0.5).requires_grad_()
    for function in (
        lambda m, s: GaussianStep(m, s).log_prob(x),
        lambda m, s: GaussianStep(m, s).log_ratio(other, x),
        lambda m, s: GaussianStep(m, s).kl(other),
        lambda m, s: GaussianStep(m, s).rsample(torch.Generator().manual_seed(0)),
        lambda m, s: fuse([GaussianStep(m, s), other], [0.3, 0.7]).kl(other),
    ):
        assert torch.autograd.gradcheck(function, (mean, std))


def test_log_ratio_keeps_differences_that_the_log_probs_lose() -> None:
    mean, x = draw(1, 4, 64, 64, seed=1), draw(1, 4, 64, 64, seed=2)
    shift, std = 1e-6 * draw(1, 4, 64, 64, seed=3), torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64)
    near, reference = GaussianStep((mean + shift).float(), std), GaussianStep(mean.float(), std)
    exact = GaussianStep(near.mean.double(), std).log_ratio(
        GaussianStep(reference.mean.double(), std), x.float()
    )
    error = (near.log_ratio(reference, x.float()) - exact).abs().item()
    naive = (near.log_prob(x.float()) - reference.log_prob(x.float()) - exact).abs().item()
    assert error < 1e-7
    assert naive > 1e3 * error
    assert reference.log_ratio(reference, x.float()).item() == 0


@pytest.mark.parametrize("std", [0.0, 0.3])
def test_deterministic_images_have_no_density_and_no_gradient(std: float) -> None:
    """Image 0 is deterministic; image 1 may be, or may not."""
    mean, x = draw(*SHAPE, seed=1).requires_grad_(), draw(*SHAPE, seed=2).requires_grad_()
    stds = torch.tensor([0.0, std, 0.3], dtype=torch.float64).view(3, 1, 1, 1).requires_grad_()
    step, other = GaussianStep(mean, stds), GaussianStep(mean.detach() + 1, stds.detach())
    for value in (step.log_prob(x), step.log_ratio(other, x), step.kl(other)):
        gradients = torch.autograd.grad(value.sum(), (mean, stds, x), allow_unused=True)
        assert value.isfinite().all()
        assert value[0] == 0
        assert value[2] != 0
        for gradient in gradients:
            assert gradient is None or (gradient.isfinite().all() and gradient[0].count_nonzero() == 0)
    torch.testing.assert_close(step.rsample()[0], mean[0], rtol=0, atol=0)


def test_a_point_mass_and_a_density() -> None:
    zero, one = (GaussianStep(torch.zeros(1, 2), torch.full((1, 1), std)) for std in (0.0, 1.0))
    assert zero.kl(one).item() == one.kl(zero).item() == math.inf
    assert zero.log_ratio(one, torch.ones(1, 2)).item() == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_maths_is_at_least_float32(given: torch.dtype, expected: torch.dtype) -> None:
    step = GaussianStep(torch.ones(2, 3, dtype=given), torch.full((1, 1), 0.1, dtype=torch.float64))
    assert {step.mean.dtype, step.std.dtype, step.rsample().dtype} == {expected}
    assert step.log_prob(torch.zeros(2, 3, dtype=given)).dtype == expected


def test_a_state_of_one_number_per_image() -> None:
    step = GaussianStep(torch.zeros(5), torch.ones(1))
    torch.testing.assert_close(
        step.log_prob(torch.ones(5)), torch.full((5,), -0.5 - 0.5 * math.log(2 * math.pi))
    )


def test_an_image_does_not_depend_on_its_batch() -> None:
    def generators(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    step = GaussianStep(torch.zeros(SHAPE), torch.ones(1, 1, 1, 1))
    batch = step.rsample(generators(7, 8, 9))
    alone = GaussianStep(torch.zeros(1, *SHAPE[1:]), torch.ones(1, 1, 1, 1)).rsample(generators(8))
    assert torch.equal(batch[1:2], alone)
    one = torch.Generator().manual_seed(3)
    assert torch.equal(step.rsample(one), torch.randn(SHAPE, generator=torch.Generator().manual_seed(3)))
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        step.rsample(generators(1, 2))


def test_samples_have_the_moments() -> None:
    x = GaussianStep(torch.full((20_000,), 2.0), torch.full((1,), 0.5)).rsample(
        torch.Generator().manual_seed(0)
    )
    assert abs(x.mean().item() - 2) < 4 * 0.5 / math.sqrt(20_000)
    assert abs(x.std().item() - 0.5) < 4 * 0.5 / math.sqrt(40_000)


# fuse


def assert_same(a: GaussianStep, b: GaussianStep, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a.mean, b.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(a.std.expand(SHAPE), b.std.expand(SHAPE), rtol=tolerance, atol=tolerance)


def test_fusing_with_a_one_hot_weight_returns_that_step() -> None:
    steps = [make_step(1), make_step(2), GaussianStep(draw(*SHAPE), torch.zeros(1, 1, 1, 1))]
    assert fuse(steps, [0, 1, 0]) is steps[1]
    assert fuse(steps, [0, 0, 1.0]) is steps[2]


@pytest.mark.parametrize("weights", [(0.2, 0.3, 0.5), (0.9, 0.4, -0.3)])
def test_fusing_one_step_with_itself_changes_nothing(weights: tuple[float, ...]) -> None:
    assert_same(fuse([make_step(1)] * 3, weights), make_step(1))


def test_fusing_is_symmetric_and_associative() -> None:
    a, b, c = make_step(1), make_step(2, (1, 1, 1, 1)), make_step(3, SHAPE)
    whole = fuse([a, b, c], [0.2, 0.3, 0.5])
    assert_same(whole, fuse([c, a, b], [0.5, 0.2, 0.3]))
    assert_same(whole, fuse([fuse([a, b], [0.4, 0.6]), c], [0.5, 0.5]))


def test_equal_stds_give_the_weighted_mean_of_means() -> None:
    std = torch.tensor([0.3, 0.7, 1.1]).view(3, 1, 1, 1)
    a, b = (GaussianStep(draw(*SHAPE, seed=seed).float(), std) for seed in (1, 2))
    fused = fuse([a, b], [0.25, 0.75])
    torch.testing.assert_close(fused.mean, 0.25 * a.mean + 0.75 * b.mean, rtol=0, atol=5e-7)
    torch.testing.assert_close(fused.std, std, rtol=1e-7, atol=0)


def test_fused_variance_lies_between_the_smallest_and_the_arithmetic_mean() -> None:
    a, b = make_step(1, SHAPE), make_step(2, SHAPE)
    variance, variances = fuse([a, b], [0.3, 0.7]).std.square(), torch.stack([a.std, b.std]).square()
    assert (variance >= variances.amin(0) - 1e-12).all()
    assert (variance <= 0.3 * variances[0] + 0.7 * variances[1] + 1e-12).all()


@pytest.mark.parametrize("betas", [(1.0, 1.0), (0.5, 2.0)], ids=["one temperature", "two temperatures"])
def test_fusing_the_tilts_is_tilting_by_the_sum(betas: tuple[float, float]) -> None:
    """N(m, v) tilted by (a x + b x^2) / beta is a Gaussian in closed form; unequal betas bring the reference
    in."""
    mean, variance, target_beta, weights = 0.4, 0.8, 1.0, (0.35, 0.65)
    rewards = ((0.7, -0.6), (-1.2, 0.2))

    def tilt(a: float, b: float, beta: float) -> GaussianStep:
        precision = 1 / variance - 2 * b / beta
        centre = torch.tensor([[(mean / variance + a / beta) / precision]], dtype=torch.float64)
        return GaussianStep(centre, torch.full_like(centre, precision**-0.5))

    shares = [weight * beta / target_beta for weight, beta in zip(weights, betas, strict=True)]
    experts = [tilt(*reward, beta) for reward, beta in zip(rewards, betas, strict=True)]
    fused = fuse([tilt(0, 0, 1), *experts], [1 - sum(shares), *shares])
    a, b = (sum(w * r[i] for w, r in zip(weights, rewards, strict=True)) for i in (0, 1))
    direct = tilt(a, b, target_beta)
    torch.testing.assert_close(fused.mean, direct.mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(fused.std, direct.std, rtol=1e-14, atol=1e-14)


def test_the_fused_step_minimises_the_weighted_kl() -> None:
    steps, weights = [make_step(1, SHAPE), make_step(2, SHAPE)], [0.3, 0.7]
    fused = fuse(steps, weights)
    mean, std = fused.mean.clone().requires_grad_(), fused.std.clone().requires_grad_()
    current = GaussianStep(mean, std)
    objective = 0.3 * current.kl(steps[0]).sum() + 0.7 * current.kl(steps[1]).sum()
    for gradient in torch.autograd.grad(objective, (mean, std)):
        assert gradient.abs().max() < 1e-10


def test_deterministic_steps_fuse_to_the_weighted_mean() -> None:
    """Also where only some images of the batch are deterministic."""
    stds = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64).view(3, 1, 1, 1)
    a, b = GaussianStep(draw(*SHAPE, seed=1), stds), GaussianStep(draw(*SHAPE, seed=2), 2 * stds)
    fused = fuse([a, b], [0.2, 0.8])
    torch.testing.assert_close(fused.mean[0], 0.2 * a.mean[0] + 0.8 * b.mean[0])
    torch.testing.assert_close(fused.mean[1:], (0.2 * 4 * a.mean + 0.8 * b.mean)[1:] / (0.2 * 4 + 0.8))
    torch.testing.assert_close(
        fused.std.flatten(), torch.tensor([0.0, 1.0, 1.0]).double() * (0.2 * 4 + 0.8) ** -0.5
    )


@pytest.mark.parametrize(
    ("stds", "weights", "message"),
    [
        ((0.5, 0.5), (0.5, 0.6), "sum to 1.1"),
        ((0.5, 0.5), (1.0,), "2 steps with 1 weights"),
        ((0.0, 0.5), (0.5, 0.5), "some stds are 0"),
        ((0.5, 0.1), (1.5, -0.5), "no positive precision"),
    ],
)
def test_what_cannot_be_fused_is_refused(
    stds: tuple[float, ...], weights: tuple[float, ...], message: str
) -> None:
    steps = [GaussianStep(torch.zeros(1, 2), torch.full((1, 1), std)) for std in stds]
    with pytest.raises(ValueError, match=message):
        fuse(steps, weights)
