import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

from lit_align.backbones import REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import Batch, PromptDataModule, ShapesPrompts
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods import AlignPropModule
from lit_align.methods.alignprop import differentiable_rollout, last_step_again, reward_loss
from lit_align.randomness import generator
from lit_align.rewards import Brightness, CLIPScore, JPEGCompressibility, Redness, Reward, RewardBank
from lit_align.samplers import DDIM, Sampler
from lit_align.methods.alignprop.truncation import (
    FixedWindow,
    GaussianWindow,
    LowVariance,
    NoTruncation,
    OneShot,
    PerStep,
    Truncation,
    UniformWindow,
)

STEPS = 4


class LinearSampler(Sampler):
    """``x' = a x + prediction + s z``: the toy chains; a clean state is noised to ``α x + σ ε``."""

    def __init__(
        self, num_steps: int, factor: float, std: float, levels: tuple[float, float] = (1.0, 0.0)
    ) -> None:
        self.num_steps = num_steps
        self.timesteps = torch.arange(num_steps).flip(0)
        self.stochastic = torch.full((num_steps,), std > 0)
        self.factor, self.std = factor, std
        self.levels = levels

    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        return GaussianStep(self.factor * x + prediction, torch.tensor(self.std))

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        return self.levels[0] * x0 + self.levels[1] * noise

    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        raise AssertionError

    def predict_x0(self, x: Tensor, prediction: Tensor, t: int | Tensor) -> Tensor:
        return prediction


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


def test_above_its_ceiling_a_image_gives_no_gradient():
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
def test_sizes_that_the_sampler_does_not_have_are_refused(tiny, truncation):
    with pytest.raises(ConfigError, match="truncation"):
        module(tiny, truncation=truncation)


# ---- the gradient on a real denoiser


def module(folder: Path, reward: Reward | None = None, checkpointing: bool = False, **options: Any):
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sampler": partial(DDIM, num_steps=STEPS, eta=1.0),
        "truncation": UniformWindow(),
        "coefficient": 1.0,
        "guidance": 1.0,
        "micro_batch": 16,
        "optimizer": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
    } | options
    return AlignPropModule(
        StableDiffusionBackbone(str(folder), lora=LoRA(), checkpointing=checkpointing),
        rewards=RewardBank({"trained": reward or Redness(), "monitored": Brightness()}, {"trained": 1.0}),
        **settings,
    )


def small_batch(images: int = 3) -> Batch:
    prompts = [f"a star number {i}" for i in range(images)]
    return Batch(prompts, torch.arange(images), index=torch.arange(images) + 7)


