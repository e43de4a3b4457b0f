"""NFT and AWM: their closed forms, and that they learn."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_align.advantages import GroupAdvantages
from lit_align.backbones import POLICY, REFERENCE
from lit_align.errors import ConfigError
from lit_align.methods import NFTModule
from lit_align.methods.ddpo import clipped_surrogate
from lit_align.methods.joint import Rollouts
from lit_align.methods.nft import (
    AWM,
    NFT,
    OLD,
    ForwardObjective,
    OldPolicy,
    awm_log_prob,
    awm_loss,
    implicit_policies,
    nft_loss,
    normalised_error,
)
from lit_align.randomness import generator
from lit_align.replay import Pairs
from lit_align.samplers.schedule import DiffusionSchedule
from tests.methods.build import (
    assert_close_gradients,
    draw,
    fit,
    held_out,
    make,
    prompts,
    randomise,
    task_prompts,
)
from tests.methods.test_protocol import two_tasks

N, SHAPE = 6, (3, 4, 4)


def values(*seeds: int) -> list[Tensor]:
    return [torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(s)).double() for s in seeds]


@pytest.fixture
def advantages() -> Tensor:
    return torch.tensor([-5.0, -1.0, 0.0, 0.5, 2.0, 5.0], dtype=torch.float64)


# ---- the losses


def test_the_loss_is_the_released_code_s_in_velocities(advantages: Tensor) -> None:
    clean, noise, v, old = values(1, 2, 3, 4)
    t, beta = torch.linspace(0.1, 0.9, N).double().view(-1, 1, 1, 1), 0.3
    x = (1 - t) * clean + t * noise
    loss = nft_loss(x - t * v, x - t * old, clean, advantages, beta)
    for i in range(N):
        r = min(max(advantages[i].item() / 5 / 2 + 0.5, 0), 1)
        positive = beta * v[i] + (1 - beta) * old[i]
        negative = (1 + beta) * old[i] - beta * v[i]
        errors = [x[i] - t[i] * one - clean[i] for one in (positive, negative)]
        first, second = ((e**2 / max(e.abs().mean(), 1e-5)).mean() for e in errors)
        expected = 5 * (r * first / beta + (1 - r) * second / beta)
        assert loss[i].item() == pytest.approx(expected.item(), rel=1e-12)


def test_at_the_old_policy_the_gradient_is_the_advantage_times_the_denoising_gradient(
    advantages: Tensor,
) -> None:
    clean, old = values(1, 2)
    for beta, clip in ((1.0, 5.0), (0.1, 5.0), (2.0, 10.0)):
        x0 = old.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(nft_loss(x0, old, clean, advantages, beta, clip).sum(), x0)
        error = old - clean
        weight = error.abs().mean((1, 2, 3), keepdim=True)
        expected = advantages.view(-1, 1, 1, 1) * 2 * error / weight / math.prod(SHAPE)
        torch.testing.assert_close(gradient, expected)  # whatever beta and clip
        assert torch.equal(gradient[2], torch.zeros(SHAPE).double())  # r is 1/2


def test_without_an_advantage_the_policy_is_held_at_the_old_one() -> None:
    clean, old, away = values(1, 2, 3)
    x0 = (old + 0.1 * away).requires_grad_()
    (gradient,) = torch.autograd.grad(nft_loss(x0, old, clean, torch.zeros(N).double(), 1.0).sum(), x0)
    assert (gradient * (x0 - old)).flatten(1).sum(1).min() > 0


def test_the_optimum_on_a_toy_is_the_theorem_s() -> None:
    """Clean states of two values with a known probability of being good, one element, all noise levels."""
    schedule = DiffusionSchedule({"num_train_timesteps": 100, "beta_end": 0.05})
    clean, prior, good = (torch.tensor(v).double() for v in ([-1.0, 2.0], [0.6, 0.4], [0.2, 0.7]))
    for t, x in ((30, 0.4), (60, -0.5), (95, 1.0)):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        posterior = prior * torch.exp(-((x - alpha * clean) ** 2) / (2 * sigma**2))
        posterior /= posterior.sum()
        old = (posterior * clean).sum()
        for beta in (0.5, 1.0, 4.0):
            # The loss without its adaptive weight is quadratic: one Newton step is the optimum.
            x0 = old.clone().requires_grad_()
            plus, minus = implicit_policies(x0, old, beta)
            loss = (posterior * (good * (plus - clean) ** 2 + (1 - good) * (minus - clean) ** 2)).sum()
            (first,) = torch.autograd.grad(loss, x0, create_graph=True)
            (second,) = torch.autograd.grad(first, x0)
            share = (posterior * good).sum()
            of_good = (posterior * good * clean).sum() / share
            expected = old + 2 / beta * share * (of_good - old)
            assert (x0 - first / second).item() == pytest.approx(expected.item(), rel=1e-9)


def test_implicit_policies_are_mirror_images_around_the_old_one() -> None:
    new, old = values(1, 2)
    plus, minus = implicit_policies(new, old, 0.25)
    torch.testing.assert_close((plus + minus) / 2, old)
    assert torch.equal(implicit_policies(new, old, 1.0)[0], old + (new - old))
    assert torch.equal(implicit_policies(old, old, 3.0)[1], old)


def test_the_adaptive_weight_makes_errors_of_all_sizes_count_alike() -> None:
    clean, error = values(1, 2)
    small, large = (normalised_error(clean + scale * error, clean) for scale in (1e-2, 1e2))
    torch.testing.assert_close(large / small, torch.full((N,), 1e4).double(), rtol=1e-6, atol=0)
    x0 = (clean + error).requires_grad_()
    (gradient,) = torch.autograd.grad(normalised_error(x0, clean).sum(), x0)
    expected = 2 * error / error.abs().mean((1, 2, 3), keepdim=True) / math.prod(SHAPE)
    torch.testing.assert_close(gradient, expected)
    assert normalised_error(clean, clean).sum() == 0  # and no division by 0


def test_awm_is_ppo_on_matching_errors(advantages: Tensor) -> None:
    error, before = torch.rand(2, N, generator=torch.Generator().manual_seed(0)).double()
    sigma = torch.linspace(0.2, 1, N).double()
    one = awm_log_prob(error, sigma, 1.0)
    torch.testing.assert_close(one, -sigma * error, rtol=1e-6, atol=1e-9)
    quarter = awm_log_prob(error, sigma, 0.25)
    torch.testing.assert_close(quarter, -4 * sigma * (error**0.25 - 1e-10**0.25), rtol=1e-6, atol=1e-8)
    then = awm_log_prob(before, sigma, 0.25)
    expected = clipped_surrogate(quarter - then, advantages, 0.1)
    assert torch.equal(awm_loss(quarter, then, advantages, 0.1), expected)
    assert torch.equal(awm_loss(then, then, advantages, 0.1), -advantages)  # the ratio is 1


# ---- the module


def run(tiny: Any, tmp_path: Any, batches: int, **options: Any) -> tuple[NFTModule, list[dict[str, float]]]:
    sizes = options.pop("data", {})
    module = make(NFTModule, tiny, **options)
    recorder = fit(module, tmp_path, batches, data=prompts(**({"prompts": 4, "images": 4} | sizes)))
    return module, recorder.logged


def drift(module: NFTModule, weights: str) -> float:
    own, other = (module.backbone.weight_sets.parameters_of(name) for name in (POLICY, weights))
    return sum((a - b).square().sum().item() for a, b in zip(own, other, strict=True))


def test_ratios_are_1_in_the_first_update_of_a_rollout_batch(tiny: Any, tmp_path: Any) -> None:
    objective = AWM(clip_range=1e-9, old_weight=0.0)
    _, logged = run(tiny, tmp_path, 2, objective=objective, lr=1e-2)
    assert [one["train/clip_fraction"] for one in logged] == [0.0, 0.0]
    _, logged = run(tiny, tmp_path, 1, objective=objective, lr=1e-2, inner_epochs=3)
    assert logged[0]["train/clip_fraction"] == pytest.approx(2 / 3, abs=0.05)
    # Later ones compare with the policy that sampled, at the same timesteps and noise.
    objective = AWM(clip_range=1e-4, old_weight=0.0)
    _, logged = run(tiny, tmp_path, 1, objective=objective, lr=0.0, inner_epochs=2)
    assert logged[0]["train/clip_fraction"] == 0


@pytest.mark.parametrize("objective", [NFT(0.5), AWM(clip_range=0.5, power=0.5, old_weight=0.2)])
def test_the_loss_asks_all_policies_at_latents_that_are_noised_anew(
    tiny: Any, tmp_path: Any, objective: ForwardObjective
) -> None:
    """By hand: of each image, step and pass the noise is another, and AWM's weight is the noise level."""
    normaliser = GroupAdvantages(clip=2.0)  # which counts as certainly good
    options: dict[str, Any] = {"advantages": normaliser, "objective": objective, "seed": 3}
    module = make(NFTModule, tiny, **options, reference_weight=0.3, lr=0.0)
    trained, kept, collect = randomise(module), list[Rollouts](), module.collect
    module.collect = lambda batch: kept.append(collect(batch)) or kept[0]  # type: ignore[method-assign, func-returns-value]
    fit(module, tmp_path, data=prompts(2, 2))
    assert drift(module, OLD) == 0  # the first batch is followed by a copy
    # The images are those of the policy, or of the old one, which at the start is the pretrained model.
    sampled_with = REFERENCE if isinstance(objective, NFT) else POLICY
    drawn = draw(module, kept[0].batch, "rollout", sampled_with).trajectory
    torch.testing.assert_close(kept[0].trajectory.states, drawn.states)
    for parameter in module.backbone.weight_sets.parameters_of(OLD):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    pairs = Pairs(torch.tensor([0, 1, 1, 3]), torch.tensor([1, 0, 2, 1]))
    # Errors of the policy that sampled, from which AWM has moved in both directions.
    errors = None if isinstance(objective, NFT) else torch.tensor([0.5, 2.0, 0.5, 2.0])
    loss, _ = module._loss(kept[0], 1, pairs, errors, 4)

    index, advantages = kept[0].batch.index[pairs.rows].tolist(), kept[0].advantages[pairs.rows]
    clean = kept[0].trajectory.states[-1, pairs.rows]
    draws = [
        generator(module.seed, "noising", *at, 1) for at in zip(index, pairs.steps.tolist(), strict=True)
    ]
    t, noise = (
        module.sampler.timesteps[pairs.steps],
        torch.stack([torch.randn(4, 8, 8, generator=d) for d in draws]),
    )
    levels = module.sampler.schedule.alpha(t), module.sampler.schedule.sigma(t)
    alpha, sigma = (level.float().view(-1, 1, 1, 1) for level in levels)
    x, cond = alpha * clean + sigma * noise, kept[0].policy.cond[pairs.rows]
    now, old, before = (module.backbone.predict(x, t, cond, 1.0, name) for name in (POLICY, OLD, REFERENCE))
    if isinstance(objective, NFT):
        x0, x0_old = ((x - sigma * prediction) / alpha for prediction in (now, old.detach()))
        expected = nft_loss(x0, x0_old, clean, advantages, 0.5, 2.0)
    else:
        log_prob = awm_log_prob((now - noise).square().mean((1, 2, 3)), sigma.flatten(), 0.5)
        behaviour = awm_log_prob(errors, sigma.flatten(), 0.5)
        expected = awm_loss(log_prob, behaviour, advantages / 2, 0.5)
        expected = expected + 0.2 * (now - old.detach()).square().mean((1, 2, 3))
    expected = (expected + 0.3 * (now - before.detach()).square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6, check_dtype=False)
    assert_close_gradients(torch.autograd.grad(expected, trained), torch.autograd.grad(loss, trained))


