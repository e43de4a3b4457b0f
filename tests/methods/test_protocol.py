"""What every method must do, whatever it learns from. A method's own identities are in its own file."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from safetensors import safe_open
from torch import Tensor

from lit_align.advantages import GroupAdvantages, PerPromptAdvantages
from lit_align.backbones import POLICY, REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import TextPrompts
from lit_align.errors import ConfigError
from lit_align.methods import (
    AlignmentModule,
    AlignPropModule,
    DDPOModule,
    DPOModule,
    MSDDAModule,
    PRDPModule,
    SFTModule,
    SPINModule,
)
from lit_align.methods.alignprop import NoTruncation, UniformWindow
from lit_align.methods.pretraining import Pretraining
from lit_align.methods.tasks import Task
from lit_align.rewards import Brightness, Redness, RewardBank
from tests.methods.build import (
    EvenBrightness,
    Greys,
    Killed,
    Recorder,
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

SLOWER = partial(torch.optim.lr_scheduler.LinearLR, total_iters=8)
"""A schedule that moves in every update of a short run."""


@dataclass(frozen=True)
class Case:
    """One method with the options that make its run as rich as can be.

    Attributes:
        method: Its class.
        options: Makes the options: advantages and tasks have a state, and belong to one module.
        sizes: Of its data.
        items: What a micro-batch counts, of an update in one process.
        updates: In a batch.
        scored: Whether it learns from the scores of images.
    """

    method: type[AlignmentModule]
    options: Callable[[], dict[str, Any]] = dict
    sizes: dict[str, int] | None = None
    items: int = 16
    updates: int = 1
    scored: bool = True

    def make(self, folder: Path, **options: Any) -> AlignmentModule:
        return make(self.method, folder, **self.options() | options)

    def data(self, module: AlignmentModule, **options: Any) -> Any:
        """Its data; on two ranks the global order of the four validation prompts is not that of the ranks."""
        sizes = {"validation_prompts": 4, "validation_images_per_prompt": 1} | (self.sizes or {})
        return data_for(module, **sizes | options)


def two_tasks() -> dict[str, Task]:
    return {
        "a": Task(bank(EvenBrightness("leave_one_out")), GroupAdvantages("batch")),
        "b": Task(bank(Unscored(Brightness())), PerPromptAdvantages(4, 2), 0.5),
    }


STEPS = {"num_steps": 3}
CASES = {
    "ddpo": Case(
        DDPOModule,
        # The penalty evaluates the reference between the forward and the backward pass of the policy.
        lambda: (
            STEPS
            | {
                "advantages": PerPromptAdvantages(8, 2),
                "updates": 2,
                "kl_weight": 1.0,
                "kl_target": 1e-3,
                "lr_scheduler": SLOWER,
            }
        ),
        {"prompts": 4, "images": 2},
        items=12,
        updates=2,
    ),
    "joint": Case(
        DDPOModule,
        lambda: (
            STEPS
            | {
                "tasks": two_tasks(),
                "pretraining": Pretraining(Greys(), batch=4, order="every"),
                "kl_target": 1e-3,
            }
        ),
        # A reward of sets has no score for one image.
        {"prompts": 2, "images": 2, "validation_images_per_prompt": 2},
        items=12,
        updates=2,
    ),
    "prdp": Case(
        PRDPModule,
        lambda: STEPS | {"inner_epochs": 2, "lr_scheduler": SLOWER},
        {"prompts": 2, "images": 2},
        items=12,
        updates=2,
    ),
    "alignprop": Case(
        AlignPropModule,
        lambda: STEPS | {"truncation": UniformWindow(), "kl_weight": 0.1, "checkpointing": "prediction"},
        {"prompts": 4, "images": 1},
        items=4,
    ),
    "msdda": Case(
        MSDDAModule,
        lambda: STEPS | {"updates": 2, "lr_scheduler": SLOWER},
        {"prompts": 4, "images": 2},
        items=12,
        updates=2,
    ),
    "spin": Case(SPINModule, lambda: {"steps": 2, "lr_scheduler": SLOWER}, items=4, scored=False),
    "dpo": Case(DPOModule, lambda: {"lr_scheduler": SLOWER}, items=4, scored=False),
    "sft": Case(SFTModule, lambda: {"lr_scheduler": SLOWER}, items=4, scored=False),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


NOT_MEASURED = ("perf/", "images/s", "train/ratio_deviation", "train/lr")
"""Logged names that are times or rounding."""


def assert_close_logs(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for before, after in zip(one, other, strict=True):
        names = {name for name in before if not name.startswith(NOT_MEASURED)}
        assert names == {name for name in after if not name.startswith(NOT_MEASURED)}
        for name in names:
            assert before[name] == pytest.approx(after[name], rel=1e-3, abs=1e-5, nan_ok=True), name


# ---- micro-batches and ranks


def descended(case: Case, tiny: Path, folder: Path, batches: int, **options: Any) -> Recorder:
    """A fit by gradient descent with momentum, in which rounding stays rounding, from weights that are not 0.

    It is validated before it, and after two batches.
    """
    devices = options.pop("devices", 1)
    descent = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    module = case.make(tiny, optimizer=descent, lr_scheduler=None, **options)
    randomise(module, 0.1)
    validations = {"limit_val_batches": None, "val_check_interval": 2} if batches > 1 else {}
    return fit(module, folder, batches, data=case.data(module), devices=devices, **validations)


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(case: Case, tiny: Path, folder: Path) -> Recorder:
    """Three batches in one process, each update one backward pass."""
    return descended(case, tiny, folder, 3, micro_batch=case.items)


@pytest.mark.parametrize("size", ["one", "uneven"])
def test_micro_batches_change_no_gradient_and_nothing_that_is_logged(
    case: Case, alone: Recorder, tiny: Path, tmp_path: Path, size: str
) -> None:
    micro_batch = 1 if size == "one" else case.items // 2 + 1
    parts = descended(case, tiny, tmp_path, 1, micro_batch=micro_batch)
    assert len(parts.gradients) == case.updates
    for one, other in zip(parts.gradients, alone.gradients[: case.updates], strict=True):
        assert_close_gradients(one, other)
    first = {name: value for name, value in alone.logged[0].items() if not name.startswith("val/")}
    assert_close_logs(parts.logged, [first])


def pooled_rows(folder: Path) -> list[int]:
    """Rows of the pairs whose opponents a run of SPIN keeps; none of another method."""
    rows: list[int] = []
    for shard in folder.rglob("pool/*/*.safetensors"):
        with safe_open(shard, "pt") as opened:
            rows += opened.get_tensor("index").tolist()
    return sorted(rows)


def test_two_ranks_are_one(case: Case, alone: Recorder, folder: Path, tiny: Path, tmp_path: Path) -> None:
    two = descended(case, tiny, tmp_path, 3, micro_batch=case.items // 3, devices=2)
    assert len(two.gradients) == len(alone.gradients) == 3 * case.updates
    for one, other in zip(two.gradients, alone.gradients, strict=True):
        assert_close_gradients(one, other)
    assert_close_logs(two.logged, alone.logged)
    assert len(two.index[0]) == len(alone.index[0]) // 2
    assert pooled_rows(tmp_path) == pooled_rows(folder)
    assert bool(pooled_rows(folder)) == (case.method is SPINModule)
    # Validation in the images' global order.
    assert two.at == alone.at == [0, int(alone.logged[1]["progress/images"])]
    for measured, expected in zip(two.validated, alone.validated, strict=True):
        assert measured.keys() == expected.keys()
        for name, values in measured.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-3, atol=1e-5, equal_nan=True)


# ---- a whole run

LONG: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": None}


@dataclass(frozen=True)
class Run:
    """A fit that is over.

    Attributes:
        module: As the fit left it.
        recorder: What happened.
        folder: Of its files.
        start: All parameters before it.
        trained: Names of those that require gradients before it.
        reference: Images of the pretrained model, drawn before it.
    """

    module: AlignmentModule
    recorder: Recorder
    folder: Path
    start: dict[str, Tensor]
    trained: set[str]
    reference: Tensor


@pytest.fixture(scope="module")
def whole(case: Case, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two epochs of two batches with a stateful optimizer, a validation before and after each epoch."""
    folder = tmp_path_factory.mktemp("whole")
    module = case.make(tiny)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    reference = draw(module, held_out(module), weights=REFERENCE).images
    logger = CSVLogger(folder, name=None, version="")
    recorder = fit(module, folder, 2, BatchCheckpoint(), **LONG, logger=logger, data=case.data(module))
    return Run(module, recorder, folder, start, names, reference)