def randomise(aligned: AlignPropModule) -> list[Tensor]:
    """Move the adapter away from 0, where the gradient of A vanishes; returns what is trained."""
    trained = [p for p in aligned.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return trained


def gradients(
    aligned: AlignPropModule, attached: Tensor, batch: Batch, graphs: Tensor | None = None
) -> list[Tensor]:
    trained = randomise(aligned)
    latents, kl = aligned.differentiable_sample(batch, attached, graphs)
    # The reference is what is active when the backward pass begins.
    with torch.no_grad():
        aligned.backbone.predict(latents, 1, aligned.backbone.encode(batch.prompts), 1.0, REFERENCE)
    score = aligned.rewards(aligned.backbone.decode(latents), batch.prompts).total.sum() - kl.sum()
    return list(torch.autograd.grad(score, trained))


def test_graphs_of_further_steps_change_no_gradient(tiny):
    """Another process may need them, with which the weights are shared."""
    aligned, batch, attached = module(tiny, kl_weight=0.1), small_batch(), window(2, STEPS, 3)
    plain = gradients(aligned, attached, batch)
    opened = gradients(aligned, attached, batch, torch.ones(STEPS, dtype=torch.bool))
    for one, two in zip(plain, opened, strict=True):
        torch.testing.assert_close(two, one, atol=1e-7, rtol=1e-5)
    assert any(gradient.abs().max() > 1e-6 for gradient in plain)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_whole_chain_has_the_gradient_of_finite_differences(tiny, eta, guidance):
    aligned = module(tiny, sampler=partial(DDIM, num_steps=STEPS, eta=eta), guidance=guidance)
    trained = randomise(aligned)
    aligned.double()
    cond = aligned.backbone.encode(["a star", "a red circle"])
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score() -> Tensor:
        latents, _ = differentiable_rollout(
            partial(aligned._predict, cond, "policy"),
            aligned.sampler,
            noise,
            window(STEPS, STEPS, 2),
            torch.Generator().manual_seed(0),
        )
        red, green, _ = aligned.backbone.vae.decode(latents).sample.mean((0, 2, 3))  # unrounded by decode()
        return red - green

    weight = trained[1]
    gradient = torch.autograd.grad(score(), weight)[0].flatten()
    place, step = int(gradient.abs().argmax()), 1e-5
    found = []
    with torch.no_grad():
        for sign in (1, -1):
            weight.view(-1)[place] += sign * step
            found.append(score().item())
            weight.view(-1)[place] -= sign * step
    assert gradient[place].abs() > 1e-6
    assert (found[0] - found[1]) / (2 * step) == pytest.approx(gradient[place].item(), rel=1e-6)


def test_a_window_is_the_chain_with_its_prefix_under_no_grad(tiny):
    aligned, batch, length = module(tiny), small_batch(), 2
    found = gradients(aligned, window(length, STEPS, 3), batch)
    trained = [p for p in aligned.parameters() if p.requires_grad]
    policy = aligned.backbone.policy(aligned.sampler, aligned.backbone.encode(batch.prompts))
    draws = [generator(aligned.seed, "rollout", i) for i in batch.index.tolist()]
    x = torch.stack([torch.randn(4, 8, 8, generator=draw) for draw in draws])
    for k in range(STEPS):
        with torch.set_grad_enabled(k >= STEPS - length):
            x = policy(x, k).rsample(draws)
    score = aligned.rewards(aligned.backbone.decode(x), batch.prompts).total.sum()
    expected = torch.autograd.grad(score, trained)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert any(gradient.abs().max() > 1e-6 for gradient in found)


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_checkpointed_equals_plain_when_weight_sets_switch_in_between(tiny, kl_weight):
    attached = torch.stack([torch.arange(STEPS) >= first for first in (0, 1, 3)], dim=1)
    options: dict[str, Any] = {"kl_weight": kl_weight, "guidance": 2.0}
    plain, recomputed = (
        gradients(module(tiny, checkpointing=on, **options), attached, small_batch()) for on in (False, True)
    )
    assert all(torch.equal(one, two) for one, two in zip(plain, recomputed, strict=True))
    assert any(gradient.abs().max() > 1e-6 for gradient in plain)


def test_the_prefix_holds_no_memory_and_checkpointed_decoding_little(tiny):
    held: dict[str, int] = {}
    for name, length, on in (("one", 1, False), ("all", STEPS, False), ("checkpointed", STEPS, True)):
        aligned, sizes = module(tiny, checkpointing=on), []
        randomise(aligned)
        hooks = (lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            latents, _ = aligned.differentiable_sample(small_batch(), window(length, STEPS, 3))
            aligned.backbone.decode(latents)
        held[name] = sum(sizes)
    assert held["all"] > 2.5 * held["one"]
    assert held["checkpointed"] < 0.1 * held["all"]


def test_saturated_pixels_give_no_gradient(tiny):
    aligned, batch = module(tiny), small_batch()
    trained = randomise(aligned)
    for bias, saturated in ((0.0, False), (9.0, True), (-9.0, True)):
        aligned.backbone.vae.decoder.conv_out.bias.data.fill_(bias)
        latents, _ = aligned.differentiable_sample(batch, window(STEPS, STEPS, 3))
        images = aligned.backbone.decode(latents)
        assert bool(((images == 0) | (images == 1)).all()) == saturated
        found = torch.autograd.grad(aligned.rewards(images, batch.prompts).total.sum(), trained)
        assert all(gradient.isfinite().all() for gradient in found)
        assert all(gradient.eq(0).all() for gradient in found) == saturated


def test_a_one_shot_of_the_last_step_is_the_last_step_without_noise(tiny):
    """ReFL with a window of 1 is DRaFT-1 where the chain ends at a clean state."""
    found = []
    for truncation in (OneShot(1, 1), FixedWindow(1)):
        aligned = module(tiny, truncation=truncation)
        config = dict(aligned.backbone.pipeline.scheduler.config) | {"set_alpha_to_one": True}
        aligned.sampler = DDIM(config, num_steps=STEPS, eta=1.0)
        found.append(gradients(aligned, window(1, STEPS, 3), small_batch()))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)
    assert any(gradient.abs().max() > 1e-6 for gradient in found[0])


def test_copies_come_after_the_chains_that_they_belong_to(tiny):
    plain, again = module(tiny, truncation=FixedWindow(1)), module(tiny, truncation=LowVariance(2))
    attached, batch = window(1, STEPS, 3), small_batch()
    with torch.no_grad():
        latents, _ = plain.differentiable_sample(batch, attached)
        ends, kl = again.differentiable_sample(batch, attached)
    assert ends.shape == (9, 4, 8, 8)
    assert kl.shape == (3,)
    assert torch.equal(ends[:3], latents)
    own = (ends[3:] - latents.repeat(2, 1, 1, 1)).flatten(1).norm(dim=1)
    others = (ends[3:] - latents.roll(1, 0).repeat(2, 1, 1, 1)).flatten(1).norm(dim=1)
    assert bool((own < 0.5 * others).all())
    assert own.unique().numel() == 6  # each has noise of its own


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_images_are_those_of_sample(tiny, eta):
    aligned, batch = module(tiny, sampler=partial(DDIM, num_steps=STEPS, eta=eta)), small_batch()
    randomise(aligned)
    attached = torch.stack([torch.arange(STEPS) >= first for first in (0, 2, 3)], dim=1)
    latents, _ = aligned.differentiable_sample(batch, attached)
    with torch.no_grad():
        samples = aligned.sample(batch, "rollout")
    assert torch.equal(latents.detach(), samples.trajectory.states[-1])


def test_kl_is_that_of_the_attached_steps_and_zero_at_the_reference(tiny):
    aligned, batch = module(tiny, kl_weight=1.0), small_batch()
    whole = window(STEPS, STEPS, 3)
    with torch.no_grad():
        _, at_start = aligned.differentiable_sample(batch, whole)
        randomise(aligned)
        _, moved = aligned.differentiable_sample(batch, whole)
        _, late = aligned.differentiable_sample(batch, window(1, STEPS, 3))
        expected = aligned.trajectory_kl(batch, aligned.sample(batch, "rollout").trajectory)
    assert torch.equal(at_start, torch.zeros(3))
    torch.testing.assert_close(moved, expected)
    assert bool((late < moved).all())


def test_one_shot_is_the_clean_state_that_a_late_step_implies(tiny):
    aligned, batch = module(tiny, truncation=OneShot(1, 3)), small_batch()
    randomise(aligned)
    attached = torch.stack([torch.arange(STEPS) == step for step in (1, 2, 3)], dim=1)
    with torch.no_grad():
        latents, _ = aligned.differentiable_sample(batch, attached)
        states = aligned.sample(batch, "rollout").trajectory.states
        cond = aligned.backbone.encode(batch.prompts)
        for image, step in enumerate((1, 2, 3)):
            t = int(aligned.sampler.timesteps[step])
            prediction = aligned.backbone.predict(states[step], t, cond)
            clean = aligned.sampler.predict_x0(states[step], prediction, t)
            assert torch.equal(latents[image], clean[image])


# ---- training


class Recorder(Callback):
    """Keeps gradients before each update and all logged metrics; may stop the process in an update."""

    def __init__(self, crash: int = 0) -> None:
        self.gradients: list[list[Tensor]] = []
        self.logged: list[dict[str, float]] = []
        self.crash = crash

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])
        if len(self.gradients) == self.crash:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def fit(
    aligned: AlignPropModule, folder: Path, collections: int, *callbacks: Callback, **options: Any
) -> None:
    path, prompts = options.pop("ckpt_path", None), options.pop("prompts", 8)
    trainer = Trainer(
        limit_train_batches=collections,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, BatchCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **({"max_epochs": 1} | options),
    )
    loaded = PromptDataModule(
        ShapesPrompts(["open"]),
        images_per_prompt=1,
        prompts_per_batch=prompts,
        validation_prompts=8,
        validation_images_per_prompt=1,
    )
    trainer.fit(aligned, loaded, ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("truncation", [UniformWindow(), PerStep(), OneShot(1, 3), LowVariance(2)])
def test_micro_batches_change_no_gradient(tiny, tmp_path, truncation):
    found, logged = [], []
    for micro_batch in (64, 3):
        recorder = Recorder()
        aligned = module(tiny, truncation=truncation, micro_batch=micro_batch, kl_weight=0.1)
        randomise(aligned)
        fit(aligned, tmp_path, 1, recorder, limit_val_batches=0)
        found.append(recorder.gradients[0])
        logged.append(recorder.logged[0])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    for name in ("train/loss", "train/reward", "train/reward/monitored", "train/kl_penalty"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-4)
    assert logged[0]["progress/images"] == 8
    assert logged[0]["progress/reward_queries"] == 8 * (1 + truncation.copies)


@pytest.mark.parametrize("truncation", [UniformWindow(), OneShot(1, 2)])
def test_learns_a_reward_past_a_threshold(tiny, tmp_path, truncation):
    learner = module(
        tiny, truncation=truncation, optimizer=partial(torch.optim.AdamW, lr=2e-2, weight_decay=0.0)
    )
    fit(learner, tmp_path, 12)
    before, after = learner.baseline["reward"], learner.latest["reward"]
    assert after.mean() > before.mean() + before.std()
    assert learner.latest["kl"].mean() > 0


def test_a_target_is_approached_from_above_too(tiny, tmp_path):
    learner = module(tiny, target=-0.2, optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0))
    fit(learner, tmp_path, 8)
    before, after = learner.baseline["reward"].mean(), learner.latest["reward"].mean()
    assert -0.2 < after < before


