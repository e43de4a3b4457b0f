import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from numpy.polynomial.hermite_e import hermegauss
from PIL import Image
from rich.progress import Progress

from lit_align.backbones import POLICY, REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.methods.msdda.baselines import CoDe, FactorSoup, RewardGradient, Soup, score_clean
from lit_align.callbacks import SweepReport
from lit_align.cli import main
from lit_align.data import Batch, PromptDataModule, ShapesPrompts
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods import MSDDAModule
from lit_align.methods.msdda.experts import centred, step_loss
from lit_align.rewards import (
    Brightness,
    JPEGCompressibility,
    PairwiseDiversity,
    Redness,
    Reward,
    RewardBank,
)
from lit_align.samplers import DDIM
from lit_align.methods.msdda.sweep import Front, Measured, Point, Sweep

CONFIG = Path(__file__).parents[2] / "configs" / "msdda.yaml"
BOTH = {"bright": None, "red": None}


def module(folder: Path, lr: float = 1e-2, lora: LoRA | None = LoRA(), **options: Any) -> MSDDAModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "sampler": partial(DDIM, num_steps=4),
        "experts": BOTH,
        "weights": {"bright": 0.5, "red": 0.5},
        "beta": 0.05,
        "guidance": 1.0,
        "micro_batch": 16,
        "rollout_batch": 16,
    } | options
    return MSDDAModule(
        StableDiffusionBackbone(str(folder), lora=lora),
        rewards=RewardBank({"bright": Brightness(), "red": Redness()}, {"bright": 10.0, "red": 30.0}),
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        **settings,
    )


def randomise(fused: MSDDAModule) -> None:
    for seed, name in enumerate(fused.trained):
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in fused.backbone.parameters_of(name):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


