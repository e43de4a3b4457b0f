"""FlowSDE against diffusers' scheduler, the published formulas, and Gaussian data whose velocity is known."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.rollout import rollout
from lit_align.samplers import DDIM, FlowSchedule, FlowSDE
from lit_align.samplers.flow import Rule

SD3: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX: dict[str, Any] = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
RULES: list[Rule] = ["flow-sde", "dance", "cps", "precise"]
SHAPE = (3, 4, 5, 5)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def levels(sampler: FlowSDE) -> list[float]:
    return [*(sampler.timesteps.double() / 1000).tolist(), 0.0]


# ---- schedules


@pytest.mark.parametrize("mu", [None, 0.5, 1.15])
def test_without_noise_a_step_is_that_of_diffusers(mu: float | None) -> None:
    config, x, prediction = SD3 if mu is None else FLUX, draw(1, torch.float32), draw(2, torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 7, 7).tolist(), mu=mu)
    for rule in RULES:
        sampler = FlowSDE(config | {"mu": lambda steps: mu}, num_steps=7, rule=rule, noise_level=0.0)
        assert torch.equal(sampler.timesteps, scheduler.timesteps)
        assert not sampler.stochastic.any()
        scheduler._step_index = None
        for k, t in enumerate(scheduler.timesteps):
            theirs = scheduler.step(prediction, t, x, return_dict=False)[0]
            torch.testing.assert_close(sampler.step(x, prediction, k).mean, theirs, rtol=0, atol=2e-6)


def test_a_static_shift_is_made_once() -> None:
    sampler = FlowSDE(SD3, num_steps=4)
    plain = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(sampler.timesteps / 1000, 3 * plain / (1 + 2 * plain))
    twice = FlowMatchEulerDiscreteScheduler(shift=3.0)  # what the pipeline does when it is not told sigmas
    twice.set_timesteps(4)
    assert twice.timesteps[-1] < 10 < 100 < sampler.timesteps[-1]


def test_a_dynamic_shift_is_asked_for_by_the_number_of_steps() -> None:
    asked: list[int] = []

    def mu(steps: int) -> float:
        asked.append(steps)
        return 0.8

    sampler = FlowSDE(FLUX | {"mu": mu}, num_steps=5)
    plain = torch.linspace(1, 0.2, 5)
    torch.testing.assert_close(
        sampler.timesteps / 1000, math.exp(0.8) / (math.exp(0.8) + 1 / plain - 1), rtol=1e-5, atol=1e-6
    )
    assert asked == [5]


def test_the_path_is_straight_and_the_prediction_a_velocity() -> None:
    schedule, x0, noise = FlowSchedule(SD3), draw(1), draw(2)
    t = torch.tensor([1000.0, 250.5, 1.0])
    sigma = (t.double() / 1000).view(-1, 1, 1, 1)
    x = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * noise)
    target = schedule.target(x0, noise, t)
    torch.testing.assert_close(target, noise - x0)
    torch.testing.assert_close(schedule.predict_x0(x, target, t), x0)
    for same in (250.5, torch.tensor(250.5), torch.tensor(250.5, dtype=torch.float64)):
        assert schedule.sigma(same).shape == ()
        assert schedule.sigma(same) == 0.2505
        assert schedule.alpha(same).dtype == torch.float64


def test_a_timestep_is_drawn_from_each_generator_and_from_those_of_the_scheduler() -> None:
    def draws() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(200)]

    for config in (SD3, FLUX):
        t = FlowSchedule(config).draw_t(draws())
        own = FlowMatchEulerDiscreteScheduler.from_config(config).timesteps
        assert torch.equal(t, own[[int(torch.randint(1000, (), generator=one)) for one in draws()]])
        assert 0 < t.min() < 100
        assert 900 < t.max() <= 1000


# ---- the published steps, written as they are published


def flow_sde(x: Tensor, v: Tensor, now: float, to: float, first: float, a: float) -> tuple[Tensor, float]:
    """Flow-GRPO's code: the divisor at 1 is that of ``sigmas[1]``."""
    s = a * math.sqrt(now / (1 - (first if now == 1 else now)))
    dt = to - now
    mean = x * (1 + s**2 / (2 * now) * dt) + v * (1 + s**2 * (1 - now) / (2 * now)) * dt
    return mean, s * math.sqrt(-dt)


def dance(x: Tensor, v: Tensor, now: float, to: float, first: float, a: float) -> tuple[Tensor, float]:
    """DanceGRPO's code: the score of the implied clean state, at constant noise."""
    clean, dt = x - now * v, to - now
    score = -(x - clean * (1 - now)) / now**2
    return x + dt * v - 0.5 * a**2 * score * dt, a * math.sqrt(-dt)


