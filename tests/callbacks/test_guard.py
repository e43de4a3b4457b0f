"""The guard in small runs whose trained reward is the opposite of a held-out one."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from torch import Tensor
from transformers.optimization import Adafactor

from lit_align.advantages import GroupAdvantages
from lit_align.callbacks import (
    AdapterExport,
    BatchCheckpoint,
    BestCheckpoint,
    Guard,
    RunFolder,
)
from lit_align.callbacks.summary import RunSummary, read_report
from lit_align.callbacks.trouble import UNKNOWN, bounds, validations
from lit_align.errors import ConfigError
from lit_align.methods import AlignmentModule, AlignPropModule, DDPOModule, DPOModule, NFTModule, SPINModule
from lit_align.methods.tasks import Task
from lit_align.rewards import Brightness, Redness, Reward, RewardBank
from tests.methods.build import (
    Recorder,
    bank,
    fit,
    make,
    pairs,
    prompts,
    task_prompts,
    trained,
    trainer,
)

SIZES = {"validation_prompts": 12, "validation_images_per_prompt": 2}
EVERY_BATCH = {"limit_val_batches": 1.0, "val_check_interval": 1}
BATCHES = 4
STEPS = {"num_steps": 2}


class Darkness(Reward):
    """What falls as the brightness rises."""

    differentiable = True

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return -images.mean(dim=(1, 2, 3))


class Still(Reward):
    """What never rises."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return images.new_zeros(len(images))


class Served(Darkness):
    """The darkness, from a server that is down at first; then for the first images of a batch it is up."""

    def __init__(self, answered: int) -> None:
        super().__init__()
        self.answered = answered

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores = super().forward(images, prompts)
        return torch.where(torch.arange(len(images)) < self.answered, scores, torch.nan)