def batch(images: int = 4) -> Batch:
    prompts = [f"a star number {i // 2}" for i in range(images)]
    return Batch(prompts, torch.arange(images) // 2, index=torch.arange(images) + 7)


def data(prompts: int = 4, images: int = 4) -> PromptDataModule:
    return PromptDataModule(
        ShapesPrompts(["open"]),
        images_per_prompt=images,
        prompts_per_batch=prompts,
        validation_prompts=4,
        validation_images_per_prompt=2,
        test_prompts=4,
        test_images_per_prompt=2,
    )


def trainer(tmp_path: Path, collections: int, *callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(
        max_epochs=1,
        limit_train_batches=collections,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **({"accelerator": "cpu", "enable_progress_bar": False} | options),
    )


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
    with torch.no_grad():
        assert torch.equal(fused.sample(batch(), "test").images, fused.sample(batch(), "test", "red").images)
        fused.weights = {"bright": 0.5, "red": 0.5}
        between = fused.sample(batch(), "test")
        kl = fused.trajectory_kl(batch(), between.trajectory)
    assert (between.images - fused.sample(batch(), "test", "red").images).abs().max() > 1e-3
    assert (kl > 0).all()
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == before


def test_what_is_missing_to_one_stays_with_the_reference(tiny):
    fused = module(tiny)
    randomise(fused)
    with torch.no_grad():
        kls = []
        for share in (0.0, 0.25, 0.5):
            fused.weights = {"bright": share, "red": share}
            samples = fused.sample(batch(), "test")
            kls.append(fused.trajectory_kl(batch(), samples.trajectory).mean().item())
            if share == 0.0:
                assert torch.equal(samples.images, fused.sample(batch(), "test", REFERENCE).images)
    assert kls[0] == 0 < kls[1] < kls[2]
    with torch.no_grad():
        fused.target_beta = 2 * fused.beta  # twice the KL strength, half the powers
        assert torch.equal(fused.stds(fused.weights) or torch.zeros(1), torch.zeros(1))
        half = fused.sample(batch(), "test").images
        fused.target_beta, fused.weights = fused.beta, {"bright": 0.25, "red": 0.25}
        assert torch.equal(half, fused.sample(batch(), "test").images)


def test_own_samplers_of_experts_change_the_stds_and_the_kl_knows(tiny):
    own = {"red": partial(DDIM, num_steps=4, eta=0.5)}
    fused = module(tiny, samplers=own)
    randomise(fused)
    stds = fused.stds(fused.weights)
    common = module(tiny)
    randomise(common)
    assert stds is not None
    assert common.stds(common.weights) is None
    x = torch.zeros(1, *fused.backbone.latent_shape)
    for k, std in enumerate(stds):
        both = [sampler.step(x, x, k).std for sampler in (fused.sampler, fused.samplers["red"])]
        torch.testing.assert_close(std**-2, (both[0] ** -2 + both[1] ** -2) / 2, rtol=1e-5, atol=0)
    with torch.no_grad():
        samples = fused.sample(batch(), "test")
        # Unequal stds alone are a distance, even where no expert differs from the reference.
        kl = fused.trajectory_kl(batch(), samples.trajectory)
        assert (kl > common.trajectory_kl(batch(), common.sample(batch(), "test").trajectory)).all()


def test_one_expert_per_step_draws_other_images_that_do_not_depend_on_the_batch(tiny):
    fused = module(tiny, one_expert_per_step=True)
    randomise(fused)
    exact = module(tiny)
    randomise(exact)
    with torch.no_grad():
        images = fused.sample(batch(), "test").images
        again = fused.sample(batch()[torch.tensor([2])], "test").images
        assert (images - exact.sample(batch(), "test").images).abs().max() > 1e-3
    torch.testing.assert_close(images[2:3], again, atol=1e-5, rtol=0)


# ---- training


class Trained(Callback):
    """The trained weights at the end, and what was logged."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def test_each_expert_learns_its_own_reward_and_the_fused_policy_lies_between(tiny, tmp_path):
    learner = module(tiny, 4e-3, LoRA(8, 8.0), beta=3e-3, updates=2, inner_epochs=2, micro_batch=64)
    recorder = Trained()
    trainer(tmp_path, 8, recorder).fit(learner, data(prompts=4, images=16))
    loaded = data()
    loaded.setup("validate")
    held_out = next(iter(loaded.val_dataloader()))
    means: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name in (REFERENCE, "bright", "red", POLICY):
            scores = learner.score(learner.sample(held_out, "validation", name).images, held_out).report
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
    together = module(tiny, clip_norm=1e-3)
    trainer(tmp_path, 3).fit(together, data())
    alone = module(tiny, clip_norm=1e-3, experts={"red": None}, weights={"red": 1.0})
    trainer(tmp_path, 3).fit(alone, data())
    pairs = zip(together.backbone.parameters_of("red"), alone.backbone.parameters_of("red"), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert any(p.abs().max() > 0 for p in alone.backbone.parameters_of("red")[1::2])


def test_micro_batches_change_no_gradient(tiny, tmp_path):
    gradients = []
    for micro_batch in (64, 5):
        recorder = Trained()
        trainer(tmp_path, 1, recorder).fit(module(tiny, micro_batch=micro_batch), data())
        gradients.append(recorder.gradients[0])
    # Rounding differs with the batch of a prediction, by some 1e-5 of the largest element.
    size = max(gradient.abs().max().item() for gradient in gradients[0])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-4 * size)


# ---- the sweep


def test_a_sweep_measures_every_way_at_every_weight_on_the_same_noise(tiny, tmp_path, monkeypatch):
    baselines = [Soup(), FactorSoup(), CoDe(candidates=4, every=2), RewardGradient(growth=0.5)]
    sweep = Sweep(2, [{"bright": 0.2, "red": 0.8}], baselines, images=2)
    fused = module(tiny, sweep=sweep, joint=[{"bright": 0.5, "red": 0.5}])
    randomise(fused)
    before = {name: p.requires_grad for name, p in fused.named_parameters()}
    report = SweepReport()
    trainer(tmp_path, 1, report).test(fused, data(), verbose=False)
    assert {name: p.requires_grad for name, p in fused.named_parameters()} == before
    assert fused.front is not None
    found = {(m.point.method, tuple(w for _, w in m.point.weights)): m for m in fused.front.measured}
    grid = [(1.0, 0.0), (0.5, 0.5), (0.2, 0.8), (0.0, 1.0)]
    wanted = {("base", ()), ("expert", grid[0]), ("expert", grid[3]), ("joint training", grid[1])}
    wanted |= {(name, w) for name in ("MSDDA", "soup", "soup of factors") for w in grid[1:3]}
    wanted |= {(name, w) for name in ("CoDe", "reward gradient") for w in grid}
    assert set(found) == wanted
    rows = {(row["method"], row["weight/bright"]): row for row in fused.front.rows() if "gain" in row}
    base = found["base", ()].metrics
    # Each figure against what the module itself samples.
    loaded = data()
    loaded.setup("test")
    held_out = next(iter(loaded.test_dataloader()))
    with torch.no_grad():
        own = fused.sample(held_out, "test", "red")
        assert torch.equal(
            found["expert", grid[3]].metrics["reward/red"],
            fused.score(own.images, held_out).report["reward/red"],
        )
        assert torch.equal(found["expert", grid[3]].images, own.images[[0, 2]])
        fused.backbone.mix_weights("by hand", {"bright": 0.2, "red": 0.8})
        soup = fused.sample(held_out, "test", "by hand").images
    assert torch.equal(found["soup", grid[2]].images, soup[[0, 2]])
    assert not torch.equal(found["MSDDA", grid[2]].images, soup[[0, 2]])
    assert (base["kl"] == 0).all()
    assert "kl" not in found["CoDe", grid[0]].metrics
    assert (found["MSDDA", grid[1]].metrics["kl"] > 0).all()
    # Search and gradients serve what they are asked for; the experts here are random.
    for method in ("CoDe", "reward gradient"):
        assert rows[method, 1.0]["gain"] > 0
        assert rows[method, 0.0]["gain"] > 0
    after = found["MSDDA", grid[2]].metrics
    gains = {name: after[f"reward/{name}"] - base[f"reward/{name}"] for name in BOTH}
    difference = 0.2 * 10 * gains["bright"] + 0.8 * 30 * gains["red"]
    assert rows["MSDDA", 0.2]["gain"] == pytest.approx(difference.mean().item(), abs=1e-5)
    volumes = fused.front.hypervolumes()
    assert volumes["base"] == pytest.approx(1.0, abs=1e-5)
    assert volumes["MSDDA"] >= volumes["expert"]
    written = tmp_path / "lit_align" / "sweep"
    assert {path.name for path in written.iterdir()} == {"sweep.csv", "sweep.json", "strip.png", "front.png"}
    summary = json.loads((written / "sweep.json").read_text())
    assert summary["hypervolume"] == volumes
    assert set(summary["hypervolume_error"]) == set(summary["hypervolume_lead"]) | {"MSDDA"} == set(volumes)
    assert summary["hypervolume_lead"]["base"] == pytest.approx(volumes["MSDDA"] - 1, abs=1e-5)
    assert min(summary["hypervolume_error"].values()) > 0
    assert len(summary["points"]) == len(wanted) == len((written / "sweep.csv").read_text().splitlines()) - 1
    assert not list(written.parent.glob(".*draft"))


def test_three_objectives_are_swept_on_a_triangle(tiny, tmp_path):
    names = ["bright", "red", "blue"]
    torch.manual_seed(0)
    rewards: dict[str, Reward] = {"bright": Brightness(), "red": Redness(), "blue": Brightness()}
    fused = MSDDAModule(
        StableDiffusionBackbone(str(tiny)),
        sampler=partial(DDIM, num_steps=2),
        rewards=RewardBank(rewards, dict.fromkeys(names, 1.0)),
        experts=dict.fromkeys(names),
        weights=dict.fromkeys(names, 1 / 3),
        sweep=Sweep(3, baselines=[]),
        guidance=1.0,
    )
    randomise(fused)
    trainer(tmp_path, 1, SweepReport()).test(fused, data(), verbose=False)
    assert fused.front is not None
    assert len(fused.front.measured) == 1 + 10
    assert (tmp_path / "lit_align" / "sweep" / "front.png").exists()


def test_adapters_whose_factors_cannot_be_averaged_are_refused_before_anything_runs(tiny, tmp_path):
    other = StableDiffusionBackbone(str(tiny), lora=LoRA(2, 2.0))
    other.save_weights(tmp_path / "other")
    with pytest.raises(ConfigError, match="ranks"):
        module(
            tiny, experts={"bright": None, "red": str(tmp_path / "other")}, sweep=Sweep(2, [], [FactorSoup()])
        )


# ---- files and the command line


def arguments(tiny: Path) -> list[str]:
    rewards = {"preference": {"class_path": "Brightness"}, "aesthetic": {"class_path": "Redness"}}
    return [
        f"--config={CONFIG}",
        "--trainer.max_epochs=2",
        "--trainer.limit_train_batches=3",
        "--trainer.accelerator=cpu",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false",
        "--data.init_args.images_per_prompt=2",
        "--data.init_args.prompts_per_batch=4",
        "--data.init_args.validation_prompts=4",
        "--data.init_args.validation_images_per_prompt=2",
        "--data.init_args.test_prompts=4",
        "--data.init_args.test_images_per_prompt=2",
        f"--model.init_args.backbone.init_args.pretrained={tiny}",
        "--model.init_args.sampler.init_args.num_steps=4",
        "--model.init_args.sampler.init_args.noisy_steps=3",
        f"--model.init_args.rewards.init_args.rewards={json.dumps(rewards)}",
    ]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])


def test_a_resumed_fit_equals_the_uninterrupted_one_bit_for_bit(tiny, monkeypatch):
    options = arguments(tiny)
    main(["fit", *options, "--trainer.logger.init_args.name=whole"])
    with monkeypatch.context() as patch:
        log, calls = MSDDAModule.log_rollout_batch, []

        def dying(self: MSDDAModule, *given: Any) -> None:
            calls.append(1)
            if len(calls) == 5:  # in the second epoch, after a validation, with its updates done
                raise KeyboardInterrupt
            log(self, *given)

        patch.setattr(MSDDAModule, "log_rollout_batch", dying)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            main(["fit", *options, "--trainer.logger.init_args.name=cut"])
    main(["fit", *options, "--trainer.logger.init_args.name=cut", "--ckpt_path=last"])
    whole, cut = (
        torch.load(f"logs/{name}/version_0/checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    assert all(".preference." in name or ".aesthetic." in name for name in whole["state_dict"])
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in whole["state_dict"].items())
    assert any(value.abs().max() > 0 for name, value in whole["state_dict"].items() if "lora_B" in name)
    moments = [state["optimizer_states"][0]["state"] for state in (whole, cut)]
    assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert whole["progress"]["images"] == cut["progress"]["images"] == 48


def test_adapters_of_a_run_are_experts_of_another_and_a_mixture_for_predict(tiny):
    options = arguments(tiny)
    main(["fit", *options])
    run = Path("logs/msdda/version_0")
    adapter = run / "adapter"
    assert {path.name for path in adapter.iterdir()} == {
        "preference",
        "aesthetic",
        "pytorch_lora_weights.safetensors",
    }
    main(["test", *options, "--ckpt_path=last"])
    trained = json.loads((run / "test.json").read_text())["metrics"]
    experts = {name: str(adapter / name) for name in ("preference", "aesthetic")}
    # Other ranks than the run's: the adapters bring their own.
    loaded = [
        *options,
        f"--model.init_args.experts={json.dumps(experts)}",
        "--model.init_args.backbone.init_args.lora={rank: 2, alpha: 2}",
    ]
    main(["test", *loaded])
    again = json.loads(Path("logs/msdda/version_1/test.json").read_text())["metrics"]
    assert again == trained
    assert trained["kl"]["after"] > 0
    weights = dict.fromkeys(experts.values(), 0.5)
    ddpo = CONFIG.with_name("ddpo.yaml")
    mixture = [f"--model.init_args.backbone.init_args.adapters={json.dumps(weights)}"]
    bank = '--model.init_args.rewards.init_args.weights={"preference": 1.0}'
    main(["predict", f"--config={ddpo}", *options[1:], *mixture, bank])
    rows = Path("logs/ddpo/version_0/predictions/metadata.jsonl").read_text().splitlines()
    assert len(rows) == 8
    with pytest.raises(SystemExit):
        main(["fit", *loaded])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"experts": {"beauty": None}, "weights": {"beauty": 1.0}}, "beauty"),
        ({"experts": {"policy": None}}, "policy"),
        ({"weights": {"bright": 0.9, "red": 0.9}}, "at most 1"),
        ({"weights": {"bright": -0.5, "red": 0.9}}, "negative"),
        ({"weights": {"blue": 1.0}}, "blue"),
        ({"betas": {"blue": 1.0}}, "blue"),
        ({"beta": 0.0}, "beta"),
        ({"experts": BOTH | {"red": "nowhere"}}, "nowhere"),
        ({"samplers": {"red": partial(DDIM, num_steps=5)}}, "num_steps"),
        ({"samplers": {"red": partial(DDIM, num_steps=4, eta=0.0)}}, "stds"),
        (
            {
                "sampler": partial(DDIM, num_steps=4, eta=0.2),
                "samplers": dict.fromkeys(BOTH, partial(DDIM, num_steps=4)),
                "target_beta": 0.02,
            },
            "precision",
        ),
        ({"one_expert_per_step": True, "target_beta": 0.02}, "chance"),
        ({"experts": {"soup": None}}, "soup"),
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


def test_sweeps_that_cannot_be_told_apart_or_made_are_refused():
    with pytest.raises(ConfigError, match="two are called 'CoDe'"):
        Sweep(2, baselines=[CoDe(4, 5), CoDe(20, 5)])
    assert len(Sweep(2, baselines=[CoDe(4, 5), CoDe(20, 5, name="CoDe, 20")]).baselines) == 2
    with pytest.raises(ConfigError, match="grid"):
        Sweep(0)
    with pytest.raises(ConfigError, match="images: -1"):
        Sweep(2, images=-1)


def test_the_gradient_of_a_black_box_is_refused_before_anything_runs(tiny):
    bank = RewardBank({"bright": Brightness(), "jpeg": JPEGCompressibility()}, {"bright": 1.0, "jpeg": 1.0})
    with pytest.raises(ConfigError, match="gradient of jpeg"):
        MSDDAModule(
            StableDiffusionBackbone(str(tiny)),
            partial(DDIM, num_steps=2),
            bank,
            experts={"bright": None, "jpeg": None},
            weights={"bright": 1.0},
            sweep=Sweep(2, baselines=[RewardGradient()]),
        )


def test_experts_that_were_never_trained_are_not_tested(tiny, tmp_path):
    fused = module(tiny, joint=[{"bright": 0.5, "red": 0.5}])
    for run in (trainer(tmp_path, 1).test, trainer(tmp_path, 1).predict):
        with pytest.raises(ConfigError, match="bright, red, joint0 would be the pretrained model itself"):
            run(fused, data())
    trainer(tmp_path, 1).fit(fused, data())
    trainer(tmp_path, 1).test(fused, data(), verbose=False)


def test_a_target_further_than_the_experts_moves_the_mixtures_and_not_the_experts(tiny, tmp_path):
    """At beta / 2 the product has each expert to the power 2, the reference to -1; the soup goes as far."""
    fused = module(tiny, target_beta=0.025, sweep=Sweep(2, baselines=[Soup()]))
    randomise(fused)
    trainer(tmp_path, 1).test(fused, data(), verbose=False)
    assert fused.front is not None
    found = {(m.point.method, tuple(w for _, w in m.point.weights)): m for m in fused.front.measured}
    assert {method for method, weights in found if weights == (0.0, 1.0)} == {"expert", "MSDDA", "soup"}
    assert all(fused.front.ends[name] == [] for name in ("MSDDA", "soup", "joint training"))
    loaded = data()
    loaded.setup("test")
    held_out = next(iter(loaded.test_dataloader()))
    with torch.no_grad():
        expert = fused.sample(held_out, "test", "red").images
        fused.backbone.mix_weights("by hand", {"bright": 1.0, "red": 1.0})
        soup = fused.sample(held_out, "test", "by hand").images
        fused.backbone.mix_weights("by hand", {"red": 2.0})
        corner = fused.sample(held_out, "test", "by hand").images
        fused.export(tmp_path / "adapter")  # at the configured weights, .5 and .5: as far as the product
        fused.backbone.load_weights("read", tmp_path / "adapter")
        torch.testing.assert_close(fused.sample(held_out, "test", "read").images, soup, atol=1e-5, rtol=0)
    assert torch.equal(found["soup", (0.0, 1.0)].images, corner[::2])
    assert torch.equal(found["expert", (0.0, 1.0)].images, expert[::2])
    assert not torch.equal(found["MSDDA", (0.0, 1.0)].images, expert[::2])
    assert torch.equal(found["soup", (0.5, 0.5)].images, soup[::2])


def test_where_one_expert_has_another_strength_only_the_other_end_is_an_expert(tiny, tmp_path):
    fused = module(tiny, betas={"red": 0.1}, sweep=Sweep(2, baselines=[Soup(), FactorSoup()]))
    randomise(fused)
    trainer(tmp_path, 1).test(fused, data(), verbose=False)
    assert fused.front is not None
    bright, red = ((("bright", float(i)), ("red", float(1 - i))) for i in (1, 0))
    assert fused.front.ends == {"MSDDA": [bright], "soup": [bright], "soup of factors": [bright, red]} | {
        "joint training": [bright]
    }
    for method in ("MSDDA", "soup", "soup of factors"):
        points = fused.front.methods()[method]
        assert len(points) == 3
        assert {one.point.weights for one in points} >= {bright, red}


def test_less_of_a_penalty_is_better_on_the_front_and_in_volumes():
    def point(method: str, gain: float, cost: float) -> Measured:
        base = torch.linspace(-1, 1, 8)
        metrics = {"reward/gain": base + gain, "reward/cost": base + cost}
        return Measured(Point(method), metrics, torch.arange(8), 0.0, torch.zeros(0))

    measured = [point("base", 0, 0), point("good", 1, -1), point("bad", 1, 1)]
    front = Front(("gain", "cost"), measured, {"gain": 2.0, "cost": -3.0})
    assert [row["front"] for row in front.rows()] == [False, True, False]
    volumes = front.hypervolumes()
    assert volumes["good"] > volumes["base"] > volumes["bad"]
    again = front.resampled_hypervolumes()
    assert all(abs(again[name].mean() - volumes[name]) < 0.3 for name in volumes)


def test_what_does_not_vary_or_has_no_score_has_no_volume_and_no_place_on_the_front():
    metrics = [
        {"reward/a": torch.full((4,), value), "reward/b": torch.arange(4.0)} for value in (1.0, math.nan)
    ]
    measured = [
        Measured(Point(name), own, torch.arange(4), 0.0, torch.zeros(0))
        for name, own in zip(("base", "unscored"), metrics, strict=True)
    ]
    front = Front(("a", "b"), measured, {"a": 1.0, "b": 1.0})
    assert all(math.isnan(volume) for volume in front.hypervolumes().values())
    assert [row["front"] for row in front.rows()] == [True, False]


def test_where_the_fused_policy_is_an_expert_it_leads_as_that():
    base = torch.linspace(-1, 1, 8)
    corner, even = (("a", 1.0), ("b", 0.0)), (("a", 0.5), ("b", 0.5))
    gains = {
        Point("base"): 0.0,
        Point("expert", corner): 2.0,
        Point("MSDDA", even): 1.0,
        Point("CoDe", corner): 3.0,
    }
    measured = [
        Measured(
            point, {f"reward/{name}": base + gain for name in "ab"}, torch.arange(8), 0.0, torch.zeros(0)
        )
        for point, gain in gains.items()
    ]
    rows = Front(("a", "b"), measured, {"a": 1.0, "b": 1.0}, {"MSDDA": [corner]}).rows()
    assert [row.get("lead") for row in rows[:3]] == [None, None, None]
    assert rows[3]["lead"] == pytest.approx(-1.0)


def test_a_sweep_of_two_processes_is_that_of_one(tiny, tmp_path):
    found = []
    for devices in (1, 2):
        fused = module(tiny, sweep=Sweep(2, baselines=[Soup()], images=3))
        randomise(fused)
        folder = tmp_path / str(devices)
        strategy = "ddp_spawn" if devices == 2 else "auto"
        trainer(folder, 1, SweepReport(), devices=devices, strategy=strategy).test(
            fused, data(), verbose=False
        )
        (summary,) = folder.glob("**/sweep.json")
        found.append(
            (json.loads(summary.read_text()), np.asarray(Image.open(summary.with_name("strip.png"))))
        )
    (one, strip_one), (two, strip_two) = found
    assert one["images"] == two["images"] == 8
    for before, after in zip(one["points"], two["points"], strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - {"seconds"}:
            assert before[name] == pytest.approx(after[name], abs=1e-4), name
    assert one["hypervolume_error"] == pytest.approx(two["hypervolume_error"], abs=1e-3)
    assert strip_one.shape == strip_two.shape
    assert np.abs(strip_one.astype(int) - strip_two).max() <= 2


def test_the_bar_of_a_sweep_moves_inside_the_trainers(tiny, tmp_path, monkeypatch):
    drawn: list[float] = []
    refresh = Progress.refresh

    def monitored(self: Progress) -> None:
        drawn.extend(task.completed for task in self.tasks if task.description == "Sweep")
        refresh(self)

    monkeypatch.setattr(Progress, "refresh", monitored)
    monkeypatch.setattr("lit_align.methods.base.SECONDS_A_FRAME", 0.0)
    fused = module(tiny, sweep=Sweep(2, baselines=[], images=0))
    randomise(fused)
    run = trainer(tmp_path, 1, SweepReport(), RichProgressBar(), enable_progress_bar=True)
    run.test(fused, data(), verbose=False)
    assert {1.0, 2.0, 3.0, 4.0} <= set(drawn)  # the base, both experts, and between them
    assert not list(tmp_path.glob("**/strip.png"))  # no images were asked for
    assert list(tmp_path.glob("**/sweep.csv"))


def test_a_weight_set_is_sampled_with_its_own_sampler(tiny):
    own = {"red": partial(DDIM, num_steps=4, eta=0.5)}
    fused, other = module(tiny, samplers=own, weights={"red": 1.0}), module(tiny)
    randomise(fused)
    randomise(other)
    with torch.no_grad():
        alone = fused.sample(batch(), "test", "red").images
        assert torch.equal(alone, fused.sample(batch(), "test").images)
        assert not torch.equal(alone, other.sample(batch(), "test", "red").images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_objectives_are_scored_outside_autocast(tiny, dtype):
    """As everywhere else: what search and gradients follow must not change with the precision."""
    seen = []

    class Watcher(Brightness):
        def forward(self, images, prompts, groups=None, columns=None):
            seen.append((torch.is_autocast_enabled("cpu"), images.dtype))
            return super().forward(images, prompts, groups, columns)

    fused = module(tiny)
    fused.rewards = RewardBank({"bright": Watcher()}, {"bright": 10.0})
    seen.clear()  # the bank tried it
    with torch.autocast("cpu", torch.bfloat16):
        scores = fused.objective("bright", torch.full((4, 3, 8, 8), 0.5, dtype=dtype), batch())
    assert seen == [(False, torch.float32)]
    torch.testing.assert_close(scores, torch.full((4,), 5.0))


def test_guidance_by_gradients_predicts_once_a_step(tiny, monkeypatch):
    fused, calls = module(tiny), []
    predict = StableDiffusionBackbone.predict
    monkeypatch.setattr(
        StableDiffusionBackbone,
        "predict",
        lambda self, *given, **named: calls.append(1) or predict(self, *given, **named),
    )
    noise, _ = fused.draw_noise(torch.arange(4), "test")
    with torch.no_grad():
        step = RewardGradient(growth=0.5, temperature=2.0).policy(fused, dict.fromkeys(BOTH, 0.5), batch())(
            noise, 1
        )
    assert len(calls) == 1
    # The same from one gradient at a time.
    base, x = fused.expert(REFERENCE, batch()), noise.clone().requires_grad_()
    found = base(x, 1)
    shift = torch.zeros_like(noise)
    for name in BOTH:
        score = score_clean(fused, base, {name: 1.0}, batch(), x, 1).sum()
        (gradient,) = torch.autograd.grad(score, x)
        shift += 0.5 * gradient / gradient.norm(dim=1, keepdim=True) / 2.0
    torch.testing.assert_close(step.mean, found.mean + 0.5 * found.std.square() * shift)


def test_rewards_of_sets_are_no_objectives_of_single_steps_or_candidates(tiny, tmp_path):
    bank = RewardBank(
        {"bright": Brightness(), "varied": PairwiseDiversity("shapes")}, {"bright": 1.0, "varied": 1.0}
    )
    options = {"weights": {"bright": 1.0}, "guidance": 1.0, "experts": {"bright": None, "varied": None}}
    sampler, backbone = partial(DDIM, num_steps=2), StableDiffusionBackbone(str(tiny))
    with pytest.raises(ConfigError, match=r"varied is a reward of sets.*take CoDe out"):
        MSDDAModule(backbone, sampler, bank, sweep=Sweep(2, baselines=[CoDe()]), **options)
    fused = MSDDAModule(StableDiffusionBackbone(str(tiny)), sampler, bank, **options)
    with pytest.raises(ConfigError, match=r"varied is a reward of sets.*train it with DDPOModule"):
        trainer(tmp_path, 1).fit(fused, data())


def test_one_random_expert_is_called_so(tiny, tmp_path):
    fused = module(tiny, one_expert_per_step=True, sweep=Sweep(2, baselines=[]))
    randomise(fused)
    trainer(tmp_path, 1).test(fused, data(), verbose=False)
    assert fused.front is not None
    assert {m.point.method for m in fused.front.measured} == {"base", "expert", "one random expert"}


def test_a_candidate_without_a_score_is_not_chosen(tiny, monkeypatch):
    """NaN counts as the largest elsewhere, and the search would follow what cannot be judged."""
    fused, chosen, least, seen = module(tiny), [], -math.inf, list[float]()

    def unsure(self: MSDDAModule, name: str, images: torch.Tensor, batch: Batch) -> torch.Tensor:
        scores = images.mean((1, 2, 3))
        seen.extend(scores.tolist())
        return torch.where(scores < least, torch.nan, scores)

    monkeypatch.setattr(MSDDAModule, "objective", unsure)
    for _ in range(2):
        seen.clear()
        with torch.no_grad():
            search = CoDe(candidates=6, every=1).policy(fused, {"bright": 1.0}, batch(1))
            chosen.append(search(fused.draw_noise(torch.tensor([7]), "test")[0], 0).mean)
        assert len(seen) == 6
        least = sorted(seen)[3]  # of the second search three candidates have no score
    assert torch.equal(*chosen)


def test_an_expert_learns_at_its_own_strength_from_the_common_sampler(tiny, tmp_path):
    losses = []
    for betas in ({}, {"red": 5.0}):
        fused = module(tiny, betas=betas, target_beta=0.05)
        trainer(tmp_path, 2).fit(fused, data())
        losses.append({name: [p.clone() for p in fused.backbone.parameters_of(name)] for name in BOTH})
    assert all(torch.equal(*both) for both in zip(losses[0]["bright"], losses[1]["bright"], strict=True))
    assert not all(torch.equal(*both) for both in zip(losses[0]["red"], losses[1]["red"], strict=True))
    own = module(tiny, samplers={"red": partial(DDIM, num_steps=4, eta=0.5)})
    with pytest.raises(ConfigError, match="samplers: fit learns red from chains of the common sampler"):
        trainer(tmp_path, 1).fit(own, data())


def test_fit_needs_experts_to_train_and_images_to_compare(tiny, tmp_path):
    with pytest.raises(ConfigError, match="images_per_prompt"):
        trainer(tmp_path, 1).fit(module(tiny), data(images=1))
    with pytest.raises(ConfigError, match="updates"):
        trainer(tmp_path, 1).fit(module(tiny, updates=3), data())
    with pytest.raises(ConfigError, match="eta"):
        trainer(tmp_path, 1).fit(module(tiny, sampler=partial(DDIM, num_steps=4, eta=0.0)), data())
