import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning import Callback, Trainer

from lit_align.advantages import Advantages, BatchAdvantages, GroupAdvantages
from lit_align.backbones import LoRA, StableDiffusionBackbone
from lit_align.data import PromptDataModule, ShapesPrompts
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.methods.ddpo import clipped_surrogate, score_function_loss
from lit_align.replay import Replay
from lit_align.rewards import Brightness, Redness, Reward, RewardBank
from lit_align.samplers import DDIM


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


class Recorder(Callback):
    """Keeps gradients before each update and all logged figures."""

    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in pl_module.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


class RecordToFile(Recorder):
    """Writes the first gradient where another process can read it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save(
                {"gradients": self.gradients, "rewards": [f["train/reward"] for f in self.logged]}, self.path
            )


class NoScore(Reward):
    """Every other image has no score."""

    differentiable = False
    scope = "sample"

    def forward(self, images, prompts, groups=None, columns=None):
        scores = images.mean((1, 2, 3))
        scores[::2] = math.nan
        return scores


def module(
    folder: Path,
    reward: Reward | None = None,
    lora: LoRA | None = LoRA(),
    lr: float = 1e-3,
    eta: float = 1.0,
    **options: Any,
) -> DDPOModule:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "advantages": GroupAdvantages(),
        "guidance": 1.0,
        "clip_range": 1e-2,
        "micro_batch": 16,
    } | options
    return DDPOModule(
        StableDiffusionBackbone(str(folder), lora=lora),
        sampler=partial(DDIM, num_steps=4, eta=eta),
        rewards=RewardBank({"trained": reward or Brightness(), "monitored": Redness()}, {"trained": 1.0}),
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.0),
        **settings,
    )


def data(prompts: int = 4, images: int = 4, **options: Any) -> PromptDataModule:
    return PromptDataModule(
        ShapesPrompts(["open"]),
        images_per_prompt=images,
        prompts_per_batch=prompts,
        validation_prompts=4,
        validation_images_per_prompt=2,
        **options,
    )


def trainer(tmp_path: Path, collections: int, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "num_sanity_val_steps": 0,
    } | options
    return Trainer(
        max_epochs=1,
        limit_train_batches=collections,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=list(callbacks),
        **settings,
    )


def test_at_the_first_update_every_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(tiny, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, 1, recorder).fit(module(tiny, advantages=BatchAdvantages(clip=0.5)), data())
    metrics = recorder.logged[0]
    assert metrics["train/ratio_deviation"] < 1e-4  # 1 % of the clip range
    assert metrics["train/clip_fraction"] == 0
    assert metrics["train/kl"] > 0
    assert metrics["progress/images"] == metrics["progress/reward_queries"] == 16


def test_replay_in_the_batch_shape_of_the_rollout_gives_ratios_of_exactly_one(tiny, tmp_path):
    recorder = Recorder()
    aligned = module(tiny, micro_batch=16, rollout_batch=16, timestep_fraction=0.25)
    aligned.stochastic_steps = torch.tensor([2])  # one step for all images: the batch is the rollout's
    trainer(tmp_path, 1, recorder).fit(aligned, data())
    assert recorder.logged[0]["train/ratio_deviation"] == 0


def test_micro_batches_change_no_gradient(tiny, tmp_path):
    gradients = []
    for micro_batch in (64, 5):
        recorder = Recorder()
        trainer(tmp_path, 1, recorder).fit(module(tiny, micro_batch=micro_batch), data())
        gradients.append(recorder.gradients[0])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)


def test_score_function_and_importance_sampling_share_the_first_gradient(tiny, tmp_path):
    gradients = []
    for clip_range in (1e-2, None):
        recorder = Recorder()
        trainer(tmp_path, 1, recorder).fit(module(tiny, clip_range=clip_range), data())
        gradients.append(recorder.gradients[0])
    for clipped, score in zip(*gradients, strict=True):
        torch.testing.assert_close(clipped, score, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lora", [LoRA(rank=8, alpha=8), None])
def test_learns_a_reward_past_a_threshold(tiny, tmp_path, lora):
    recorder = Recorder()
    learner = module(tiny, lora=lora, lr=2e-2 if lora else 1e-3, updates=2, micro_batch=128)
    lit = trainer(tmp_path, 12, recorder)
    lit.fit(learner, data(prompts=8, images=8))
    before, after = learner.baseline["reward"].mean(), learner.latest["reward"].mean()
    spread = learner.baseline["reward"].std()
    assert after > before + 0.5 * spread
    assert learner.latest["kl"].mean() > 0
    assert torch.equal(learner.baseline["kl"], torch.zeros_like(learner.baseline["kl"]))


def test_the_reference_penalty_is_zero_at_the_reference_and_holds_the_policy_back(tiny, tmp_path):
    moved = {}
    for kl_weight in (0.0, 100.0):
        recorder = Recorder()
        learner = module(tiny, lr=1e-2, kl_weight=kl_weight, updates=2, inner_epochs=2)
        trainer(tmp_path, 4, recorder).fit(learner, data())
        moved[kl_weight] = learner.latest["kl"].mean()
        if kl_weight:
            assert recorder.logged[-1]["train/kl_penalty"] > 0
    assert moved[100.0] < 0.5 * moved[0.0]


@pytest.mark.parametrize("lr", [1e-4, 1e-2])
def test_the_step_is_scaled_to_the_kl_target_from_below_and_from_above(tiny, tmp_path, lr):
    target, found = 1e-3, {}
    for kl_target in (target, None):
        recorder = Recorder()
        trainer(tmp_path, 10, recorder).fit(module(tiny, lr=lr, kl_target=kl_target, updates=2), data())
        found[kl_target] = sum(metrics["train/kl"] for metrics in recorder.logged[-3:]) / 3
    assert target / 4 < found[target] < target * 4
    assert abs(math.log(found[target] / target)) < 0.5 * abs(math.log(found[None] / target))


def test_a_schedule_lowers_the_kl_target_too(tiny, tmp_path):
    """To a quarter of the rate after ten updates: a sixteenth of the KL, which goes with the square."""
    falling = partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.25, total_iters=10)
    recorder = Recorder()
    learner = module(tiny, lr=1e-3, kl_target=1e-3, updates=2, lr_scheduler=falling)
    trainer(tmp_path, 12, recorder).fit(learner, data())
    found = [metrics["train/kl"] for metrics in recorder.logged]
    assert 1e-3 / 64 < sum(found[-4:]) / 4 < 1e-3 / 4


def test_steps_without_noise_are_not_replayed(tiny, tmp_path):
    recorder = Recorder()
    aligned = module(tiny)
    aligned = DDPOModule(
        aligned.backbone,
        sampler=partial(DDIM, num_steps=4, noisy_steps=2),
        rewards=aligned.rewards,
        advantages=GroupAdvantages(),
        guidance=1.0,
        micro_batch=16,
    )
    assert aligned.stochastic_steps.tolist() == [0, 1]
    assert aligned.steps_per_image == 2
    trainer(tmp_path, 2, recorder).fit(aligned, data())
    assert all(gradient.isfinite().all() for gradient in recorder.gradients[0])
    assert recorder.logged[0]["train/ratio_deviation"] < 1e-6


def test_images_without_a_score_give_no_gradient_and_no_nan(tiny, tmp_path):
    recorder = Recorder()
    trainer(tmp_path, 1, recorder).fit(module(tiny, reward=NoScore()), data())
    assert all(gradient.isfinite().all() for gradient in recorder.gradients[0])
    assert math.isfinite(recorder.logged[0]["train/reward"])


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in(tiny):
    aligned = module(tiny, rollout_batch=3)
    loaded = data()
    loaded.setup("validate")
    batch = next(iter(loaded.val_dataloader()))
    with torch.no_grad():
        parts = aligned.sample(batch, "validation").images
        aligned.rollout_batch = 100
        whole = aligned.sample(batch, "validation").images
        other = aligned.sample(batch, "test").images
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert (other - whole).abs().max() > 0.01


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_two_processes_give_the_gradient_of_one(tiny, tmp_path, updates):
    found = {}
    for devices in (1, 2):
        path = tmp_path / f"{devices}.pt"
        strategy = "ddp_spawn" if devices == 2 else "auto"
        lit = trainer(tmp_path, 3, RecordToFile(path), devices=devices, strategy=strategy)
        # The penalty evaluates the reference between the forward and the backward pass of the policy.
        aligned = module(
            tiny, lr=1e-3, kl_weight=1.0, updates=updates, clip_norm=1e9, advantages=GroupAdvantages("batch")
        )
        lit.fit(aligned, data())
        found[devices] = torch.load(path)
    for one, two in zip(found[1]["gradients"], found[2]["gradients"], strict=True):
        for single, averaged in zip(one, two, strict=True):
            torch.testing.assert_close(averaged, single, atol=1e-6, rtol=1e-3)
    assert any(gradient.abs().max() > 1e-5 for gradient in found[1]["gradients"][0])
    assert found[1]["rewards"] == pytest.approx(found[2]["rewards"], abs=1e-5)


def test_eta_zero_is_refused_with_the_remedy(tiny):
    with pytest.raises(ConfigError, match="eta"):
        module(tiny, eta=0.0)


def test_one_image_per_prompt_is_refused_with_group_advantages(tiny, tmp_path):
    with pytest.raises(ConfigError, match="images_per_prompt"):
        trainer(tmp_path, 1).fit(module(tiny), data(images=1))


def test_updates_that_do_not_divide_the_prompts_are_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="updates"):
        trainer(tmp_path, 1).fit(module(tiny, updates=3), data())


def test_score_function_allows_one_update(tiny):
    with pytest.raises(ConfigError, match="clip_range"):
        module(tiny, clip_range=None, updates=2)


def test_lasting_non_finite_gradients_end_the_run(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(
        Advantages, "__call__", lambda self, rewards, groups, prompts: torch.full_like(rewards, math.nan)
    )
    learner = module(tiny)
    before = [p.clone() for p in learner.parameters() if p.requires_grad]
    with pytest.raises(ConfigError, match="non-finite"):
        trainer(tmp_path, 12).fit(learner, data())
    after = [p for p in learner.parameters() if p.requires_grad]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("broken", ["advantages", "chains"])
def test_a_broken_collection_does_not_scale_the_next_steps(tiny, tmp_path, monkeypatch, broken):
    if broken == "advantages":
        monkeypatch.setattr(
            Advantages, "__call__", lambda self, rewards, *_: torch.full_like(rewards, math.nan)
        )
    else:
        monkeypatch.setattr(Replay, "moved", lambda self, pairs, _: torch.full((len(pairs.rows),), math.nan))
    learner = module(tiny, kl_target=1e-3)
    trainer(tmp_path, 2).fit(learner, data())
    assert learner.step_scale == {"": 1.0}
    assert all(p.isfinite().all() for p in learner.parameters())


def test_lightning_version_is_not_a_malicious_one():
    assert lightning.__version__ not in ("2.6.2", "2.6.3")
