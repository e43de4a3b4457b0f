"""Numbers that are not finite: skipped, counted, told; past a limit the run ends and says what it skipped."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import Tensor

from lit_align.backbones import LoRA, StableDiffusionBackbone
from lit_align.callbacks import RunFolder, SkippedUpdates, checkpoint_callbacks
from lit_align.errors import ConfigError
from lit_align.methods import (
    AlignmentModule,
    AlignPropModule,
    DDPOModule,
    DPOModule,
    MSDDAModule,
    NFTModule,
    PRDPModule,
    SPINModule,
)
from lit_align.methods.sampling import Sampling
from lit_align.methods.skipped import LIMIT, NotFinite
from lit_align.rewards import Brightness, Redness, Reward, RewardBank
from tests.methods.build import assert_same, data_for, fit, flat, make, prompts, randomise, trained, trainer

SCORED: dict[str, type[AlignmentModule]] = {
    "ddpo": DDPOModule,
    "nft": NFTModule,
    "prdp": PRDPModule,
    "alignprop": AlignPropModule,
    "msdda": MSDDAModule,
}
SMALL: dict[str, Any] = {"prompts": 2, "images": 2}


def slowly(*values: Any) -> list[Any]:
    """Values that only the slow tests try."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class Given(Reward):
    """The brightness, and in its place a value for the images of some places."""

    differentiable = True

    def __init__(self, value: float, every: int = 2, after: int = 0) -> None:
        super().__init__()
        self.value, self.every, self.wait = value, every, after

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        scores, self.wait = images.mean(dim=(1, 2, 3)), self.wait - 1
        if self.wait >= 0:
            return scores
        return torch.where(torch.arange(len(images)) % self.every == 0, self.value, scores)


def with_reward(name: str, folder: Path, given: Reward, **options: Any) -> AlignmentModule:
    method = SCORED[name]
    if name == "msdda":
        rewards = RewardBank({"bright": given, "red": given}, {"bright": 10.0, "red": 30.0})
        return make(method, folder, rewards=rewards, num_steps=2, **options)
    return make(method, folder, given, num_steps=2, **options)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("value", [math.inf, *slowly(-math.inf, math.nan, 3e38, 1e30)])
def test_whatever_a_reward_says_the_weights_stay_finite(name: str, value: float, tiny: Path, tmp_path: Path):
    module = with_reward(name, tiny, Given(value))
    recorder = fit(module, tmp_path, data=prompts(**SMALL))
    assert flat(recorder.weights).isfinite().all()
    if not math.isfinite(value):
        assert recorder.logged[0]["train/unscored"] == 0.5


@pytest.mark.parametrize("name", SCORED)
def test_rollout_batches_without_a_score_change_nothing_and_end_the_run(
    name: str, tiny: Path, tmp_path: Path
):
    """Not even by the momentum and the decay of the optimizer, which has made a step before."""
    module = with_reward(
        name, tiny, Given(math.nan, every=1, after=2), optimizer=partial(torch.optim.AdamW, lr=1e-2)
    )
    states: list[list[Tensor]] = []

    class Weights(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            states.append(trained(module))

    run = tmp_path / "run"
    runs = trainer(tmp_path, 2 * LIMIT, RunFolder(run), Weights(), SkippedUpdates())
    with pytest.raises(NotFinite, match=f"no image of the last {LIMIT} rollout batches has a finite score"):
        runs.fit(module, prompts(**SMALL))
    good = 1 if name == "msdda" else 2  # two rewards ask twice a batch
    assert_same(states[good - 1], states[-1])
    assert_same(states[good - 1], trained(module))
    told = json.loads((run / "non_finite.json").read_text())
    assert "no image of the last" in told["error"]
    assert len(told["skipped"]) == LIMIT
    rows = told["skipped"][-1]["rows"]
    assert len(rows) == 4
    assert all(row["prompt"] and row["reward"] == "nan" for row in rows)


def test_updates_without_a_finite_gradient_end_the_run_and_good_checkpoints_stay(tiny: Path, tmp_path: Path):
    """A learning rate that explodes in the second epoch: the update itself is finite, what follows is not."""
    explodes = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda k: 1.0 if k < 2 else 1e39)
    module = make(DDPOModule, tiny, num_steps=2, lr=1e-3, lr_scheduler=explodes)
    run = tmp_path / "run"
    callbacks = [RunFolder(run), SkippedUpdates(), *checkpoint_callbacks()]
    runs = trainer(tmp_path, 2, *callbacks, max_epochs=9, limit_val_batches=1)
    with pytest.raises(NotFinite, match=r"finite score|not finite.*best\.ckpt"):
        runs.fit(module, prompts(**SMALL))
    told = json.loads((run / "non_finite.json").read_text())
    assert told["skipped"][-1]["rows"][0]["prompt"]
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["progress"]["images"] == 8
    assert flat(list(best["state_dict"].values())).isfinite().all()
    again = make(DDPOModule, tiny, num_steps=2, lr=1e-3)
    trainer(tmp_path, 1).validate(again, prompts(**SMALL), ckpt_path=run / "checkpoints" / "best.ckpt")
    assert again.images == 8


