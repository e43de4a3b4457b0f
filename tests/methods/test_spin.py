import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_align.backbones import POLICY, LoRA, StableDiffusionBackbone
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import PairBatch, PickaPicDataModule, PromptDataModule, ShapesPrompts
from lit_align.errors import ConfigError
from lit_align.methods import SPINModule
from lit_align.methods import spin as spin_file
from lit_align.methods.spin import OPPONENT, forward_chain
from lit_align.randomness import generator
from lit_align.rewards import Brightness, Redness, RewardBank
from lit_align.samplers import DDIM
from tests.conftest import SCHEDULE

BATCH = 4


class Recorder(Callback):
    """Keeps what was logged and the weights of both players after each batch; may die in one."""

    def __init__(self, crash: int = 0) -> None:
        self.crash = crash
        self.logged: list[dict[str, float]] = []
        self.rows: list[list[int]] = []
        self.players: list[dict[str, list[Tensor]]] = []
        self.pools: list[dict[int, Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if len(self.logged) == self.crash - 1:
            raise RuntimeError("killed")
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})
        self.rows.append(batch.index.tolist())
        self.players.append({name: weights(pl_module, name) for name in (POLICY, OPPONENT)})
        samples = pl_module.pool[batch.index]
        self.pools.append(dict(zip(batch.index.tolist(), samples, strict=True)))


def weights(module: SPINModule, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in module.backbone.parameters_of(name)]


def module(folder: Path, lora: LoRA | None = LoRA(), rate: float = 1e-2, **options: Any) -> SPINModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "iterations": 2,
        "steps": 3,
        "beta": 200.0,
        "guidance": 1.0,
        "micro_batch": 3,
    } | options
    return SPINModule(
        StableDiffusionBackbone(str(folder), lora=lora),
        sampler=settings.pop("sampler", partial(DDIM, num_steps=3)),
        rewards=RewardBank({"brightness": Brightness(), "redness": Redness()}, {"brightness": 1.0}),
        optimizer=partial(torch.optim.AdamW, lr=rate, weight_decay=0.0),
        **settings,
    )


def data(**options: Any) -> PickaPicDataModule:
    settings: dict[str, Any] = {
        "pairs_per_batch": BATCH,
        "resolution": 16,
        "validation_prompts": 2,
        "validation_images_per_prompt": 1,
    } | options
    return PickaPicDataModule(**settings)


def fit(
    aligned: SPINModule,
    folder: Path,
    batches: int,
    *callbacks: Callback,
    source: LightningDataModule | None = None,
    ckpt_path: Path | None = None,
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "limit_val_batches": 0} | options
    trainer = Trainer(
        accelerator="cpu",
        limit_train_batches=batches,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(callback, BatchCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **settings,
    )
    trainer.fit(aligned, source or data(), ckpt_path=ckpt_path)
    return trainer


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(first, second) for first, second in zip(one, two, strict=True))


# ---- the losses


@pytest.mark.parametrize("exact", [False, True])
def test_the_first_loss_of_each_iteration_is_log_2_and_it_falls(tiny, tmp_path, exact):
    recorder = Recorder()
    fit(module(tiny, exact=exact, steps=4), tmp_path, 8, recorder)
    for first in (recorder.logged[0], recorder.logged[4]):
        assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-7)
        assert first["train/margin"] == 0
        assert first["train/accuracy"] == 0.5
    for last in (recorder.logged[3], recorder.logged[7]):
        assert last["train/loss"] < math.log(2)
        assert last["train/margin"] > 0
    assert [metrics["train/iteration"] for metrics in recorder.logged] == [1.0] * 4 + [2.0] * 4