def cps(x: Tensor, v: Tensor, now: float, to: float, first: float, a: float) -> tuple[Tensor, float]:
    clean, noise, std = x - now * v, x + v * (1 - now), to * math.sin(a * math.pi / 2)
    return clean * (1 - to) + noise * math.sqrt(to**2 - std**2), std


def precise(x: Tensor, v: Tensor, now: float, to: float, first: float, a: float) -> tuple[Tensor, float]:
    r = to * (1 - now) / (now * (1 - to))
    std = to * math.sqrt(1 - r ** (a**2))
    clean, noise = x - now * v, x + v * (1 - now)
    return clean * (1 - to) + noise * math.sqrt(to**2 - std**2), std


Published = Callable[[Tensor, Tensor, float, float, float, float], tuple[Tensor, float]]
PUBLISHED: list[tuple[Rule, Published, float]] = [
    ("flow-sde", flow_sde, 0.7),
    ("dance", dance, 0.3),
    ("cps", cps, 0.8),
    ("precise", precise, 1.5),
]


@pytest.mark.parametrize(("rule", "published", "default"), PUBLISHED)
@pytest.mark.parametrize("level", [None, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 9])
def test_each_rule_is_the_published_one(
    rule: Rule, published: Published, default: float, level: float | None, steps: int
) -> None:
    sampler, x, v = FlowSDE(SD3, steps, rule, level), draw(1), draw(2)
    sigmas = levels(sampler)
    for k in range(steps):
        step = sampler.step(x, v, k)
        mean, std = published(x, v, sigmas[k], sigmas[k + 1], sigmas[1], default if level is None else level)
        torch.testing.assert_close(step.mean, mean, rtol=1e-10, atol=1e-10)
        assert step.std.item() == pytest.approx(std, rel=1e-9, abs=1e-12)
        assert bool(sampler.stochastic[k]) == (std > 0)
    if rule in ("cps", "precise"):
        assert not sampler.stochastic[-1]


def test_log_prob_and_kl_are_those_of_the_step() -> None:
    """The KL is exact: the code of Flow-GRPO leaves out the size of the step."""
    sampler, x, v, other = FlowSDE(SD3, 6), draw(1), draw(2), draw(3)
    sigmas = levels(sampler)
    step, moved = sampler.step(x, v, 2), sampler.step(x, other, 2)
    s, dt = 0.7 * math.sqrt(sigmas[2] / (1 - sigmas[2])), sigmas[2] - sigmas[3]
    expected = ((step.mean - moved.mean) ** 2).flatten(1).sum(1) / (2 * s**2 * dt)
    torch.testing.assert_close(step.kl(moved), expected)
    normal = torch.distributions.Normal(step.mean, s * math.sqrt(dt))
    torch.testing.assert_close(step.log_prob(x), normal.log_prob(x).flatten(1).sum(1))


@pytest.mark.parametrize("rule", RULES)
def test_steps_with_the_right_prediction_keep_the_forward_process_or_say_that_they_do_not(rule: Rule) -> None:
    """The weights of the clean state and the noise, after a step, and the noise that it draws."""
    sampler, one = FlowSDE(SD3, 6, rule), torch.ones(1, 1, dtype=torch.float64)
    schedule, sigmas, exact = sampler.schedule, levels(sampler), []
    for k, t in enumerate(sampler.timesteps):
        (clean, std), (noise, _) = (
            (step.mean.item(), step.std.item())
            for x0, eps in ((one, 0 * one), (0 * one, one))
            for step in [sampler.step(schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t), k)]
        )
        assert clean == pytest.approx(1 - sigmas[k + 1], rel=1e-9)
        exact.append(math.sqrt(noise**2 + std**2) == pytest.approx(sigmas[k + 1], rel=1e-9, abs=1e-9))
    assert all(exact) == sampler.keeps_forward_process
    assert FlowSDE(SD3, 6, rule, 0.0).keeps_forward_process


def test_precise_is_the_posterior_of_ddpm_at_the_root_of_2() -> None:
    """The variance of a state given a noisier one and the clean one: both steps between them are Gaussian."""
    sampler = FlowSDE(SD3, 6, "precise", math.sqrt(2))
    for k, (now, to) in enumerate(pairwise(levels(sampler)[:-1])):
        between = now**2 - ((1 - now) / (1 - to)) ** 2 * to**2
        std = sampler.step(draw(1), draw(2), k).std.item()
        assert std == pytest.approx(to * math.sqrt(between) / now, rel=1e-9)


