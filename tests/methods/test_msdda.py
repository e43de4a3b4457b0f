"""MSDDA: the loss of its experts, the fused policy, training, files, and what is refused."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

from lit_align.backbones import POLICY, REFERENCE, LoRA
from lit_align.cli import main
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods import DDPOModule, MSDDAModule
from lit_align.methods.msdda import FactorSoup, RewardGradient, Soup, Sweep
from lit_align.methods.msdda.experts import centred, step_loss
from lit_align.methods.msdda.weights import check_names
from lit_align.replay import Pairs
from lit_align.rewards import Brightness, JPEGCompressibility, PairwiseDiversity, RewardBank
from lit_align.samplers import DDIM
from tests.methods.build import (
    assert_same,
    both_objectives,
    draw,
    fit,
    held_out,
    make,
    prompts,
    randomise,
    trainer,
)

CONFIG = Path(__file__).parents[2] / "configs" / "msdda.yaml"
BOTH = {"bright": None, "red": None}

module = partial(make, MSDDAModule)


def batch(images: int = 4) -> Batch:
    listed = [f"a star number {i // 2}" for i in range(images)]
    return Batch(listed, torch.arange(images) // 2, index=torch.arange(images) + 7)


def kl_of(fused: MSDDAModule) -> torch.Tensor:
    """The KL of what the fused policy draws."""
    trajectory = draw(fused, batch(), "test").trajectory
    with torch.no_grad():
        return fused.distance(batch(), fused.backbone.encode(batch().prompts), trajectory)["kl"]


# ---- losses


def test_rewards_are_compared_with_the_other_images_of_the_prompt():
    rewards = torch.tensor([1.0, 4.0, 7.0, 5.0, math.nan, 2.0, 8.0])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    found = centred(rewards, groups)
    assert torch.equal(found, torch.tensor([-4.5, 0.0, 4.5, 0.0, 0.0, -6.0, 6.0]))


def test_the_loss_is_least_at_the_tilted_reference():
    """Reference N(0, 1), reward a x: the optimum of E r - beta KL is N(a / beta, 1), by quadrature."""
    a, beta = 0.3, 0.5
    x, weights = (torch.tensor(part) for part in hermegauss(60))
    weights = weights / weights.sum()

    def loss(mean: torch.Tensor) -> torch.Tensor:
        now = GaussianStep(mean.expand(60, 1), torch.ones(1, dtype=torch.float64))
        then = GaussianStep(torch.zeros(60, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
        log_ratio = now.log_ratio(then, x[:, None])
        return (weights * step_loss(log_ratio, now.kl(then), a * x, beta, math.inf)).sum()

    for point, sign in ((a / beta, 0.0), (a / beta + 0.2, 1.0), (a / beta - 0.2, -1.0)):
        mean = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(mean), mean)
        assert gradient.item() == pytest.approx(0.0, abs=1e-9) if sign == 0 else gradient * sign > 0.01
    torch.testing.assert_close(loss(torch.tensor(a / beta)), torch.tensor(-0.5 * a**2 / beta).double())


@pytest.mark.parametrize(("advantage", "ratio", "alive"), [(1, 6, False), (1, 4, True), (-1, 6, True)])
def test_large_ratios_stop_only_what_pays(advantage, ratio, alive):
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = step_loss(log_ratio, torch.zeros(1), torch.tensor([float(advantage)]), 1.0, 5.0)
    (gradient,) = torch.autograd.grad(loss.sum(), log_ratio)
    assert (gradient.abs().item() > 0) is alive


# ---- the fused policy


def test_one_hot_weights_draw_the_experts_images_bit_for_bit(tiny):
    fused = module(tiny, weights={"red": 1.0})
    randomise(fused)
    before = {name: p.requires_grad for name, p in fused.named_parameters()}
    expert = draw(fused, batch(), "test", "red").images
    assert torch.equal(draw(fused, batch(), "test").images, expert)
    scores = fused.score(expert, batch()).report
    torch.testing.assert_close(scores["reward"], 30 * scores["reward/red"])
    fused.weights = {"bright": 0.5, "red": 0.5}
    assert (draw(fused, batch(), "test").images - expert).abs().max() > 1e-3
    assert (kl_of(fused) > 0).all()
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == before


def test_what_is_missing_to_one_stays_with_the_reference(tiny):
    fused = module(tiny)
    randomise(fused)
    kls = []
    for share in (0.0, 0.25, 0.5):
        fused.weights = {"bright": share, "red": share}
        kls.append(kl_of(fused).mean().item())
        if share == 0.0:
            reference = draw(fused, batch(), "test", REFERENCE).images
            assert torch.equal(draw(fused, batch(), "test").images, reference)
    assert kls[0] == 0 < kls[1] < kls[2]
    fused.target_beta = 2 * fused.beta  # twice the KL strength, half the powers
    assert fused.step_stds() is None
    half = draw(fused, batch(), "test").images
    fused.target_beta, fused.weights = fused.beta, {"bright": 0.25, "red": 0.25}
    assert torch.equal(half, draw(fused, batch(), "test").images)


def test_own_samplers_of_experts_change_the_stds_and_the_kl_knows(tiny):
    fused, common = module(tiny, samplers={"red": partial(DDIM, num_steps=3, eta=0.5)}), module(tiny)
    randomise(fused)
    randomise(common)
    stds = fused.step_stds()
    assert stds is not None
    assert common.step_stds() is None
    x = torch.zeros(1, *fused.backbone.latent_shape)
    for k, std in enumerate(stds):
        both = [sampler.step(x, x, k).std for sampler in (fused.sampler, fused.samplers["red"])]
        torch.testing.assert_close(std**-2, (both[0] ** -2 + both[1] ** -2) / 2, rtol=1e-5, atol=0)
    # Unequal stds alone are a distance, even where no expert differs from the reference.
    assert (kl_of(fused) > kl_of(common)).all()
    chains, cond = draw(fused, batch(), "test").trajectory, fused.backbone.encode(batch().prompts)
    expected = torch.zeros(4)
    with torch.no_grad():
        for k in fused.stochastic_steps.tolist():
            reference = fused.expert(REFERENCE, cond)(chains.states[k], k)
            expected += GaussianStep(chains.means[k], stds[k]).kl(reference)
    torch.testing.assert_close(kl_of(fused), expected)
    # A weight set is sampled with its own sampler.
    alone = draw(fused, batch(), "test", "red").images
    fused.weights = {"bright": 0.0, "red": 1.0}
    assert torch.equal(alone, draw(fused, batch(), "test").images)
    assert not torch.equal(alone, draw(common, batch(), "test", "red").images)


def test_one_expert_per_step_draws_other_images_that_do_not_depend_on_the_batch(tiny):
    fused, exact = module(tiny, one_expert_per_step=True), module(tiny)
    randomise(fused)
    randomise(exact)
    images = draw(fused, batch(), "test").images
    again = draw(fused, batch()[torch.tensor([2])], "test").images
    assert (images - draw(exact, batch(), "test").images).abs().max() > 1e-3
    torch.testing.assert_close(images[2:3], again, atol=1e-5, rtol=0)
    # Which expert is followed when is drawn for each image and seed.
    cond, choices = fused.backbone.encode(batch().prompts), []
    for fused.seed in (0, 1):
        choices.append(fused.policy(batch(), cond).choices)
        assert len(choices[-1].unique(dim=1).T) > 1
    assert not torch.equal(*choices)


# ---- training


def test_each_expert_makes_what_its_own_reward_prefers_more_likely(tiny_attentive, tmp_path):
    options = {"beta": 3e-3, "updates": 2, "inner_epochs": 4, "micro_batch": 128, "num_steps": 4}
    learner = module(tiny_attentive, lr=4e-3, lora=LoRA(8, 8.0), **options)
    recorder, data = fit(learner, tmp_path, data=prompts(2, 16)), prompts(2, 16)
    data.setup("fit")
    seen = next(iter(data.train_dataloader()))
    assert seen.index.tolist() == recorder.index[0]
    samples, cond = draw(learner, seen, "rollout", REFERENCE), learner.backbone.encode(seen.prompts)
    scores, states = learner.score(samples.images, seen).report, samples.trajectory.states
    for name in BOTH:
        with torch.no_grad():
            expert, reference = (learner.expert(one, cond) for one in (name, REFERENCE))
            log_ratio = sum(
                expert(states[k], k).log_ratio(reference(states[k], k), states[k + 1])
                for k in learner.stochastic_steps.tolist()
            )
        advantages = centred(scores[f"reward/{name}"], seen.groups)
        assert torch.corrcoef(torch.stack([advantages, log_ratio]))[0, 1] > 0.3
        # The loss begins at 0, where expert and reference are one; every pass uses the same images.
        assert recorder.logged[0][f"train/loss/{name}"] < -0.01
        assert recorder.logged[0][f"train/kl/{name}"] > 0


@pytest.mark.slow
def test_each_expert_learns_its_own_reward_and_the_fused_policy_lies_between(tiny_attentive, tmp_path):
    options = {"beta": 3e-3, "updates": 2, "inner_epochs": 2, "micro_batch": 128, "num_steps": 4}
    learner = module(tiny_attentive, lr=4e-3, lora=LoRA(8, 8.0), **options)
    recorder = fit(learner, tmp_path, 8, data=prompts(4, 16), limit_val_batches=None)
    validated = held_out(learner)
    means: dict[str, dict[str, float]] = {}
    for name in (REFERENCE, "bright", "red", POLICY):
        scores = learner.score(draw(learner, validated, "validation", name).images, validated).report
        means[name] = {n: scores[n].mean().item() for n in ("reward/bright", "reward/red", "reward")}
    for name, other in (("bright", "red"), ("red", "bright")):
        own, spread = f"reward/{name}", learner.baseline[f"reward/{name}"].std().item()
        assert means[name][own] > means[REFERENCE][own] + 0.05 * spread
        # Not above the reference in both: a brighter image is less red, so the two objectives are opposed.
        assert means[name][own] > means[POLICY][own] > means[other][own]
    assert means[POLICY]["reward"] > means[REFERENCE]["reward"]
    assert recorder.logged[-1]["train/kl/red"] > 0
    assert learner.latest["kl"].mean() > 0


def test_training_side_by_side_is_training_alone(tiny, tmp_path):
    options = {"clip_norm": 1e-3, "updates": 2}
    together = module(tiny, **options)
    alone = module(tiny, experts={"red": None}, weights={"red": 1.0}, **options)
    for learner in (together, alone):
        fit(learner, tmp_path, 2, data=prompts(2, 2))
    found = [learner.backbone.weight_sets.parameters_of("red") for learner in (together, alone)]
    assert_same(*found)
    assert any(parameter.abs().max() > 0 for parameter in found[0][1::2])


def test_each_pass_draws_its_steps_anew(tiny, monkeypatch):
    fused, drawn = module(tiny, num_steps=5, timestep_fraction=0.5, inner_epochs=2), []
    monkeypatch.setattr(fused, "update", lambda losses: drawn.append(losses[0].args[1]) or {})
    fused._learn([], batch())
    assert torch.equal(drawn[0].rows, drawn[1].rows)
    assert not torch.equal(drawn[0].steps, drawn[1].steps)
    fused.seed += 1
    fused._learn([], batch())
    assert not torch.equal(drawn[0].steps, drawn[2].steps)


def test_the_loss_is_the_sum_over_experts_with_scaled_rewards_and_their_own_strengths(tiny, tmp_path):
    """By hand, at three of four pairs of images and steps of the reference's chains."""
    options = {"betas": {"red": 0.2}, "target_beta": 0.05, "max_ratio": 1.05, "guidance": 2.0}
    fused, kept = module(tiny, lr=0.0, **options), []
    randomise(fused, 0.1)
    learn = fused._learn
    fused._learn = lambda lessons, batch: kept.append(lessons) or learn(lessons, batch)
    fit(fused, tmp_path, data=prompts(2, 2))
    (lessons,), pairs, expected = kept, Pairs(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 1])), 0.0
    with torch.no_grad():
        found, _ = fused._loss(lessons, pairs, 4)
        states, cond = lessons[0].trajectory.states, lessons[0].policy.cond
        policies = {one: fused.backbone.policy(fused.sampler, cond, 2.0, one) for one in (*BOTH, REFERENCE)}
        for name, scale, beta in (("bright", 10.0, 0.05), ("red", 30.0, 0.2)):
            rewards = scale * fused.collected[f"reward/{name}"].view(2, 2)
            advantages = (rewards - rewards.flip(1)).flatten()
            for row, k in zip(pairs.rows, pairs.steps.tolist(), strict=True):
                x, drawn = states[k, row[None]], states[k + 1, row[None]]
                now, before = (policies[one][row[None]](x, k) for one in (name, REFERENCE))
                ratio = (now.log_prob(drawn) - before.log_prob(drawn)).exp()
                gain = torch.minimum(advantages[row] * ratio, advantages[row] * ratio.clamp(max=1.05))
                expected += beta * ((now.mean - before.mean) / now.std).square().sum() / 2 - gain
    torch.testing.assert_close(found, expected.squeeze() / 4, rtol=1e-3, atol=1e-5)


