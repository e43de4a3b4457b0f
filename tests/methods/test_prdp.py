"""PRDP's own identities and refusals; what every method must do is in test_protocol.py."""

import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from lit_align.backbones import REFERENCE
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods import PRDPModule
from lit_align.methods.metrics import Loss, Metrics
from lit_align.methods.prdp import compared_pairs, predicted_reward, reward_difference_loss
from lit_align.replay import Replay
from lit_align.rewards import Reward, StatisticalParity
from tests.methods.build import (
    EvenBrightness,
    assert_same,
    draw,
    fit,
    make,
    prompts,
    randomise,
    task_prompts,
    trained,
)

CONVENTIONS = ["listing", "equations"]


def chains(prompts: int = 3, images: int = 6, steps: int = 4) -> tuple[torch.Tensor, ...]:
    """Log-ratios now and at sampling, ``(N, B, S)``, and rewards ``(N, B)``, in float64."""
    draw = torch.Generator().manual_seed(0)
    shape = (prompts, images, steps)
    now, old = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return now, old, torch.randn(shape[:2], generator=draw, dtype=torch.float64)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of)[0]


# ---- the loss


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_loss_is_twice_the_unbiased_variance_of_what_is_missing(convention):
    now, old, rewards = chains()
    now.requires_grad_()
    loss = reward_difference_loss(now, old, rewards, 0.5, None, convention)
    missing = predicted_reward(now, convention) - rewards / 0.5
    torch.testing.assert_close(loss, 2 * missing.var(1))
    share = 1 / now.shape[-1] if convention == "listing" else 1.0
    expected = share * 4 / (now.shape[1] - 1) * (missing - missing.mean(1, keepdim=True))
    torch.testing.assert_close(gradient(loss, now), expected[:, :, None].expand_as(now))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("clip_range", [None, 0.3])
def test_what_changes_nothing(convention, clip_range):
    now, old, rewards = chains()
    loss = partial(reward_difference_loss, clip_range=clip_range, convention=convention)
    expected = loss(now, old, rewards, 0.5)
    of_the_prompt = torch.tensor([[3.0], [-5.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(now, old, rewards + of_the_prompt, 0.5), expected)
    torch.testing.assert_close(loss(now, old, 7 * rewards, 3.5), expected)
    torch.testing.assert_close(loss(now.flip(1), old.flip(1), rewards.flip(1), 0.5), expected)


def test_the_conventions_are_one_where_there_is_one_step_and_no_tie():
    now, old, rewards = chains(steps=1)
    one, other = (reward_difference_loss(now, old, rewards, 0.5, 0.1, c) for c in CONVENTIONS)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_policy_that_has_not_moved_is_not_clipped(convention):
    old, _, rewards = chains()
    now = old.clone().requires_grad_()
    plain, clipped = (reward_difference_loss(now, old, rewards, 0.5, c, convention) for c in (None, 1e-6))
    assert torch.equal(plain, clipped)
    assert torch.equal(gradient(plain, now), gradient(clipped, now))


def test_the_larger_of_the_two_losses_is_taken():
    now, old, rewards = chains()
    for clip_range in (1e-3, 0.3, 1.0):
        clipped = reward_difference_loss(now, old, rewards, 0.5, clip_range)
        assert (clipped >= reward_difference_loss(now, old, rewards, 0.5, None)).all()


@pytest.mark.parametrize(("direction", "alive"), [(1, False), (-1, True), (0.5, True), (-0.5, True)])
def test_the_gradient_dies_past_the_clip_only_where_the_rewards_push(direction, alive):
    old = torch.zeros(1, 2, 3, dtype=torch.float64)
    side = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # the first image has more reward
    now = (0.15 * direction * side[:, :, None].expand_as(old)).clone().requires_grad_()
    found = gradient(reward_difference_loss(now, old, side, 0.1, clip_range=0.1), now)
    assert (found != 0).all() if alive else (found == 0).all()


def test_images_without_a_score_and_ties_are_in_no_pair():
    now, old, rewards = chains(1, 4)
    rewards[0] = torch.tensor([1.0, math.nan, 1.0, 2.0])
    found = reward_difference_loss(now, old, rewards, 0.5, 0.1)
    assert compared_pairs(rewards)[0].nonzero().tolist() == [[3, 0], [3, 2]]
    parts = [
        reward_difference_loss(now[:, [3, i]], old[:, [3, i]], rewards[:, [3, i]], 0.5, 0.1) for i in (0, 2)
    ]
    torch.testing.assert_close(found, sum(parts) / 2)
    assert compared_pairs(rewards, "equations")[0].nonzero().tolist() == [[0, 2], [0, 3], [2, 3]]
    rewards[0, 1] = math.inf
    torch.testing.assert_close(reward_difference_loss(now, old, rewards, 0.5, 0.1), found)


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [math.nan, 1.0, math.nan], [math.nan] * 3])
def test_a_prompt_without_pairs_gives_nothing(rewards):
    now, old, _ = chains(1, 3)
    now.requires_grad_()
    loss = reward_difference_loss(now, old, torch.tensor([rewards], dtype=torch.float64), 1e-6, 0.1)
    assert loss.item() == 0
    assert (gradient(loss, now) == 0).all()


