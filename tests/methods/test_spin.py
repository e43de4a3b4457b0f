"""SPIN: its two objectives, the iterations, and what is refused; the pool is in test_spin_opponent.py."""

import math
from functools import partial
from statistics import mean
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.backbones import POLICY
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import PairBatch
from lit_align.errors import ConfigError
from lit_align.methods import SPINModule
from lit_align.methods.spin.module import forward_chain
from lit_align.methods.spin.opponent import OPPONENT
from lit_align.pool import Pool
from lit_align.samplers import DDIM
from tests.methods.build import fit, make, pairs, prompts
from tests.methods.recorders import Recorder
from tests.pipelines import SCHEDULE

BATCH = 4

module = partial(make, SPINModule)


def weights(aligned: SPINModule, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in aligned.backbone.weight_sets.parameters_of(name)]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


class Players(Recorder):
    """Keeps the weights of both players after each batch as well, and the opponent's images."""

    def __init__(self, crash: int = 0) -> None:
        super().__init__(crash)
        self.players: list[dict[str, list[Tensor]]] = []
        self.pools: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.players.append({name: weights(pl_module, name) for name in (POLICY, OPPONENT)})
        self.pools.append(pl_module.pool[batch.index])


# ---- the losses


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny_attentive", {"lr": 3e-3, "steps": 4}),
        pytest.param("tiny", {"exact": True, "beta": 10.0, "lr": 1e-3, "steps": 8}, marks=pytest.mark.slow),
    ],
    ids=["step", "exact"],
)
def test_the_first_loss_of_each_iteration_is_log_2_and_it_falls(model, request, tmp_path, options):
    steps = options["steps"]
    logged = fit(module(request.getfixturevalue(model), **options), tmp_path, 2 * steps).logged
    for first, *later in (logged[:steps], logged[steps:]):
        assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["train/margin"] == 0
        assert first["train/accuracy"] == 0.5
        assert mean(metrics["train/loss"] for metrics in later) < math.log(2)
        assert mean(metrics["train/margin"] for metrics in later) > 0
    assert [metrics["train/iteration"] for metrics in logged] == [1.0] * steps + [2.0] * steps


def drawn_pairs(aligned: SPINModule, resolution: int) -> PairBatch:
    """A batch of pairs, with the opponent's images of its prompts in the pool; the policy has moved on."""
    aligned.iteration = 1
    draw = torch.Generator().manual_seed(1)
    for parameter in aligned.backbone.weight_sets.parameters_of(POLICY):
        torch.nn.init.normal_(parameter, std=0.1, generator=draw)
    source = pairs("winners", resolution=resolution)
    source.setup("fit")
    batch: PairBatch = next(iter(source.train_dataloader()))
    aligned.pool = Pool(None, "test")
    with torch.no_grad():
        aligned.pool.add(batch.index.tolist(), aligned._play(batch.index.tolist(), batch.prompts))
    return batch


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize(("model", "resolution"), [("tiny", 16), ("tiny_v", 32)])
def test_equals_the_released_loss_of_diffusion_dpo_on_winners_and_generated_images(
    model, resolution, shared_noise, request
):
    """The released code, fed with the opponent as its frozen model and the opponent's latents as losers."""
    aligned = module(request.getfixturevalue(model), shared_noise=shared_noise)
    batch = drawn_pairs(aligned, resolution)
    with torch.no_grad():
        winners, losers = aligned.prepare(batch)
        loss, metrics = aligned.loss((winners, losers), torch.arange(BATCH))
        scheduler = aligned.backbone.pipeline.scheduler
        latents, noise = (
            torch.cat([getattr(side, n) for side in (winners, losers)]) for n in ("latents", "noise")
        )
        t = torch.cat([winners.t, losers.t])
        noisy = scheduler.add_noise(latents, noise, t)
        (states,) = winners.cond.prompt.values()
        target = noise if model == "tiny" else scheduler.get_velocity(latents, noise, t)
        errors = {}
        for name in (POLICY, OPPONENT):
            unet = aligned.backbone.weight_sets.choose(name)
            prediction = unet(noisy, t, encoder_hidden_states=torch.cat([states] * 2), return_dict=False)[0]
            errors[name] = (prediction - target).pow(2).mean(dim=[1, 2, 3])
        model_w, model_l = errors[POLICY].chunk(2)
        reference_w, reference_l = errors[OPPONENT].chunk(2)
        inside = -0.5 * 200.0 * ((model_w - model_l) - (reference_w - reference_l))
    torch.testing.assert_close(loss, -logsigmoid(inside), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["margin"], inside, rtol=1e-3, atol=1e-4)
    assert loss.std() > 1e-3
    assert torch.equal(winners.noise, losers.noise) == shared_noise
    torch.testing.assert_close(losers.latents, aligned.pool[batch.index])