@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("model", ["tiny", "tiny_v"])
def test_equals_the_released_loss_of_diffusion_dpo_on_winners_and_generated_images(
    model, shared_noise, request
):
    """The released code, fed with the opponent as its frozen model and the opponent's latents as losers."""
    aligned = module(request.getfixturevalue(model), shared_noise=shared_noise)
    aligned.iteration = 1
    for parameter in aligned.backbone.unet.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    source = data(resolution=16 if model == "tiny" else 32)
    source.setup("fit")
    pairs = next(iter(source.train_dataloader()))
    aligned.pool = spin_file.Pool(None, "test")
    with torch.no_grad():
        aligned.pool.add(pairs.index.tolist(), aligned._play(pairs.index.tolist(), pairs.prompts))
        winners, losers = aligned.prepare(pairs)
        loss = aligned.loss((winners, losers), torch.arange(BATCH), {})
        scheduler = aligned.backbone.pipeline.scheduler
        latents, noise = (
            torch.cat([getattr(side, n) for side in (winners, losers)]) for n in ("latents", "noise")
        )
        t = torch.cat([winners.t, losers.t])
        noisy = scheduler.add_noise(latents, noise, t)
        states = torch.cat([winners.cond.embeds] * 2)
        target = noise if model == "tiny" else scheduler.get_velocity(latents, noise, t)
        errors = {}
        for name in (POLICY, OPPONENT):
            unet = aligned.backbone._choose(name)
            prediction = unet(noisy, t, encoder_hidden_states=states, return_dict=False)[0]
            errors[name] = (prediction - target).pow(2).mean(dim=[1, 2, 3])
        model_w, model_l = errors[POLICY].chunk(2)
        reference_w, reference_l = errors[OPPONENT].chunk(2)
        inside = -0.5 * 200.0 * ((model_w - model_l) - (reference_w - reference_l))
    torch.testing.assert_close(loss, -logsigmoid(inside), rtol=1e-4, atol=1e-5)
    assert loss.std() > 1e-3
    assert torch.equal(winners.noise, losers.noise) == shared_noise
    torch.testing.assert_close(losers.latents, aligned.pool[pairs.index])


def test_the_exact_loss_is_that_of_the_log_densities_of_both_chains(tiny):
    """Equation 4.8 by hand: log p(policy) - log p(opponent) of winners' chains less that of losers'."""
    aligned = module(tiny, exact=True, beta=50.0, sampler=partial(DDIM, num_steps=3, eta=1.0))
    aligned.iteration = 1
    for parameter in aligned.backbone.parameters_of(POLICY):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    source = data()
    source.setup("fit")
    pairs = next(iter(source.train_dataloader()))
    aligned.pool = spin_file.Pool(None, "test")
    with torch.no_grad():
        aligned.pool.add(pairs.index.tolist(), aligned._play(pairs.index.tolist(), pairs.prompts))
        chains = aligned.prepare(pairs)
        metrics: dict[str, list[Tensor]] = {}
        loss = aligned.loss(chains, torch.arange(BATCH), metrics)
        cond, size = aligned.backbone.encode(pairs.prompts), math.prod(aligned.backbone.latent_shape)
        ratios = []
        for states in (chains.winners, aligned.pool[pairs.index].transpose(0, 1)):
            densities = [
                sum(
                    aligned.backbone.policy(aligned.sampler, cond, 1.0, name)(states[k], k).log_prob(
                        states[k + 1]
                    )
                    for k in aligned.sampler.stochastic.nonzero().flatten().tolist()
                )
                for name in (POLICY, OPPONENT)
            ]
            ratios.append((densities[0] - densities[1]) / size)
    assert ratios[0].abs().min() > 1e-3
    torch.testing.assert_close(torch.cat(metrics["winner_ratio"]), ratios[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(loss, -logsigmoid(50.0 * (ratios[0] - ratios[1])), rtol=1e-3, atol=1e-3)
    # The winners' chains end in their images.
    torch.testing.assert_close(chains.winners[-1], aligned.winners(pairs), rtol=0.2, atol=0.3)


def test_a_forward_chain_has_the_marginals_of_the_forward_process():
    sampler = DDIM(
        SCHEDULE | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, num_steps=5
    )
    draw = torch.Generator().manual_seed(0)
    x0 = torch.full((4000, 8), 1.7, dtype=torch.float64)
    states = forward_chain(sampler, x0, torch.randn(x0.shape, dtype=torch.float64, generator=draw), draw)
    assert len(states) == 6
    one, nothing = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    for k, t in enumerate(sampler.timesteps.tolist()):
        mean, std = (float(sampler.add_noise(*pair, t)) for pair in ((1.7 * one, nothing), (nothing, one)))
        assert states[k].mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(x0.numel()))
        assert states[k].std().item() == pytest.approx(std, rel=0.02)


def test_without_noise_in_the_steps_the_forward_chain_ends_in_the_image():
    sampler = DDIM(SCHEDULE | {"set_alpha_to_one": True}, num_steps=5, eta=0.0)
    x0, noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double().split(1)
    torch.testing.assert_close(forward_chain(sampler, x0, noise)[-1], x0)


def test_micro_batches_change_no_gradient(tiny, tmp_path):
    found = []
    for micro_batch in (BATCH, 1):
        recorder = Recorder()
        fit(module(tiny, micro_batch=micro_batch), tmp_path / str(micro_batch), 1, recorder)
        found.append(recorder.gradients[0])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


# ---- iterations


def test_each_iteration_plays_against_what_the_last_one_left(tiny, tmp_path):
    recorder = Recorder()
    aligned = module(
        tiny,
        steps=[2, 3],
        beta=[100.0, 300.0],
        lr=[1e-2, 1e-3],
        lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5),
    )
    before = weights(aligned, POLICY)
    trainer = fit(aligned, tmp_path, 4, recorder, max_epochs=2)
    opponents = [players[OPPONENT] for players in recorder.players]
    assert len(opponents) == 5, "the fit ends with the last iteration"
    assert all(equal(opponent, before) for opponent in opponents[:2])
    assert not equal(before, recorder.players[1][POLICY])
    assert all(equal(opponent, recorder.players[1][POLICY]) for opponent in opponents[2:])
    logged = recorder.logged
    assert [metrics["train/iteration"] for metrics in logged] == [1, 1, 2, 2, 2]
    assert [metrics["train/beta"] for metrics in logged] == [100, 100, 300, 300, 300]
    # The optimizer and its schedule are new: the rate after the update is shown, and moments begin anew.
    assert [metrics["train/lr"] for metrics in logged] == pytest.approx([5e-3, 2.5e-3, 5e-4, 2.5e-4, 1.25e-4])
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {3.0}
    assert trainer.global_step == 5
    assert logged[-1]["progress/images"] == 5 * BATCH * 2
    assert logged[-1]["progress/reward_queries"] == 0


