"""The doctor names what is wrong with a configuration, and is silent where nothing is."""

import os
import shutil
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from lit_align.advantages import GroupAdvantages
from lit_align.cli import main
from lit_align.cli.doctor import PACKAGE, _own, _processes, _warned
from lit_align.doctor import Asked, Trial, judge, look
from lit_align.doctor.memory import Memory, activations, capacity
from lit_align.doctor.trial import BATCHES, Seen
from lit_align.methods import (
    AlignmentModule,
    AlignPropModule,
    DDPOModule,
    DPOModule,
    NFTModule,
    PRDPModule,
    SFTModule,
    SPINModule,
)
from lit_align.methods.pretraining import Pretraining
from lit_align.methods.tasks import Task
from lit_align.rewards import Brightness, Redness, Reward, RewardBank
from tests.methods.build import Greys, bank, fit, make, pairs, prompts, task_prompts, trainer

ROOT = Path(__file__).parents[2]
ASKED = Asked(3, -1, 8, None, 1, Path("logs"))
CLIP = 1.6 / (4 * 8 * 8)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])


def healthy(tiny: Path, method: type[AlignmentModule] = DDPOModule, **options: Any) -> AlignmentModule:
    own: dict[str, Any] = {} if method in (NFTModule, AlignPropModule) else {"clip_range": CLIP}
    return make(method, tiny, **{"num_steps": 3, "noisy_steps": 2, "lr": 1e-4} | own | options)


SIZES = {"prompts": 8, "images": 4, "validation_prompts": 64, "validation_images_per_prompt": 1}


def data(**options: Any) -> Any:
    return prompts(**SIZES | options)


# ---- at a look


def test_a_healthy_configuration_is_left_alone(tiny):
    for method in (DDPOModule, PRDPModule, NFTModule):
        assert list(look(healthy(tiny, method), data(), ASKED)) == []


def test_validation_by_batches_over_the_ends_of_epochs_is_validation(tiny):
    assert list(look(healthy(tiny), data(), replace(ASKED, val_every=None))) == []


def schedule(updates: int) -> Any:
    return partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=updates)


def denoising_tasks() -> dict[str, Any]:
    """Two tasks and captioned images, in three updates a batch."""
    tasks = {name: Task(bank(), GroupAdvantages()) for name in ("a", "b")}
    return {"tasks": tasks, "pretraining": Pretraining(Greys(), batch=4)}


