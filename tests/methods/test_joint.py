"""Several tasks in one run: nothing of one reaches another. What every method does is in test_protocol.py."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.advantages import Advantages, BatchAdvantages, GroupAdvantages, PerPromptAdvantages
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import MultiTaskDataModule, PromptDataModule, ShapesPrompts, ShapesRenders, TaskPrompts
from lit_align.errors import ConfigError
from lit_align.methods import DDPOModule
from lit_align.methods.objectives import denoising_error
from lit_align.methods.pretraining import Order, Pretraining, denoising_loss
from lit_align.methods.tasks import Task, check_task
from lit_align.randomness import generator
from lit_align.rewards import Brightness, Redness, Reward
from tests.methods.build import (
    EvenBrightness,
    Greys,
    Unscored,
    assert_close_gradients,
    assert_same,
    bank,
    fit,
    flat,
    make,
    prompts,
    task_prompts,
    trained,
)
from tests.methods.recorders import Collected

make_ddpo = partial(make, DDPOModule)
FEW = {"prompts": 2, "images": 2}


class EvenBrightnessOfAll(EvenBrightness):
    scope = "batch"


class Still(Reward):
    """Likes all images alike: every advantage is 0."""

    differentiable = False
    scope = "sample"

    def forward(self, images, prompts, groups=None, columns=None):
        return torch.zeros(len(images))


class Loud(Brightness):
    """The same images, scored on another scale and with an offset."""

    def forward(self, images, prompts, groups=None, columns=None):
        return 1000 * super().forward(images, prompts, groups, columns) ** 3 + 77


def one_task(advantages: Advantages | None = None, weight: float = 1.0) -> dict[str, Task]:
    return {"a": Task(bank(Brightness()), advantages or BatchAdvantages(), weight)}


@pytest.mark.parametrize("order", ["sequence", "interleaved"])
def test_one_task_is_the_plain_run_bit_for_bit(tiny: Path, tmp_path: Path, order: str) -> None:
    options: dict[str, Any] = {"updates": 2, "kl_target": 1e-3, "num_steps": 3}
    plain = make_ddpo(tiny, Unscored(Brightness()), advantages=PerPromptAdvantages(8, 2), **options)
    tasks = {"a": Task(bank(Unscored(Brightness())), PerPromptAdvantages(8, 2))}
    joint = make_ddpo(tiny, tasks=tasks, task_order=order, **options)
    before = trained(plain)
    first = fit(plain, tmp_path, 3, data=prompts(2))
    second = fit(joint, tmp_path, 3)
    assert_same(trained(plain), trained(joint))
    assert not torch.equal(trained(plain)[1], before[1])
    for name in ("train/reward", "train/loss", "progress/images"):
        assert repr([f[name] for f in first.logged]) == repr([f[name] for f in second.logged])
    for name in ("train/kl", "train/step_scale", "train/unscored"):
        assert [f[name] for f in first.logged] == [f[f"{name}/a"] for f in second.logged]
    assert [f["train/reward/trained"] for f in first.logged] == [
        f["train/reward/a/trained"] for f in second.logged
    ]


@pytest.mark.parametrize("advantages", [BatchAdvantages, GroupAdvantages])
def test_advantages_of_a_task_do_not_know_the_other(
    tiny: Path, tmp_path: Path, advantages: type[Advantages]
) -> None:
    """Whatever the other task's rewards are; interleaved, so that both have sampled before any update."""
    found = []
    for other in (Redness(), Loud()):
        tasks = {"a": Task(bank(Brightness()), advantages()), "b": Task(bank(other), advantages())}
        collected = Collected()
        fit(make_ddpo(tiny, tasks=tasks, task_order="interleaved", num_steps=2), tmp_path, 1, collected)
        found.append(dict(collected.advantages))
    assert torch.equal(found[0]["a"], found[1]["a"])
    assert not torch.equal(found[0]["b"], found[1]["b"])
    for values in found:
        assert all(abs(float(one.sum())) < 1e-4 and one.abs().max() > 0.1 for one in values.values())