def test_the_exact_loss_is_that_of_the_log_densities_of_both_chains(tiny):
    """Equation 4.8 by hand: log p(policy) - log p(opponent) of winners' chains less that of losers'."""
    aligned = module(tiny, exact=True, beta=50.0)
    batch = drawn_pairs(aligned, 16)
    with torch.no_grad():
        chains = aligned.prepare(batch)
        loss, metrics = aligned.loss(chains, torch.arange(BATCH))
        cond, size = aligned.backbone.encode(batch.prompts), math.prod(aligned.backbone.latent_shape)
        ratios = []
        for states in (chains.winners, aligned.pool[batch.index].transpose(0, 1)):
            densities = [
                sum(
                    aligned.policy(batch, cond, name)(states[k], k).log_prob(states[k + 1])
                    for k in aligned.sampler.stochastic.nonzero().flatten().tolist()
                )
                for name in (POLICY, OPPONENT)
            ]
            ratios.append((densities[0] - densities[1]) / size)
    assert ratios[0].abs().min() > 1e-3
    torch.testing.assert_close(metrics["winner_ratio"], ratios[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(metrics["loser_ratio"], ratios[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loss, -logsigmoid(50.0 * (ratios[0] - ratios[1])), rtol=1e-3, atol=1e-3)
    # The winners' chains end in their images.
    torch.testing.assert_close(chains.winners[-1], aligned.winners(batch), rtol=0.2, atol=0.3)


def test_a_forward_chain_has_the_marginals_of_the_forward_process():
    config = SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    sampler, draw = DDIM(config, num_steps=5), torch.Generator().manual_seed(0)
    x0 = torch.full((4000, 8), 1.7, dtype=torch.float64)
    states = forward_chain(sampler, x0, torch.randn(x0.shape, dtype=torch.float64, generator=draw), draw)
    assert len(states) == 6
    for k, t in enumerate(sampler.timesteps):
        mean, std = 1.7 * float(sampler.schedule.alpha(t)), float(sampler.schedule.sigma(t))
        assert states[k].mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(x0.numel()))
        assert states[k].std().item() == pytest.approx(std, rel=0.02)


def test_without_noise_in_the_steps_the_forward_chain_ends_in_the_image():
    sampler = DDIM(SCHEDULE | {"set_alpha_to_one": True}, num_steps=5, eta=0.0)
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double().split(1)
    torch.testing.assert_close(forward_chain(sampler, x0, noise)[-1], x0)


# ---- iterations


def test_each_iteration_plays_against_what_the_last_one_left(tiny, tmp_path):
    halving = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    aligned = module(tiny, rates=[1e-2, 1e-3], steps=[2, 3], beta=[100.0, 300.0], lr_scheduler=halving)
    recorder, before = Players(), weights(aligned, POLICY)
    fit(aligned, tmp_path, 4, recorder=recorder, max_epochs=2)
    opponents = [players[OPPONENT] for players in recorder.players]
    assert len(opponents) == 5, "the fit ends with the last iteration"
    assert all(equal(opponent, before) for opponent in opponents[:2])
    assert not equal(before, recorder.players[1][POLICY])
    assert all(equal(opponent, recorder.players[1][POLICY]) for opponent in opponents[2:])
    logged = recorder.logged
    assert [metrics["train/iteration"] for metrics in logged] == [1, 1, 2, 2, 2]
    assert [metrics["train/beta"] for metrics in logged] == [100, 100, 300, 300, 300]
    # The optimizer and its schedule are new: moments begin anew.
    assert [metrics["train/lr"] for metrics in logged] == pytest.approx([1e-2, 5e-3, 1e-3, 5e-4, 2.5e-4])
    assert {float(state["step"]) for state in aligned.optimizers().state.values()} == {3.0}
    assert aligned.global_step == 5
    assert logged[-1]["progress/images"] == 5 * BATCH * 2
    assert logged[-1]["progress/reward_queries"] == 0
    with pytest.warns(UserWarning, match="all 2 iterations are made, so nothing is trained"):
        fit(aligned, tmp_path, 4)
    assert aligned.images == 5 * BATCH * 2


def test_full_finetuning_has_a_whole_network_as_opponent(tiny, tmp_path):
    aligned = module(tiny, lora=None, lr=1e-3, steps=1)
    fit(aligned, tmp_path, 2, BatchCheckpoint())
    kept = aligned.kept()
    assert len(kept) == 2 * len(list(aligned.backbone.network.parameters()))
    assert sum(parameter.requires_grad for parameter in kept.values()) == len(kept) // 2
    assert not equal(*(weights(aligned, name) for name in (POLICY, OPPONENT)))


# ---- refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": [1, 2, 3]}, "steps.*3 entries for 2 iterations"),
        ({"beta": [1.0]}, "beta.*1 entries"),
        ({"beta": 0.0}, "beta.*positive"),
        ({"rates": [1e-3, -1.0]}, "lr.*positive"),
        ({"iterations": 0}, "iterations"),
        ({"micro_batch": 0}, r"optimisation\.micro_batch"),
        ({"exact": True, "eta": 0.0}, "exact.*eta to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny, options, named):
    with pytest.raises(ConfigError, match=named):
        module(tiny, **options)


def test_rates_that_the_schedule_would_overrule_are_refused(tiny, tmp_path):
    own_rate = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=9)
    with pytest.raises(ConfigError, match=r"iteration 1 wants 0.01.*lr_scheduler"):
        fit(module(tiny, rates=1e-2, lr_scheduler=own_rate), tmp_path)
    fit(module(tiny, lr_scheduler=own_rate), tmp_path)


def test_a_trainer_that_ends_before_the_last_iteration_says_so(tiny, tmp_path):
    with pytest.warns(UserWarning, match="ends after 1 epochs of 1 updates, and the 2 iterations have 6"):
        fit(module(tiny), tmp_path)


def test_prompts_without_images_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"SPINModule.*PickaPicDataModule"):
        fit(module(tiny), tmp_path, data=prompts())


def test_images_of_another_size_than_the_models_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"32 x 32 .* the model draws 16 x 16; set data.resolution"):
        fit(module(tiny), tmp_path, data=pairs("winners", resolution=32))
