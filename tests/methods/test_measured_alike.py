"""Held-out images are compared with what was measured alike, and of the pretrained model."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from PIL import Image

from lit_align.advantages import GroupAdvantages
from lit_align.backbones import POLICY, REFERENCE
from lit_align.callbacks import BatchCheckpoint
from lit_align.callbacks.images import ImageGrids
from lit_align.callbacks.summary import RunSummary, read_report
from lit_align.comparison import diversity, high_frequency, saturation
from lit_align.data import Batch, PromptDataModule, PromptSource
from lit_align.methods import AlignmentModule, DDPOModule, MSDDAModule
from lit_align.methods.tasks import Task
from lit_align.methods.validation import measure
from lit_align.rewards import Brightness, Redness, RewardBank, ShapesTruth
from lit_align.samplers import DDIM
from tests.methods import build
from tests.methods.build import bank, draw, fit, held_out, randomise, task_prompts, trainer

make = partial(build.make, num_steps=2)
prompts = partial(build.prompts, 2, 2, validation_prompts=2)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter of an earlier run."""
    module, folder = make(DDPOModule, tiny), tmp_path_factory.mktemp("adapter")
    randomise(module)
    module.export(folder)
    return folder


def test_what_is_measured_of_images() -> None:
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(list("aabb"), torch.tensor([3, 3, 5, 5]), index=torch.arange(4))
    found = measure(images, bank()(images, batch.prompts), batch)
    assert torch.equal(found["diversity"], diversity(images, batch.groups))
    assert torch.equal(found["saturation"], saturation(images))
    assert torch.equal(found["high_frequency"], high_frequency(images))


def starts_elsewhere(tiny: Path, adapter: Path) -> dict[str, AlignmentModule]:
    """Modules whose policy is not the pretrained model before any training."""
    experts: dict[str, str | None] = {"bright": None, "red": str(adapter)}
    return {
        "adapters": make(DDPOModule, tiny, adapters={str(adapter): 0.5}),
        "an expert": make(MSDDAModule, tiny, experts=experts),
        "without noise": make(DDPOModule, tiny, adapters={str(adapter): 0.5}, eval_sampler=no_noise()),
    }


def no_noise() -> Any:
    return partial(DDIM, num_steps=2, eta=0.0)