def test_tasks_sample_in_sequence_or_all_at_first(tiny: Path, tmp_path: Path) -> None:
    weights = []
    for order, sampled_at in (("sequence", [0, 2, 4, 6]), ("interleaved", [0, 0, 4, 4])):
        tasks = {name: Task(bank(Brightness()), BatchAdvantages()) for name in ("a", "b")}
        module, collected = (
            make_ddpo(tiny, tasks=tasks, task_order=order, updates=2, num_steps=3),
            Collected(),
        )
        recorder = fit(module, tmp_path, 2, collected)
        assert collected.sampled_at == sampled_at
        # Measured only while the weights are those that sampled: 1 up to rounding.
        assert all(metrics.get("train/ratio_deviation", 0.0) < 1e-4 for metrics in recorder.logged)
        assert module.images == 32
        weights.append(trained(module))
    assert not torch.equal(weights[0][1], weights[1][1])


def test_a_task_of_weight_zero_is_only_monitored(tiny: Path, tmp_path: Path) -> None:
    tasks = one_task() | {"b": Task(bank(Redness()), BatchAdvantages(), 0.0)}
    module, collected = make_ddpo(tiny, tasks=tasks, num_steps=2), Collected()
    fit(module, tmp_path, 2, collected, limit_val_batches=None)
    assert {task for task, _ in collected.advantages} == {"a"}
    assert module.latest["reward/b/trained"].isfinite().sum() == 8
    assert module.latest["reward/a/trained"].isfinite().sum() == 8
    # What is trained makes the reward, by which the best checkpoint is chosen.
    assert torch.equal(module.latest["reward"].isfinite(), module.latest["reward/a"].isfinite())
    with pytest.raises(ConfigError, match="all weights are 0"):
        make_ddpo(tiny, tasks=one_task(weight=0.0))


def test_a_weight_scales_the_step_of_its_task(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []
    for weight in (1.0, 0.25):
        module = make_ddpo(tiny, tasks=one_task(weight=weight), num_steps=2)
        before = trained(module)
        fit(module, tmp_path)
        moved.append(flat(trained(module)) - flat(before))
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-3, atol=1e-7)
    tasks = one_task() | {"b": Task(bank(Redness()), BatchAdvantages(), 0.25)}
    module = make_ddpo(tiny, tasks=tasks)
    module.step_scale["b"] = 2.0  # as by kl_target
    monkeypatch.setattr(module, "update", lambda losses, scale: scale)
    assert [module.optimise([], task) for task in ("a", "b")] == [1.0, 0.5]


def test_shared_timesteps_are_one_update_each_on_all_images(tiny: Path, tmp_path: Path) -> None:
    module, collected = make_ddpo(tiny, advantages=BatchAdvantages(), shared_timesteps=3), Collected()
    drawn: list[list[Any]] = []
    draw = module._draw_updates

    def recording(batch: Any, epoch: int) -> Any:
        drawn.append(draw(batch, epoch))
        return drawn[-1]

    module._draw_updates = recording  # type: ignore[method-assign]
    fit(module, tmp_path, 4, collected, data=prompts(2))
    assert collected.sampled_at == [0, 3, 6, 9]
    assert all(torch.equal(pairs.rows, torch.arange(8)) for parts in drawn for pairs in parts)
    steps = [[pairs.steps.unique() for pairs in parts] for parts in drawn]
    assert all(torch.cat(one).unique().numel() == 3 for one in steps)
    assert len({tuple(int(step) for step in one) for one in steps}) > 1
    for wrong in ({"shared_timesteps": 5}, {"shared_timesteps": 2, "updates": 2}):
        with pytest.raises(ConfigError, match="shared_timesteps"):
            make_ddpo(tiny, **wrong)


def test_an_image_without_a_score_has_no_advantage_and_is_counted(tiny: Path, tmp_path: Path) -> None:
    collected = Collected()
    module = make_ddpo(tiny, Unscored(Brightness()), advantages=BatchAdvantages(), num_steps=2)
    recorder = fit(module, tmp_path, 1, collected, data=prompts(2))
    share = recorder.logged[0]["train/unscored"]
    assert 0 < share < 1
    ((_, advantages),) = collected.advantages
    assert float((advantages == 0).float().mean()) == share


# ---- the pre-training loss


def extra(order: Order = "after", **options: Any) -> Pretraining:
    return Pretraining(Greys(), batch=4, order=order, **options)