@pytest.mark.parametrize("method", [DDPOModule, *slowly(SPINModule, DPOModule)])
def test_gradients_that_are_not_finite_are_skipped_with_their_losses(
    method, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = {"steps": 2 * LIMIT} if method is SPINModule else {}
    module = make(method, tiny, num_steps=2, micro_batch=2, **own)
    name = "_loss" if method is DDPOModule else "_part"
    compute, calls = getattr(module, name), iter(range(10**6))

    def broken(*arguments: Any) -> Any:
        loss, metrics = compute(*arguments)
        return (loss * math.nan if next(calls) % 2 else loss), metrics

    monkeypatch.setattr(module, name, broken)
    before = trained(module)
    run = tmp_path / "run"
    with pytest.raises(NotFinite, match=f"last {LIMIT} updates had gradients that are not finite"):
        trainer(tmp_path, 2 * LIMIT, RunFolder(run), SkippedUpdates(), max_epochs=9).fit(
            module, data_for(module, **(SMALL if method is DDPOModule else {}))
        )
    if method is not SPINModule:  # whose opponent is among what is kept
        assert_same(trained(module), before)
    told = json.loads((run / "non_finite.json").read_text())
    assert len(told["skipped"]) == LIMIT
    assert told["skipped"][0]["reason"] == "the norm of an update's gradient is nan"
    assert math.isfinite(told["skipped"][0]["losses"][0])
    assert told["skipped"][0]["losses"][1] == "nan"
    assert {"image", "prompt"} <= set(told["skipped"][0]["rows"][0])


def tear(module: AlignmentModule, *images: int) -> None:
    """Let the chains of some images begin with what is not a number."""
    draw = module.draw_noise

    def torn(index: Tensor, purpose: str, seed: int | None = None) -> Any:
        noise, draws = draw(index, purpose, seed)
        noise[torch.isin(index, torch.tensor(images))] = math.nan
        return noise, draws

    module.draw_noise = torn  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["ddpo", "msdda", *slowly("nft", "prdp")])
def test_a_chain_that_is_not_finite_costs_its_own_image_alone(name: str, tiny: Path, tmp_path: Path):
    module = with_reward(name, tiny, Brightness())
    randomise(module, 0.1)
    before = trained(module)
    tear(module, 0)
    recorder = fit(module, tmp_path, data=prompts(prompts=2, images=4))
    assert recorder.logged[0]["train/unscored"] == 1 / 8
    if name == "msdda":  # from the reference: that of the other images
        assert recorder.logged[0]["train/kl"] < 200
    assert flat(recorder.weights).isfinite().all()
    assert not torch.equal(flat(before), flat(recorder.weights))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("ddpo", "bf16-mixed"),
        ("prdp", "32-true"),
        pytest.param("ddpo", "32-true", marks=pytest.mark.slow),
        pytest.param("prdp", "bf16-mixed", marks=pytest.mark.slow),
    ],
)
def test_a_chain_that_is_not_finite_is_not_measured(name: str, precision: Any, tiny: Path, tmp_path: Path):
    """What a rollout batch says of its updates is in the range that the other images give."""
    own = {"prdp": {"inner_epochs": 2}, "ddpo": {"inner_epochs": 2, "kl_target": 1.0}}[name]
    found = []
    for torn in ((), (0,), (0, 4)):  # of the first image of a prompt the KL is measured
        module = with_reward(name, tiny, Brightness(), lr=1e-4, **own)
        randomise(module, 0.1)
        tear(module, *torn)
        recorder = fit(module, tmp_path, data=prompts(prompts=2, images=4), precision=precision)
        found.append(recorder.logged[0])
    whole, one, both = found
    assert abs(one["train/kl"]) < 0.5
    assert one["train/clip_fraction"] <= whole["train/clip_fraction"] + 0.05
    assert one.get("train/ratio_deviation", 0.0) < 1e-3
    assert math.isnan(both["train/kl"])
    if name == "ddpo":
        assert one["train/step_scale"] == whole["train/step_scale"] == 1.5
        assert "train/step_scale" not in both  # nothing was measured
    else:
        assert one["train/reference_kl"] < 2 * whole["train/reference_kl"]