def last_checkpoint(folder: Path) -> Path:
    (last,) = folder.rglob("last.ckpt")
    return last


def assert_equal(one: Any, other: Any, place: str = "") -> None:
    """Equality to the bit through nested lists and dicts; NaN equals NaN."""
    if isinstance(one, Tensor):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), place
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_equal(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_equal(first, second, f"{place}.{number}")
    else:
        assert one == other or (one != one and other != other), place


@pytest.mark.parametrize(
    "crash", [4, pytest.param(3, marks=pytest.mark.slow)], ids=["mid-epoch", "first-of-epoch"]
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    case: Case, whole: Run, tiny: Path, tmp_path: Path, crash: int
) -> None:
    cut, resumed = case.make(tiny), case.make(tiny)
    killed = Recorder(crash, after=case.updates - 1)
    with pytest.raises(Killed):
        fit(cut, tmp_path, 2, BatchCheckpoint(), **LONG, data=case.data(cut), recorder=killed)
    last = last_checkpoint(tmp_path)
    rest = fit(resumed, tmp_path, 2, BatchCheckpoint(), **LONG, data=case.data(resumed), ckpt_path=last)
    states = [torch.load(last_checkpoint(folder), weights_only=True) for folder in (whole.folder, tmp_path)]
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "progress", "global_step", "epoch", "loops")
    for part in (*parts, *({"tasks", "denoising_steps", "spin"} & states[0].keys())):
        assert_equal(*(state[part] for state in states), part)
    moments = [state["exp_avg"] for state in states[0]["optimizer_states"][0]["state"].values()]
    assert any(moment.abs().max() > 0 for moment in moments)
    assert len(killed.logged) == crash - 1
    assert whole.recorder.index == killed.index + rest.index
    for one, other in zip(whole.recorder.logged, killed.logged + rest.logged, strict=True):
        # The Trainer keeps showing what an earlier batch has logged, which a resumed one does not know.
        names = {name for name in one.keys() & other.keys() if not name.startswith(("perf/", "images/s"))}
        assert {"train/loss", "train/lr", "progress/images"} <= names
        assert_equal(*({name: logged[name] for name in names} for logged in (one, other)))
    assert_equal(whole.recorder.validated, killed.validated + rest.validated)
    assert_equal(whole.module.baseline, resumed.baseline)