def test_without_a_signal_an_iteration_is_one_step_of_the_denoising_loss(tiny: Path, tmp_path: Path) -> None:
    """Against the loss written out, for the same rows, timesteps and noise."""
    descent = partial(torch.optim.SGD, lr=1e-2)  # which stays where it is where there is no gradient
    common: dict[str, Any] = {
        "optimizer": descent,
        "clip_norm": 1e9,
        "seed": 3,
        "num_steps": 2,
        "micro_batch": 3,
    }
    found = []
    for order in ("before", "after", "every"):
        module = make_ddpo(tiny, Still(), pretraining=extra(order, weight=0.5), **common)
        module.step_scale[""] = 0.8  # as by kl_target
        fit(module, tmp_path, data=prompts(**FEW))
        found.append(trained(module))
    plain = make_ddpo(tiny, Still(), **common)
    before, backbone, schedule = trained(plain), plain.backbone, plain.sampler.schedule
    total = torch.zeros(())
    for number, row in enumerate(extra().rows(3, range(4))):
        draw = generator(3, "pretraining", number)
        t = torch.randint(1000, (), generator=draw)[None]
        noise = torch.randn(backbone.latent_shape, generator=draw)[None]
        x = schedule.add_noise(backbone.latents(Greys().image(row)[None]), noise, t)
        error = backbone.predict(x, t, backbone.encode([f"grey {row}"])) - noise
        total = total + error.square().mean() / 4
    gradients = torch.autograd.grad(total, [p for p in plain.parameters() if p.requires_grad])
    for weights in found:
        for after, start, gradient in zip(weights, before, gradients, strict=True):
            torch.testing.assert_close(after, start - 0.8 * 0.5e-2 * gradient, rtol=1e-5, atol=1e-7)


def test_the_loss_is_one_for_a_denoiser_that_predicts_nothing(tiny: Path) -> None:
    """Of standard noise, predicted as 0; and the schedule's target is the noise for an epsilon model."""
    module = make_ddpo(tiny, Still())
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
    with pytest.raises(ConfigError, match=OTHER_SIZE):
        denoising_loss(module.backbone, module.sampler, *ShapesRenders(["single"]).batch([0]), draws[:1])


OTHER_SIZE = r"64 x 64 pixels .*, but the model draws 16 x 16; give pretraining.source images of that size"


def test_captioned_images_of_another_size_are_refused_before_anything_is_sampled(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(DDPOModule, "sample", None)
    module = make_ddpo(tiny, pretraining=Pretraining(ShapesRenders(["single"]), batch=4))
    with pytest.raises(ConfigError, match=OTHER_SIZE):
        fit(module, tmp_path)


@pytest.mark.parametrize("order", ["before", "after", "every"])
def test_captioned_images_go_round_in_every_order(tiny: Path, tmp_path: Path, order: Order) -> None:
    asked, mixed_in = list[int](), extra(order)
    caption = mixed_in.source.caption
    mixed_in.source.caption = lambda row: asked.append(row) or caption(row)  # type: ignore[method-assign, func-returns-value]
    module, collected = make_ddpo(tiny, pretraining=mixed_in, updates=2, num_steps=2, seed=3), Collected()
    recorder = fit(module, tmp_path, 3, collected, data=prompts(**FEW))
    steps = 3 * (2 if order == "every" else 1)
    assert module.denoising_steps == steps
    assert asked[1:] == extra().rows(module.seed, range(4 * steps))  # the first was looked at before the fit
    assert collected.sampled_at == {"before": [1, 4, 7], "after": [0, 3, 6], "every": [0, 2, 4]}[order]
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


def test_two_processes_are_one_for_rewards_of_groups_and_of_the_batch(tiny: Path, tmp_path: Path) -> None:
    """As the protocol for DDPO, with rewards of sets, shared steps and updates on captioned images."""
    found = []
    for devices in (1, 2):
        tasks = {
            "a": Task(bank(EvenBrightness("shared")), BatchAdvantages()),
            "c": Task(bank(EvenBrightnessOfAll("leave_one_out")), BatchAdvantages()),
        }
        options: dict[str, Any] = {"shared_timesteps": 2, "seed": 3, "num_steps": 3}
        descent = partial(torch.optim.SGD, lr=1e-3)
        module = make_ddpo(tiny, tasks=tasks, pretraining=extra(), optimizer=descent, **options)
        found.append(fit(module, tmp_path / str(devices), 2, devices=devices))
    assert len(found[0].gradients) == 2 * (2 * 2 + 1)
    for one, two in zip(*(recorder.gradients for recorder in found), strict=True):
        assert_close_gradients(two, one)
    for name in ("train/reward/a", "train/reward/c", "train/denoising_loss"):
        one, two = ([metrics[name] for metrics in recorder.logged] for recorder in found)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-7)


