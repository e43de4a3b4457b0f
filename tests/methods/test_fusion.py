import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, DenoisingPolicy, StableDiffusionBackbone
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep, fuse
from lit_align.methods.msdda.fusion import FusedPolicy, RandomExpertPolicy, draw_choices, fusion_weights
from lit_align.rollout import rollout
from lit_align.samplers import DDIM

PROMPTS = ["a red circle", "two stars"]


class Experts(StableDiffusionBackbone):
    """A tiny model with three experts, that counts which of them are asked."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.asked: list[str] = []
        for seed, name in enumerate("abc"):
            self.weight_sets.add(name)
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in self.weight_sets.parameters_of(name):
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))

    def predict(self, x, t, cond, guidance=1.0, weights="policy"):
        self.asked += [weights] * len(x)
        return super().predict(x, t, cond, guidance, weights)

    def policies(self, names: str = "abc", eta: float = 1.0) -> list[DenoisingPolicy]:
        sampler = self.make_sampler(partial(DDIM, num_steps=5, eta=eta))
        return [self.policy(sampler, self.encode(PROMPTS), 2.0, name) for name in names]


@pytest.fixture(scope="module")
def experts(tiny) -> Experts:
    return Experts(str(tiny))


@pytest.fixture
def x(experts) -> Tensor:
    return torch.randn(2, *experts.latent_shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _without_gradient():
    with torch.no_grad():
        yield


def draws(seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(2)]


def assert_same(one: GaussianStep, two: GaussianStep, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(one.mean, two.mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        one.std.expand_as(one.mean), two.std.expand_as(two.mean), rtol=tolerance, atol=0
    )


def test_one_hot_is_the_expert_bit_for_bit_and_only_it_is_asked(experts, x):
    policies = experts.policies()
    for i, policy in enumerate(policies):
        alone = rollout(policy, x, 5, draws())
        experts.asked.clear()
        fused = rollout(FusedPolicy(policies, [float(i == j) for j in range(3)]), x, 5, draws())
        assert set(experts.asked) == {policy.weights}
        assert torch.equal(fused.states, alone.states)
        assert torch.equal(fused.log_probs, alone.log_probs)


def test_weights_as_people_round_them_leave_nothing_to_the_reference():
    found = fusion_weights(dict.fromkeys("abc", 0.333333), 1.0)
    assert found == dict.fromkeys("abc", pytest.approx(1 / 3, abs=1e-12)) | {REFERENCE: 0.0}
    assert fusion_weights({"a": 0.9999}, 1.0)[REFERENCE] == pytest.approx(1e-4)


def test_experts_of_weight_zero_are_not_asked(experts, x):
    experts.asked.clear()
    FusedPolicy(experts.policies(), [0.5, 0.0, 0.5])(x, 2)
    assert sorted(experts.asked) == ["a", "a", "c", "c"]


@pytest.mark.parametrize("k", [0, 2, torch.tensor([1, 4])])
def test_equal_stds_give_the_sampler_step_on_the_mean_prediction(experts, x, k):
    policies, weights = experts.policies(), [0.2, 0.5, 0.3]
    fused = FusedPolicy(policies, weights)(x, k)
    mean = sum(w * policy.predict(x, k) for w, policy in zip(weights, policies, strict=True))
    assert_same(fused, policies[0].sampler.step(x, mean, k), 1e-6)
    assert_same(fused, fuse([policy(x, k) for policy in policies], weights), 1e-5)


def test_identical_experts_are_unchanged_for_every_weight(experts, x):
    policy = experts.policies("a")[0]
    own = replace(policy, sampler=experts.make_sampler(partial(DDIM, num_steps=5)))
    for others in ([policy] * 3, [policy, own, own]):  # fused predictions, and fused steps
        for weights in ([0.2, 0.3, 0.5], [1 / 3] * 3, [-0.5, 0.5, 1.0]):
            assert_same(FusedPolicy(others, weights)(x, 2), policy(x, 2), 1e-5)


@pytest.mark.parametrize("etas", [(1.0, 1.0, 1.0), (1.0, 0.6, 0.8)])
def test_the_order_of_experts_does_not_matter(experts, x, etas):
    policies = [experts.policies(name, eta)[0] for name, eta in zip("abc", etas, strict=True)]
    weights = [0.2, 0.5, 0.3]
    whole = FusedPolicy(policies, weights)(x, 2)
    for order in permutations(range(3)):
        assert_same(FusedPolicy([policies[i] for i in order], [weights[i] for i in order])(x, 2), whole, 1e-5)


def test_own_etas_are_fused_by_precision_with_means_of_their_own(experts, x):
    policies = [experts.policies("a", 1.0)[0], experts.policies("b", 0.5)[0]]
    steps = [policy(x, 2) for policy in policies]
    precisions = [w / step.std.double() ** 2 for w, step in zip((0.3, 0.7), steps, strict=True)]
    std = (precisions[0] + precisions[1]).rsqrt()
    mean = std**2 * sum(p * step.mean.double() for p, step in zip(precisions, steps, strict=True))
    fused = FusedPolicy(policies, [0.3, 0.7])(x, 2)
    torch.testing.assert_close(fused.mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused.std.double(), std, rtol=1e-5, atol=0)


def test_one_random_expert_per_step_has_the_cost_of_one_model_and_the_right_mean(experts, x):
    policies, weights = experts.policies(), [0.2, 0.5, 0.3]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    choices = draw_choices(weights, 4000, generators)
    assert choices.shape == (4000, 2)
    share = torch.stack([(choices == i).double().mean() for i in range(3)])
    torch.testing.assert_close(share, torch.tensor(weights).double(), atol=0.03, rtol=0)
    experts.asked.clear()
    step = RandomExpertPolicy(policies, torch.tensor([[0, 2]] * 5))(x, 2)
    assert sorted(experts.asked) == ["a", "c"]
    wanted = [policies[i](x, 2).mean[row] for row, i in enumerate((0, 2))]
    torch.testing.assert_close(step.mean, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    # An image's choices are its own, whatever the others of the batch.
    again = draw_choices(weights, 4000, [torch.Generator().manual_seed(1)])
    assert torch.equal(again[:, 0], choices[:, 1])
    with pytest.raises(ConfigError, match="not a probability"):
        draw_choices([1.5, -0.5], 3, generators)


def test_what_is_missing_to_one_is_the_references():
    assert fusion_weights({"a": 0.2, "b": 0.8}, 0.5) == {"a": 0.2, "b": 0.8, REFERENCE: 0.0}
    found = fusion_weights({"a": 0.2, "b": 0.5}, 0.5)
    assert found == {"a": 0.2, "b": 0.5, REFERENCE: pytest.approx(0.3)}
    # KL-strength realignment of one expert, and its extrapolation.
    assert fusion_weights({"a": 1.0}, 2.0, {"a": 0.5}) == {"a": 0.25, REFERENCE: 0.75}
    assert fusion_weights({"a": 1.0}, 0.5, {"a": 1.0}) == {"a": 2.0, REFERENCE: -1.0}
    assert fusion_weights({"a": 0.1, "b": 0.2, "c": 0.7}, 1.0)[REFERENCE] == 0.0


# ---- closed forms


@dataclass(frozen=True)
class Tilt:
    """The step reward a x + b x^2 under the reference N(m, v), all in float64."""

    m: float
    v: float

    @property
    def reference(self) -> GaussianStep:
        return self.step(0.0, 0.0, 1.0)

    def step(self, a: float, b: float, beta: float) -> GaussianStep:
        """N(m, v) exp((a x + b x^2) / beta)."""
        precision = 1 / self.v - 2 * b / beta
        mean = (self.m / self.v + a / beta) / precision
        tensors = [torch.tensor([value], dtype=torch.float64) for value in (mean, precision**-0.5)]
        return GaussianStep(*tensors)


@pytest.mark.parametrize("betas", [(0.5, 0.5, 0.5), (0.5, 1.5, 0.9)], ids=["equal", "unequal"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("weights", [(0.2, 0.5, 0.3), (0.1, 0.2, 0.3)], ids=["whole", "incomplete"])
def test_quadratic_tilts_fuse_to_the_tilt_by_the_mixed_reward(betas, beta, weights):
    world, rewards = Tilt(0.3, 0.8), [(0.7, -0.4), (-1.2, 0.15), (0.1, -1.0)]
    named = dict(zip("abc", weights, strict=True))
    exponents = fusion_weights(named, beta, dict(zip("abc", betas, strict=True)))
    steps = [world.step(a, b, own) for (a, b), own in zip(rewards, betas, strict=True)]
    fused = fuse([*steps, world.reference], list(exponents.values()))
    mixed = [sum(w * r[i] for w, r in zip(weights, rewards, strict=True)) for i in range(2)]
    wanted = world.step(mixed[0], mixed[1], beta)
    assert fused.mean.item() == pytest.approx(wanted.mean.item(), abs=1e-10)
    assert fused.std.item() == pytest.approx(wanted.std.item(), abs=1e-10)


def chain_optimum(
    weights: tuple[float, float], rewards: list[tuple[float, float]], beta: float
) -> GaussianStep:
    """First-step optimum for the terminal reward a x_0 + b x_0^2, x_0 ~ N(x_1, u): tilted by soft values."""
    a, b = (sum(w * r[i] for w, r in zip(weights, rewards, strict=True)) for i in range(2))
    u = 0.5
    # log E exp((a x_0 + b x_0^2) / beta) over x_0 ~ N(x_1, u) is quadratic in x_1.
    shrink = 1 - 2 * b * u / beta
    return Tilt(0.3, 0.8).step(a / shrink, b / shrink, beta)


@pytest.mark.parametrize(
    ("rewards", "agrees"), [([(0.7, 0.0), (-1.2, 0.0)], True), ([(0.7, -0.4), (-1.2, -1.0)], False)]
)
def test_negative_control_terminal_rewards_fuse_only_where_they_are_linear(rewards, agrees):
    experts = [chain_optimum(one, rewards, 0.5) for one in ((1.0, 0.0), (0.0, 1.0))]
    fused = fuse(experts, [0.4, 0.6])
    wanted = chain_optimum((0.4, 0.6), rewards, 0.5)
    difference = abs(fused.mean - wanted.mean).item() + abs(fused.std - wanted.std).item()
    assert difference < 1e-12 if agrees else difference > 1e-2


def test_in_a_gaussian_world_step_level_experts_fuse_to_the_step_level_optimum_of_the_mixed_reward():
    """A chain of three steps x <- c x + s z with quadratic terminal rewards, along whole trajectories.

    The step reward is the mean terminal reward of the reference's continuation, a quadratic of the next state
    in closed form; all experts share the chain, and the fused policy's states are those of the optimum.
    """
    c, s, beta, steps = 0.9, [0.8, 0.6, 0.5], 0.5, 3
    rewards, weights = [(0.7, -0.4), (-1.2, -1.0)], [0.35, 0.65]

    def policy(a: float, b: float):
        def step(x: Tensor, k: int) -> GaussianStep:
            # E[a x_0 + b x_0^2 | x] = a c^n x + b c^(2n) x^2 + const, with n steps left after this one.
            left = steps - 1 - k
            slope, curve = a * c**left, b * c ** (2 * left)
            precision = s[k] ** -2 - 2 * curve / beta
            mean = (c * x * s[k] ** -2 + slope / beta) / precision
            return GaussianStep(mean, torch.tensor(precision**-0.5, dtype=x.dtype))

        return step

    experts = [policy(*reward) for reward in rewards]
    mixed = policy(*(sum(w * r[i] for w, r in zip(weights, rewards, strict=True)) for i in range(2)))
    x = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    trajectories = [
        rollout(one, x, steps, torch.Generator().manual_seed(1))
        for one in (lambda x, k: fuse([expert(x, k) for expert in experts], weights), mixed)
    ]
    torch.testing.assert_close(trajectories[0].states, trajectories[1].states, rtol=0, atol=1e-12)
    torch.testing.assert_close(trajectories[0].log_probs, trajectories[1].log_probs, rtol=0, atol=1e-12)
    # And it is no expert, nor the mean of the experts' states.
    assert (
        trajectories[0].states[-1]
        - rollout(experts[0], x, steps, torch.Generator().manual_seed(1)).states[-1]
    ).abs().mean() > 0.1


def test_the_fused_step_is_where_the_weighted_sum_of_kls_is_stationary():
    draw = torch.Generator().manual_seed(5)
    weights = [0.2, 0.5, 0.3]
    means, stds = (torch.rand(3, 2, 4, dtype=torch.float64, generator=draw) + 0.3 for _ in range(2))
    steps = [GaussianStep(mean, std) for mean, std in zip(means, stds, strict=True)]
    fused = fuse(steps, weights)
    with torch.enable_grad():
        mean, std = fused.mean.clone().requires_grad_(), fused.std.clone().requires_grad_()
        total = sum(
            w * GaussianStep(mean, std).kl(step).sum() for w, step in zip(weights, steps, strict=True)
        )
        gradients = torch.autograd.grad(total, (mean, std))
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients)
    variances = stds**2
    arithmetic = sum(w * v for w, v in zip(weights, variances, strict=True))
    assert (fused.std**2 >= variances.min(0).values - 1e-12).all()
    assert (fused.std**2 <= arithmetic + 1e-12).all()


def test_fusing_in_stages_is_fusing_at_once():
    draw = torch.Generator().manual_seed(6)
    steps = [
        GaussianStep(*(torch.rand(2, 4, dtype=torch.float64, generator=draw) + 0.3).expand(2, 2, 4))
        for _ in range(3)
    ]
    whole = fuse(steps, [0.2, 0.5, 0.3])
    staged = fuse([fuse(steps[:2], [2 / 7, 5 / 7]), steps[2]], [0.7, 0.3])
    torch.testing.assert_close(whole.mean, staged.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.std, staged.std, rtol=1e-12, atol=1e-12)
    assert math.isfinite(whole.mean.sum())
