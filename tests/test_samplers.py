"""DDIM against diffusers' schedulers at every step, and against Gaussian data whose denoiser is known
exactly."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep, Policy
from lit_align.rollout import rollout
from lit_align.samplers import DDIM, DiffusionSchedule

SD: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}
SHAPE = (3, 4, 5, 5)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def diffusers_ddim(
    config: dict[str, Any], num_steps: int, dtype: torch.dtype = torch.float64
) -> DDIMScheduler:
    scheduler = DDIMScheduler.from_config(config)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(dtype)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(dtype)
    scheduler.set_timesteps(num_steps)
    return scheduler


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_every_step_agrees_with_diffusers(
    prediction_type: str, spacing: str, to_one: bool, eta: float
) -> None:
    changes = {"prediction_type": prediction_type, "timestep_spacing": spacing, "set_alpha_to_one": to_one}
    config, x, prediction, noise = SD | changes, draw(1), draw(2), draw(3)
    sampler, scheduler = DDIM(config, num_steps=7, eta=eta), diffusers_ddim(config, 7)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        step = sampler.step(x, prediction, k)
        theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise)
        torch.testing.assert_close(step.mean + step.std * noise, theirs.prev_sample, rtol=1e-10, atol=1e-10)
        ours = sampler.schedule.predict_x0(x, prediction, t)
        torch.testing.assert_close(ours, theirs.pred_original_sample, rtol=1e-10, atol=1e-10)
        single = sampler.step(x.float(), prediction.float(), k)
        torch.testing.assert_close(single.mean.double(), step.mean, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_float32_agrees_with_diffusers_as_it_is(prediction_type: str, eta: float) -> None:
    config = SD | {"prediction_type": prediction_type}
    x, prediction, noise = (draw(seed, torch.float32) for seed in (1, 2, 3))
    sampler, scheduler = DDIM(config, num_steps=50, eta=eta), diffusers_ddim(config, 50, torch.float32)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        step = sampler.step(x, prediction, k)
        theirs = scheduler.step(prediction, t, x, eta=eta, variance_noise=noise).prev_sample
        assert step.mean.dtype == torch.float32
        torch.testing.assert_close(step.mean + step.std * noise, theirs, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_eta_1_is_the_posterior_of_ddpm(prediction_type: str) -> None:
    config = SD | {"prediction_type": prediction_type, "set_alpha_to_one": True, "steps_offset": 0}
    scheduler = DDPMScheduler.from_config(config, variance_type="fixed_small")
    scheduler.alphas_cumprod, scheduler.one = scheduler.alphas_cumprod.double(), scheduler.one.double()
    scheduler.set_timesteps(20)
    sampler, x, prediction = DDIM(config, num_steps=20, eta=1.0), draw(1), draw(2)
    assert torch.equal(sampler.timesteps, scheduler.timesteps)
    for k, t in enumerate(scheduler.timesteps.tolist()):
        generator = torch.Generator().manual_seed(k)
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        theirs = scheduler.step(prediction, t, x, generator=generator).prev_sample
        step = sampler.step(x, prediction, k)
        torch.testing.assert_close(step.mean + step.std * noise, theirs, rtol=1e-10, atol=1e-10)
        if t > 0:  # diffusers adds no noise at t = 0
            assert step.std.item() ** 2 == pytest.approx(float(scheduler._get_variance(t)), rel=1e-10)


def test_a_batch_may_mix_steps() -> None:
    sampler, x, prediction = DDIM(SD, num_steps=10), draw(1).float(), draw(2).float()
    k = torch.tensor([9, 0, 4])
    mixed = sampler.step(x, prediction, k)
    t = sampler.timesteps[k]
    x0, noisy = sampler.schedule.predict_x0(x, prediction, t), sampler.schedule.add_noise(x, prediction, t)
    for row in range(3):
        alone = sampler.step(x[row : row + 1], prediction[row : row + 1], int(k[row]))
        assert torch.equal(mixed.mean[row : row + 1], alone.mean)
        assert torch.equal(mixed.std[row : row + 1], alone.std)
        assert torch.equal(
            x0[row : row + 1],
            sampler.schedule.predict_x0(x[row : row + 1], prediction[row : row + 1], int(t[row])),
        )
        assert torch.equal(
            noisy[row : row + 1],
            sampler.schedule.add_noise(x[row : row + 1], prediction[row : row + 1], int(t[row])),
        )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_true_prediction_recovers_x0(prediction_type: str) -> None:
    sampler, x0, noise = DDIM(SD | {"prediction_type": prediction_type}, num_steps=10), draw(1), draw(2)
    scheduler = diffusers_ddim(SD, 10)
    for t in sampler.timesteps.tolist():
        times = torch.full((3,), t)
        x = sampler.schedule.add_noise(x0, noise, t)
        torch.testing.assert_close(x, scheduler.add_noise(x0, noise, times))
        truth = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, times)}
        torch.testing.assert_close(
            sampler.schedule.predict_x0(x, truth[prediction_type], t), x0, rtol=1e-9, atol=1e-9
        )
        torch.testing.assert_close(
            sampler.schedule.target(x0, noise, t), truth[prediction_type], rtol=1e-9, atol=1e-9
        )


def test_which_steps_draw_noise() -> None:
    assert DDIM(SD, num_steps=20).stochastic.all()
    assert not DDIM(SD, num_steps=20, eta=0.0).stochastic.any()
    # The level after the last step is 1: its noise would have variance 0.
    to_one = DDIM(SD | {"set_alpha_to_one": True}, num_steps=20)
    assert to_one.stochastic.tolist() == [True] * 19 + [False]
    last = to_one.step(draw(1), draw(2), 19)
    assert last.log_prob(last.rsample()).tolist() == [0, 0, 0]
    torch.testing.assert_close(
        last.mean, to_one.schedule.predict_x0(draw(1), draw(2), int(to_one.timesteps[19]))
    )


def test_noisy_steps_are_those_of_eta_and_the_others_those_of_eta_zero() -> None:
    mixed, noisy, still = DDIM(SD, 6, 1.0, noisy_steps=4), DDIM(SD, 6, 1.0), DDIM(SD, 6, 0.0)
    assert mixed.stochastic.tolist() == [True] * 4 + [False] * 2
    x, prediction = draw(0), draw(1)
    for k in range(6):
        step, same = mixed.step(x, prediction, k), (noisy if k < 4 else still).step(x, prediction, k)
        assert torch.equal(step.mean, same.mean)
        assert torch.equal(step.std, same.std)
    assert not DDIM(SD, 6, 1.0, noisy_steps=0).stochastic.any()
    with pytest.raises(ConfigError, match="noisy_steps is 7"):
        DDIM(SD, 6, 1.0, noisy_steps=7)


def test_half_precision_is_promoted() -> None:
    sampler, x, prediction = DDIM(SD, num_steps=10), draw(1).bfloat16(), draw(2).bfloat16()
    step = sampler.step(x, prediction, 9)
    assert step.mean.dtype == step.std.dtype == torch.float32
    assert torch.equal(step.mean, sampler.step(x.float(), prediction.float(), 9).mean)
    assert (
        sampler.schedule.add_noise(x, prediction, 1).dtype
        == sampler.schedule.predict_x0(x, prediction, 1).dtype
        == torch.float32
    )


def test_every_number_of_trailing_steps_has_valid_timesteps() -> None:
    for num_steps in (61, 103, 1000):  # for the first two diffusers' own list has one timestep too many
        timesteps = DDIM(SD | {"timestep_spacing": "trailing"}, num_steps=num_steps).timesteps
        assert len(timesteps) == num_steps
        assert 0 <= timesteps.min() <= timesteps.max() == 999


def test_zero_terminal_snr_starts_from_pure_noise() -> None:
    config = SD | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    sampler = DDIM(config | {"prediction_type": "v_prediction"}, num_steps=10)
    assert sampler.step(draw(1), draw(2), 0).mean.isfinite().all()
    with pytest.raises(ConfigError, match="v_prediction"):
        DDIM(config, num_steps=10)


@pytest.mark.parametrize("scheduler", [PNDMScheduler(), EulerDiscreteScheduler()], ids=["PNDM", "Euler"])
def test_a_config_without_clip_sample_does_not_clip(
    scheduler: PNDMScheduler | EulerDiscreteScheduler,
) -> None:
    assert "clip_sample" not in scheduler.config
    x0 = DDIM(scheduler.config, num_steps=10).schedule.predict_x0(10 * draw(1), draw(2), 1)
    assert x0.abs().max() > 5


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [(EulerDiscreteScheduler, 0.0), (EulerAncestralDiscreteScheduler, 1.0)],
    ids=["Euler", "ancestral"],
)
def test_few_trailing_steps_are_those_of_the_euler_schedulers(scheduler: Any, eta: float) -> None:
    """The schedules of SDXL-Turbo and Lightning: in scaled states Euler's step is DDIM's."""
    config = SD | {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    theirs = scheduler.from_config(config)
    theirs.set_timesteps(4)
    sampler = DDIM(theirs.config | {"set_alpha_to_one": True}, num_steps=4, eta=eta)
    assert sampler.timesteps.tolist() == theirs.timesteps.tolist() == [999, 749, 499, 249]
    sigmas = theirs.sigmas
    for k, (t, sigma, after) in enumerate(zip(theirs.timesteps, sigmas[:-1], sigmas[1:], strict=True)):
        x, prediction = draw(k), draw(10 + k)
        before, now = (1 + sigma**2).sqrt(), (1 + after**2).sqrt()
        step = sampler.step(x, prediction, k)
        draws = torch.Generator().manual_seed(3)
        made = theirs.step(prediction, t, x * before, generator=draws).prev_sample / now
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        torch.testing.assert_close(step.mean + step.std * noise, made, atol=1e-5, rtol=1e-5)


def test_a_scheduler_that_does_not_clip_may_carry_the_word() -> None:
    config = SD | {"_class_name": "PNDMScheduler", "clip_sample": True}
    x0 = DDIM(config, num_steps=10).schedule.predict_x0(10 * draw(1), draw(2), 1)
    assert x0.abs().max() > 5


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"_class_name": "LCMScheduler"}, {}, "LCMScheduler, of a consistency model"),
        ({"_class_name": "TCDScheduler"}, {}, "TCDScheduler, of a consistency model"),
        ({"_class_name": "EDMEulerScheduler"}, {}, "EDMEulerScheduler, of a model that scales"),
        ({"_class_name": "UnCLIPScheduler"}, {}, "UnCLIPScheduler, which DDIM cannot stand in for"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            {},
            "UniPCMultistepScheduler has use_flow_sigmas",
        ),
        (
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_type": "continuous",
                "prediction_type": "v_prediction",
            },
            {},
            "timestep_type continuous, of a model that gets the logarithm of the noise",
        ),
        (
            {"_class_name": "DDPMScheduler", "beta_schedule": "sigmoid"},
            {},
            r"cannot be made of .* config \(sigmoid is not implemented\); replace entries",
        ),
        ({"clip_sample": True}, {}, "Set clip_sample to false"),
        ({"thresholding": True}, {}, "Set thresholding to false"),
        ({"prediction_type": "flow_prediction"}, {}, "'flow_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "FlowMatchEulerDiscreteScheduler"),
        ({}, {"num_steps": 0}, "num_steps is 0; choose 1 to 1000"),
        ({}, {"num_steps": 1001}, "num_steps is 1001"),
        ({}, {"num_steps": 1000}, "steps_offset is 1"),
        ({}, {"eta": -0.1}, "eta is -0.1"),
        ({}, {"eta": math.nan}, "eta is nan"),
        ({}, {"eta": 1.5}, "take at most 1"),
        ({"trained_betas": [0.1] * 9}, {}, "trained_betas are 9, and its num_train_timesteps 1000"),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DDIM(SD | config, **arguments)


def test_a_timestep_may_be_any_number_or_tensor() -> None:
    schedule = DiffusionSchedule(SD)
    assert schedule.alpha(500).dtype == schedule.sigma(500).dtype == torch.float64
    torch.testing.assert_close(
        schedule.alpha(500) ** 2 + schedule.sigma(500) ** 2, torch.tensor(1.0).double()
    )
    for t in (500, 500.0, torch.tensor(500), torch.tensor(500.0), torch.tensor(500, dtype=torch.bfloat16)):
        assert schedule.alpha(t).shape == ()
        assert schedule.alpha(t) == schedule.alpha(500)
        assert torch.equal(schedule.add_noise(draw(1), draw(2), t), schedule.add_noise(draw(1), draw(2), 500))
    assert schedule.sigma(torch.tensor([1.0, 999.0])).tolist() == [schedule.sigma(1), schedule.sigma(999)]
    for t in (499.5, -1, 1000, torch.tensor([5, 1000])):
        with pytest.raises(AssertionError):
            schedule.alpha(t)


def test_a_timestep_is_drawn_from_each_generator() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(200)]

    drawn = DiffusionSchedule(SD).draw_t(generators())
    assert drawn.tolist() == [int(torch.randint(1000, (), generator=one)) for one in generators()]
    assert drawn.min() < 50
    assert drawn.max() > 950


CENTRE, SPREAD = 2.0, 0.5


def gaussian_policy(sampler: DDIM) -> Policy:
    """The policy of the exact denoiser for data N(CENTRE, SPREAD^2), for a sampler of prediction_type
    sample."""
    levels = DDIMScheduler.from_config(SD).alphas_cumprod.double()

    def policy(x: Tensor, k: int | Tensor) -> GaussianStep:
        level = levels[sampler.timesteps[k]]
        gain = level.sqrt() * SPREAD**2 / (level * SPREAD**2 + 1 - level)
        return sampler.step(x, CENTRE + gain * (x - level.sqrt() * CENTRE), k)

    return policy


def final_moments(num_steps: int, eta: float) -> tuple[DDIM, Tensor, float, float]:
    """The sampler, 4000 draws from the true marginal at its first timestep, and the moments of what it makes
    of them.

    The denoiser is affine, so a step maps x to p x + q + sigma z and the state stays Gaussian; p and q are
    read off the policy at the states 0 and 1.
    """
    config = SD | {"prediction_type": "sample", "set_alpha_to_one": True}
    sampler = DDIM(config, num_steps=num_steps, eta=eta)
    level = float(DDIMScheduler.from_config(SD).alphas_cumprod[sampler.timesteps[0]])
    mean, variance = math.sqrt(level) * CENTRE, level * SPREAD**2 + 1 - level
    noise = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, policy = mean + math.sqrt(variance) * noise, gaussian_policy(sampler)
    for k in range(num_steps):
        step = policy(torch.tensor([[0.0], [1.0]], dtype=torch.float64), k)
        offset, slope = step.mean[0].item(), (step.mean[1] - step.mean[0]).item()
        mean, variance = slope * mean + offset, slope**2 * variance + step.std.item() ** 2
    return sampler, start, mean, math.sqrt(variance)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gaussian_data_is_sampled_with_its_own_moments(eta: float) -> None:
    """The mean is exact; the error of the std is of first order in the size of the steps."""
    _, _, mean, coarse = final_moments(100, eta)
    sampler, start, _, fine = final_moments(200, eta)
    assert mean == pytest.approx(CENTRE, rel=1e-6)
    assert fine == pytest.approx(SPREAD, rel=0.05)
    assert 0.4 < (fine - SPREAD) / (coarse - SPREAD) < 0.6
    samples = rollout(gaussian_policy(sampler), start, 200, torch.Generator().manual_seed(1)).states[-1]
    assert abs(samples.mean().item() - CENTRE) < 4 * fine / math.sqrt(4000)
    assert abs(samples.std().item() / fine - 1) < 4 / math.sqrt(8000)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"eta": 0.0}, "eta is 0, which has no density; set sampler.init_args.eta to 1"),
        ({"eta": 0.0, "noisy_steps": 0}, "eta is 0, which has no density; set sampler.init_args.eta to 1"),
        ({"noisy_steps": 0}, "noisy_steps has none of the steps; set sampler.init_args.noisy_steps to null"),
        (
            {"num_steps": 1},
            "num_steps is 1, and the last step draws none; set sampler.init_args.num_steps to",
        ),
        ({"eta": 1e-30}, "eta is 1e-30, too little for a density in float32; set sampler.init_args.eta to 1"),
    ],
)
def test_why_no_step_has_noise_is_said(options: dict[str, Any], told: str) -> None:
    sampler = DDIM(SD | {"set_alpha_to_one": True}, **{"num_steps": 6} | options)
    assert not sampler.stochastic.any()
    assert sampler.no_noise.startswith(told)