class Repaired(Callback):
    """Lets :class:`Served` answer from the first rollout batch on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.rewards.rewards["dark"].answered = 10**6


def exploited(tiny: Path, lr: float = 1e-2, method: type[Any] = AlignPropModule, **options: Any) -> Any:
    rewards = RewardBank({"bright": Brightness(), "dark": Darkness()}, {"bright": 1.0})
    return make(method, tiny, rewards=rewards, lr=lr, seed=0, **STEPS | options)


def run(
    module: AlignmentModule, folder: Path, guard: Guard | None, *more: Callback, **options: Any
) -> Recorder:
    """Train with a validation after every rollout batch."""
    data = prompts(2, 4, **SIZES)
    guards = [guard] if guard else []
    return fit(module, folder, BATCHES, RunFolder(folder), *guards, *more, data=data, **EVERY_BATCH | options)


def saved(folder: Path, name: str = "last") -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return content


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_warning_changes_nothing_and_is_not_repeated_before_it_is_worse(tiny, tmp_path):
    alone = run(exploited(tiny), tmp_path / "alone", None)
    with pytest.warns(UserWarning, match="guard: ") as told:
        watched = run(exploited(tiny), tmp_path / "guard", Guard())
    assert all(map(torch.equal, alone.weights, watched.weights))
    told = [str(one.message) for one in told if "guard: " in str(one.message)]
    assert "after 8 images reward/dark fell by 0." in told[0]
    assert "since the best validation, at 0 images: nothing is changed" in told[0]
    (kept,) = (tmp_path / "guard" / "checkpoints").glob("guard_*")
    assert kept.name == "guard_00000000.ckpt"
    start = torch.load(kept, weights_only=True)
    assert not any(values.any() for name, values in start["state_dict"].items() if "lora_B" in name)


def test_after_a_warning_there_is_trouble_only_beyond_what_was_told(tmp_path):
    guard, running, groups = Guard(), trainer(tmp_path, 1), torch.arange(40)
    names = ("reward/truth", "diversity", "saturation", "high_frequency")
    best = {name: torch.linspace(0, 1, 40) for name in names}
    wiggle = 0.01 * torch.cos(torch.arange(40.0))
    fallen, further = (best | {"reward/truth": best["reward/truth"] - by + wiggle} for by in (0.2, 0.4))
    guard._rewards, guard._best = ["reward/truth"], best
    assert guard._changes(running, fallen, groups)[0].certain
    guard._acted = fallen
    assert not guard._changes(running, fallen, groups)[0].certain
    assert guard._changes(running, further, groups)[0].certain
    # A new best validation is compared with from then on, whatever was told before.
    guard._keep(trainer(tmp_path, 1, fast_dev_run=True), SimpleNamespace(latest=best, images=8))
    assert guard._changes(running, fallen, groups)[0].certain


def test_its_options_decide_what_is_trouble(tmp_path):
    running, wiggle = trainer(tmp_path, 1), 0.01 * torch.cos(torch.arange(40.0))
    names = ("reward/truth", "diversity", "saturation", "high_frequency", "kl")
    best = {name: torch.linspace(0, 1, 40) for name in names}
    now = best | {"reward/truth": best["reward/truth"] - 0.002 + wiggle, "kl": 5 + wiggle}

    def evidence(name: str, **options: float) -> float:
        guard = Guard(**options)  # type: ignore[arg-type]
        guard._rewards, guard._best = ["reward/truth"], best
        changes = guard._changes(running, now, torch.arange(40))
        return next(one.evidence for one in changes if one.name == name)

    assert [evidence("kl", max_distance=limit) >= 1 for limit in (4.0, 6.0)] == [True, False]
    assert evidence("kl") == 0
    assert 0 < evidence("reward/truth", false_alarms=1e-3) < evidence("reward/truth", false_alarms=0.1)


def test_a_run_in_trouble_stops_and_stays_stopped(tiny, tmp_path):
    guards = [Guard("stop"), BatchCheckpoint()]
    with pytest.warns(UserWarning, match="the run stops; its weights are in"):
        ended = run(exploited(tiny), tmp_path, *guards)
    assert ended.at == [0, 8]
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="this run was stopped"):
        again = run(exploited(tiny), tmp_path, Guard("stop"), BatchCheckpoint(), ckpt_path=last)
    assert again.at == []
    goes_on = run(exploited(tiny), tmp_path, Guard(), BatchCheckpoint(), ckpt_path=last)
    assert goes_on.at == [16, 24, 32]


def test_a_lower_rate_is_kept_and_told(tiny, tmp_path):
    schedule = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (step + 1))
    with pytest.warns(UserWarning, match="the learning rate is 0.1 of what it was configured"):
        found = run(
            exploited(tiny, lr_scheduler=schedule), tmp_path, Guard("lower_rate", 0.1), BatchCheckpoint()
        )
    rates = [logged["train/lr"] for logged in found.logged]
    assert rates[:2] == pytest.approx([1e-2, 1e-2 / 2 * 0.1])  # what a schedule makes of it stays
    factor = saved(tmp_path)["progress"]["rate_factor"]
    assert any(factor == pytest.approx(0.1**times) for times in range(1, BATCHES + 1))


def test_a_kl_target_falls_with_the_rate(tiny):
    module = make(DDPOModule, tiny, kl_target=0.01)
    module._trainer = trainer(Path(), 1)
    optimizer = module.configure_optimizers()
    module._trainer.strategy.optimizers = [optimizer]
    kl = torch.tensor(0.01)
    assert module._scale_step("", kl, 0.01) == 1.0
    module.rate_factor = 0.8
    assert module._scale_step("", kl * 0.64, 0.01) == pytest.approx(1.0)


class Before(Callback):
    """Keeps the state at the first validation of some images, before the guard sees it."""

    def __init__(self) -> None:
        self.moments: dict[int, Any] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        (optimizer,) = trainer.optimizers
        steps = {int(state["step"]) for state in optimizer.state.values()}
        self.moments[pl_module.images] = (trained(pl_module), steps, trainer.global_step)


def test_a_rollback_takes_weights_and_moments_back_and_no_counter(tiny, tmp_path):
    slower = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1.0 if step < 1 else 0.9)
    # With two steps a later validation is better.
    module, seen = exploited(tiny, num_steps=4, lr_scheduler=slower), Before()
    with pytest.warns(UserWarning, match="its weights are restored, and the learning rate is 0.5"):
        found = run(
            module,
            tmp_path,
            Guard("rollback"),
            AdapterExport(),
            BestCheckpoint(),
            BatchCheckpoint(),
            RunSummary(),
            seen,
        )
    assert found.at == [0, 8, 16, 24, 32]
    assert [one["train/lr"] for one in found.logged[:2]] == pytest.approx([1e-2, 0.9 * 0.5e-2])
    start = seen.moments[0][0]
    weights, steps, updates = seen.moments[8]
    assert all(map(torch.equal, weights, start))
    assert steps == set()  # nothing had been learnt then
    assert updates == 1
    assert module.images == 32
    last, guard = saved(tmp_path), saved(tmp_path, "guard_00000000")
    assert last["progress"]["images"] == 32
    assert last["global_step"] == BATCHES
    # Lightning keeps none of a run's beginning, and of the others the weights were given up.
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()
    assert same(last["progress"]["latest"], guard["progress"]["latest"])
    assert same(last["state_dict"], guard["state_dict"])
    measured = read_report(tmp_path / "validation.json")["metrics"]["reward"]
    assert measured["after"] == measured["before"] == pytest.approx(module.baseline["reward"].mean().item())


@pytest.mark.parametrize("action", [pytest.param("lower_rate", marks=pytest.mark.slow), "rollback"])
def test_a_run_that_goes_on_acts_as_if_it_had_never_ended(action, tiny, tmp_path):
    def once(folder: Path, **options: Any) -> dict[str, Any]:
        callbacks = [Guard(action), BestCheckpoint(), BatchCheckpoint()]
        with pytest.warns(UserWarning, match="guard: "):
            run(exploited(tiny, lr=3e-3), folder, *callbacks, **options)
        return saved(folder)

    whole = once(tmp_path / "whole", max_epochs=2)
    once(tmp_path / "parts")
    parts = once(tmp_path / "parts", max_epochs=2, ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "progress"):
        assert equal(whole[part], parts[part]), part
    assert equal(whole["callbacks"]["Guard"], parts["callbacks"]["Guard"])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def in_vain(tiny: Path) -> Any:
    """A run whose trained reward rises, and the held-out one neither rises nor falls."""
    rewards = RewardBank({"bright": Brightness(), "still": Still()}, {"bright": 1.0})
    return make(AlignPropModule, tiny, rewards=rewards, lr=1e-2, seed=0, **STEPS)


def test_a_reward_that_rises_in_vain_is_trouble_after_some_validations(tiny, tmp_path):
    with pytest.warns(UserWarning, match="guard: ") as told:
        found = run(in_vain(tiny), tmp_path / "guard", Guard("stop", patience=2), BatchCheckpoint())
    assert found.at == [0, 8, 16]
    (told,) = [str(one.message) for one in told if "guard: " in str(one.message)]
    assert "after 16 images reward rose by 0." in told
    assert "and reward/still did not, for 2 validations, since the best validation, at 0 images" in told
    with pytest.warns(UserWarning, match=r"after 24 images reward rose .* for 3 validations"):
        run(in_vain(tiny), tmp_path / "patient", Guard())


def test_what_rises_in_vain_is_counted_on_when_a_run_goes_on(tiny, tmp_path):
    run(in_vain(tiny), tmp_path, Guard("stop", patience=6), BatchCheckpoint())
    assert saved(tmp_path)["callbacks"]["Guard"]["in_vain"] == BATCHES
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.warns(UserWarning, match="for 6 validations"):
        run(
            in_vain(tiny),
            tmp_path,
            Guard("stop", patience=6),
            BatchCheckpoint(),
            ckpt_path=last,
            max_epochs=2,
        )


def test_a_patience_that_outlasts_the_fit_is_told(tiny, tmp_path):
    with pytest.warns(UserWarning, match=r"guard: patience 3 is more than the validations of this fit \(1\)"):
        run(in_vain(tiny), tmp_path, Guard(), val_check_interval=BATCHES)


def test_a_checkpoint_that_counted_nothing_in_vain_is_taken():
    guard, earlier = Guard(), Guard().state_dict()
    del earlier["in_vain"]
    guard.load_state_dict(earlier)
    assert guard.state_dict()["in_vain"] == 0


def test_where_no_reward_is_trained_on_none_rises_in_vain():
    rewards = ["reward/bright", "reward/dark"]
    names = ("reward", *rewards, "diversity", "saturation", "high_frequency")
    measured = {name: torch.rand(24) for name in names}
    on_pairs, on_bright = (bounds(measured, held, 4, 0.01, None) for held in (rewards, rewards[1:]))
    assert "reward" not in [one.name for one in on_pairs]
    assert "reward" in [one.name for one in on_bright]


def test_a_better_validation_is_the_best_and_older_files_go(tiny, tmp_path):
    rewards = RewardBank({"bright": Brightness(), "watched": Brightness()}, {"bright": 1.0})
    module = make(AlignPropModule, tiny, rewards=rewards, lr=1e-2, seed=0, **STEPS)
    run(module, tmp_path, Guard("rollback"), BatchCheckpoint())
    (kept,) = (tmp_path / "checkpoints").glob("guard_*")
    assert kept.name == "guard_00000032.ckpt"
    assert same(saved(tmp_path)["state_dict"], torch.load(kept, weights_only=True)["state_dict"])
    assert saved(tmp_path)["callbacks"]["Guard"]["best_images"] == 32


@pytest.mark.parametrize("answered", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_validation_without_scores_is_the_best_only_until_the_next(answered, tiny, tmp_path):
    rewards = RewardBank({"bright": Brightness(), "dark": Served(answered)}, {"bright": 1.0})
    module = make(AlignPropModule, tiny, rewards=rewards, lr=1e-2, seed=0, **STEPS)
    with pytest.warns(UserWarning, match=r"reward/dark fell by .* since the best validation, at 8 images"):
        run(module, tmp_path, Guard(), Repaired())
    (kept,) = (tmp_path / "checkpoints").glob("guard_*")
    assert kept.name == "guard_00000008.ckpt"


def test_what_is_now_measured_otherwise_is_not_compared(tiny, tmp_path):
    module = exploited(tiny)
    guard = Guard()
    guard._best, guard._pretrained = {"reward/dark": torch.ones(24)}, {"reward/dark": 24.0}
    module.baseline = module.latest = {"reward/dark": torch.full((24,), 2.0)}
    module.prompt_groups = torch.arange(12).repeat_interleave(2)
    guard._forget_other_measurements(module)
    assert guard._best == {}


@pytest.mark.slow
def test_two_processes_decide_alike(tiny, tmp_path):
    recorder = fit(
        exploited(tiny),
        tmp_path,
        2,
        RunFolder(tmp_path),
        Guard("rollback"),
        BatchCheckpoint(),
        data=prompts(2, 4, **SIZES),
        devices=2,
        **EVERY_BATCH,
    )
    assert recorder.at == [0, 8, 16]
    last, guard = saved(tmp_path), saved(tmp_path, "guard_00000000")
    assert same(last["state_dict"], guard["state_dict"])
    assert last["progress"]["rate_factor"] == 0.25


REFUSED = {
    "nothing held out": (Guard(), lambda t: make(DDPOModule, t, rewards=_all()), "all rewards are trained"),
    "an unknown name": (Guard(reward="bright"), exploited, "'bright' is not held out; give one of dark"),
    "iterations": (Guard("rollback"), lambda t: make(SPINModule, t), "SPINModule cannot go back"),
    "no rate": (
        Guard("lower_rate"),
        lambda t: exploited(t, optimizer=partial(Adafactor, lr=None)),
        "no learning rate to lower",
    ),
}


def _all() -> RewardBank:
    return RewardBank({"bright": Brightness(), "red": Redness()}, {"bright": 1.0, "red": 1.0})


@pytest.mark.parametrize("reason", REFUSED)
def test_a_run_that_cannot_be_watched_is_refused_in_a_sentence(reason, tiny, tmp_path):
    guard, module, told = REFUSED[reason]
    with pytest.raises(ConfigError, match=told) as refused:
        fit(module(tiny), tmp_path, 1, guard, **EVERY_BATCH)
    assert "\n" not in str(refused.value)


def test_a_run_without_validation_or_with_the_guard_too_late_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"no validation; raise trainer\.limit_val_batches"):
        fit(exploited(tiny), tmp_path, 1, Guard())
    with pytest.raises(ConfigError, match="comes after AdapterExport"):
        fit(exploited(tiny), tmp_path, 1, AdapterExport(), Guard(), **EVERY_BATCH)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"action": "panic"}, "'panic' is none of warn, stop, lower_rate, rollback"),
        ({"factor": 1.0}, "factor 1.0 must be between 0 and 1"),
        ({"false_alarms": 0}, "false_alarms 0 must be between 0 and 1"),
        ({"max_distance": -1.0}, "max_distance -1.0 must be positive"),
        ({"patience": 0}, "patience 0 must be at least 1 validation"),
        ({"patience": float("nan")}, "patience nan must be at least 1 validation"),
    ],
)
def test_values_that_cannot_work_are_refused(options, told):
    with pytest.raises(ConfigError, match=told):
        Guard(**options)


def test_what_is_held_out(tiny):
    assert exploited(tiny).held_out == ("reward/dark",)
    assert make(DPOModule, tiny).held_out == ("reward/trained", "reward/monitored")
    assert Guard()._decided_by(("reward/clip", "reward/truth")) == ["reward/truth", "reward/clip"]
    assert Guard()._decided_by(("reward/clip",)) == ["reward/clip"]
    assert Guard(reward="clip")._decided_by(("reward/truth", "reward/clip"))[0] == "reward/clip"
    tasks = {"a": Task(bank(), GroupAdvantages()), "b": Task(bank(), GroupAdvantages(), weight=0.0)}
    module = make(DDPOModule, tiny, tasks=tasks)
    assert module.held_out == ("reward/a/monitored", "reward/b/monitored")


@pytest.mark.slow
@pytest.mark.parametrize("method", [DDPOModule, NFTModule, DPOModule])
def test_methods_with_state_of_their_own_go_back(method, tiny_attentive, tmp_path):
    """DDPO with several tasks, NFT with its old policy, and a method on pairs."""
    if method is DPOModule:
        module, data = make(method, tiny_attentive, lr=1.0, num_steps=4), pairs(**SIZES)
    elif method is NFTModule:
        module, data = exploited(tiny_attentive, 1e-2, NFTModule, num_steps=4), prompts(2, 4, **SIZES)
    else:
        rewards = RewardBank({"bright": Brightness(), "still": Still()}, {"bright": 1.0})
        tasks = {name: Task(rewards, GroupAdvantages()) for name in "ab"}
        module = make(method, tiny_attentive, tasks=tasks, lr=1e-2, num_steps=4)
        data = task_prompts("a", "b", **SIZES)
    callbacks = [RunFolder(tmp_path), Guard("rollback", max_distance=1e-6), BatchCheckpoint()]
    fit(module, tmp_path, 3, *callbacks, data=data, **EVERY_BATCH)
    last = saved(tmp_path)
    guard = saved(tmp_path, f"guard_{last['callbacks']['Guard']['best_images']:08d}")
    assert last["progress"]["rate_factor"] < 1
    assert same(last["state_dict"], guard["state_dict"])
    assert module.images == last["progress"]["images"]


class Length:
    """What a Trainer says of its length."""

    def __init__(self, epochs: Any, batches: Any, each: Any, every: Any) -> None:
        self.max_epochs, self.num_training_batches = epochs, batches
        self.val_check_batch, self.check_val_every_n_epoch = each, every


@pytest.mark.parametrize(
    ("length", "count"),
    [
        ((3, 8, 8, 1), 3),
        ((3, 8, 2, 1), 12),
        ((8, 8, 8, 4), 2),
        ((3, 8, 6, None), 4),
        ((3, 8, float("inf"), 1), 3),
        ((-1, 8, 8, 1), UNKNOWN),
        ((2, float("inf"), 5, None), UNKNOWN),
    ],
)
def test_the_validations_of_a_fit_are_counted(length, count):
    assert validations(Length(*length)) == count  # type: ignore[arg-type]
