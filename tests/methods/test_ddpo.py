"""DDPO's own identities and refusals; what every method must do is in test_protocol.py."""

import math
import warnings
from functools import partial

import lightning
import pytest
import torch

from lit_align.advantages import Advantages, BatchAdvantages
from lit_align.backbones import POLICY, REFERENCE
from lit_align.backbones.base import rounds_float32
from lit_align.callbacks import BatchCheckpoint
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods import DDPOModule
from lit_align.methods.ddpo import clipped_surrogate, score_function_loss
from lit_align.methods.tasks import Task
from lit_align.replay import Pairs, Replay, Yardstick, draw_few_pairs
from lit_align.rewards import Brightness
from tests.methods.build import (
    assert_close_gradients,
    assert_same,
    bank,
    draw,
    fit,
    held_out,
    make,
    prompts,
    randomise,
    task_prompts,
    trained,
)
from tests.methods.recorders import Collected

FEW = {"prompts": 4, "images": 2}


# ---- the loss


def test_clipped_and_score_function_gradients_agree_at_ratio_one():
    advantages = torch.tensor([1.5, -0.5, 0.0, 2.0], dtype=torch.float64)
    gradients = []
    for loss in (score_function_loss, lambda ratio, a: clipped_surrogate(ratio, a, 0.1)):
        log_ratio = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(log_ratio, advantages).sum(), log_ratio)
        gradients.append(gradient)
    assert torch.equal(*gradients)
    assert torch.equal(gradients[0], -advantages)


@pytest.mark.parametrize(
    ("advantage", "ratio", "alive"),
    [(1, 1.2, False), (1, 0.8, True), (-1, 0.8, False), (-1, 1.2, True), (1, 1.05, True), (-1, 0.95, True)],
)
def test_the_gradient_dies_past_the_clip_only_where_the_advantage_pushes(advantage, ratio, alive):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = clipped_surrogate(log_ratio, torch.tensor([float(advantage)]), 0.1)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert (gradient.abs().item() > 0) is alive


# ---- replay


def test_at_the_first_update_every_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(tiny, tmp_path):
    module, collected = make(DDPOModule, tiny, advantages=BatchAdvantages(clip=0.5)), Collected()
    (metrics,) = fit(module, tmp_path, 1, collected).logged
    assert metrics["train/reward_std"] == pytest.approx(module.collected["reward"].std().item())
    assert metrics.get("train/ratio_deviation", 0.0) < 1e-4  # 1 % of the clip range
    assert metrics["train/clip_fraction"] == 0
    ((_, advantages),) = collected.advantages
    assert abs(advantages.mean()) > 1e-3  # as they were clipped
    assert metrics["train/loss"] == pytest.approx(-advantages.mean().item(), abs=1e-6)
    assert metrics["train/kl"] > 0
    assert metrics["progress/images"] == metrics["progress/reward_queries"] == 16


def test_replay_in_the_batch_shape_of_the_rollout_gives_ratios_of_exactly_one(tiny, tmp_path):
    module = make(DDPOModule, tiny, micro_batch=16, batch=16, timestep_fraction=0.25)
    randomise(module, 0.1)
    module.stochastic_steps = torch.tensor([2])  # one step for all images: the batch is the rollout's
    assert "train/ratio_deviation" not in fit(module, tmp_path).logged[0]  # it is told where it is not 0


def test_score_function_and_importance_sampling_share_the_first_gradient(tiny, tmp_path):
    clipped, score = (
        fit(make(DDPOModule, tiny, clip_range=clip_range), tmp_path, data=prompts(**FEW)).gradients[0]
        for clip_range in (1e-2, None)
    )
    assert_close_gradients(clipped, score, 1e-4)


def test_steps_without_noise_are_not_replayed(tiny, tmp_path):
    module = make(DDPOModule, tiny, noisy_steps=2)
    assert module.stochastic_steps.tolist() == [0, 1]
    assert module.steps_per_image == 2
    recorder = fit(module, tmp_path, 2, data=prompts(**FEW))
    assert all(gradient.isfinite().all() for gradient in recorder.gradients[0])
    assert recorder.logged[0].get("train/ratio_deviation", 0.0) < 1e-6


def test_each_pass_draws_its_steps_anew_and_an_update_has_whole_prompts(tiny):
    module = make(DDPOModule, tiny, num_steps=5, timestep_fraction=0.5, updates=2, inner_epochs=2)
    batch = held_out(module)
    first, second, again = (module._draw_updates(batch, epoch) for epoch in (0, 1, 0))
    assert [part.rows.tolist() for part in first] == [[0, 0, 1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6, 7, 7]]
    assert not torch.equal(first[0].steps, second[0].steps)
    assert torch.equal(first[0].steps, again[0].steps)
    of_images = torch.cat([part.steps for part in first]).view(len(batch), -1)
    assert len(of_images.unique(dim=0)) > 1  # each image has its own
    module.seed += 1
    assert not torch.equal(module._draw_updates(batch, 0)[0].steps, first[0].steps)