def test_an_expert_learns_at_its_own_strength(tiny, tmp_path):
    learnt = []
    for betas in ({}, {"red": 5.0}):
        fused = module(tiny, betas=betas, target_beta=0.05, updates=2)
        fit(fused, tmp_path, data=prompts(2, 2))
        learnt.append({name: list(fused.backbone.weight_sets.parameters_of(name)) for name in BOTH})
    assert_same(learnt[0]["bright"], learnt[1]["bright"])
    assert not all(torch.equal(*both) for both in zip(learnt[0]["red"], learnt[1]["red"], strict=True))


def test_what_fit_cannot_train_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="images_per_prompt"):
        fit(module(tiny), tmp_path, data=prompts(4, 1))
    with pytest.raises(ConfigError, match="updates"):
        fit(module(tiny, updates=3), tmp_path)
    with pytest.raises(ConfigError, match="eta"):
        fit(module(tiny, eta=0.0), tmp_path)
    with pytest.raises(ConfigError, match="samplers: fit learns red from chains of the common sampler"):
        fit(module(tiny, samplers={"red": partial(DDIM, num_steps=3, eta=0.5)}), tmp_path)
    bank = RewardBank(
        {"bright": Brightness(), "varied": PairwiseDiversity("shapes")}, {"bright": 1.0, "varied": 1.0}
    )
    of_sets = {"rewards": bank, "weights": {"bright": 1.0}, "experts": {"bright": None, "varied": None}}
    with pytest.raises(ConfigError, match=r"varied is a reward of sets.*train it with DDPOModule"):
        fit(module(tiny, **of_sets), tmp_path)