def test_only_what_is_trained_moves_and_the_reference_stays(whole: Run) -> None:
    module = whole.module
    moving = whole.trained | set(module.kept())  # SPIN's opponent moves too, without gradients
    assert whole.recorder.reached == whole.trained
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name in whole.trained), name
        assert torch.equal(parameter, whole.start[name]) == (name not in moving), name
    assert torch.equal(draw(module, held_out(module), weights=REFERENCE).images, whole.reference)


def test_validation_begins_at_no_images_and_measures_the_same_ones_every_time(
    case: Case, whole: Run, tmp_path: Path
) -> None:
    module, recorder = whole.module, whole.recorder
    count = recorder.logged[-1]["progress/images"]
    assert module.images == count > 0
    assert recorder.at == [0, count / 2, count]
    assert_equal(recorder.validated[0], module.baseline)
    assert torch.equal(module.baseline["kl"], torch.zeros_like(module.baseline["kl"]))
    assert (recorder.validated[-1]["kl"] > 0).all()
    # Once more, in a Trainer that is not the first: the same to the bit.
    images = module.images
    trainer(tmp_path, 1, limit_val_batches=None).validate(module, case.data(module), verbose=False)
    assert_equal(module.latest, recorder.validated[-1])
    assert module.images == images
    # And these are, before and after, those of purpose "validation" on the same prompts.
    batch = held_out(module, case.data(module))
    for weights, validated in ((REFERENCE, module.baseline), (POLICY, module.latest)):
        scores = module.score(draw(module, batch, "validation", weights).images, batch).report["reward"]
        torch.testing.assert_close(
            scores, validated["reward"][: len(batch)], rtol=1e-6, atol=0, equal_nan=True
        )