def test_entries_that_a_scheduler_has_from_another_change_nothing() -> None:
    """diffusers keeps them: ``FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)``."""
    other = SD3 | {"use_flow_sigmas": True, "flow_shift": 3.0}
    assert levels(FlowSDE(other, 4)) == levels(FlowSDE(SD3, 4))
    with pytest.warns(UserWarning, match=r"takes 1, as .* had 3: set backbone.scheduler: {shift: 3}"):
        FlowSDE(other | {"_use_default_values": ["shift"]}, 4)


@pytest.mark.parametrize("rule", RULES)
def test_every_number_of_steps_is_finite(rule: Rule) -> None:
    for steps in (1, 2, 3, 28, 1000):
        sampler = FlowSDE(SD3, steps, rule)
        k = torch.arange(steps)
        one = torch.ones(steps, 1, dtype=torch.float64)
        for x, v in ((one, 0 * one), (0 * one, one)):
            step = sampler.step(x, v, k)
            assert step.mean.isfinite().all()
            assert step.std.isfinite().all()


@pytest.mark.parametrize("rule", RULES)
def test_noise_is_drawn_in_a_window(rule: Rule) -> None:
    x, v = draw(1), draw(2)
    noisy, still = FlowSDE(SD3, 8, rule), FlowSDE(SD3, 8, rule, 0.0)
    for window, inside in ((3, range(3)), ((2, 5), range(2, 5)), ([2, 5], range(2, 5)), (0, range(0))):
        sampler = FlowSDE(SD3, 8, rule, noisy_steps=window)
        assert sampler.stochastic.nonzero().flatten().tolist() == list(inside)
        for k in range(8):
            step, same = sampler.step(x, v, k), (noisy if k in inside else still).step(x, v, k)
            assert torch.equal(step.mean, same.mean)
            assert torch.equal(step.std, same.std)


def test_a_batch_may_mix_steps() -> None:
    sampler, x, v = FlowSDE(SD3, 10), draw(1, torch.float32), draw(2, torch.float32)
    k = torch.tensor([9, 0, 4])
    mixed = sampler.step(x, v, k)
    for row in range(3):
        alone = sampler.step(x[row : row + 1], v[row : row + 1], int(k[row]))
        assert torch.equal(mixed.mean[row : row + 1], alone.mean)
        assert torch.equal(mixed.std[row : row + 1], alone.std)
    half = sampler.step(x.bfloat16(), v.bfloat16(), 3)
    assert half.mean.dtype == half.std.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, {}, "PNDMScheduler, of a diffusion model; .*DDIM"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0},
            {},
            r"UniPCMultistepScheduler with use_flow_sigmas; .* \(flow_shift 3.0 is its shift\)",
        ),
        ({"_class_name": "FlowMatchLCMScheduler"}, {}, "FlowMatchLCMScheduler goes to the clean image"),
        ({"stochastic_sampling": True}, {}, "goes to the clean image and adds new noise, .* distilled from"),
        ({"invert_sigmas": True}, {}, "invert_sigmas"),
        ({"use_dynamic_shifting": True}, {}, "use_dynamic_shifting"),
        ({"shift_terminal": 0.02}, {"num_steps": 1}, "no 1 decreasing"),
        ({}, {"num_steps": 0}, "num_steps is 0; choose 1 to 1000"),
        ({}, {"rule": "sde"}, "rule is 'sde'; choose flow-sde, dance, cps, precise"),
        ({}, {"noise_level": -0.1}, "noise_level is -0.1"),
        ({}, {"noise_level": math.nan}, "noise_level is nan"),
        ({}, {"noise_level": 1.2, "rule": "cps"}, "at most 1"),
        ({}, {"noisy_steps": 11}, "noisy_steps is 11; choose from 0 to num_steps, 10"),
        ({}, {"noisy_steps": (5, 2)}, r"noisy_steps is \(5, 2\)"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlowSDE(SD3 | config, **arguments)


def test_a_diffusion_sampler_is_refused_for_a_flow_model() -> None:
    with pytest.raises(ConfigError, match=r"FlowMatchEulerDiscreteScheduler.*FlowSDE"):
        DDIM(SD3, 10)


# ---- Gaussian data whose velocity is known


CENTRE, SPREAD = 2.0, 0.5


def gaussian_policy(sampler: FlowSDE) -> Callable[[Tensor, int], GaussianStep]:
    """The policy of the exact velocity for data N(CENTRE, SPREAD^2)."""

    def policy(x: Tensor, k: int) -> GaussianStep:
        sigma = float(sampler.timesteps[k].double()) / 1000
        off = (x - (1 - sigma) * CENTRE) / ((1 - sigma) ** 2 * SPREAD**2 + sigma**2)
        return sampler.step(x, sigma * off - (CENTRE + (1 - sigma) * SPREAD**2 * off), k)

    return policy


def final_moments(num_steps: int, rule: Rule, level: float, shift: float = 1.0) -> tuple[float, float]:
    """Mean and std of the images; the velocity is affine, so the states stay Gaussian."""
    sampler = FlowSDE({"shift": shift}, num_steps, rule, level)
    policy, mean, variance = gaussian_policy(sampler), 0.0, 1.0
    for k in range(num_steps):
        step = policy(torch.tensor([[0.0], [1.0]], dtype=torch.float64), k)
        offset, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + step.std.item() ** 2
    return mean, math.sqrt(variance)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("rule", "level"), [("dance", 0.7), ("precise", 1.0), ("cps", 0.0)])