# ---- files


def test_experts_that_were_never_trained_are_not_tested(tiny, tmp_path):
    fused = module(tiny, num_steps=2, joint=[{"bright": 0.5, "red": 0.5}], target_beta=0.02)
    assert fused.expert_betas == {"joint0": 0.02, "bright": 0.05, "red": 0.05}
    for run in (trainer(tmp_path, 1).test, trainer(tmp_path, 1).predict):
        with pytest.raises(ConfigError, match="bright, red, joint0 would be the pretrained model itself"):
            run(fused, prompts())
    fit(fused, tmp_path, data=prompts(2, 2))
    trainer(tmp_path, 1).test(fused, prompts(), verbose=False)


def test_adapters_of_a_run_are_experts_of_another_and_a_mixture_of_another_method(tiny, tmp_path):
    learner = module(tiny)
    randomise(learner)
    adapter = tmp_path / "adapter"
    learner.export(adapter)
    assert {path.name for path in adapter.iterdir()} == {*BOTH, "pytorch_lora_weights.safetensors"}
    experts = {name: str(adapter / name) for name in BOTH}
    # Other ranks than the run's: the adapters bring their own.
    loaded = module(tiny, experts=experts, lora=LoRA(2, 2.0))
    for name in (POLICY, *BOTH):
        assert torch.equal(*(draw(one, batch(), "test", name).images for one in (learner, loaded)))
    assert (kl_of(loaded) > 0).all()
    with pytest.raises(ConfigError, match="all are loaded, and nothing is left to train"):
        fit(loaded, tmp_path)
    # In folder/ lies the rewarded soup, which is also what a method makes of both adapters.
    loaded.backbone.weight_sets.load("soup", adapter)
    mixture = make(DDPOModule, tiny, adapters=dict.fromkeys(experts.values(), 0.5))
    images = draw(mixture, batch(), "test").images
    torch.testing.assert_close(images, draw(loaded, batch(), "test", "soup").images, atol=1e-5, rtol=0)
    assert (images - draw(loaded, batch(), "test").images).abs().max() > 1e-3


