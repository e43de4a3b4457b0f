"""Several tasks in one run: nothing of one reaches another, and what is saved is taken up to the bit."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor

from lit_align.advantages import Advantages, BatchAdvantages, GroupAdvantages, PerPromptAdvantages
from lit_align.backbones import LoRA, StableDiffusionBackbone
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import (
    CaptionedImages,
    MultiTaskDataModule,
    PromptDataModule,
    ShapesPrompts,
    ShapesRenders,
    TaskPrompts,
)
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.methods.joint import Collection
from lit_align.methods.objectives import denoising_error
from lit_align.methods.pretraining import Order, Pretraining, denoising_loss
from lit_align.randomness import generator
from lit_align.rewards import Brightness, Redness, Reward, RewardBank, SetReward
from lit_align.samplers import DDIM
from lit_align.methods.tasks import Task, check_task


class Greys(CaptionedImages):
    """Seven grey images of the tiny model's size."""

    def __len__(self) -> int:
        return 7

    def caption(self, row: int) -> str:
        return f"grey {row}"

    def image(self, row: int) -> Tensor:
        return torch.full((3, 16, 16), row / 7)


class EvenBrightness(SetReward):
    """Minus the squared mean distance of a set's brightness from a half, for as many bright as dark."""

    DEFINED_FROM = 1

    def features(self, images: Tensor) -> Tensor:
        return (images.mean(dim=(1, 2, 3))[:, None] - 0.5).double().cpu()

    def value(self, total: Tensor, count: Tensor) -> Tensor:
        return -(total[:, 0] / count).square()


class EvenBrightnessOfAll(EvenBrightness):
    scope = "batch"


class Dark(Reward):
    """Scores dark images; a bright one has no score."""

    differentiable = False
    scope = "sample"

    def forward(self, images, prompts, groups=None, columns=None):
        level = images.mean(dim=(1, 2, 3))
        return torch.where(level > level.median(), torch.nan, -level)


def bank(reward: Reward) -> RewardBank:
    return RewardBank({"trained": reward, "monitored": Redness()}, {"trained": 1.0})


def make(folder: Path, lora: LoRA | None = LoRA(), lr: float = 1e-3, **options: Any) -> DDPOModule:
    torch.manual_seed(0)
    adam = partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    settings: dict[str, Any] = {"guidance": 1.0, "clip_range": 1e-2, "micro_batch": 16, "optimizer": adam}
    return DDPOModule(
        StableDiffusionBackbone(str(folder), lora=lora),
        sampler=partial(DDIM, num_steps=4, eta=1.0),
        **settings | options,
    )


SIZES: dict[str, Any] = {
    "images_per_prompt": 4,
    "prompts_per_batch": 2,
    "validation_prompts": 2,
    "validation_images_per_prompt": 2,
}


def joint_data(*names: str) -> MultiTaskDataModule:
    sources = {"a": ShapesPrompts(["open"]), "b": ShapesPrompts(["single"]), "c": ShapesPrompts(["open"])}
    return MultiTaskDataModule({name: TaskPrompts(sources[name]) for name in names}, **SIZES)