@pytest.mark.parametrize("name", ["adapters", "an expert", "without noise"])
def test_what_is_compared_with_is_the_pretrained_model_wherever_a_run_starts(
    name: str, tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    module, grids = starts_elsewhere(tiny, adapter)[name], ImageGrids()
    recorder = fit(module, tmp_path, 1, grids, RunSummary(), data=prompts(), limit_val_batches=None)
    distance, batch = "drift" if name == "without noise" else "kl", held_out(module, prompts())
    assert (recorder.validated[0][distance] > 0).all()
    assert torch.equal(module.baseline[distance], torch.zeros(len(batch)))
    with module.evaluating():
        images = draw(module, batch, weights=REFERENCE).images
    assert torch.equal(module.baseline["reward"], module.score(images, batch).report["reward"])
    assert module.baseline.keys() == module.latest.keys()
    assert not torch.equal(module.baseline["reward"], recorder.validated[0]["reward"])
    assert grids.state_dict() == {}  # images of the pretrained model were not kept
    (report,) = tmp_path.rglob("validation.json")
    assert read_report(report)["metrics"][distance]["before"] == 0


def test_a_policy_that_starts_elsewhere_is_validated_beside_the_pretrained_model(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    module = starts_elsewhere(tiny, adapter)["adapters"]
    trainer(tmp_path, 1, RunSummary(), limit_val_batches=None).validate(module, prompts(), verbose=False)
    (report,) = tmp_path.rglob("validate.json")
    measured = read_report(report)["metrics"]
    assert measured["kl"]["before"] == 0
    assert measured["reward"]["difference"] != 0


@pytest.fixture(scope="module")
def checkpoint(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run from Python."""
    folder = tmp_path_factory.mktemp("run")
    callbacks = ImageGrids(), BatchCheckpoint()
    fit(make(DDPOModule, tiny), folder, 1, *callbacks, data=prompts(), limit_val_batches=None)
    (path,) = folder.rglob("last.ckpt")
    return path


def test_images_that_are_shown_have_their_own_scores(checkpoint: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    shown, measured = content["callbacks"]["ImageGrids"], content["progress"]["baseline"]
    assert shown["index"] == [0, 2]  # the first of each prompt
    for name, scores in shown["scores"].items():
        assert scores == measured[name][shown["index"]].tolist()


def validate(
    module: AlignmentModule,
    folder: Path,
    checkpoint: Path | None,
    data: Any = None,
    *callbacks: Callback,
    **options: Any,
) -> None:
    trainer(folder, 1, *callbacks, **{"limit_val_batches": None} | options).validate(
        module, data or prompts(), checkpoint, verbose=False, weights_only=True if checkpoint else None
    )


OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "eval_sampler": ({"eval_sampler": no_noise()}, {}, {}),
    "seed": ({"seed": 5}, {}, {}),
    "rewards": ({"rewards": RewardBank({"trained": Redness()}, {"trained": 1.0})}, {}, {}),
    "held_out": ({}, {"validation_prompts": 3}, {}),
    "held_out, less batches": ({}, {"eval_batch": 2}, {"limit_val_batches": 1}),
}
"""Of the module, of the data, of the Trainer; by the fact that is told."""


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_validation_that_measures_otherwise_is_compared_with_nothing(
    name: str, tiny: Path, tmp_path: Path, checkpoint: Path
) -> None:
    options, sizes, limits = OTHERWISE[name]
    module = make(DDPOModule, tiny, **options)
    with pytest.warns(UserWarning, match=f"measured with another .*{name.partition(',')[0]} .* -> "):
        validate(module, tmp_path, checkpoint, prompts(**sizes), **limits)
    assert module.latest
    assert not module.baseline


def test_images_that_are_sampled_otherwise_do_not_stand_beside_earlier_ones(
    tiny: Path, tmp_path: Path, checkpoint: Path
) -> None:
    widths = []
    for guidance in (1.0, 2.0):
        folder = tmp_path / str(guidance)
        validate(make(DDPOModule, tiny, guidance=guidance), folder, checkpoint, None, ImageGrids())
        (grid,) = folder.rglob("validation_*.png")
        widths.append(Image.open(grid).width)
    assert widths[0] > widths[1]  # two images a prompt, and one


def test_a_run_that_measures_otherwise_goes_on_with_a_new_baseline(
    tiny: Path, tmp_path: Path, checkpoint: Path
) -> None:
    module, data = make(DDPOModule, tiny, eval_sampler=no_noise()), prompts(validation_prompts=3)
    with pytest.warns(UserWarning, match="measured with another eval_sampler .*, held_out 4 images"):
        fit(module, tmp_path, 1, data=data, ckpt_path=checkpoint, max_epochs=2, limit_val_batches=None)
    assert module.measured_at == {"images": 8, "reward_queries": 8, "compared_since": 4}
    batch = held_out(module, data)
    with module.evaluating():
        images = draw(module, batch, weights=REFERENCE).images
    assert torch.equal(module.baseline["reward"], module.score(images, batch).report["reward"])


def test_a_checkpoint_that_says_less_is_compared_as_before(
    tiny: Path, tmp_path: Path, checkpoint: Path
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for name in ("eval_sampler", "seed", "held_out"):
        del content["identity"][name]
    torch.save(content, tmp_path / "old.ckpt")
    for path in (checkpoint, tmp_path / "old.ckpt"):
        module = make(DDPOModule, tiny)
        validate(module, tmp_path, path)
        assert torch.equal(module.baseline["reward"], content["progress"]["baseline"]["reward"])


def test_what_a_module_has_validated_is_compared_with_nothing_else(tiny: Path, tmp_path: Path) -> None:
    module, data = make(DDPOModule, tiny), prompts()
    fit(module, tmp_path, 1, data=data, limit_val_batches=None)
    baseline, latest, groups = module.baseline, module.latest, module.prompt_groups
    module.taken_back = {name: values + 1 for name, values in latest.items()}  # by a guard
    summary = RunSummary()
    randomise(module)
    trainer(tmp_path, 1, summary).test(module, data, verbose=False)
    assert module.baseline is baseline
    assert module.latest is latest
    assert module.prompt_groups is groups
    (report,) = tmp_path.rglob("test.json")
    metrics = read_report(report)["metrics"]
    for key, name in (("before", "base/reward"), ("after", "reward")):
        assert metrics["reward"][key] == pytest.approx(module.tested[name].mean().item())
    assert not torch.equal(module.tested["base/reward"], baseline["reward"])
    batch = next(iter(data.test_dataloader()))
    for name, weights in (("reward", POLICY), ("base/reward", REFERENCE)):  # on the same noise
        scores = module.score(draw(module, batch, "test", weights).images, batch).report["reward"]
        torch.testing.assert_close(module.tested[name], scores)
    validate(module, tmp_path, None)
    assert module.baseline is baseline
    with pytest.warns(UserWarning, match="measured with another held_out 4 images"):
        validate(module, tmp_path, None, prompts(validation_prompts=1))
    assert not module.baseline


class Some(PromptSource):
    """Prompts that are given."""

    def __init__(self, *texts: str, wanted: object = None) -> None:
        self.texts, self.wanted = texts, wanted

    def __len__(self) -> int:
        return len(self.texts)

    def prompt(self, row: int) -> str:
        return self.texts[row]

    def columns(self, row: int) -> dict[str, Any]:
        return {} if self.wanted is None else {"wanted": self.wanted, "other": object()}


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_of_a_test_that_leave_the_validation_make_it_another_one(
    shared: bool, tiny: Path, tmp_path: Path, checkpoint: Path
) -> None:
    module = make(DDPOModule, tiny)
    data: PromptDataModule = prompts(
        test_source=Some(held_out(module, prompts()).prompts[0] if shared else "a circle of my own")
    )
    fit(module, tmp_path, 1, data=data, ckpt_path=checkpoint, max_epochs=2, limit_val_batches=None)
    old = torch.load(checkpoint, weights_only=True)["progress"]["baseline"]["reward"]
    assert torch.equal(module.baseline["reward"], old) != shared


def test_other_columns_of_the_same_prompts_are_another_measurement(tiny: Path, tmp_path: Path) -> None:
    """A target in the data that was corrected: rewards of the same images are then other numbers."""
    module, said = make(DDPOModule, tiny), []
    for wanted in (2, 2, 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            validate(module, tmp_path, None, prompts(validation_source=Some("a", "b", wanted=wanted)))
        told = any("measured with another columns" in str(one.message) for one in caught)
        said.append((told, module.identity()["columns"], module.measurement("validate")["columns"]))
    assert [told for told, *_ in said] == [False, False, True]
    assert said[0][1] == said[1][1] != said[2][1]
    assert said[0][2] == said[1][2] != said[2][2]


def test_other_weights_of_objectives_are_another_reward(tiny: Path, tmp_path: Path) -> None:
    data = prompts()
    fit(make(MSDDAModule, tiny), tmp_path, 1, BatchCheckpoint(), data=data, limit_val_batches=None)
    (path,) = tmp_path.rglob("last.ckpt")
    module = make(MSDDAModule, tiny)
    validate(module, tmp_path, path, data)
    assert module.baseline
    module = make(MSDDAModule, tiny, weights={"bright": 0.9, "red": 0.1})
    with pytest.warns(UserWarning, match="measured with another weights bright 0.5, red 0.5 -> bright 0.9"):
        validate(module, tmp_path, path, data)
    assert not module.baseline


def test_a_run_names_the_rewards_of_all_tasks(tiny: Path, tmp_path: Path) -> None:
    def joint(second: float) -> DDPOModule:
        tasks = {
            "a": Task(bank(), GroupAdvantages()),
            "b": Task(
                RewardBank({"red": Redness(), "bright": Brightness()}, {"red": 2.0}), GroupAdvantages()
            ),
        }
        tasks["b"].weight = second
        return make(DDPOModule, tiny, tasks=tasks)

    found = []
    for second in (1.0, 0.0):
        module = joint(second)
        module.trainer = trainer(tmp_path, 1)
        module.trainer.datamodule = task_prompts("a", "b")  # type: ignore[attr-defined]
        module.trainer.datamodule.setup("fit")  # type: ignore[attr-defined]
        module.setup("fit")
        found.append(module.identity()["rewards"])
    assert found[0] == {
        "a/trained": "Brightness x 1",
        "a/monitored": "Redness",
        "b/red": "Redness x 2",
        "b/bright": "Brightness",
    }
    assert found[1] == found[0] | {"b/red": "Redness"}  # a task of weight 0 is monitored


def test_a_reward_that_is_left_out_does_not_make_the_second_run_of_a_module_another_one(
    tiny: Path, tmp_path: Path
) -> None:
    module = make(
        DDPOModule,
        tiny,
        rewards=RewardBank({"trained": Brightness(), "truth": ShapesTruth()}, {"trained": 1.0}),
    )
    with pytest.warns(UserWarning, match="left out"):
        fit(module, tmp_path, 1, data=prompts(), limit_val_batches=None)
    baseline = module.baseline
    validate(module, tmp_path, None)
    assert module.baseline is baseline


def test_a_backbone_that_another_module_has_trained_is_compared_with_the_pretrained_model(
    tiny: Path, tmp_path: Path
) -> None:
    first = make(DDPOModule, tiny, lr=1e-1)
    fit(first, tmp_path, 1, data=prompts())
    second = make(DDPOModule, tiny)
    second.backbone = first.backbone
    recorder = fit(second, tmp_path, 1, data=prompts(), limit_val_batches=None)
    assert (recorder.validated[0]["kl"] > 0).all()
    assert torch.equal(second.baseline["kl"], torch.zeros(len(held_out(second, prompts()))))
    with second.evaluating():
        images = draw(second, held_out(second, prompts()), weights=REFERENCE).images
    score = second.score(images, held_out(second, prompts())).report["reward"]
    assert torch.equal(second.baseline["reward"], score)