def test_equal_rewards_ask_for_equal_log_ratios_in_the_equations():
    now, old, rewards = chains(1, 3)
    loss = reward_difference_loss(now, old, torch.ones_like(rewards), 1.0, None, "equations")
    torch.testing.assert_close(loss, 2 * now.sum(-1).var(1))


# ---- Gaussian policies, where the optimum is known


def gaussian_chains(
    shift: torch.Tensor, z: torch.Tensor, old: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-ratios to a reference without shift of chains ``x[k+1] = x[k] + shift[k] + z``, and where they end.

    ``z (B, S)`` drew the chains under the shift ``old (S,)``.
    """
    increments = old + z
    steps = [GaussianStep(s.expand(z.shape).reshape(-1, 1), torch.ones(1)) for s in (shift, 0 * shift)]
    return steps[0].log_ratio(steps[1], increments.reshape(-1, 1)).view(1, *z.shape), increments.sum(-1)[None]


def test_on_policy_the_gradient_is_that_of_the_reward_with_its_kl():
    beta, size = 0.5, 1000
    z = torch.special.ndtri((torch.arange(size, dtype=torch.float64) + 0.5) / size)[:, None]
    for start in (0.0, 0.4):
        shift = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        log_ratio, x = gaussian_chains(shift, z, shift.detach())
        loss = reward_difference_loss(
            log_ratio, log_ratio.detach(), (2 * x).sin() + x, beta, 1e-3, "equations"
        )
        ends = shift + z.squeeze(-1)
        objective = ((2 * ends).sin() + ends).mean() - beta * shift.square().sum() / 2
        torch.testing.assert_close(
            gradient(loss, shift), -4 / beta * gradient(objective, shift), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize(("convention", "optimum"), [("listing", 3 * 0.4), ("equations", 0.4)])
def test_the_optimum_of_gaussian_chains_is_reached(convention, optimum):
    """With the reward ``a x`` each step shifts by ``a`` over a nat's weight: beta, or beta / S (listing)."""
    a, beta, draw = 0.2, 0.5, torch.Generator().manual_seed(0)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for _ in range(30):  # rollout batches
        old = shift.detach().clone()
        z = torch.randn(64, 3, generator=draw, dtype=torch.float64)
        reference = gaussian_chains(old, z, old)[0]
        for _ in range(4):
            log_ratio, ends = gaussian_chains(shift, z, old)
            loss = reward_difference_loss(log_ratio, reference, a * ends, beta, 0.5, convention)
            step = (0.5 if convention == "listing" else 0.05) * gradient(loss, shift)
            with torch.no_grad():
                shift -= step
    torch.testing.assert_close(shift.detach(), torch.full_like(shift, optimum), atol=1e-3, rtol=0)
    assert loss.item() < 1e-5


def test_the_loss_of_a_bandit_is_a_parabola_around_the_optimum():
    a, beta = 0.3, 0.6
    z = torch.randn(50, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for shift in (-1.0, 0.0, 0.5, 2.0):
        theta = torch.tensor([shift], dtype=torch.float64)
        log_ratio, ends = gaussian_chains(theta, z, torch.zeros(1, dtype=torch.float64))
        loss = reward_difference_loss(log_ratio, log_ratio, a * ends, beta, None)
        torch.testing.assert_close(loss, 2 * (theta - a / beta) ** 2 * z.var())


# ---- the module


class Given(Reward):
    """The same scores for the images of every prompt."""

    differentiable, scope = False, "sample"

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = torch.tensor(scores)

    def forward(self, images, prompts, groups=None, columns=None):
        return self.scores.repeat(-(-len(images) // len(self.scores)))[: len(images)]


def stored_chains(module: PRDPModule, images: int = 4, count: int = 2) -> tuple[Replay, torch.Tensor]:
    """Stored chains of a policy that has left the reference, which then moves on; and rewards ``(N, B)``."""
    loaded = prompts(count, images)
    loaded.setup("fit")
    batch = next(iter(loaded.train_dataloader()))
    draw = torch.Generator().manual_seed(3)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def move() -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter += 0.02 * torch.randn(parameter.shape, generator=draw).to(parameter)

    move()
    draw_noise, dtype = module.draw_noise, parameters[0].dtype  # chains in float64 where the weights are

    def noise_like_weights(*arguments: Any) -> tuple[torch.Tensor, list[torch.Generator]]:
        noise, draws = draw_noise(*arguments)
        return noise.to(dtype), draws

    module.draw_noise = noise_like_weights
    policy = module.policy(batch, module.backbone.encode(batch.prompts))
    with torch.no_grad():
        samples = module.sample(policy, batch, "rollout")
        rewards = module.score(samples.images, batch).total.double().view(count, images)
    move()
    return Replay(policy, samples.trajectory), rewards


def two_passes(module: PRDPModule, replay: Replay, rewards: torch.Tensor, monkeypatch: Any) -> Metrics:
    """The updates of a rollout batch but for the optimizer's steps; gradients stay at the parameters."""

    def backward(losses: Sequence[Loss]) -> Metrics:
        for compute in losses:
            compute()[0].backward()
        return {}

    monkeypatch.setattr(module, "update", backward)
    moved = module._moved  # this is not the first update: the policy has moved on
    monkeypatch.setattr(module, "_moved", lambda replay, pairs, _: moved(replay, pairs, False))
    old, _ = module._compare(replay)
    return module._learn(replay, old.view(*rewards.shape, -1), rewards)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(("micro_batch", "guidance", "updates"), [(1000, 1.0, 1), (5, 3.0, 2)])
def test_two_passes_give_the_gradient_of_one(
    tiny_attentive, monkeypatch, convention, micro_batch, guidance, updates
):
    scale = 1 if convention == "listing" else 256
    module = make(
        PRDPModule,
        tiny_attentive,
        convention=convention,
        clip_range=1e-3 * scale,
        beta=1e-2,
        micro_batch=micro_batch,
        guidance=guidance,
        noisy_steps=3,
        updates=updates,
    ).double()
    replay, rewards = stored_chains(module)
    metrics = two_passes(module, replay, rewards, monkeypatch)
    assert 0.1 < metrics["clip_fraction"].double().mean() < 0.9
    parameters = [p for p in module.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in parameters]

    # The listing as it stands: log-probabilities of whole chains, one graph.
    states = replay.trajectory.states
    reference = module.backbone.policy(module.sampler, replay.policy.cond, guidance, REFERENCE)
    log_ratios = []
    for k in range(3):
        now, before = replay.policy(states[k], k), reference(states[k], k)
        then = GaussianStep(replay.trajectory.means[k], now.std)
        drawn = states[k + 1]
        log_ratios.append([s.log_prob(drawn) - before.log_prob(drawn) for s in (now, then)])
    now, old = (torch.stack([pair[i] for pair in log_ratios], -1).view(*rewards.shape, 3) for i in range(2))
    unit = 256 / scale
    loss = reward_difference_loss(now / unit, (old / unit).detach(), rewards, 1e-2, 1e-3 * scale, convention)
    # Each update takes the mean over prompts of its own, and the gradients of all are added up here.
    direct = torch.autograd.grad(updates * loss.mean(), parameters)
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=1e-6, atol=0)
    for one, other in zip(found, direct, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    assert all(one.abs().max() > 0 for one in direct)


class LiveGraph:
    """Bytes that autograd keeps for backward passes; ``peak`` is the most at one time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        kept, size = tensor.detach().clone(), tensor.numel() * tensor.element_size()
        weakref.finalize(kept, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        return kept

    def _free(self, size: int) -> None:
        self.now -= size


def test_the_graph_is_that_of_one_micro_batch_whatever_the_images_and_steps(tiny, monkeypatch):
    peaks = []
    for images, steps in ((2, 2), (4, 5)):
        graph = LiveGraph()
        module = make(PRDPModule, tiny, micro_batch=4, num_steps=steps)
        replay, rewards = stored_chains(module, images)
        with torch.autograd.graph.saved_tensors_hooks(graph.keep, lambda kept: kept):
            two_passes(module, replay, rewards, monkeypatch)
        assert graph.now == 0
        peaks.append(graph.peak)
    # But for the coefficients, of which there is one an image and step.
    assert max(peaks) < 1.01 * min(peaks)


def test_images_are_replayed_at_the_steps_with_noise_wherever_these_are(tiny):
    module = make(PRDPModule, tiny)
    module.stochastic_steps = torch.tensor([1, 3])
    pairs = module._pairs(torch.tensor([0, 2]))
    assert (pairs.rows.tolist(), pairs.steps.tolist()) == ([0, 0, 2, 2], [1, 3, 1, 3])


def test_a_batch_is_logged_and_its_first_update_is_on_policy(tiny, tmp_path):
    metrics = fit(make(PRDPModule, tiny, noisy_steps=3, updates=2), tmp_path).logged[0]
    assert metrics.get("train/ratio_deviation", 0.0) < 1e-4  # 1 % of the clip range
    assert metrics["train/clip_fraction"] < 0.5  # none in the first of the two updates
    assert metrics["train/compared_pairs"] == 6
    assert metrics["train/kl"] > 0
    assert metrics["train/reference_kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["progress/images"] == metrics["progress/reward_queries"] == 16
    assert {"train/loss", "train/grad_norm", "train/lr", "perf/sampling_fraction"} <= metrics.keys()


def test_the_distance_to_the_reference_is_logged_in_nats_an_image(tiny, tmp_path):
    module = make(PRDPModule, tiny, EvenBrightness("leave_one_out"), lr=0.0, noisy_steps=2, guidance=2.0)
    data = prompts(2, 2)
    randomise(module, 0.1)
    (logged,) = fit(module, tmp_path, data=data).logged
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    chains, cond = draw(module, batch, "rollout").trajectory, module.backbone.encode(batch.prompts)
    with torch.no_grad():
        expected = module.distance(batch, cond, chains)["kl"].mean().item()
    assert logged["train/reference_kl"] == pytest.approx(expected, rel=1e-4)
    assert logged["train/compared_pairs"] == 1  # by their credit: a set's own value is that of both images


def test_the_clip_holds_the_policy_near_the_one_that_sampled(tiny, tmp_path):
    moved = {}
    for clip_range in (1e-4, None):
        module = make(PRDPModule, tiny, lr=2e-3, clip_range=clip_range, inner_epochs=6, num_steps=3)
        recorder = fit(module, tmp_path, data=prompts(2))
        moved[clip_range] = recorder.logged[0]["train/kl"]
        assert len(recorder.gradients) == 6
    assert "train/clip_fraction" not in recorder.logged[0]
    assert moved[1e-4] < 0.5 * moved[None]


@pytest.mark.parametrize("scores", [[1.0] * 4, [math.nan, 1.0, math.inf, math.nan]], ids=["ties", "one"])
def test_a_batch_without_pairs_trains_nothing(tiny, tmp_path, scores):
    module = make(PRDPModule, tiny, Given(scores), updates=2, num_steps=2)
    before = trained(module)
    recorder = fit(module, tmp_path)
    assert len(recorder.gradients) == 2
    assert recorder.logged[0]["train/loss"] == recorder.logged[0]["train/compared_pairs"] == 0
    assert_same(trained(module), before)


# ---- mistakes


@pytest.mark.parametrize("option", ["beta", "clip_range", "updates", "inner_epochs", "micro_batch"])
def test_a_size_that_is_not_positive_is_refused(tiny, option):
    with pytest.raises(ConfigError, match=option):
        make(PRDPModule, tiny, **{option: 0})


def test_one_image_per_prompt_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="images_per_prompt"):
        fit(make(PRDPModule, tiny), tmp_path, data=prompts(images=1))


def test_updates_that_do_not_divide_the_prompts_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="updates"):
        fit(make(PRDPModule, tiny, updates=3), tmp_path)


def test_rewards_that_are_the_same_for_all_images_of_a_prompt_are_refused(tiny, tmp_path):
    shared = StatisticalParity("shapes", min_confidence=0.0, credit="shared")
    with pytest.raises(ConfigError, match="PRDP takes their mean away"):
        fit(make(PRDPModule, tiny, shared), tmp_path)


def test_several_tasks_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="PRDPModule learns one"):
        fit(make(PRDPModule, tiny), tmp_path, data=task_prompts("a"))