def test_a_ceiling_that_all_images_are_above_changes_nothing(tiny, tmp_path):
    recorder = Recorder()
    fit(module(tiny, ceiling=-1.0), tmp_path, 1, recorder, limit_val_batches=0)
    assert all(gradient.eq(0).all() for gradient in recorder.gradients[0])
    assert recorder.logged[0]["train/loss"] == 1.0


def test_mixed_precision_keeps_the_gradient_behind_a_prefix_without_one(tiny, tmp_path):
    """Autocast remembers cast weights: those of the prefix, made without a graph, must not be taken up."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        recorder, aligned = Recorder(), module(tiny, truncation=FixedWindow(1))
        randomise(aligned)
        fit(aligned, tmp_path, 1, recorder, limit_val_batches=0, precision=precision)
        found.append(torch.cat([gradient.flatten() for gradient in recorder.gradients[0]]))
    assert (found[1] - found[0]).norm() < 0.2 * found[0].norm()


class HalfScored(Redness):
    """Every other image has no score."""

    def forward(self, images, prompts, groups=None, columns=None):
        scores = super().forward(images, prompts)
        return torch.where(torch.arange(len(images)) % 2 == 0, scores, math.nan)


def test_images_without_a_score_give_no_gradient_and_no_nan(tiny, tmp_path):
    recorder = Recorder()
    fit(module(tiny, reward=HalfScored()), tmp_path, 1, recorder, limit_val_batches=0)
    assert all(gradient.isfinite().all() for gradient in recorder.gradients[0])
    assert math.isfinite(recorder.logged[0]["train/loss"])


def test_a_resumed_run_equals_the_uninterrupted_one(tiny, tmp_path):
    options: dict[str, Any] = {"max_epochs": 2}
    whole, cut, resumed = (module(tiny, kl_weight=0.1) for _ in range(3))
    fit(whole, tmp_path / "whole", 3, **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(cut, tmp_path / "cut", 3, Recorder(crash=5), BatchCheckpoint(), **options)
    (last,) = (tmp_path / "cut").rglob("last.ckpt")
    fit(resumed, tmp_path / "resumed", 3, ckpt_path=last, **options)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert resumed.images == whole.images == 48


class GradientsToFile(Recorder):
    """Writes the gradients where another process can read them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save({"gradients": self.gradients, "logged": self.logged}, self.path)


