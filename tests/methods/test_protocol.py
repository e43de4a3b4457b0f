"""What every method must do, whatever it learns from: micro-batches, ranks, resuming, validation, generation.

What it must make of scores is in test_protocol_scores.py; a method's own identities are in its own file.
"""

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
from lit_align.backbones import POLICY, REFERENCE
from lit_align.callbacks import BatchCheckpoint
from lit_align.data import TextPrompts
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
from lit_align.methods.alignprop import UniformWindow
from lit_align.methods.nft import AWM, OldPolicy
from lit_align.methods.pretraining import Pretraining
from lit_align.methods.tasks import Task
from lit_align.rewards import Brightness
from tests.methods.build import (
    EvenBrightness,
    Greys,
    Unscored,
    assert_close_gradients,
    bank,
    data_for,
    draw,
    fit,
    held_out,
    make,
    prompts,
    randomise,
    trainer,
)
from tests.methods.recorders import Killed, Recorder

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
    """

    method: type[AlignmentModule]
    options: Callable[[], dict[str, Any]] = dict
    sizes: dict[str, int] | None = None
    items: int = 16
    updates: int = 1

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


STEPS = {"num_steps": 2}
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
        items=8,
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
        items=8,
        updates=2,
    ),
    "nft": Case(
        NFTModule,
        # The old policy is the policy after the first batch, and then falls behind it.
        lambda: STEPS | {"old_policy": OldPolicy(0, 0.3, 0.5), "updates": 2, "lr_scheduler": SLOWER},
        {"prompts": 4, "images": 2},
        items=8,
        updates=2,
    ),
    "awm": Case(
        NFTModule,
        lambda: (
            STEPS
            | {"objective": AWM(clip_range=0.1), "old_policy": OldPolicy(0, 0.3, 0.3), "inner_epochs": 2}
        ),
        {"prompts": 2, "images": 2},
        items=8,
        updates=2,
    ),
    "prdp": Case(
        PRDPModule,
        lambda: STEPS | {"inner_epochs": 2, "lr_scheduler": SLOWER},
        {"prompts": 2, "images": 2},
        items=8,
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
        items=8,
        updates=2,
    ),
    "spin": Case(SPINModule, lambda: {"steps": 2, "lr_scheduler": SLOWER}, items=4),
    "dpo": Case(DPOModule, lambda: {"lr_scheduler": SLOWER}, items=4),
    "sft": Case(SFTModule, lambda: {"lr_scheduler": SLOWER}, items=4),
}


LONG_CASES = ("awm", "sft")
"""Cases that share nearly all of their code with another one."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LONG_CASES)) for name in CASES],
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


NOT_MEASURED = ("perf/", "images/s", "train/ratio_deviation", "train/lr")
"""Logged names that are times or rounding."""


def assert_close_logs(one: list[dict[str, float]], other: list[dict[str, float]]) -> None:
    for before, after in zip(one, other, strict=True):
        names = {name for name in before if not name.startswith(NOT_MEASURED)}
        assert names == {name for name in after if not name.startswith(NOT_MEASURED)}
        for name in names:
            assert before[name] == pytest.approx(after[name], rel=1e-6, abs=1e-6, nan_ok=True), name


# ---- micro-batches and ranks


def descended(case: Case, tiny: Path, folder: Path, batches: int, **options: Any) -> Recorder:
    """A fit in float64, by gradient descent with momentum, from weights that are not 0.

    In float32 the network amplifies rounding, and in Adam's first steps signs of gradients that are 0 but for
    rounding decide. It is validated before it, and after two batches.
    """
    devices = options.pop("devices", 1)
    descent = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    module = case.make(tiny, optimizer=descent, lr_scheduler=None, **options)
    randomise(module, 0.1)
    module.double()
    validations = {"limit_val_batches": None, "val_check_interval": 2} if batches > 1 else {}
    torch.set_default_dtype(torch.float64)
    try:
        return fit(module, folder, batches, data=case.data(module), devices=devices, **validations)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def folder(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(case: Case, tiny: Path, folder: Path) -> Recorder:
    """Three batches in one process, each update one backward pass."""
    if "tasks" in case.options():
        pytest.skip(
            "the updates of tasks are DDPO's, bit for bit: test_joint.py, which has ranks of its own too"
        )
    return descended(case, tiny, folder, 3, micro_batch=case.items)


@pytest.mark.parametrize("size", ["one", "uneven"])
def test_micro_batches_change_no_gradient_and_nothing_that_is_logged(
    case: Case, alone: Recorder, tiny: Path, tmp_path: Path, size: str
) -> None:
    micro_batch = 1 if size == "one" else case.items // 2 + 1
    parts = descended(case, tiny, tmp_path, 1, micro_batch=micro_batch)
    assert len(parts.gradients) == case.updates
    for one, other in zip(parts.gradients, alone.gradients[: case.updates], strict=True):
        assert_close_gradients(one, other, 1e-6)
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
        assert_close_gradients(one, other, 1e-6)
    assert_close_logs(two.logged, alone.logged)
    assert len(two.index[0]) == len(alone.index[0]) // 2
    assert pooled_rows(tmp_path) == pooled_rows(folder)
    assert bool(pooled_rows(folder)) == (case.method is SPINModule)
    # Validation in the images' global order.
    assert two.at == alone.at == [0, int(alone.logged[1]["progress/images"])]
    for measured, expected in zip(two.validated, alone.validated, strict=True):
        assert measured.keys() == expected.keys()
        for name, values in measured.items():
            torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-6, equal_nan=True)


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
    module.sampling.seed += 1
    ((other, _),) = trainer(tmp_path, 1).predict(module, data)
    module.seed -= 1
    assert torch.equal(module.generate(listed, seed=module.seed + 1), other)