def test_each_pass_draws_its_timesteps_anew(tiny: Any) -> None:
    module = make(NFTModule, tiny, num_steps=5, timesteps=2, inner_epochs=2)
    rollouts: Any = SimpleNamespace(batch=held_out(module))
    (first,), (second,) = (module._draw_updates(rollouts, epoch) for epoch in (0, 1))
    assert torch.equal(first.rows, second.rows)
    assert not torch.equal(first.steps, second.steps)
    module.seed += 1
    assert not torch.equal(module._draw_updates(rollouts, 0)[0].steps, first.steps)


def test_the_old_policy_follows_as_its_schedule_says(tiny: Any, tmp_path: Any) -> None:
    module, _ = run(tiny, tmp_path, 2, lr=1e-2, old_policy=OldPolicy(flat=5))
    assert drift(module, OLD) == 0
    module, logged = run(tiny, tmp_path, 3, lr=1e-2, old_policy=OldPolicy(0, 0.9, 0.9))
    assert drift(module, OLD) > 0
    # The first batch is followed by a copy; then the old policy falls behind, in a first update too.
    assert [one["train/old_distance"] > 0 for one in logged] == [False, False, True]
    assert [OldPolicy(75, 0.0075, 0.999).decay(n) for n in (0, 75, 76, 10**6)] == [0, 0, 0.0075, 0.999]