LOOKS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a clip range for larger latents": (
        "clip_range",
        lambda tiny: (healthy(tiny, clip_range=1e-5), data(), ASKED),
    ),
    "a clip range that never binds": (
        "clip_range",
        lambda tiny: (healthy(tiny, clip_range=1.0), data(), ASKED),
    ),
    "PRDP's clip range in nats": (
        "clip_range",
        lambda tiny: (healthy(tiny, PRDPModule, convention="equations", clip_range=1e-4), data(), ASKED),
    ),
    "two images of a prompt": ("few_images_of_a_prompt", lambda tiny: (healthy(tiny), data(images=2), ASKED)),
    "many updates on few images": (
        "few_images_in_an_update",
        lambda tiny: (healthy(tiny, updates=4), data(), ASKED),
    ),
    "no validation": (
        "no_validation",
        lambda tiny: (healthy(tiny), data(), replace(ASKED, val_batches=0)),
    ),
    "validation by an epoch that the run does not reach": (
        "no_validation",
        lambda tiny: (healthy(tiny), data(), replace(ASKED, val_every=4)),
    ),
    "few held-out images": (
        "few_held_out",
        lambda tiny: (healthy(tiny), data(validation_prompts=8), ASKED),
    ),
    "nothing monitored": (
        "nothing_monitored",
        lambda tiny: (
            healthy(tiny, rewards=RewardBank({"red": Redness()}, {"red": 1.0})),
            data(),
            ASKED,
        ),
    ),
    "fewer updates than SPIN's iterations": (
        "iterations_are_cut",
        lambda tiny: (make(SPINModule, tiny, iterations=2, steps=30), data(), ASKED),
    ),
    "no end": ("no_end", lambda tiny: (healthy(tiny), data(), replace(ASKED, max_epochs=None))),
    "a schedule that ends early": (
        "schedule_ends",
        lambda tiny: (healthy(tiny, lr_scheduler=schedule(5)), data(), ASKED),
    ),
    "a schedule for one of two passes": (
        "schedule_ends",
        lambda tiny: (healthy(tiny, inner_epochs=2, lr_scheduler=schedule(24)), data(), ASKED),
    ),
    "a schedule for one of two shared steps": (
        "schedule_ends",
        lambda tiny: (healthy(tiny, shared_timesteps=2, lr_scheduler=schedule(24)), data(), ASKED),
    ),
    "a schedule for two tasks without the captioned images": (
        "schedule_ends",
        lambda tiny: (
            healthy(tiny, lr_scheduler=schedule(48), **denoising_tasks()),
            task_prompts("a", "b", **SIZES),
            ASKED,
        ),
    ),
    "a schedule that cannot be stepped to the end": (
        "schedule_ends",
        lambda tiny: (
            healthy(
                tiny,
                optimizer=torch.optim.Muon,
                lr_scheduler=partial(OneCycleLR, max_lr=1e-3, total_steps=5),
            ),
            data(),
            ASKED,
        ),
    ),
    "prompts that two processes cannot share": (
        "processes",
        lambda tiny: (healthy(tiny), data(prompts=9, validation_prompts=64), replace(ASKED, processes=2)),
    ),
    "held-out prompts that three processes cannot share": (
        "processes",
        lambda tiny: (healthy(tiny), data(prompts=9, test_prompts=9), replace(ASKED, processes=3)),
    ),
    "updates that do not divide over processes": (
        "processes",
        lambda tiny: (healthy(tiny, updates=2), data(prompts=6, images=12), replace(ASKED, processes=2)),
    ),
    "guidance beside NFT": (
        "guidance_is_learnt",
        lambda tiny: (healthy(tiny, NFTModule, guidance=3.0), data(), ASKED),
    ),
}


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (DDPOModule, {"clip_range": 1.0}, "none"),
        (DDPOModule, {"clip_range": 1e-6}, "nearly every update"),
        (DDPOModule, {"clip_range": CLIP}, None),
        (PRDPModule, {"clip_range": 1.0}, "none"),
        (PRDPModule, {"clip_range": 1.0, "convention": "equations"}, None),
    ],
)
def test_a_run_tells_of_a_clip_range_of_another_size_of_latent(method, options, told, tiny, tmp_path):
    module = healthy(tiny, method, **options)
    assert prod(module.backbone.latent_shape) == 1.6 / CLIP
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(module, tmp_path, 1, data=data())
    texts = [str(one.message) for one in found if str(one.message).startswith("clip_range")]
    assert texts == [] if told is None else f"it stops {told}; published runs have 1.6 nats" in texts[0]


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        (DPOModule, {"beta": 2000.0 * 256 / 16384}, None),
        (
            DPOModule,
            {"beta": 125.0 * 256 / 16384},
            "hardly changes with the policy",
        ),  # Shapes' on latents of 1.5
        (DPOModule, {"beta": 5000.0}, "soon saturates"),
        (SPINModule, {"beta": [30.0, 1.0]}, "hardly changes with the policy"),
        (SPINModule, {"beta": 1.0, "exact": True}, None),  # a sum over steps
        (SFTModule, {}, None),
    ],
)
def test_a_run_and_the_doctor_tell_of_a_beta_of_another_size_of_latent(method, options, told, tiny, tmp_path):
    module = make(method, tiny, **options)
    assert prod(module.backbone.latent_shape) == 256
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, 1).fit(module, held := pairs())
    texts = [str(one.message) for one in caught if str(one.message).startswith("beta: ")]
    found = [f"{one.what}; {one.remedy}" for one in look(module, held, ASKED) if one.name == "beta"]
    assert texts == [f"beta: {one}" for one in found]
    assert (
        texts == [] if told is None else f"{told}; published runs have about 0.12, which is 30.7" in texts[0]
    )