def test_experts_are_given_on_the_command_line(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    learner = module(tiny)
    randomise(learner)
    learner.export(tmp_path)
    experts = {"preference": str(tmp_path / "bright"), "aesthetic": str(tmp_path / "red")}
    rewards = {"preference": {"class_path": "Brightness"}, "aesthetic": {"class_path": "Redness"}}
    main(
        [
            *("test", f"--config={CONFIG}", f"--model.experts={json.dumps(experts)}"),
            f"--model.rewards.init_args.rewards={json.dumps(rewards)}",
            f"--model.backbone.pretrained={tiny}",
            "--model.sampler.init_args={num_steps: 2, noisy_steps: 1}",
            *("--data.test_prompts=2", "--data.test_images_per_prompt=2"),
            *("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
        ]
    )
    metrics = json.loads(Path("logs/msdda/version_0/test.json").read_text())["metrics"]
    assert metrics["kl"]["after"] > 0


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts": {"beauty": None}, "weights": {"beauty": 1.0}}, "beauty"),
        ({"experts": {"policy": None}}, "policy"),
        ({"experts": {"soup": None}}, "soup"),
        ({"weights": {"bright": 0.9, "red": 0.9}}, "at most 1"),
        ({"weights": {"bright": -0.5, "red": 0.9}}, "negative"),
        ({"weights": {"blue": 1.0}}, "blue"),
        ({"betas": {"blue": 1.0}}, "blue"),
        ({"samplers": {"blue": None}}, "blue"),
    ],
)
def test_names_that_do_not_fit_are_refused(changes, named):
    given = {"experts": BOTH, "weights": {"bright": 0.5, "red": 0.5}, "betas": {}, "samplers": {}}
    with pytest.raises(ConfigError, match=named):
        check_names(**given | changes, rewards=both_objectives())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weights": {"bright": 0.9, "red": 0.9}}, "at most 1"),
        ({"beta": 0.0}, "beta"),
        ({"experts": BOTH | {"red": "nowhere"}}, "nowhere"),
        ({"samplers": {"red": partial(DDIM, num_steps=5)}}, "num_steps"),
        ({"samplers": {"red": partial(DDIM, num_steps=3, eta=0.0)}}, "stds"),
        (
            {"eta": 0.2, "samplers": dict.fromkeys(BOTH, partial(DDIM, num_steps=3)), "target_beta": 0.02},
            "precision",
        ),
        ({"one_expert_per_step": True, "target_beta": 0.02}, "not a probability"),
        ({"sweep": Sweep(2, [{"brihgt": 0.5, "red": 0.5}])}, r"sweep.points.*no expert brihgt"),
        ({"joint": [{"brihgt": 0.5, "red": 0.5}]}, r"joint.*no expert brihgt"),
        ({"joint": [{"bright": 0.9, "red": 0.5}]}, r"joint.*at most 1"),
        ({"lora": None, "sweep": Sweep(2, baselines=[Soup()])}, "mixtures are made of adapters"),
        ({"lora": None, "sweep": Sweep(2, baselines=[FactorSoup()])}, "mixtures are made of adapters"),
    ],
)
def test_what_cannot_work_is_named(tiny, options, named):
    with pytest.raises(ConfigError, match=named):
        module(tiny, **options)


def test_the_gradient_of_a_black_box_is_refused_before_anything_runs(tiny):
    bank = RewardBank({"bright": Brightness(), "jpeg": JPEGCompressibility()}, {"bright": 1.0, "jpeg": 1.0})
    options = {"experts": {"bright": None, "jpeg": None}, "weights": {"bright": 1.0}}
    with pytest.raises(ConfigError, match="gradient of jpeg"):
        module(tiny, rewards=bank, sweep=Sweep(2, baselines=[RewardGradient()]), **options)