class Recorder(Callback):
    """Keeps what every rollout batch was, and all logged figures."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.advantages: list[tuple[str, Tensor]] = []
        self.sampled_at: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        collect = pl_module.collect

        def recording(*arguments: Any) -> Collection:
            collection: Collection = collect(*arguments)
            self.advantages.append((collection.batch.task, collection.advantages.clone()))
            self.sampled_at.append(collection.sampled_at)
            return collection

        pl_module.collect = recording

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def fit(
    module: DDPOModule, data: Any, folder: Path, iterations: int = 2, *callbacks: Callback, **options: Any
) -> Recorder:
    recorder = Recorder()
    settings: dict[str, Any] = {"accelerator": "cpu", "limit_val_batches": 0, "max_epochs": 1} | options
    resumed = settings.pop("ckpt_path", None)
    trainer = Trainer(
        limit_train_batches=iterations,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=any(isinstance(one, BatchCheckpoint) for one in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[recorder, *callbacks],
        **settings,
    )
    trainer.fit(module, data, ckpt_path=resumed, weights_only=True if resumed else None)
    return recorder


def trained(module: DDPOModule) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


def flat(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.flatten() for weight in weights])


def assert_same(one: list[Tensor], two: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("order", ["sequence", "interleaved"])
def test_one_task_is_the_plain_run_bit_for_bit(tiny: Path, tmp_path: Path, order: str) -> None:
    options: dict[str, Any] = {"updates": 2, "kl_target": 1e-3}
    plain = make(tiny, rewards=bank(Brightness()), advantages=PerPromptAdvantages(8, 2), **options)
    joint = make(
        tiny, tasks={"a": Task(bank(Brightness()), PerPromptAdvantages(8, 2))}, task_order=order, **options
    )
    before = trained(plain)
    first = fit(plain, PromptDataModule(ShapesPrompts(["open"]), **SIZES), tmp_path, 3)
    second = fit(joint, joint_data("a"), tmp_path, 3)
    assert_same(trained(plain), trained(joint))
    assert not torch.equal(trained(plain)[1], before[1])
    for name in ("train/reward", "train/loss", "progress/images"):
        assert [f[name] for f in first.logged] == [f[name] for f in second.logged]
    for name in ("train/kl", "train/step_scale", "train/unscored"):
        assert [f[name] for f in first.logged] == [f[f"{name}/a"] for f in second.logged]
    assert [f["train/reward/trained"] for f in first.logged] == [
        f["train/reward/a/trained"] for f in second.logged
    ]


class Loud(Brightness):
    """The same images, scored on another scale and with an offset."""

    def forward(self, images, prompts, groups=None, columns=None):
        return 1000 * super().forward(images, prompts, groups, columns) ** 3 + 77


@pytest.mark.parametrize("advantages", [BatchAdvantages, GroupAdvantages])
def test_advantages_of_a_task_do_not_know_the_other(
    tiny: Path, tmp_path: Path, advantages: type[Advantages]
) -> None:
    """Whatever the other task's rewards are; interleaved, so that both have sampled before any update."""
    found = []
    for other in (Redness(), Loud()):
        tasks = {"a": Task(bank(Brightness()), advantages()), "b": Task(bank(other), advantages())}
        recorder = fit(
            make(tiny, tasks=tasks, task_order="interleaved"), joint_data("a", "b"), tmp_path, iterations=1
        )
        found.append(dict(recorder.advantages))
    assert torch.equal(found[0]["a"], found[1]["a"])
    assert not torch.equal(found[0]["b"], found[1]["b"])
    for values in found:
        assert all(abs(float(one.sum())) < 1e-4 and one.abs().max() > 0.1 for one in values.values())


def test_tasks_sample_in_sequence_or_all_at_first(tiny: Path, tmp_path: Path) -> None:
    weights = []
    for order, sampled_at in (("sequence", [0, 2, 4, 6]), ("interleaved", [0, 0, 4, 4])):
        tasks = {name: Task(bank(Brightness()), BatchAdvantages()) for name in ("a", "b")}
        module = make(tiny, tasks=tasks, task_order=order, updates=2)
        recorder = fit(module, joint_data("a", "b"), tmp_path)
        assert recorder.sampled_at == sampled_at
        # Measured only while the weights are those that sampled: 1 up to rounding.
        assert all(metrics["train/ratio_deviation"] < 1e-4 for metrics in recorder.logged)
        assert module.images == 32
        weights.append(trained(module))
    assert not torch.equal(weights[0][1], weights[1][1])


def test_a_task_of_weight_zero_is_only_monitored(tiny: Path, tmp_path: Path) -> None:
    tasks = {
        "a": Task(bank(Brightness()), BatchAdvantages()),
        "b": Task(bank(Redness()), BatchAdvantages(), 0.0),
    }
    module = make(tiny, tasks=tasks)
    recorder = fit(module, joint_data("a", "b"), tmp_path, limit_val_batches=None)
    assert {task for task, _ in recorder.advantages} == {"a"}
    assert module.latest["reward/b/trained"].isfinite().sum() == 4
    assert module.latest["reward/a/trained"].isfinite().sum() == 4
    # What is trained makes the reward, by which the best checkpoint is chosen.
    assert torch.equal(module.latest["reward"].isfinite(), module.latest["reward/a"].isfinite())
    with pytest.raises(ConfigError, match="all weights are 0"):
        make(tiny, tasks={"a": Task(bank(Brightness()), BatchAdvantages(), 0.0)})


def test_a_weight_scales_the_step_of_its_task(tiny: Path, tmp_path: Path) -> None:
    moved = []
    for weight in (1.0, 0.25):
        module = make(tiny, tasks={"a": Task(bank(Brightness()), BatchAdvantages(), weight)})
        before = trained(module)
        fit(module, joint_data("a"), tmp_path, iterations=1)
        moved.append(flat(trained(module)) - flat(before))
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-3, atol=1e-7)