def test_the_pool_holds_the_opponents_images_of_the_coming_pairs_alone(tiny, tmp_path):
    recorder = Recorder()
    aligned = module(tiny, steps=[3, 2])
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "mine.txt").touch()
    fit(aligned, tmp_path, 5, recorder)
    assert (tmp_path / "pool" / "mine.txt").exists()
    (folder,) = (tmp_path / "pool").glob("[!m]*")  # the first iteration's went with it
    assert aligned.pool is not None
    assert aligned.pool.source == folder.name
    shards = sorted(folder.iterdir())
    with safe_open(shards[0], "pt") as shard:
        assert shard.metadata() == {"source": folder.name}
        assert shard.get_slice("samples").get_shape() == [2 * BATCH, *aligned.backbone.latent_shape]
    assert sorted(aligned.pool._places) == sorted(row for rows in recorder.rows[3:] for row in rows)


def test_the_same_pair_gets_another_image_from_another_opponent(tiny, tmp_path):
    recorder = Recorder()

    class FewPairs(PickaPicDataModule):
        def _training_rows(self) -> Any:
            return super()._training_rows()[:BATCH]

    source = FewPairs(pairs_per_batch=BATCH, resolution=16, batches_per_epoch=4)
    fit(module(tiny, steps=2), tmp_path, 4, recorder, source=source)
    assert {tuple(sorted(rows)) for rows in recorder.rows} == {tuple(sorted(recorder.rows[0]))}
    for row in recorder.rows[0]:
        first, same, other, _ = (pool[row] for pool in recorder.pools)
        assert torch.equal(first, same)
        assert (first - other).abs().max() > 1e-3


# ---- interrupts


