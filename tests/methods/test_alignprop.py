"""AlignProp on a small denoiser: gradients through the sampler, the loss of a batch, what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_align.backbones import REFERENCE
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.methods import AlignPropModule
from lit_align.methods.alignprop import FixedWindow, LowVariance, OneShot, PerStep
from lit_align.methods.alignprop.chain import differentiable_rollout
from lit_align.methods.alignprop.module import RolloutBatch, reward_loss
from lit_align.randomness import generator
from lit_align.rewards import CLIPScore, JPEGCompressibility, Redness
from lit_align.samplers import DDIM
from tests.methods.build import (
    assert_close_gradients,
    assert_same,
    draw,
    fit,
    flat,
    make,
    prompts,
    randomise,
    trainer,
)

STEPS = 4

module = partial(make, AlignPropModule, num_steps=STEPS)


def window(length: int, images: int = 3) -> Tensor:
    return (torch.arange(STEPS) >= STEPS - length)[:, None].expand(-1, images)


def begin_at(*first: int) -> Tensor:
    """Windows of their own for the images, each by its first attached step."""
    return torch.stack([torch.arange(STEPS) >= step for step in first], dim=1)


def small_batch(images: int = 3) -> Batch:
    listed = [f"a star number {10**i}" for i in range(images)]
    return Batch(listed, torch.arange(images), index=torch.arange(images) + 7)


def sample(aligned: AlignPropModule, attached: Tensor, graphs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    batch = small_batch()
    return aligned.differentiable_sample(batch, aligned.backbone.encode(batch.prompts), attached, graphs)


def gradients(aligned: AlignPropModule, attached: Tensor, graphs: Tensor | None = None) -> list[Tensor]:
    batch, trained = small_batch(), randomise(aligned)
    latents, kl = sample(aligned, attached, graphs)
    # The reference is what is active when the backward pass begins.
    with torch.no_grad():
        aligned.backbone.predict(latents, 1, aligned.backbone.encode(batch.prompts), 1.0, REFERENCE)
    score = aligned.rewards(aligned.backbone.decode(latents), batch.prompts).total.sum() - kl.sum()
    found = list(torch.autograd.grad(score, trained))
    assert flat(found).abs().max() > 1e-6
    return found


# ---- the gradient


def test_graphs_of_further_steps_change_no_gradient(tiny):
    """Another process may need them, with which the weights are shared."""
    aligned, attached = module(tiny, kl_weight=0.1), window(2)
    plain = gradients(aligned, attached)
    opened = gradients(aligned, attached, torch.ones(STEPS, dtype=torch.bool))
    for one, two in zip(plain, opened, strict=True):
        torch.testing.assert_close(two, one, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("eta", "guidance", "one_shot"),
    [(0.0, 1.0, False), (1.0, 1.0, False), (0.0, 3.0, False), (1.0, 3.0, False), (1.0, 3.0, True)],
)
def test_the_whole_chain_has_the_gradient_of_finite_differences(tiny, eta, guidance, one_shot):
    """A one-shot at the first step is a whole chain too."""
    aligned = module(tiny, eta=eta)
    trained = randomise(aligned)
    aligned.double()
    cond = aligned.backbone.encode(["a star", "a red circle"])
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attached = window(STEPS, 2)
    if one_shot:
        attached = attached & (torch.arange(STEPS) == 0)[:, None]

    def score() -> Tensor:
        latents, _ = differentiable_rollout(
            aligned.backbone.policy(aligned.sampler, cond, guidance).predict,
            aligned.sampler,
            noise,
            attached,
            torch.Generator().manual_seed(0),
            one_shot=one_shot,
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
    found = gradients(aligned, window(length))
    policy = aligned.policy(batch, aligned.backbone.encode(batch.prompts))
    draws = [generator(aligned.seed, "rollout", i) for i in batch.index.tolist()]
    x = torch.stack([torch.randn(4, 8, 8, generator=each) for each in draws])
    for k in range(STEPS):
        with torch.set_grad_enabled(k >= STEPS - length):
            x = policy(x, k).rsample(draws)
    score = aligned.rewards(aligned.backbone.decode(x), batch.prompts).total.sum()
    assert_same(found, torch.autograd.grad(score, [p for p in aligned.parameters() if p.requires_grad]))


@pytest.mark.parametrize("kl_weight", [0.0, 1.0])
def test_checkpointed_equals_plain_when_weight_sets_switch_in_between(tiny, kl_weight):
    options: dict[str, Any] = {"kl_weight": kl_weight, "guidance": 2.0}
    plain, recomputed = (
        gradients(module(tiny, checkpointing=kind, **options), begin_at(0, 1, 3))
        for kind in ("none", "prediction")
    )
    assert_same(plain, recomputed)


def test_the_prefix_holds_no_memory_and_checkpointed_decoding_little(tiny):
    held: dict[str, int] = {}
    for name, length, kind in (("one", 1, "none"), ("all", STEPS, "none"), ("again", STEPS, "prediction")):
        aligned, sizes = module(tiny, checkpointing=kind), []
        randomise(aligned)
        hooks = (lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x)
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            latents, _ = sample(aligned, window(length))
            aligned.backbone.decode(latents)
        held[name] = sum(sizes)
    assert held["all"] > 2.5 * held["one"]
    assert held["again"] < 0.1 * held["all"]


def test_saturated_pixels_give_no_gradient(tiny):
    aligned, batch = module(tiny), small_batch()
    trained = randomise(aligned)
    for bias, saturated in ((0.0, False), (9.0, True), (-9.0, True)):
        aligned.backbone.vae.decoder.conv_out.bias.data.fill_(bias)
        latents, _ = sample(aligned, window(STEPS))
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
        found.append(gradients(aligned, window(1)))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


# ---- the images


def test_copies_come_after_the_chains_that_they_belong_to(tiny):
    plain, again = module(tiny, truncation=FixedWindow(1)), module(tiny, truncation=LowVariance(2))
    with torch.no_grad():
        latents, _ = sample(plain, window(1))
        ends, kl = sample(again, window(1))
    assert ends.shape == (9, 4, 8, 8)
    assert kl.shape == (3,)
    assert torch.equal(ends[:3], latents)
    own = (ends[3:] - latents.repeat(2, 1, 1, 1)).flatten(1).norm(dim=1)
    others = (ends[3:] - latents.roll(1, 0).repeat(2, 1, 1, 1)).flatten(1).norm(dim=1)
    assert bool((own < 0.5 * others).all())
    assert own.unique().numel() == 6  # each has noise of its own


@pytest.mark.parametrize(("eta", "guidance"), [(0.0, 1.0), (1.0, 2.0)])
def test_the_images_are_those_of_sample(tiny, eta, guidance):
    aligned = module(tiny, eta=eta, guidance=guidance)
    randomise(aligned)
    latents, _ = sample(aligned, begin_at(0, 2, 3))
    assert torch.equal(latents.detach(), draw(aligned, small_batch(), "rollout").trajectory.states[-1])


def test_kl_is_that_of_the_attached_steps_and_zero_at_the_reference(tiny):
    aligned, batch = module(tiny, kl_weight=1.0), small_batch()
    with torch.no_grad():
        _, at_start = sample(aligned, window(STEPS))
        randomise(aligned)
        _, moved = sample(aligned, window(STEPS))
        _, late = sample(aligned, window(1))
        trajectory = draw(aligned, batch, "rollout").trajectory
        expected = aligned.distance(batch, aligned.backbone.encode(batch.prompts), trajectory)["kl"]
    assert torch.equal(at_start, torch.zeros(3))
    torch.testing.assert_close(moved, expected)
    assert bool((late < moved).all())


def test_one_shot_is_the_clean_state_that_a_late_step_implies(tiny):
    aligned, batch = module(tiny, truncation=OneShot(1, 3)), small_batch()
    randomise(aligned)
    attached = torch.stack([torch.arange(STEPS) == step for step in (1, 2, 3)], dim=1)
    with torch.no_grad():
        latents, _ = sample(aligned, attached)
        states = draw(aligned, batch, "rollout").trajectory.states
        policy = aligned.policy(batch, aligned.backbone.encode(batch.prompts))
        for image, step in enumerate((1, 2, 3)):
            clean = policy.predict_x0(states[step], policy.predict(states[step], step), step)
            assert torch.equal(latents[image], clean[image])


# ---- the loss and the update


class OfThePrompt(Redness):
    """How red an image is, times what its prompt has more than 14 letters."""

    def forward(self, images, prompts, groups=None, columns=None):
        return super().forward(images, prompts) * torch.tensor([len(prompt) - 14.0 for prompt in prompts])


@pytest.mark.parametrize(
    ("options", "stands_still"),
    [
        ({}, False),
        ({"coefficient": 0.5, "target": -0.2}, False),
        ({"ceiling": -1.0}, True),
        ({"ceiling": 1.0, "truncation": LowVariance(2), "reward": OfThePrompt()}, False),
        ({"coefficient": 0.5, "kl_weight": 0.7}, False),
    ],
    ids=["reward", "target", "ceiling below all", "copies", "penalty"],
)
def test_the_loss_of_a_batch_is_the_mean_over_images_and_copies(tiny, options, stands_still):
    aligned, batch = module(tiny, **options), small_batch()
    trained = randomise(aligned)
    work = RolloutBatch(batch, aligned.backbone.encode(batch.prompts), window(2))
    loss, _ = aligned._loss(work, torch.arange(3), work.attached.any(1))
    latents, kl = sample(aligned, window(2))
    ends = batch.prompts * (len(latents) // 3)
    rewards = aligned.rewards(aligned.backbone.decode(latents), ends).total
    settings = {"coefficient": 1.0, "target": None, "ceiling": None, "kl_weight": 0.0} | options
    expected = settings["coefficient"] * reward_loss(rewards, settings["target"], settings["ceiling"]).mean()
    expected = expected + settings["kl_weight"] * kl.mean() / latents[0].numel()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, trained, retain_graph=True)
    assert flat(found).eq(0).all() == stands_still
    if not stands_still:
        assert_close_gradients(found, torch.autograd.grad(expected, trained))


@pytest.mark.parametrize("truncation", [PerStep(), OneShot(1, 3), LowVariance(2)])
def test_micro_batches_change_no_gradient_of_any_truncation(tiny, tmp_path, truncation):
    found, logged = [], []
    for micro_batch in (64, 3):
        aligned = module(tiny, truncation=truncation, micro_batch=micro_batch, kl_weight=0.1, seed=3)
        randomise(aligned)
        recorder = fit(aligned, tmp_path, data=prompts(8, 1))
        found.append(recorder.gradients[0])
        logged.append(recorder.logged[0])
    assert_close_gradients(*found)
    for name in ("train/loss", "train/reward", "train/reward/monitored", "train/kl_penalty"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-4)
    assert logged[0]["progress/images"] == 8
    assert logged[0]["progress/reward_queries"] == 8 * (1 + truncation.copies)
    draws = [generator(aligned.seed, "truncation", i) for i in recorder.index[0]]  # one for each image
    steps = sum(int(truncation.attached(STEPS, one).sum()) for one in draws)
    assert logged[0]["train/attached_steps"] == steps / 8


def test_mixed_precision_keeps_the_gradient_behind_a_prefix_without_one(tiny, tmp_path):
    """Autocast remembers cast weights: those of the prefix, made without a graph, must not be taken up."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        aligned = module(tiny, truncation=FixedWindow(1))
        randomise(aligned)
        recorder = fit(aligned, tmp_path, data=prompts(8, 1), precision=precision)
        found.append(flat(recorder.gradients[0]))
    assert (found[1] - found[0]).norm() < 0.2 * found[0].norm()