# ---- how far a rollout batch goes


def test_the_reference_penalty_is_zero_at_the_reference_and_holds_the_policy_back(tiny, tmp_path):
    moved = {}
    for kl_weight in (0.0, 100.0):
        module = make(DDPOModule, tiny, lr=1e-2, kl_weight=kl_weight, updates=2, inner_epochs=2, num_steps=2)
        recorder = fit(module, tmp_path, 3, data=prompts(**FEW), limit_val_batches=None)
        moved[kl_weight] = module.latest["kl"].mean()
        if kl_weight:
            assert recorder.logged[-1]["train/kl_penalty"] > 0
    assert moved[100.0] < 0.5 * moved[0.0]


def test_the_loss_and_its_penalty_are_means_over_latent_elements(tiny, tmp_path):
    """By hand, at some pairs of images and steps."""
    module = make(DDPOModule, tiny, lr=0.0, kl_weight=0.7, clip_range=0.1, guidance=2.0)
    parameters, kept, collect = randomise(module), [], module.collect
    module.collect = lambda batch: kept.append(collect(batch)) or kept[0]
    fit(module, tmp_path, data=prompts(**FEW))
    pairs, (rollouts,) = Pairs(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1])), kept
    drawn = draw(module, rollouts.batch, "rollout").trajectory
    torch.testing.assert_close(rollouts.trajectory.states, drawn.states)
    loss, metrics = module._loss(rollouts, pairs, 3)
    terms, penalties, cond = [], [], module.backbone.encode(rollouts.batch.prompts)
    policy, reference = (module.backbone.policy(module.sampler, cond, 2.0, n) for n in (POLICY, REFERENCE))
    for row, step in zip(pairs.rows, pairs.steps.tolist(), strict=True):
        x, drawn = (rollouts.trajectory.states[k, row[None]] for k in (step, step + 1))
        now, before = policy[row[None]](x, step), reference[row[None]](x, step)
        torch.testing.assert_close(rollouts.trajectory.means[step, row[None]], now.mean, rtol=1e-4, atol=1e-5)
        density = now.log_prob(drawn) / 256
        terms.append(-rollouts.advantages[row] * (density - density.detach()).exp())
        penalties.append(((now.mean - before.mean.detach()) / now.std).square().sum() / 2 / 256)
    torch.testing.assert_close(metrics["kl_penalty"], torch.stack(penalties).detach(), rtol=1e-4, atol=0)
    expected = (torch.cat(terms) + 0.7 * torch.stack(penalties)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert_close_gradients(torch.autograd.grad(expected, parameters), torch.autograd.grad(loss, parameters))
    # The movement that is logged is in nats a step.
    randomise(module, 0.5)
    at = rollouts.yardstick.pairs
    with torch.no_grad():
        now = rollouts.policy[at.rows](rollouts.states(at), at.steps)
    chains = rollouts.trajectory
    means, after = chains.means[at.steps, at.rows], chains.states[at.steps + 1, at.rows]
    moved = (now.mean - means) / now.std
    nats = moved.square().sum((1, 2, 3)) / 2
    torch.testing.assert_close(rollouts.yardstick.read().kl, nats)
    # So is its estimate from a second place, here the same one.
    same = rollouts.states(at), means
    torch.testing.assert_close(Yardstick(rollouts, at, 16, same).read().kl, nats)
    # The loss is clipped where the policy has moved.
    loss, metrics = module._loss(rollouts, at, len(at.rows))
    ratio = ((now.log_prob(after) - GaussianStep(means, now.std).log_prob(after)) / 256).exp()
    clipped, own = metrics["clip_fraction"].bool(), rollouts.advantages[at.rows]
    assert clipped.any()
    assert torch.equal(clipped, (ratio - 1).abs() > 0.1)
    terms = torch.maximum(-own * ratio, -own * ratio.clamp(0.9, 1.1)) + 0.7 * metrics["kl_penalty"]
    torch.testing.assert_close(loss.detach(), terms.mean(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_the_step_is_scaled_to_the_kl_target_from_below_and_from_above(tiny, tmp_path, lr):
    target = 1e-3
    module = make(DDPOModule, tiny, lr=lr, kl_target=target, num_steps=3, noisy_steps=2, micro_batch=32)
    found = [metrics["train/kl"] for metrics in fit(module, tmp_path, 10, data=prompts(**FEW)).logged]
    last = sum(found[-3:]) / 3
    assert target / 4 < last < target * 4
    # The first batch moved with the rate as it was given.
    assert abs(math.log(last / target)) < 0.5 * abs(math.log(found[0] / target))


def test_a_schedule_and_a_tasks_weight_lower_the_kl_target_with_their_square(tiny, tmp_path):
    """The factor on the rate is at rest where the KL is the target times both, squared."""
    half = partial(torch.optim.lr_scheduler.ConstantLR, factor=0.5, total_iters=99)
    task = Task(bank(Brightness()), BatchAdvantages(), weight=0.25)
    module = make(DDPOModule, tiny, tasks={"a": task}, kl_target=1e-3, lr_scheduler=half, num_steps=2)
    (logged,) = fit(module, tmp_path, data=task_prompts("a", **FEW)).logged
    wished = 1e-3 * (0.25 * 0.5) ** 2
    # The first batch moved with the rate as it was given; a factor changes by half at the most.
    expected = min(max(math.sqrt(wished / logged["train/kl/a"]), 0.5), 1.5)
    assert module.step_scale["a"] == pytest.approx(expected)
    assert logged["train/step_scale/a"] == pytest.approx(expected)
    for kl, factor in ((wished, 1.0), (wished / 1.44, 1.2), (100 * wished, 0.5), (wished / 100, 1.5)):
        before = module.step_scale["a"]
        assert module._scale_step("a", torch.tensor(kl), 1e-3) == pytest.approx(factor * before)


HALF = [{"precision": "bf16-mixed"}, {"dtype": "bfloat16"}]
"""Predictions below float32: mixed precision over float32 weights, and frozen weights of 16 bits."""


def one_batch(tiny, folder, lr, dtype="float32", precision="32-true"):
    module = make(DDPOModule, tiny, lr=lr, kl_target=1e-2, num_steps=3, micro_batch=32, dtype=dtype)
    (logged,) = fit(module, folder, data=prompts(16, 2), precision=precision).logged
    return logged


@pytest.mark.parametrize("half", HALF, ids=str)
def test_flipped_roundings_are_no_movement(tiny_attentive, tmp_path, half, monkeypatch):
    """The squared difference at the stored states is above the target, where nothing has moved."""
    raw, read = [], Yardstick.read

    def look(yardstick):
        raw.append(yardstick.replay.moved(yardstick.pairs, yardstick.size).mean())
        return read(yardstick)

    monkeypatch.setattr(Yardstick, "read", look)
    few = 2e-5 if "precision" in half else 1e-5  # with weights of more digits fewer roundings flip
    logged = one_batch(tiny_attentive, tmp_path, few, **half)
    assert raw[0] > 1e-2 > 3 * abs(logged["train/kl"])
    assert logged["train/step_scale"] == 1.5  # the rate moves by less than the target: up, not down
    assert logged["train/kl_error"] < 3e-3


@pytest.mark.parametrize("half", HALF, ids=str)
def test_movement_is_measured_below_float32_as_in_float32(tiny_attentive, tmp_path, half):
    whole, rounded = (one_batch(tiny_attentive, tmp_path, 3e-3, **kind) for kind in ({}, half))
    assert "train/kl_error" not in whole  # the KL itself
    assert whole["train/kl"] / 3 < rounded["train/kl"] < whole["train/kl"] * 3


def test_float32_is_rounded_on_a_gpu_unless_torch_is_told_otherwise():
    gpu = torch.device("cuda")
    assert not rounds_float32(torch.device("cpu"))
    assert rounds_float32(gpu)  # its convolutions
    try:
        torch.backends.cudnn.allow_tf32 = False
        assert not rounds_float32(gpu)
        torch.set_float32_matmul_precision("high")
        assert rounds_float32(gpu)
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")


def test_noise_of_the_kl_moves_the_rate_in_no_direction(tiny, tmp_path):
    module = make(DDPOModule, tiny, kl_target=1e-2, num_steps=2)
    fit(module, tmp_path, data=prompts(**FEW))
    for kl, error, factor in (
        (-0.02, 0.02, 1.0),
        (0.04, 0.02, 1.0),
        (0.04, 0.005, math.sqrt(1 / 3)),
        (-0.02, 1e-3, 1.5),
        (22.6, 2.9, 0.5),  # the error of a large KL is mostly its own spread, of which rounding hides nothing
    ):
        module.step_scale[""] = 1.0
        if factor == 1.0:
            with pytest.warns(UserWarning, match="rounding hides a KL of 0.01"):
                scale = module._scale_step("", torch.tensor(kl), 1e-2, error)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                scale = module._scale_step("", torch.tensor(kl), 1e-2, error)
        assert scale == pytest.approx(factor)


def test_without_its_target_the_rate_is_the_configured_one_again(tiny, tmp_path):
    few = {"data": prompts(**FEW), "limit_val_batches": 0}
    module = make(DDPOModule, tiny, kl_target=1e-3, num_steps=2)
    fit(module, tmp_path, 1, BatchCheckpoint(), **few)
    assert module.step_scale[""] != 1
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    for target in (1e-3, None):
        again = make(DDPOModule, tiny, kl_target=target, num_steps=2)
        recorder = fit(again, tmp_path, 1, ckpt_path=checkpoint, max_epochs=2, **few)
        scale = 1.0 if target is None else module.step_scale[""]
        assert recorder.logged[-1]["train/lr"] == pytest.approx(1e-3 * scale)


@pytest.mark.parametrize("broken", ["advantages", "chains"])
def test_a_broken_batch_does_not_scale_the_next_steps(tiny, tmp_path, monkeypatch, broken):
    if broken == "advantages":
        monkeypatch.setattr(
            Advantages, "__call__", lambda self, rewards, *_: torch.full_like(rewards, math.nan)
        )
    else:
        monkeypatch.setattr(Replay, "moved", lambda self, pairs, _: torch.full((len(pairs.rows),), math.nan))
    module = make(DDPOModule, tiny, kl_target=1e-3, num_steps=2)
    fit(module, tmp_path, 2, data=prompts(**FEW))
    assert module.step_scale == {"": 1.0}
    assert all(p.isfinite().all() for p in module.parameters())


def test_lasting_non_finite_gradients_end_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Advantages, "__call__", lambda self, rewards, groups, prompts: torch.full_like(rewards, math.nan)
    )
    module = make(DDPOModule, tiny, num_steps=2)
    before = trained(module)
    with pytest.raises(ConfigError, match="the last 10 updates had gradients that are not finite"):
        fit(module, tmp_path, 12, data=prompts(2, 2))
    assert_same(trained(module), before)


# ---- refusals


def test_one_image_per_prompt_is_refused_with_group_advantages(tiny, tmp_path):
    with pytest.raises(ConfigError, match="images_per_prompt"):
        fit(make(DDPOModule, tiny), tmp_path, data=prompts(images=1))


def test_updates_that_do_not_divide_the_prompts_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="updates"):
        fit(make(DDPOModule, tiny, updates=3), tmp_path)


@pytest.mark.parametrize("option", ["updates", "inner_epochs", "shared_timesteps"])
def test_the_score_function_allows_one_update(tiny, option):
    with pytest.raises(ConfigError, match="clip_range"):
        make(DDPOModule, tiny, clip_range=None, **{option: 2})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"updates": 0}, "updates"),
        ({"inner_epochs": 0}, "inner_epochs"),
        ({"timestep_fraction": 0.0}, "timestep_fraction"),
        ({"timestep_fraction": 1.5}, "timestep_fraction: 1.5 is more than 1"),
        ({"clip_range": 0.0}, "clip_range"),
        ({"kl_weight": -0.1}, "kl_weight"),
        ({"kl_target": 0.0}, "kl_target"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"batch": 0}, "sampling.batch"),
    ],
)
def test_values_that_cannot_work_are_refused(tiny, options, named):
    with pytest.raises(ConfigError, match=named):
        make(DDPOModule, tiny, **options)