@pytest.mark.parametrize("case", LOOKS)
def test_what_can_be_seen_is_named(case: str, tiny: Path):
    name, built = LOOKS[case]
    assert [finding.name for finding in look(*built(tiny))] == [name]


def test_a_full_disk_and_a_closed_folder_are_named(tiny, tmp_path, monkeypatch):
    module = healthy(tiny)
    full = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert [finding.name for finding in look(module, data(), ASKED)] == ["disk_full"]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert [finding.name for finding in look(module, data(), ASKED)] == ["cannot_write"]


# ---- by a trial


class Constant(Reward):
    def forward(self, images: Tensor, prompts: list[str], groups=None, columns=None) -> Tensor:
        return torch.full((len(images),), 0.5)


class OfPrompt(Reward):
    """The same for all images of a prompt."""

    def forward(self, images: Tensor, prompts: list[str], groups=None, columns=None) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])


class Half(Reward):
    """No score for every other image."""

    def forward(self, images: Tensor, prompts: list[str], groups=None, columns=None) -> Tensor:
        scores = images.mean((1, 2, 3)).cpu()
        scores[::2] = torch.nan
        return scores


class Percent(Reward):
    """A share that is given in percent."""

    documented = (0.0, 1.0)

    def forward(self, images: Tensor, prompts: list[str], groups=None, columns=None) -> Tensor:
        return 100 * images.mean((1, 2, 3)).cpu() + 1


def trained(*rewards: Reward, weights: tuple[float, ...] = (1.0, 1.0)) -> RewardBank:
    bank = {f"r{i}": reward for i, reward in enumerate(rewards)}
    return RewardBank(bank | {"other": Redness()}, dict(zip(bank, weights, strict=False)))


def tried(module: AlignmentModule, folder: Path, **options: Any) -> list[str]:
    trial = Trial()
    running = trainer(folder, BATCHES, trial, **options)
    with warnings.catch_warnings(record=True):
        running.fit(module, data())
    assert trial.seen.images == [8, 8]
    return [finding.name for finding in judge(module, trial.seen)]


def test_a_healthy_run_is_left_alone(tiny, tmp_path):
    assert tried(healthy(tiny), tmp_path) == []


def frozen_start(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)


TRIALS: dict[str, tuple[set[str], dict[str, Any]]] = {
    "a constant reward": ({"reward_constant", "no_gradient"}, {"rewards": trained(Constant())}),
    "a reward of the prompt alone": ({"no_signal", "no_gradient"}, {"rewards": trained(OfPrompt())}),
    "half of the images unscored": ({"reward_unscored"}, {"rewards": trained(Half())}),
    "a reward that does not count": (
        {"reward_dwarfed"},
        {"rewards": trained(Brightness(), Redness(), weights=(1000.0, 0.001))},
    ),
    "a schedule that begins at 0": ({"weights_fixed"}, {"lr_scheduler": frozen_start}),
    "a rate that breaks the policy": ({"step_too_large"}, {"lr": 10.0, "clip_range": None}),
    "scores outside of what is documented": ({"reward_out_of_range"}, {"rewards": trained(Percent())}),
    "a rate that does nothing": ({"step_too_small"}, {"lr": 1e-12}),
}


@pytest.mark.parametrize("case", TRIALS)
def test_what_a_trial_shows_is_named(case: str, tiny: Path, tmp_path: Path):
    names, options = TRIALS[case]
    assert set(tried(healthy(tiny, **options), tmp_path)) == names


@pytest.mark.parametrize(("ceiling", "names"), [(-1.0, ["no_gradient", "above_ceiling"]), (2.0, [])])
def test_a_ceiling_that_most_images_are_above_is_named(ceiling, names, tiny, tmp_path):
    module = healthy(tiny, AlignPropModule, ceiling=ceiling)
    trainer(tmp_path, BATCHES, trial := Trial()).fit(module, data())
    assert [finding.name for finding in judge(module, trial.seen)] == names