def test_an_image_does_not_depend_on_the_batch_it_is_sampled_in(
    whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, batch, images = whole.module, held_out(whole.module), []
    for size in (3, 100):
        monkeypatch.setattr(module, "sampling", replace(module.sampling, batch=size))
        images.append(draw(module, batch).images)
    torch.testing.assert_close(*images, atol=1e-5, rtol=0)
    assert (draw(module, batch, "test").images - images[1]).abs().amax((1, 2, 3)).min() > 0.01


def test_the_axis_of_what_is_logged_is_the_number_of_images(whole: Run) -> None:
    header, *lines = (line.split(",") for line in (whole.folder / "metrics.csv").read_text().splitlines())
    points: dict[str, list[int]] = {"train/loss": [], "val/reward": []}
    for line in lines:
        row = dict(zip(header, line, strict=True))
        for name, steps in points.items():
            if row[name]:
                steps.append(int(row["step"]))
    images = [int(metrics["progress/images"]) for metrics in whole.recorder.logged]
    assert points == {"train/loss": images, "val/reward": whole.recorder.at}
    assert len(set(images)) == 4


def test_generate_draws_what_predict_draws(case: Case, whole: Run, tmp_path: Path) -> None:
    if case.method is DDPOModule and len(whole.module.tasks) > 1:
        pytest.skip("predict takes the test prompts of the tasks, which generate does not know")
    module, listed = whole.module, ["a red circle", "two blue stars", "a dog"]
    (tmp_path / "prompts.txt").write_text("\n".join(listed))
    data = prompts(predict_source=TextPrompts(str(tmp_path / "prompts.txt")), test_images_per_prompt=1)
    ((images, _),) = trainer(tmp_path, 1).predict(module, data)
    assert torch.equal(module.generate(listed), images)
    assert torch.equal(module.generate(listed, seed=module.seed), images)
    assert torch.equal(module.generate(listed[:2]), images[:2])
    for other in (module.generate(listed, seed=module.seed + 1), module.generate(listed, weights=REFERENCE)):
        assert (other - images).flatten(1).abs().amax(1).min() > 1e-4
    module.seed += 1
    ((other, _),) = trainer(tmp_path, 1).predict(module, data)
    module.seed -= 1
    assert torch.equal(module.generate(listed, seed=module.seed + 1), other)


# ---- images without a score

SCORED = [name for name, case in CASES.items() if case.scored]


def half_scored(name: str, folder: Path) -> AlignmentModule:
    """A module whose reward has no score for the images at even places; nothing else pulls at the policy."""
    method = CASES[name].method
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


# An image without a score still holds MSDDA's experts at the reference, by the KL in their objective.
@pytest.mark.parametrize("name", [name for name in SCORED if name != "msdda"])
def test_without_any_score_the_weights_stay(name: str, tiny: Path, tmp_path: Path) -> None:
    module = half_scored(name, tiny)
    banks = module.banks if name == "joint" else [module.rewards]
    for reward in (one for each in banks for one in each.rewards.values() if isinstance(one, Unscored)):
        reward.every = 1
    before = trained(module)
    fit(module, tmp_path, data=data_for(module, prompts=2, images=2))
    assert_same(trained(module), before)


@pytest.mark.parametrize("name", CASES)
def test_images_without_a_score_are_counted(name: str, tiny: Path, tmp_path: Path) -> None:
    module = half_scored(name, tiny)
    trainer(tmp_path, 1, limit_val_batches=None).validate(module, data_for(module), verbose=False)
    missing = module.latest["reward"].isnan()
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
    module = make(CASES[name].method, tiny, eta=0.0, num_steps=6)
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
        make(CASES[name].method, tiny, eta=0.0)


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


# ---- learning


@dataclass(frozen=True)
class Learner:
    """A short training whose reward must rise.

    The last two of the four steps draw no noise. Their std is nearly 0, so that their part of a policy's
    gradient is large and says nothing: with them two batches of 64 images agree on no direction (cosine 0),
    without them they do (.6).
    """

    method: type[AlignmentModule]
    options: dict[str, Any]
    data: dict[str, int]
    batches: int = 4
    gain: float = 0.5


WEIGHTS = {"lora": LoRA(8, 8.0), "lr": 2e-2}
ALL_WEIGHTS = {"lora": None, "lr": 1e-3}
MANY = {"prompts": 8, "images": 8}
LEARNERS = {
    "ddpo": Learner(DDPOModule, WEIGHTS, MANY),
    "ddpo, all weights": Learner(DDPOModule, ALL_WEIGHTS, MANY),
    "prdp": Learner(PRDPModule, WEIGHTS | {"beta": 1e-4}, MANY),
    "prdp, all weights": Learner(
        PRDPModule, ALL_WEIGHTS | {"beta": 1e-4, "convention": "equations", "clip_range": 2.0}, MANY
    ),
    "alignprop": Learner(AlignPropModule, WEIGHTS, {"prompts": 8, "images": 1}, batches=8, gain=1.0),
}
"""Of the methods that learn from one reward. What MSDDA's experts learn, and what is learnt from pairs, is in
the files of these methods; a joint run's updates are DDPO's (see test_joint.py)."""


@pytest.mark.parametrize("name", LEARNERS)
def test_learns_a_reward_past_a_threshold(name: str, tiny: Path, tmp_path: Path) -> None:
    learner = LEARNERS[name]
    module = make(learner.method, tiny, noisy_steps=2, micro_batch=128, batch=64, **learner.options)
    fit(module, tmp_path, learner.batches, data=prompts(**learner.data), limit_val_batches=None)
    before, after = module.baseline, module.latest
    assert after["reward"].mean() > before["reward"].mean() + learner.gain * before["reward"].std()
    assert after["kl"].mean() > 0
    assert torch.equal(before["kl"], torch.zeros_like(before["kl"]))