def test_a_checkpoint_of_other_tasks_is_refused(tiny: Path, tmp_path: Path) -> None:
    fit(make_ddpo(tiny, num_steps=2), tmp_path, 1, BatchCheckpoint(), data=prompts(**FEW))
    (last,) = tmp_path.rglob("last.ckpt")
    with pytest.raises(ConfigError, match=r"a with BatchAdvantages\); resume with the config"):
        fit(make_ddpo(tiny, tasks=one_task()), tmp_path, 2, ckpt_path=last)
    with pytest.raises(ConfigError, match=r"one task with BatchAdvantages\); resume with the config"):
        fit(make_ddpo(tiny, advantages=BatchAdvantages()), tmp_path, 2, data=prompts(**FEW), ckpt_path=last)


# ---- what is refused


class SeesThisRankAlone(Still):
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


def test_a_batch_without_a_signal_is_told_and_leaves_the_step_alone(tiny: Path, tmp_path: Path) -> None:
    module = make_ddpo(tiny, Still(), advantages=BatchAdvantages(), kl_target=1.0, num_steps=2)
    with pytest.warns(UserWarning, match="all advantages are 0"):
        fit(module, tmp_path, 2, data=prompts(**FEW))
    assert module.step_scale == {"": 1.0}


def test_a_task_of_no_images_is_not_given_the_default() -> None:
    with pytest.raises(ConfigError, match="images_per_prompt"):
        MultiTaskDataModule({"a": TaskPrompts(ShapesPrompts(["open"]), images_per_prompt=0)})


@pytest.mark.parametrize("stage", ["validation", "test"])
def test_a_set_that_could_not_be_scored_on_held_out_prompts_is_refused(stage: str) -> None:
    few: dict[str, Any] = {f"{stage}_images_per_prompt": 1}
    data = PromptDataModule(ShapesPrompts(["open"]), images_per_prompt=4, prompts_per_batch=4, **few)
    task = Task(bank(EvenBrightness("shared")), BatchAdvantages())
    with pytest.raises(ConfigError, match=rf"there are 1; raise data\.{stage}_images_per_prompt"):
        check_task("a", task, data, 1, 1)


def test_tasks_and_data_must_name_the_same(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the model has a, and the data b"):
        fit(make_ddpo(tiny, tasks=one_task()), tmp_path, data=task_prompts("b"))
    with pytest.raises(ConfigError, match="a single one without a name"):
        fit(make_ddpo(tiny), tmp_path, data=task_prompts("b"))
    with pytest.raises(ConfigError, match=r"give rewards and advantages, or tasks"):
        make_ddpo(tiny, tasks={})
    with pytest.raises(ConfigError, match=r"set model\.rewards and model\.advantages to null"):
        make_ddpo(tiny, advantages=BatchAdvantages(), tasks=one_task())
    with pytest.raises(ConfigError, match="cannot be used as a tag"):
        make_ddpo(tiny, tasks={"a b": one_task()["a"]})
    with pytest.raises(ConfigError, match="negative"):
        make_ddpo(tiny, tasks=one_task(weight=-1.0))
    with pytest.raises(ConfigError, match="'at once' must be sequence or interleaved"):
        make_ddpo(tiny, tasks=one_task(), task_order="at once")


def test_the_score_function_takes_no_update_of_another_task_in_between(tiny: Path) -> None:
    two = {name: Task(bank(Brightness()), BatchAdvantages()) for name in ("a", "b")}
    with pytest.raises(ConfigError, match="set it to sequence"):
        make_ddpo(tiny, tasks=two, task_order="interleaved", clip_range=None)
    make_ddpo(tiny, tasks=two, clip_range=None)
    make_ddpo(tiny, tasks=two | {"b": replace(two["b"], weight=0)}, task_order="interleaved", clip_range=None)