def test_a_weight_scales_the_step_of_its_task_where_steps_follow_a_target_too(
    tiny: Path, tmp_path: Path
) -> None:
    """KL grows with the square of the step."""
    found = {}
    for weight in (1.0, 0.25):
        module = make(tiny, tasks={"a": Task(bank(Brightness()), BatchAdvantages(), weight)}, kl_target=1e-3)
        recorder = fit(module, joint_data("a"), tmp_path, iterations=10)
        found[weight] = sum(metrics["train/kl/a"] for metrics in recorder.logged[-5:]) / 5
    assert 0.5e-3 < found[1.0] < 2e-3
    assert found[0.25] == pytest.approx(found[1.0] / 16, rel=0.6)


def test_shared_timesteps_are_one_update_each_on_all_images(tiny: Path, tmp_path: Path) -> None:
    module = make(tiny, rewards=bank(Brightness()), advantages=BatchAdvantages(), shared_timesteps=3)
    drawn: list[list[Any]] = []
    draw = module._draw_updates

    def recording(batch: Any, epoch: int) -> Any:
        drawn.append(draw(batch, epoch))
        return drawn[-1]

    module._draw_updates = recording  # type: ignore[method-assign]
    recorder = fit(module, PromptDataModule(ShapesPrompts(["open"]), **SIZES), tmp_path, 6)
    assert recorder.sampled_at == [0, 3, 6, 9, 12, 15]
    assert all(torch.equal(pairs.rows, torch.arange(8)) for parts in drawn for pairs in parts)
    steps = [[pairs.steps.unique() for pairs in parts] for parts in drawn]
    assert all(torch.cat(one).unique().numel() == 3 for one in steps)
    assert len({tuple(int(step) for step in one) for one in steps}) > 1
    for wrong in ({"shared_timesteps": 5}, {"shared_timesteps": 2, "updates": 2}):
        with pytest.raises(ConfigError, match="shared_timesteps"):
            make(tiny, rewards=bank(Brightness()), advantages=BatchAdvantages(), **wrong)


def test_images_without_a_score_are_counted_and_move_nothing(tiny: Path, tmp_path: Path) -> None:
    module = make(tiny, rewards=bank(Dark()), advantages=BatchAdvantages())
    data = PromptDataModule(ShapesPrompts(["open"]), **SIZES)
    recorder = fit(module, data, tmp_path, iterations=1, limit_val_batches=None)
    for metrics in (module.baseline, module.latest):
        assert torch.equal(metrics["unscored"], metrics["reward"].isnan().float())
    ((_, advantages),) = recorder.advantages
    share = recorder.logged[0]["train/unscored"]
    assert 0 < share < 1
    assert float((advantages == 0).float().mean()) == share
    assert math.isfinite(recorder.logged[0]["train/reward"])


# ---- the pre-training loss


def extra(order: Order = "after", **options: Any) -> Pretraining:
    return Pretraining(Greys(), batch=4, order=order, **options)


def test_without_a_signal_an_iteration_is_one_step_of_the_denoising_loss(tiny: Path, tmp_path: Path) -> None:
    """Against the loss written out, for the same rows, timesteps and noise."""
    descent = partial(torch.optim.SGD, lr=1e-2)  # which stays where it is where there is no gradient
    common: dict[str, Any] = {
        "advantages": BatchAdvantages(),
        "optimizer": descent,
        "clip_norm": 1e9,
        "seed": 0,
    }
    found = []
    for order in ("before", "after", "every"):
        module = make(tiny, rewards=bank(Still()), pretraining=extra(order, weight=0.5), **common)
        fit(module, PromptDataModule(ShapesPrompts(["open"]), **SIZES), tmp_path, iterations=1)
        found.append(trained(module))
    plain = make(tiny, rewards=bank(Still()), **common)
    before, backbone, sampler = trained(plain), plain.backbone, plain.sampler
    total = torch.zeros(())
    for number, row in enumerate(extra().rows(0, range(4))):
        draw = generator(0, "pretraining", number)
        t = torch.randint(1000, (), generator=draw)[None]
        noise = torch.randn(backbone.latent_shape, generator=draw)[None]
        x = sampler.add_noise(backbone.latents(Greys().image(row)[None]), noise, t)
        error = backbone.predict(x, t, backbone.encode([f"grey {row}"])) - noise
        total = total + error.square().mean() / 4
    gradients = torch.autograd.grad(total, [p for p in plain.parameters() if p.requires_grad])
    for weights in found:
        for after, start, gradient in zip(weights, before, gradients, strict=True):
            torch.testing.assert_close(after, start - 0.5e-2 * gradient, rtol=1e-5, atol=1e-7)