def test_lightning_version_is_not_a_malicious_one():
    assert lightning.__version__ not in ("2.6.2", "2.6.3")


@pytest.mark.parametrize(
    ("images", "trained", "one_in", "drawn"),
    [(8, 10, 16, 5), (8, 10, 8, 10), (8, 10, 48, 1), (1, 5, 16, 1), (16, 6, 8, 6), (64, 3, 16, 6)],
)
def test_the_kl_is_measured_on_a_share_of_the_trained_pairs(images, trained, one_in, drawn):
    """Of each prompt's first image, and whatever part of the batch a rank holds."""
    steps, index = torch.arange(6 if drawn == 6 else 10) + 2, torch.arange(100, 100 + 4 * images)
    firsts = torch.arange(len(index)) % images == 0
    few = draw_few_pairs(index, firsts, steps, trained, one_in, 0, 1)
    assert few.rows.tolist() == [row for row in range(0, len(index), images) for _ in range(drawn)]
    assert all(len(set(part.tolist())) == drawn for part in few.steps.split(drawn))
    assert set(few.steps.tolist()) <= set(steps.tolist())
    half = slice(2 * images, None)
    rank = draw_few_pairs(index[half], firsts[half], steps, trained, one_in, 0, 1)
    assert rank.steps.tolist() == few.steps[2 * drawn :].tolist()