def test_a_trial_leaves_no_latents_where_the_run_would_keep_them(tiny, tmp_path):
    of_pairs = pairs(latent_cache=str(tmp_path / "latents"))
    trainer(tmp_path, BATCHES, trial := Trial()).fit(make(DPOModule, tiny), of_pairs)
    assert len(trial.seen.images) == BATCHES
    assert not (tmp_path / "latents").exists()


def test_weights_out_of_reach_and_ratios_that_are_not_1_are_named(tiny, tmp_path, monkeypatch):
    module = healthy(tiny)
    spare = torch.nn.Parameter(torch.ones(3))
    module.register_parameter("spare", spare)
    assert tried(module, tmp_path) == ["gradient_missing"]
    rough = Seen(metrics=[{"train/ratio_deviation": 0.1 * CLIP + 1e-6}], reached={"a"}, moved={"a"})
    assert [finding.name for finding in judge(module, rough)] == ["ratio_is_not_1"]
    unused = Seen(trained=["policy.blocks.3.q.lora_A", "a"], reached={"a"}, moved={"a"})
    assert [finding.name for finding in judge(module, unused)] == ["gradient_missing"]
    monkeypatch.setattr(type(module.backbone), "unread", ("blocks.3.q",))
    assert [*judge(module, unused)] == []


def test_a_step_of_an_optimizer_that_chooses_its_rate_is_judged(tiny):
    """Adafactor may have none (``lr: null``)."""
    far = Seen(metrics=[{"train/kl": 2.0}], reached={"a"}, moved={"a"})
    (finding,) = judge(module := healthy(tiny), far)
    assert module.lr is None
    assert (finding.name, finding.remedy) == (
        "step_too_large",
        "lower the learning rate, or set kl_target where the method has it",
    )


def test_gradients_of_frozen_weights_and_those_that_are_not_finite_are_named(tiny, tmp_path):
    module = healthy(tiny)
    frozen = module.backbone.unet.conv_out.weight

    def switch_on(batch: Any, batch_idx: int) -> None:
        frozen.requires_grad_(True)

    module.on_train_batch_start = switch_on  # type: ignore[method-assign]
    assert "gradient_elsewhere" in tried(module, tmp_path)
    broken = healthy(tiny)
    for parameter in broken.backbone.weight_sets.parameters_of("policy"):
        parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert "gradient_not_finite" in tried(broken, tmp_path)


def test_warnings_of_the_package_are_findings():
    said = "rewards: the models of 'clip' were trained on Shapes images, and so on; leave out y"
    assert (_warned(said).name, _warned(said).remedy) == ("reward_domain", "leave out y")
    assert _warned("3 of 4 prompts have words that the model was never taught; take others").name == (
        "untaught_words"
    )
    assert _warned("rollout batch: all advantages are 0, so there is nothing").name == "no_signal"


def test_warnings_of_libraries_are_not_findings():
    """Wherever they are installed: the environment of a checkout is often in its folder."""
    places = ["/home/u/lit_align/.venv/lib/lightning/trainer.py", str(PACKAGE / "methods" / "base.py")]
    told = [warnings.WarningMessage(Path(place).stem, UserWarning, place, 1) for place in places]
    assert _own(told) == ["base"]


def test_what_does_not_fit_the_device_is_named(tiny, tmp_path):
    trial = Trial()
    trainer(tmp_path, BATCHES, trial).fit(module := healthy(tiny, micro_batch=64), data())
    memory = trial.seen.memory
    assert memory is not None
    assert min(memory.activations, memory.weights) > 0
    assert list(judge(module, trial.seen)) == []
    enough = memory.weights + memory.activations
    for there, place in ((enough - 1, "optimisation.micro_batch"), (memory.weights - 1, "backbone")):
        trial.seen.memory = replace(memory, there=there)
        (finding,) = judge(module, trial.seen)
        assert (finding.name, finding.where) == ("memory", f"model.{place}")
    trial.seen.memory = replace(memory, there=enough)
    assert list(judge(module, trial.seen)) == []