def test_an_interrupted_pool_goes_on_without_loss_or_duplicates(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(spin_file, "SHARD", 5)
    play, drawn = SPINModule._play, list[int]()

    def counting(self: SPINModule, rows: list[int], prompts: list[str]) -> Tensor:
        if len(drawn) == 10 and not (tmp_path / "again").exists():
            raise RuntimeError("killed")
        drawn.extend(rows)
        return play(self, rows, prompts)

    monkeypatch.setattr(SPINModule, "_play", counting)
    with pytest.raises(RuntimeError, match="killed"):
        fit(module(tiny, steps=6), tmp_path / "run", 6)
    (folder,) = (tmp_path / "run" / "pool").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 2
    (tmp_path / "again").touch()
    resumed, whole = module(tiny, steps=6), module(tiny, steps=6)
    fit(resumed, tmp_path / "run", 6)
    assert len(drawn) == len(set(drawn)) == 6 * BATCH
    assert list((tmp_path / "run" / "pool").iterdir()) == [folder]
    fit(whole, tmp_path / "whole", 6)
    assert resumed.pool is not None
    assert whole.pool is not None
    index = torch.tensor(sorted(drawn))
    torch.testing.assert_close(resumed.pool[index], whole.pool[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("crash", "exact", "place"),
    [(3, False, (1, 2)), (5, False, (1, 4)), (6, True, (2, 1))],
    ids=["in-the-first", "at-the-start-of-the-second", "exact-in-the-second"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny, tmp_path, crash, exact, place):
    options: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 1.0}
    make = partial(
        module,
        tiny,
        exact=exact,
        steps=[4, 3],
        lr=[1e-2, 5e-3],
        lr_scheduler=partial(torch.optim.lr_scheduler.LinearLR, total_iters=3),
    )
    whole, cut, resumed = make(), make(), make()
    recorders = [Recorder(), Recorder(crash=crash), Recorder()]
    trainer = fit(whole, tmp_path / "whole", 4, recorders[0], **options)
    with pytest.raises(RuntimeError, match="killed"):
        fit(cut, tmp_path / "cut", 4, recorders[1], BatchCheckpoint(), **options)
    (last,) = (tmp_path / "cut").rglob("last.ckpt")
    assert tuple(torch.load(last, weights_only=True)["spin"].values()) == place
    again = fit(resumed, tmp_path / "cut", 4, recorders[2], ckpt_path=last, **options)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)
    assert recorders[0].rows == recorders[1].rows + recorders[2].rows
    losses = [[metrics["train/loss"] for metrics in recorder.logged] for recorder in recorders]
    assert losses[0] == losses[1] + losses[2]
    for one, two in zip(
        trainer.optimizers[0].state.values(), again.optimizers[0].state.values(), strict=True
    ):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert resumed.images == whole.images == 7 * BATCH * 2
    assert equal(
        *([torch.stack(list(p.values())) for p in r.pools[-1:]] for r in (recorders[0], recorders[2]))
    )


def test_a_finished_run_has_nothing_left_to_do(tiny, tmp_path):
    fit(module(tiny, iterations=1, steps=2), tmp_path, 4, BatchCheckpoint())
    (last,) = tmp_path.rglob("last.ckpt")
    recorder, finished = Recorder(), module(tiny, iterations=1, steps=2)
    fit(finished, tmp_path, 4, recorder, ckpt_path=last, max_epochs=3)
    assert recorder.logged == []
    assert finished.batches == 2


@pytest.mark.parametrize("changed", [{"sampler": partial(DDIM, num_steps=3, eta=0.5)}, {}])
def test_another_sampler_or_pretrained_model_makes_another_pool(tiny, tmp_path, changed):
    for options in ({}, changed):
        aligned = module(tiny, **options)
        if options is changed and not changed:
            frozen = next(p for p in aligned.backbone.unet.parameters() if not p.requires_grad)
            frozen.data += 0.1
        fit(aligned, tmp_path, 1)
    assert len(list((tmp_path / "pool").iterdir())) == 2


def test_a_resumed_run_with_other_epochs_has_all_the_images_it_needs(tiny, tmp_path):
    fit(module(tiny, steps=9), tmp_path, 3, BatchCheckpoint())
    (last,) = tmp_path.rglob("last.ckpt")
    resumed = module(tiny, steps=9)
    fit(resumed, tmp_path, 2, ckpt_path=last, max_epochs=2)
    assert resumed.batches == 5


def test_a_fast_dev_run_leaves_no_files(tiny, tmp_path):
    recorder = Recorder()
    fit(module(tiny), tmp_path, 2, recorder, fast_dev_run=True)
    assert len(recorder.logged) == 1
    assert not list(tmp_path.iterdir())


def test_full_finetuning_has_a_whole_network_as_opponent(tiny, tmp_path):
    aligned = module(tiny, lora=None, rate=1e-3, steps=2)
    fit(aligned, tmp_path, 4, BatchCheckpoint())
    kept = aligned.kept()
    assert len(kept) == 2 * len(list(aligned.backbone.unet.parameters()))
    assert sum(parameter.requires_grad for parameter in kept.values()) == len(kept) // 2
    assert not equal(*(aligned.backbone.parameters_of(name) for name in (POLICY, OPPONENT)))


class FiguresToFile(Recorder):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save({"gradients": self.gradients, "logged": self.logged}, self.path)


@pytest.mark.slow
def test_two_processes_share_the_pool_and_give_the_gradient_of_one(tiny, tmp_path, monkeypatch):
    found = {}
    for devices in (1, 2):
        path, strategy = tmp_path / f"{devices}.pt", "ddp_spawn" if devices == 2 else "auto"
        aligned = module(tiny, steps=2, micro_batch=2, clip_norm=1e9, rate=1e-3)
        folder = tmp_path / f"run{devices}"
        fit(aligned, folder, 4, FiguresToFile(path), devices=devices, strategy=strategy)
        found[devices] = torch.load(path)
        rows: list[int] = []
        for shard in folder.rglob("*.safetensors"):
            with safe_open(shard, "pt") as opened:
                rows += opened.get_tensor("index").tolist()
        found[devices]["rows"] = sorted(rows)
    assert found[1]["rows"] == found[2]["rows"]
    for one, two in zip(found[1]["gradients"], found[2]["gradients"], strict=True):
        for single, averaged in zip(one, two, strict=True):
            torch.testing.assert_close(averaged, single, atol=1e-5, rtol=1e-2)
    for one, two in zip(found[1]["logged"], found[2]["logged"], strict=True):
        assert one["train/margin"] == pytest.approx(two["train/margin"], abs=1e-4)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": [1, 2, 3]}, "steps.*3 entries for 2 iterations"),
        ({"beta": [1.0]}, "beta.*1 entries"),
        ({"beta": 0.0}, "beta.*positive"),
        ({"lr": [1e-3, -1.0]}, "lr.*positive"),
        ({"iterations": 0}, "iterations"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"exact": True, "sampler": partial(DDIM, num_steps=3, eta=0.0)}, "exact.*eta to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny, options, named):
    with pytest.raises(ConfigError, match=named):
        module(tiny, **options)


def test_rates_that_the_schedule_would_overrule_are_refused(tiny, tmp_path):
    own_rate = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=9)
    with pytest.raises(ConfigError, match=r"iteration 1 wants 0.01.*lr_scheduler"):
        fit(module(tiny, lr=1e-2, lr_scheduler=own_rate), tmp_path, 1)
    fit(module(tiny, lr_scheduler=own_rate), tmp_path, 1)