def test_clip_score_gives_the_trained_weights_a_gradient_after_validation(tiny, tmp_path):
    """Prompt embeddings that validation remembered in inference mode can enter a graph."""
    aligned = module(tiny, CLIPScore("shapes"), guidance=2.0, checkpointing="prediction")
    recorder = fit(aligned, tmp_path, data=prompts(4, 1), limit_val_batches=None)
    assert flat(recorder.gradients[-1]).abs().max() > 1e-8


# ---- refusals


def test_a_black_box_is_refused_by_name_with_the_remedy(tiny):
    with pytest.raises(ConfigError, match=r"trained has no gradient.*monitored.*DDPOModule"):
        module(tiny, JPEGCompressibility())


class OfTheGroup(Redness):
    scope = "group"


def test_a_reward_of_several_images_is_refused_in_a_fit_and_measured_in_a_test(tiny, tmp_path):
    aligned, data = module(tiny, OfTheGroup()), prompts(2, 2)
    with pytest.raises(ConfigError, match="several images at once; take it out of the bank, and give it to"):
        fit(aligned, tmp_path, data=data)
    trainer(tmp_path, 1).test(aligned, data, verbose=False)
    assert bool(aligned.tested["reward/trained"].isfinite().all())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kl_weight": -0.1}, "kl_weight"),
        ({"kl_weight": 1.0, "eta": 0.0}, "eta"),
        ({"coefficient": 0.0}, "coefficient"),
        ({"target": 1.0, "ceiling": 2.0}, "target 1.0 and ceiling 2.0"),
        ({"micro_batch": 0}, r"optimisation\.micro_batch"),
        ({"truncation": FixedWindow(5)}, r"truncation: FixedWindow's steps is 5; .* 1 to 4 steps"),
    ],
)
def test_options_that_cannot_work_are_refused(tiny, options, named):
    with pytest.raises(ConfigError, match=named):
        module(tiny, **options)