def test_it_samples_with_the_old_policy_and_awm_with_the_policy(tiny: Any) -> None:
    assert make(NFTModule, tiny).sampled_with == OLD
    assert make(NFTModule, tiny, objective=AWM()).sampled_with == POLICY


def test_two_tasks_leave_the_shortcut_of_the_first_update_to_the_first_task(tiny: Any, tmp_path: Any) -> None:
    module = make(NFTModule, tiny, tasks=two_tasks(), lr=1e-2)
    recorder = fit(module, tmp_path, 1, data=task_prompts("a", "b"))
    assert recorder.logged[0]["train/old_distance"] > 0  # the first task moved the policy before the second


def test_what_cannot_work_is_refused(tiny: Any) -> None:
    for options, named in (
        ({"timesteps": 9}, "timesteps: 9 are more than the 3"),
        ({"updates": 0}, "updates"),
        ({"reference_weight": -1.0}, "reference_weight"),
        ({"tasks": two_tasks(), "task_order": "interleaved", "objective": AWM()}, "task_order"),
    ):
        with pytest.raises(ConfigError, match=named):
            make(NFTModule, tiny, **options)
    for made in (lambda: NFT(0.0), lambda: AWM(clip_range=-1.0), lambda: AWM(old_weight=-1.0)):
        with pytest.raises(ConfigError, match="objective"):
            made()
    with pytest.raises(ConfigError, match="old_policy"):
        OldPolicy(hold=1.0)
    assert REFERENCE in make(NFTModule, tiny).backbone.weight_sets.names