def test_a_trainer_that_ends_before_the_last_iteration_says_so(tiny, tmp_path):
    with pytest.warns(UserWarning, match="ends after 1 epochs of 4 updates, and the 2 iterations have 6"):
        fit(module(tiny), tmp_path, 4)


def test_a_run_resumed_with_fewer_iterations_is_over(tiny, tmp_path):
    recorder = Recorder()
    fit(module(tiny, steps=2), tmp_path, 3, BatchCheckpoint())
    path = tmp_path / "lit_align" / "checkpoints" / "last.ckpt"
    fit(module(tiny, iterations=1, steps=2), tmp_path, 6, recorder, ckpt_path=path)
    assert recorder.logged == []


def test_prompts_without_images_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"SPINModule.*PickaPicDataModule"):
        fit(module(tiny), tmp_path, 1, source=PromptDataModule(ShapesPrompts(["open"])))


def test_images_of_another_size_than_the_models_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"32 pixels a side, but the model draws 16; set data.resolution"):
        fit(module(tiny), tmp_path, 1, source=data(resolution=32))


def test_the_opponents_noise_is_a_function_of_pair_and_iteration(tiny):
    aligned = module(tiny)
    aligned.iteration = 2
    noise, _ = aligned.draw_noise(torch.tensor([5]), "opponent 2")
    expected = torch.randn(aligned.backbone.latent_shape, generator=generator(aligned.seed, "opponent 2", 5))
    assert torch.equal(noise[0], expected)