class Still(Reward):
    """Likes all images alike: every advantage is 0."""

    differentiable = False
    scope = "sample"

    def forward(self, images, prompts, groups=None, columns=None):
        return torch.zeros(len(images))


def test_the_loss_is_one_for_a_denoiser_that_predicts_nothing(tiny: Path) -> None:
    """Of standard noise, predicted as 0; and the sampler's target is the noise for an epsilon model."""
    module = make(tiny, rewards=bank(Still()), advantages=BatchAdvantages())
    torch.nn.init.zeros_(module.backbone.unet.conv_out.weight)
    torch.nn.init.zeros_(module.backbone.unet.conv_out.bias)
    images, captions = Greys().batch(range(7))
    draws = [generator(0, "test", i) for i in range(7)]
    losses = denoising_loss(module.backbone, module.sampler, images, captions, draws)
    noise = []
    for i in range(7):
        draw = generator(0, "test", i)
        torch.randint(1000, (), generator=draw)
        noise.append(torch.randn(module.backbone.latent_shape, generator=draw))
    assert torch.equal(losses, denoising_error(torch.zeros(7, 4, 8, 8), torch.stack(noise)))
    with pytest.raises(ConfigError, match=r"64 pixels a side, but the model draws 16"):
        denoising_loss(module.backbone, module.sampler, *ShapesRenders(["single"]).batch([0]), draws[:1])


def test_captioned_images_of_another_size_are_refused_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(DDPOModule, "sample", None)
    pretraining = Pretraining(ShapesRenders(["single"]), batch=4)
    module = make(tiny, rewards=bank(Brightness()), advantages=BatchAdvantages(), pretraining=pretraining)
    with pytest.raises(ConfigError, match="64 pixels a side, but the model draws 16"):
        fit(module, PromptDataModule(ShapesPrompts(["open"]), **SIZES), tmp_path)