def test_memory_is_counted_by_what_the_optimizer_and_a_micro_batch_take(tiny, tmp_path):
    found: dict[str, Memory] = {}
    options: dict[str, dict[str, Any]] = {
        "adam": {"micro_batch": 4},
        "more": {"micro_batch": 8},
        "blocks": {"micro_batch": 4, "checkpointing": "blocks"},
        "sgd": {"micro_batch": 4, "optimizer": partial(torch.optim.SGD, lr=1e-4)},
    }
    for name, one in options.items():
        trial = Trial()
        trainer(tmp_path, 1, trial).fit(module := healthy(tiny, **one), data())
        assert trial.seen.memory is not None
        found[name] = trial.seen.memory
    adam, more, blocks, sgd = (found[name] for name in options)
    assert more.activations == 2 * adam.activations
    assert blocks.activations < 0.7 * adam.activations
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert adam.weights - sgd.weights == 8 * count
    there = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    assert sgd.weights - there == 4 * count  # gradients
    module.sampling.guidance = 3.0  # two predictions
    assert activations(module) > 1.5 * sgd.activations


def test_a_container_may_have_less_memory_than_its_machine(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("max", "limit", "none")]
    for file, limit in zip(files, ("max\n", "1000000\n"), strict=False):
        file.write_text(limit)
    monkeypatch.setattr("lit_align.doctor.memory.LIMITS", [str(file) for file in files])
    assert capacity(torch.device("cpu")) == 1_000_000
    files[1].unlink()
    machine = capacity(torch.device("cpu"))
    assert machine is not None
    assert machine > 1_000_000


def test_processes_are_counted_as_the_trainer_does():
    def of(devices: Any, nodes: int = 1, strategy: Any = "auto") -> int:
        return _processes(Namespace(devices=devices, num_nodes=nodes, strategy=strategy, accelerator="cpu"))

    assert [of(2), of("4"), of([0, 2]), of("0,1,2"), of("auto"), of(2, 3), of(2, 1, object())] == [
        *(2, 4, 2, 3, 1, 6, 1)
    ]


# ---- as a command


def arguments(tiny: Path, *more: str) -> list[str]:
    bank = "{brightness: {class_path: Brightness}, redness: {class_path: Redness}}"
    return [
        "--config",
        str(ROOT / "configs" / "ddpo.yaml"),
        "--trainer.accelerator=cpu",
        f"--model.backbone.pretrained={tiny}",
        "--model.backbone.lora={rank: 8, target_modules: null}",  # at this rate more weights move too far
        "--model.sampler.num_steps=3",
        "--model.sampler.noisy_steps=2",
        f"--model.clip_range={CLIP}",
        f"--model.rewards.rewards={bank}",
        "--model.rewards.weights={brightness: 1.0}",
        *more,
    ]


def test_the_command_finds_nothing_in_a_healthy_configuration_and_writes_nothing(tiny, tmp_path, capsys):
    main(["doctor", *arguments(tiny)])
    assert "nothing was found" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_1_and_a_line_for_each_finding(tiny, tmp_path, capsys):
    wrong = ["--model.clip_range=1", "--data.validation_prompts=4", "--data.validation_images_per_prompt=1"]
    with pytest.raises(SystemExit) as exited:
        main(["doctor", *arguments(tiny, *wrong)])
    assert exited.value.code == 1
    told = capsys.readouterr().out
    assert "clip_range: model.clip_range: 1 is 256 nats" in told.replace("\n", " ")
    assert told.count("256 nats") == 1  # the fit warns of it too
    assert "few_held_out: data.validation_prompts" in told
    assert list(tmp_path.iterdir()) == []


def test_what_a_fit_refuses_is_a_finding(tiny, capsys):
    with pytest.raises(SystemExit) as exited:
        main(["doctor", *arguments(tiny, "--model.updates=3")])
    assert exited.value.code == 1
    assert "refused: fit: updates: the 16 prompts" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(ROOT.glob("configs/*.yaml")), ids=lambda path: path.stem)
def test_it_is_silent_on_what_ships(config: Path, capsys):
    main(["doctor", "--config", str(config), "--trainer.accelerator=cpu"])
    assert "nothing was found" in capsys.readouterr().out