def test_two_processes_give_the_gradient_of_one(tiny, tmp_path):
    found = {}
    for devices in (1, 2):
        path, strategy = tmp_path / f"{devices}.pt", "ddp_spawn" if devices == 2 else "auto"
        aligned = module(tiny, checkpointing=True, kl_weight=0.1, clip_norm=1e9, micro_batch=3)
        recorder = GradientsToFile(path)
        fit(aligned, tmp_path, 3, recorder, limit_val_batches=0, devices=devices, strategy=strategy)
        found[devices] = torch.load(path)
    for one, two in zip(found[1]["gradients"], found[2]["gradients"], strict=True):
        for single, averaged in zip(one, two, strict=True):
            torch.testing.assert_close(averaged, single, atol=1e-6, rtol=1e-3)
    for one, two in zip(found[1]["logged"], found[2]["logged"], strict=True):
        assert one["train/reward"] == pytest.approx(two["train/reward"], abs=1e-5)


# ---- refusals


def test_a_black_box_is_refused_by_name_with_the_remedy(tiny):
    with pytest.raises(ConfigError, match=r"trained has no gradient.*monitored.*DDPOModule"):
        module(tiny, reward=JPEGCompressibility())


class OfTheGroup(Redness):
    scope = "group"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reward": OfTheGroup()}, "several images"),
        ({"kl_weight": -0.1}, "kl_weight"),
        ({"kl_weight": 1.0, "sampler": partial(DDIM, num_steps=STEPS, eta=0.0)}, "eta"),
        ({"coefficient": 0.0}, "coefficient"),
        ({"target": 1.0, "ceiling": 2.0}, "target 1.0 and ceiling 2.0"),
        ({"micro_batch": 0}, "micro_batch"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny, options, named):
    with pytest.raises(ConfigError, match=named):
        module(tiny, **options)


def test_clip_score_gives_the_trained_weights_a_gradient_after_validation(tiny, tmp_path):
    """Prompt embeddings that validation remembered in inference mode can enter a graph."""
    recorder = Recorder()
    fit(
        module(tiny, reward=CLIPScore("shapes"), guidance=2.0, checkpointing=True),
        tmp_path,
        2,
        recorder,
        max_epochs=2,
    )
    assert any(gradient.abs().max() > 1e-8 for gradient in recorder.gradients[-1])