@pytest.mark.parametrize("order", ["before", "after", "every"])
def test_captioned_images_go_round_in_every_order(tiny: Path, tmp_path: Path, order: Order) -> None:
    module = make(
        tiny, rewards=bank(Brightness()), advantages=BatchAdvantages(), pretraining=extra(order), updates=2
    )
    recorder = fit(module, PromptDataModule(ShapesPrompts(["open"]), **SIZES), tmp_path, 3)
    steps = 3 * (2 if order == "every" else 1)
    assert module.denoising_steps == steps
    assert recorder.sampled_at == {"before": [1, 4, 7], "after": [0, 3, 6], "every": [0, 2, 4]}[order]
    assert all(0 < metrics["train/denoising_loss"] < 10 for metrics in recorder.logged)
    rows = extra().rows(5, range(21))
    assert all(sorted(rows[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert rows[:7] != rows[7:14]


@pytest.mark.parametrize(
    ("options", "named"), [({"batch": 0}, "batch"), ({"weight": 0.0}, "weight"), ({"order": "last"}, "order")]
)
def test_refuses_a_pretraining_that_cannot_be(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Pretraining(Greys(), **options)


# ---- ranks and checkpoints


class Dies(Callback):
    """Ends the process in the middle of an iteration, between its two tasks."""

    def __init__(self, collection: int) -> None:
        self.left = collection

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        collect = pl_module.collect

        def dying(*arguments: Any) -> Any:
            self.left -= 1
            if not self.left:
                raise RuntimeError("the lights went out")
            return collect(*arguments)

        pl_module.collect = dying


def whole(folder: Path) -> DDPOModule:
    tasks = {
        "a": Task(bank(EvenBrightness("leave_one_out")), GroupAdvantages("batch")),
        "b": Task(bank(Dark()), PerPromptAdvantages(4, 2), 0.5),
    }
    return make(folder, tasks=tasks, pretraining=extra("every"), updates=2, kl_target=1e-3, seed=3)


@pytest.mark.parametrize("rollout batch", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_resumed_run_of_two_tasks_equals_the_uninterrupted_one(
    tiny: Path, tmp_path: Path, collection: int
) -> None:
    """Two epochs of three iterations; it dies in the second task of the second, or of the fourth."""
    settings: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": None}
    one = whole(tiny)
    fit(one, joint_data("a", "b"), tmp_path / "one", 3, **settings)
    died = tmp_path / "two", 3, BatchCheckpoint(), Dies(collection)
    with pytest.raises(RuntimeError, match="lights"):
        fit(whole(tiny), joint_data("a", "b"), *died, **settings)
    (saved,) = (tmp_path / "two").rglob("last.ckpt")
    two = whole(tiny)
    fit(
        two,
        joint_data("a", "b"),
        tmp_path / "two",
        3,
        max_epochs=2,
        limit_val_batches=None,
        ckpt_path=str(saved),
    )
    assert_same(trained(one), trained(two))
    assert one.step_scale == two.step_scale
    assert (one.images, one.denoising_steps) == (two.images, two.denoising_steps) == (96, 24)
    for name in one.tasks:
        assert one.tasks[name].advantages.state_dict() == two.tasks[name].advantages.state_dict()
    assert set(one.latest) == set(two.latest)
    assert all(torch.equal(one.latest[n].nan_to_num(9), two.latest[n].nan_to_num(9)) for n in one.latest)
    other = make(tiny, tasks={"a": Task(bank(Brightness()), BatchAdvantages())}, seed=3)
    with pytest.raises(ConfigError, match="resume with the config"):
        fit(other, joint_data("a"), tmp_path / "three", 3, ckpt_path=str(saved))


class ToFile(Callback):
    """Writes the weights and what was logged where another process can read them."""

    def __init__(self, path: Path) -> None:
        self.path, self.rewards = path, []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        wanted = ("train/reward/a", "train/reward/c", "train/unscored/a", "train/denoising_loss")
        self.rewards.append([float(trainer.logged_metrics[name]) for name in wanted])

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            torch.save({"weights": trained(pl_module), "rewards": self.rewards}, self.path)


def test_two_processes_are_one_for_rewards_of_groups_and_of_the_batch(tiny: Path, tmp_path: Path) -> None:
    found = {}
    for devices in (1, 2):
        tasks = {
            "a": Task(bank(EvenBrightness("shared")), BatchAdvantages()),
            "c": Task(bank(EvenBrightnessOfAll("leave_one_out")), BatchAdvantages()),
        }
        module = make(
            tiny,
            tasks=tasks,
            pretraining=extra(),
            shared_timesteps=2,
            seed=3,
            clip_norm=1e9,
            lr=1e-4,
        )
        path = tmp_path / f"{devices}.pt"
        strategy = "ddp_spawn" if devices == 2 else "auto"
        fit(module, joint_data("a", "c"), tmp_path, 2, ToFile(path), devices=devices, strategy=strategy)
        found[devices] = torch.load(path)
    for one, two in zip(found[1]["rewards"], found[2]["rewards"], strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-7)
    start = trained(make(tiny, rewards=bank(Still()), advantages=BatchAdvantages()))
    moved = [
        torch.cat([(w - s).flatten() for w, s in zip(found[d]["weights"], start, strict=True)])
        for d in (1, 2)
    ]
    assert moved[0].norm() > 0
    assert (moved[1] - moved[0]).norm() < 0.05 * moved[0].norm()


# ---- what is refused


class SeesThisRankAlone(Dark):
    scope = "batch"


@pytest.mark.parametrize(
    ("reward", "advantages", "images", "world", "named"),
    [
        (EvenBrightness("shared"), GroupAdvantages(), 4, 1, "a prompt share one score"),
        (EvenBrightness("shared"), BatchAdvantages(), 1, 1, "needs 2 images"),
        (EvenBrightness("leave_one_out"), GroupAdvantages(), 4, 1, ""),
        (EvenBrightness("shared"), BatchAdvantages(), 4, 1, ""),
        (EvenBrightnessOfAll("shared"), BatchAdvantages(), 1, 2, "a rollout batch share one score"),
        (EvenBrightnessOfAll("shared"), PerPromptAdvantages(), 1, 2, ""),
        (EvenBrightnessOfAll("leave_one_out"), BatchAdvantages(), 1, 2, ""),
        (SeesThisRankAlone(), BatchAdvantages(), 4, 2, "derive it from SetReward"),
        (SeesThisRankAlone(), BatchAdvantages(), 4, 1, ""),
        (Brightness(), GroupAdvantages(), 1, 1, "images_per_prompt"),
    ],
)
def test_an_impossible_pair_is_refused_with_the_remedy(
    reward: Reward, advantages: Advantages, images: int, world: int, named: str
) -> None:
    data = PromptDataModule(ShapesPrompts(["open"]), images_per_prompt=images, prompts_per_batch=4)
    if not named:
        check_task("a", Task(bank(reward), advantages), data, 1, world)
        return
    with pytest.raises(ConfigError, match=named):
        check_task("a", Task(bank(reward), advantages), data, 1, world)


@pytest.mark.parametrize(
    ("advantages", "prompts", "named"),
    [
        (BatchAdvantages(), 1, "prompts_per_batch above 1"),
        (BatchAdvantages(), 2, ""),
        (PerPromptAdvantages(buffer_size=4, min_count=2), 2, "its buffer_size, 4, to several times"),
        (PerPromptAdvantages(buffer_size=16, min_count=2), 2, ""),
    ],
)
def test_a_shared_score_needs_others_to_be_compared_with(
    advantages: Advantages, prompts: int, named: str
) -> None:
    data = PromptDataModule(ShapesPrompts(["open"]), images_per_prompt=4, prompts_per_batch=prompts)
    task = Task(bank(EvenBrightness("shared")), advantages)
    if not named:
        check_task("a", task, data, 1, 1)
        return
    with pytest.raises(ConfigError, match=named):
        check_task("a", task, data, 1, 1)


def test_a_collection_without_a_signal_is_told_and_leaves_the_step_alone(tiny: Path, tmp_path: Path) -> None:
    module = make(tiny, rewards=bank(Still()), advantages=BatchAdvantages(), kl_target=1.0)
    with pytest.warns(UserWarning, match="all advantages are 0"):
        fit(module, PromptDataModule(ShapesPrompts(["open"]), **SIZES), tmp_path, iterations=2)
    assert module.step_scale == {"": 1.0}


def test_a_task_of_no_images_is_not_given_the_default() -> None:
    with pytest.raises(ConfigError, match="images_per_prompt"):
        MultiTaskDataModule({"a": TaskPrompts(ShapesPrompts(["open"]), images_per_prompt=0)}, **SIZES)


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_a_set_that_could_not_be_scored_on_held_out_prompts_is_refused(stage: str) -> None:
    few: dict[str, Any] = {f"{stage}_images_per_prompt": 1}
    data = PromptDataModule(ShapesPrompts(["open"]), images_per_prompt=4, prompts_per_batch=4, **few)
    task = Task(bank(EvenBrightness("shared")), BatchAdvantages())
    with pytest.raises(ConfigError, match=rf"there are 1; raise data\.{stage}_images_per_prompt"):
        check_task("a", task, data, 1, 1)


def test_tasks_and_data_must_name_the_same(tiny: Path, tmp_path: Path) -> None:
    task = Task(bank(Brightness()), BatchAdvantages())
    with pytest.raises(ConfigError, match=r"the model has a, and the data b"):
        fit(make(tiny, tasks={"a": task}), joint_data("b"), tmp_path)
    with pytest.raises(ConfigError, match="a single one without a name"):
        fit(make(tiny, rewards=bank(Brightness()), advantages=BatchAdvantages()), joint_data("b"), tmp_path)
    with pytest.raises(ConfigError, match=r"give rewards and advantages, or tasks"):
        make(tiny)
    with pytest.raises(ConfigError, match=r"set model\.rewards and model\.advantages to null"):
        make(tiny, rewards=bank(Brightness()), advantages=BatchAdvantages(), tasks={"a": task})
    with pytest.raises(ConfigError, match="cannot be used as a tag"):
        make(tiny, tasks={"a b": task})
    with pytest.raises(ConfigError, match="negative"):
        make(tiny, tasks={"a": Task(bank(Brightness()), BatchAdvantages(), -1.0)})


def test_the_score_function_takes_no_update_of_another_task_in_between(tiny: Path) -> None:
    two = {name: Task(bank(Brightness()), BatchAdvantages()) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="set it to sequence"):
        make(tiny, tasks=two, task_order="interleaved", clip_range=None)
    make(tiny, tasks=two, clip_range=None)
    make(tiny, tasks=two | {"b": replace(two["b"], weight=0)}, task_order="interleaved", clip_range=None)