@pytest.mark.parametrize("name", ["msdda", *slowly("ddpo", "nft", "alignprop")])
def test_a_penalty_does_not_pull_at_images_without_a_score(name: str, tiny: Path, tmp_path: Path):
    """With one scored image of two, all pull is at that one: the gradient does not see the other's noise."""
    own = {
        "ddpo": {"kl_weight": 10.0},
        "nft": {"reference_weight": 10.0},
        "alignprop": {"kl_weight": 10.0, "eta": 1.0},
        "msdda": {"beta": 10.0},
    }[name]
    found = []
    for moved in (False, True):
        module = with_reward(name, tiny, Given(math.nan), micro_batch=64, **own)
        randomise(module, 0.1)
        draw = module.draw_noise

        def elsewhere(index: Tensor, purpose: str, seed: int | None = None, moved=moved, draw=draw) -> Any:
            other = torch.where((torch.arange(len(index)) % 2 == 0) & moved, index + 1000, index)
            return draw(other, purpose, seed)

        module.draw_noise = elsewhere  # type: ignore[method-assign]
        recorder = fit(module, tmp_path, data=prompts(prompts=2, images=4))
        found.append(flat(recorder.gradients[0]))
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def test_a_reward_of_what_is_no_image_is_no_score():
    rewards = RewardBank({"a": Redness(), "b": Given(1.0, every=1)}, {"a": 1.0, "b": 1.0})
    images = torch.rand(3, 3, 8, 8)
    images[1, 0, 0, 0] = math.nan
    output = rewards(images, ["", "", ""])
    for scores in (output.total, *output.parts.values(), *output.report.values()):
        assert scores.isnan().tolist() == [False, True, False]
    huge = RewardBank({"a": Given(3e38, every=1)}, {"a": 10.0})(images[:1], [""])
    assert huge.total.isnan().all()
    assert huge.report["reward"].isnan().all()


def test_weights_that_are_not_finite_are_refused(tiny: Path, tmp_path: Path):
    module = make(DDPOModule, tiny, num_steps=2)
    runs = trainer(tmp_path, 1)
    runs.fit(module, prompts(**SMALL))
    runs.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    next(iter(saved["state_dict"].values()))[0, 0] = math.nan
    torch.save(saved, tmp_path / "b.ckpt")
    with pytest.raises(ConfigError, match=r"not finite: the run had gone wrong.*best\.ckpt"):
        trainer(tmp_path, 1).validate(module, prompts(**SMALL), ckpt_path=tmp_path / "b.ckpt")
    folder = tmp_path / "adapter"
    randomise(module)
    next(p for p in module.parameters() if p.requires_grad).data[0, 0] = math.nan
    module.export(folder)
    with pytest.raises(ConfigError, match=r"adapter.* holds numbers that are not finite; give another"):
        StableDiffusionBackbone(str(tiny), lora=LoRA(), adapters={str(folder): 1.0})


@pytest.mark.parametrize("rate", [math.inf, math.nan, torch.tensor(math.nan)])
def test_a_rate_that_is_no_number_is_refused(rate: Any, tiny: Path):
    with pytest.raises(ConfigError, match=r"lr is (inf|nan); give a finite number"):
        make(DDPOModule, tiny, optimizer=partial(torch.optim.SGD, lr=rate)).configure_optimizers()
    with pytest.raises(ConfigError, match=r"guidance is (inf|nan)"):
        Sampling(guidance=float(rate))
