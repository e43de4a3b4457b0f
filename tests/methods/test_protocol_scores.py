"""What every method must make of scores: none is no signal, no noise is no KL, and a reward is learnt."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lit_align.advantages import GroupAdvantages
from lit_align.backbones import POLICY, REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods import (
    AlignmentModule,
    AlignPropModule,
    DDPOModule,
    DPOModule,
    MSDDAModule,
    NFTModule,
    PRDPModule,
    SFTModule,
    SPINModule,
)
from lit_align.methods.alignprop import NoTruncation
from lit_align.methods.nft import AWM
from lit_align.methods.tasks import Task
from lit_align.methods.validation import kl_to_reference
from lit_align.rewards import Brightness, Redness, RewardBank
from lit_align.rollout import Trajectory
from tests.methods.build import (
    Unscored,
    assert_close_gradients,
    assert_same,
    bank,
    data_for,
    draw,
    fit,
    flat,
    held_out,
    make,
    prompts,
    randomise,
    trained,
    trainer,
)
from tests.pipelines import SCHEDULE, make_pipeline

# ---- images without a score

METHODS: dict[str, type[AlignmentModule]] = {
    "ddpo": DDPOModule,
    "joint": DDPOModule,
    "nft": NFTModule,
    "prdp": PRDPModule,
    "alignprop": AlignPropModule,
    "msdda": MSDDAModule,
    "spin": SPINModule,
    "dpo": DPOModule,
    "sft": SFTModule,
}
SCORED = ["ddpo", "joint", "nft", "prdp", "alignprop", "msdda"]
"""Methods that learn from scores of their own images."""


def half_scored(name: str, folder: Path) -> AlignmentModule:
    """A module whose reward has no score for the images at even places; nothing else pulls at the policy."""
    method = METHODS[name]
    if name == "joint":
        tasks = {task: Task(bank(Unscored(Brightness())), GroupAdvantages()) for task in ("a", "b")}
        return make(method, folder, tasks=tasks, micro_batch=64, num_steps=2)
    if name == "msdda":
        rewards = RewardBank(
            {"bright": Unscored(Brightness()), "red": Unscored(Redness())}, {"bright": 10, "red": 30}
        )
        return make(method, folder, rewards=rewards, micro_batch=64, num_steps=2)
    own = {"alignprop": {"truncation": NoTruncation()}}.get(name, {})  # micro-batches in the order of images
    scored = Redness() if name == "alignprop" else Brightness()
    return make(method, folder, Unscored(scored), micro_batch=64, num_steps=2, **own)


@pytest.mark.parametrize("name", SCORED)
def test_an_image_without_a_score_moves_nothing(name: str, tiny: Path, tmp_path: Path) -> None:
    """Another image in its place changes no gradient, one in the place of a scored image does."""
    found = []
    for places in (-1, 0, 1):
        module = half_scored(name, tiny)
        draw_noise = module.draw_noise

        def elsewhere(
            index: Tensor, purpose: str, seed: int | None = None, places=places, draw_noise=draw_noise
        ):
            other = torch.where(torch.arange(len(index)) % 2 == places, index + 1000, index)
            return draw_noise(other if purpose == "rollout" else index, purpose, seed)

        module.draw_noise = elsewhere  # type: ignore[method-assign]
        recorder = fit(module, tmp_path, data=data_for(module, prompts=2, images=4))
        found.append(recorder.gradients[0])
        assert flat(recorder.weights).isfinite().all()
        assert math.isfinite(recorder.logged[0]["train/reward"])
    assert_close_gradients(found[0], found[1])
    with pytest.raises(AssertionError):
        assert_close_gradients(found[0], found[2], 1e-2)


@pytest.mark.parametrize("name", SCORED)
def test_without_any_score_the_weights_stay(name: str, tiny: Path, tmp_path: Path) -> None:
    module = half_scored(name, tiny)
    banks = module.banks if name == "joint" else [module.rewards]
    for reward in (one for each in banks for one in each.rewards.values() if isinstance(one, Unscored)):
        reward.every = 1
    before = trained(module)
    fit(module, tmp_path, data=data_for(module, prompts=2, images=2))
    assert_same(trained(module), before)


@pytest.mark.parametrize("name", METHODS)
def test_images_without_a_score_are_counted(name: str, tiny: Path, tmp_path: Path) -> None:
    module = half_scored(name, tiny)
    validating = trainer(tmp_path, 1, limit_val_batches=None)
    validating.validate(module, data_for(module), verbose=False)
    missing = module.latest["reward"].isnan()
    # The best checkpoint is chosen by the mean of the others.
    assert float(validating.callback_metrics["val/reward"]) == pytest.approx(
        float(module.latest["reward"].nanmean())
    )
    assert 0 < missing.sum() < len(missing)
    assert torch.equal(module.latest["unscored"], missing.float())


# ---- chains without noise


class Asked:
    """Counts what is asked of the denoiser, by weight set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        predict = StableDiffusionBackbone.predict

        def counted(
            backbone: Any, x: Tensor, t: Any, cond: Any, guidance: float = 1.0, weights: str = POLICY
        ):
            self.calls[weights] += 1
            return predict(backbone, x, t, cond, guidance, weights)

        monkeypatch.setattr(StableDiffusionBackbone, "predict", counted)