def test_the_marginal_is_kept_with_an_error_of_first_order(rule: Rule, level: float, shift: float) -> None:
    """CPS without noise is Euler's method."""
    mean, coarse = final_moments(100, rule, level, shift)
    fine = final_moments(200, rule, level, shift)[1]
    assert mean == pytest.approx(CENTRE, abs=1e-3)
    assert fine == pytest.approx(SPREAD, rel=0.03)
    assert 0.4 < (fine - SPREAD) / (coarse - SPREAD) < 0.6


def test_the_marginal_is_kept_by_flow_sde_whose_first_step_is_singular() -> None:
    errors = [abs(final_moments(steps, "flow-sde", 0.7)[1] - SPREAD) for steps in (10, 100, 1000)]
    assert errors[0] < 0.025
    assert max(errors[1:]) < 0.0015


@pytest.mark.parametrize("level", [0.3, 0.7, 0.8])
def test_cps_contracts_to_a_known_std(level: float) -> None:
    r"""Not to SPREAD, but to SPREAD cos(a pi / 4).

    With :math:`c = \cos(a \pi / 2)` and :math:`q = \alpha^2 s^2 + \sigma^2`, that of the data, a
    step of no size multiplies a state by :math:`\lambda = (\alpha^2 s^2 + c \sigma^2) / q` and adds the
    variance :math:`(1 - c^2) \sigma^2`. Of many steps the variance is that of rest,
    :math:`(1 + c)\, q^2 / (2 \alpha^2 s^2 + (1 + c) \sigma^2)`, which ends at :math:`s^2 (1 + c) / 2`.
    """
    limit = SPREAD * math.cos(level * math.pi / 4)
    errors = [final_moments(steps, "cps", level)[1] - limit for steps in (50, 100, 1000)]
    assert errors[0] < errors[1] < errors[2] < 0
    assert errors[2] > -0.005
    assert final_moments(1000, "cps", level)[1] < SPREAD - 0.5 * (SPREAD - limit)


@pytest.mark.parametrize(("rule", "level"), [("flow-sde", 0.7), ("cps", 0.7), ("precise", 1.5)])
def test_rollouts_have_these_moments(rule: Rule, level: float) -> None:
    mean, std = final_moments(20, rule, level)
    sampler = FlowSDE({}, 20, rule, level)
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = rollout(gaussian_policy(sampler), noise, 20, torch.Generator().manual_seed(1)).states[-1]
    assert abs(ends.mean().item() - mean) < 4 * std / math.sqrt(4000)
    assert abs(ends.std().item() / std - 1) < 4 / math.sqrt(8000)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"noise_level": 0.0},
            "noise_level is 0, which has no density; set sampler.init_args.noise_level to",
        ),
        ({"noisy_steps": (3, 3)}, "noisy_steps has none of the steps; set sampler.init_args.noisy_steps to"),
        (
            {"noisy_steps": (5, 6)},
            "noisy_steps has only the last step, which draws none; set sampler.init_arg",
        ),
        (
            {"num_steps": 1},
            "num_steps is 1, and the last step draws none; set sampler.init_args.num_steps to",
        ),
    ],
)
def test_why_no_step_has_noise_is_said(options: dict[str, Any], told: str) -> None:
    sampler = FlowSDE(SD3, **{"num_steps": 6, "rule": "cps"} | options)
    assert not sampler.stochastic.any()
    assert sampler.no_noise.startswith(told)