def validated(module: AlignmentModule, folder: Path) -> dict[str, Tensor]:
    trainer(folder, 1, limit_val_batches=None).validate(module, data_for(module), verbose=False)
    return module.latest


@pytest.mark.parametrize("name", ["alignprop", "msdda", "spin", "dpo", "sft"])
def test_without_noise_there_is_a_drift_and_no_kl(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(METHODS[name], tiny, eta=0.0, num_steps=6)
    asked = Asked(monkeypatch)
    measured = validated(module, tmp_path)
    images = len(measured["reward"])
    assert "kl" not in measured
    assert torch.equal(measured["drift"], torch.zeros(images))
    assert images <= module.sampling.batch
    assert asked.calls[REFERENCE] == 4  # of the six steps; a KL asks where there is noise, which is nowhere
    if name == "msdda":
        with pytest.raises(ConfigError, match="fit needs noise in the steps"):
            fit(module, tmp_path)
        randomise(module, 0.1)
        module.images = 1  # as if they were trained
    else:
        fit(module, tmp_path)
    assert (validated(module, tmp_path)["drift"] > 0).all()
    trainer(tmp_path, 1).test(module, data_for(module), verbose=False)
    assert (module.latest["drift"] > 0).all()
    assert torch.equal(module.baseline["drift"], torch.zeros(images))
    assert not any("kl" in stage for stage in (module.latest, module.baseline))


@pytest.mark.parametrize("name", ["ddpo", "prdp"])
def test_methods_that_need_a_density_refuse_chains_without_noise(name: str, tiny: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"eta is 0, which has no density; set sampler\.init_args\.eta to 1"
    ):
        make(METHODS[name], tiny, eta=0.0)


def test_the_drift_is_the_distance_of_predictions_and_the_kl_asks_only_where_there_is_noise(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(SFTModule, tiny, eta=0.0, num_steps=6, guidance=3.0, batch=2)
    randomise(module, 0.1)
    batch = held_out(module)
    states, cond = draw(module, batch).trajectory.states, module.backbone.encode(batch.prompts)
    with torch.no_grad():
        policy, reference = (module.policy(batch, cond, weights) for weights in (POLICY, REFERENCE))
        moved = [policy.predict(states[k], k) - reference.predict(states[k], k) for k in (0, 2, 3, 5)]
    expected = torch.stack(moved).square().mean((0, 2, 3, 4)).sqrt()
    torch.testing.assert_close(validated(module, tmp_path)["drift"], expected, rtol=1e-3, atol=0)
    noisy = make(SFTModule, tiny, num_steps=6, noisy_steps=2, batch=2)
    asked = Asked(monkeypatch)
    assert "drift" not in validated(noisy, tmp_path)
    assert asked.calls == {POLICY: 6, REFERENCE: 2}


class Shifted:
    """The mean of step ``k`` is ``k`` away, with a std of 1."""

    def __call__(self, x: Tensor, k: int) -> GaussianStep:
        return GaussianStep(x + k, torch.ones(1))

    def __getitem__(self, rows: Tensor) -> "Shifted":
        return self


def test_the_kl_is_that_of_the_steps_with_noise_wherever_these_are() -> None:
    still = torch.zeros(4, 5, 2)
    chains, noisy = Trajectory(still, still[1:], still[1:, :, 0]), torch.tensor([False, True, True])
    assert kl_to_reference(Shifted(), chains, noisy, 2).tolist() == [2 * (1 + 4) / 2] * 5
    stds = [torch.tensor([std]) for std in (9.0, 1.0, 2.0)]
    expected = 2 * (1 / 2 + (4 + 4) / 2 - 1 / 2 - math.log(2))
    assert kl_to_reference(Shifted(), chains, noisy, 2, stds).tolist() == pytest.approx([expected] * 5)


# ---- learning


@dataclass(frozen=True)
class Learner:
    """A short training whose reward must rise.

    The last two of the four steps draw no noise. Their std is nearly 0, so that their part of a policy's
    gradient is large and says nothing: with them two batches of 64 images agree on no direction (cosine 0),
    without them they do (.6).

    Methods on the forward process ask for a denoiser. One of random weights that predicts the noise is none:
    the clean state that it implies is mostly the weight of its error; so theirs predicts v.
    """

    method: type[AlignmentModule]
    options: dict[str, Any]
    data: dict[str, int]
    batches: int = 4
    gain: float = 0.5
    predicts_v: bool = False


WEIGHTS = {"lora": LoRA(8, 8.0), "lr": 2e-2}
ALL_WEIGHTS = {"lora": None, "lr": 1e-3}
MANY = {"prompts": 8, "images": 8}
LEARNERS = {
    "ddpo": Learner(DDPOModule, WEIGHTS, MANY),
    "ddpo, all weights": Learner(DDPOModule, ALL_WEIGHTS, MANY),
    "nft": Learner(NFTModule, WEIGHTS, {"prompts": 8, "images": 4}, 6, predicts_v=True),
    "awm": Learner(
        NFTModule, WEIGHTS | {"objective": AWM(0.1)}, {"prompts": 8, "images": 4}, 6, predicts_v=True
    ),
    "prdp": Learner(PRDPModule, WEIGHTS | {"beta": 1e-4}, MANY),
    "prdp, all weights": Learner(
        PRDPModule, ALL_WEIGHTS | {"beta": 1e-4, "convention": "equations", "clip_range": 2.0}, MANY
    ),
    "alignprop": Learner(AlignPropModule, WEIGHTS, {"prompts": 8, "images": 1}, batches=8, gain=1.0),
}
"""Of the methods that learn from one reward. What MSDDA's experts learn, and what is learnt from pairs, is in
the files of these methods; a joint run's updates are DDPO's (see test_joint.py)."""

ALIKE = ("awm", "ddpo, all weights", "prdp, all weights")
"""Share nearly all of their code with another one."""


@pytest.fixture(scope="module")
def of_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that predicts v."""
    folder = tmp_path_factory.mktemp("of_v")
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    make_pipeline(scheduler, attentive=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in LEARNERS]
)
def test_learns_a_reward_past_a_threshold(
    name: str, tiny_attentive: Path, of_v: Path, tmp_path: Path
) -> None:
    learner = LEARNERS[name]
    folder = of_v if learner.predicts_v else tiny_attentive
    steps = {"num_steps": 4, "noisy_steps": 2}
    module = make(learner.method, folder, micro_batch=128, batch=64, **steps, **learner.options)
    fit(module, tmp_path, learner.batches, data=prompts(**learner.data), limit_val_batches=None)
    before, after = module.baseline, module.latest
    assert after["reward"].mean() > before["reward"].mean() + learner.gain * before["reward"].std()
    assert after["kl"].mean() > 0
    assert torch.equal(before["kl"], torch.zeros_like(before["kl"]))
