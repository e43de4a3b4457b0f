"""Published settings train: one real batch of each, with small models and data in the place of the large.

Nothing is replaced but what stands in the tables below; a new configuration needs an entry here only where it
names a model or a source that is not there yet.
"""

import copy
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_align.cli import main
from lit_align.shapes import CLIP
from tests.rewards.published import image_reward
from tests.test_cli import ROOT, scalars

PAPER = sorted(ROOT.glob("configs/paper/*.yaml"))
ALIKE = {
    "awm_sd35",
    "dance_grpo_flux",
    "pinterest_composition",
    "pinterest_fairness",
    "prdp_large",
    "prdp_multi_reward",
}
"""Each differs by a few values from another one, which the default suite runs."""

REWARDS: dict[str, dict[str, Any]] = {
    "PickScore": {"pretrained": "shapes"},
    "CLIPScore": {"pretrained": "shapes"},
    "HPSv2": {"pretrained": str(CLIP)},
    "AestheticScore": {"pretrained": "shapes"},
    "ObjectPresence": {"pretrained": "shapes"},
    "StatisticalParity": {"pretrained": "shapes", "credit": "shared"},
}
"""Arguments of reward models, by class, that are replaced as a whole: by the models that ship."""

PROMPTS = {"source": "small", "validation_source": "validation", "test_source": "test"}
"""Shipped prompts in the place of files and of the hub, by what they are for."""

SOURCES: dict[str, dict[str, Any]] = {
    name: {"class_path": "ShapesPick"} for name in ("PickaPicFiles", "PickaPicHub")
} | {"HubImages": {"class_path": "tests.methods.build.Greys"}}
"""Shipped pairs, and captioned images of the tiny model's size, for downloaded ones, by class."""

DOWNLOADED = (
    "TextPrompts",
    "CSVPrompts",
    "TSVPrompts",
    "JSONPrompts",
    "JSONLPrompts",
    "ParquetPrompts",
    "HubPrompts",
    "ObjectPairs",
    "PickaPicPrompts",
)

SIZES: dict[str, Any] = {
    "devices": 1,
    "max_epochs": 1,
    "limit_train_batches": 1,
    "num_steps": 3,
    "noisy_steps": 2,
    "images_per_prompt": 2,
    "prompts_per_batch": 2,
    "pairs_per_batch": 2,
    "resolution": 16,
    "validation_prompts": 4,
    "validation_images_per_prompt": 2,
    "validation_fraction": 0.3,
    "test_fraction": 0.3,
    "test_prompts": 4,
    "test_images_per_prompt": 2,
    "eval_batch": 4,
    "micro_batch": 4,
    "shared_timesteps": 2,
    "timesteps": 2,
    "batch": 4,
    "size": 32,
}
"""How much of everything, wherever it is set."""

NOT_ON_A_CPU = {("precision", "16-mixed"): "bf16-mixed"}


def reduced(config: Any, models: Mapping[str, Path], key: str = "") -> Any:
    """The configuration with stand-ins; ``key`` is where ``config`` stands in it.

    Args:
        config: Or a part of it.
        models: A tiny one for each class of backbones, and for ImageReward.
        key: Where the part stands.
    """
    if isinstance(config, list):
        return [reduced(entry, models, key) for entry in config]
    if not isinstance(config, dict):
        # null is a choice of its own, not a size.
        return NOT_ON_A_CPU.get((key, config), config if config is None else SIZES.get(key, config))
    name = str(config.get("class_path", "")).rpartition(".")[2]
    if name in SOURCES:
        return SOURCES[name]
    if name in DOWNLOADED:
        return {"class_path": "ShapesPromptSet", "init_args": {"name": PROMPTS[key]}}
    small = {inner: reduced(value, models, inner) for inner, value in config.items()}
    if name in REWARDS:
        small["init_args"] = REWARDS[name]
    if name == "ImageReward":
        small["init_args"] = {"pretrained": str(models[name])}
    if key == "backbone" and "pretrained" in small.get("init_args", {}):
        small["init_args"]["pretrained"] = str(models[name or "StableDiffusionBackbone"])
    return small


@pytest.fixture(scope="module")
def preference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image_reward(folder := tmp_path_factory.mktemp("image_reward"))
    return folder


@pytest.fixture
def models(
    tiny: Path, tiny_xl: Path, flow_folder: Callable[[str], Path], preference: Path
) -> dict[str, Path]:
    return {
        "ImageReward": preference,
        "StableDiffusionBackbone": tiny,
        "StableDiffusionXLBackbone": tiny_xl,
        "StableDiffusion3Backbone": flow_folder("sd3"),
        "FluxBackbone": flow_folder("flux"),
    }


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, marks=[pytest.mark.slow] if path.stem in ALIKE else [], id=path.stem)
        for path in PAPER
    ],
)
def test_published_settings_train_one_batch(config: Path, models, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit_align"])
    bases = re.findall(r"Overlay for (configs/\w+\.yaml)", config.read_text().splitlines()[0])
    arguments = []
    for number, file in enumerate([*(ROOT / base for base in bases), config]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump(reduced(yaml.safe_load(file.read_text()), models)))
        arguments.append(f"--config={path}")
    updates = yaml.safe_load(config.read_text())["model"]["init_args"].get("updates", 1)
    if updates > SIZES["prompts_per_batch"]:  # each is of whole prompts
        arguments.append(f"--data.prompts_per_batch={updates}")
    quiet = [
        "accelerator=cpu",
        "enable_progress_bar=false",
        "enable_model_summary=false",
        "limit_val_batches=1",
    ]
    main(["fit", *arguments, *(f"--trainer.{option}" for option in quiet)])
    (run,) = Path("logs").glob("*/version_0")
    metrics = scalars(run)
    (loss,) = metrics.Scalars("train/loss")
    assert math.isfinite(loss.value)
    settings = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]
    sampler = (settings["sampling"]["eval_sampler"] or settings["sampler"])["init_args"]
    noise = sampler["noise_level" if "noise_level" in sampler else "eta"]
    distance = "val/kl" if noise else "val/drift"  # steps without noise have no density
    assert {"train/loss", "val/reward", distance} <= set(metrics.Tags()["scalars"])


def test_nothing_else_is_replaced(models):
    """The stand-ins leave a configuration of the package's own models and small sizes as it is."""
    config = yaml.safe_load((ROOT / "configs" / "prdp.yaml").read_text())
    changed = copy.deepcopy(config)
    for part, name in (("model", "backbone"), ("trainer", "devices")):
        assert name in str(changed[part])
    small = reduced(changed, models)
    assert changed == config
    kept, given = small["model"]["init_args"], config["model"]["init_args"]
    for name in ("beta", "clip_range", "convention", "updates", "inner_epochs"):
        assert kept[name] == given[name]
    assert kept["optimisation"] == given["optimisation"] | {"micro_batch": 4}
    assert kept["sampling"] == given["sampling"] | {"batch": 4}


@pytest.mark.parametrize(
    ("name", "queries", "model", "rate", "weights"),
    [
        ("prdp_small", 51_200, (3e-5, 1e-6, 10), 1e-5, {"pickscore": 0.01}),
        ("prdp_large", 512_000, (3e-6, 1e-4, 1), 7e-6, {"pickscore": 0.01}),
        (
            "prdp_multi_reward",
            512_000,
            (3e-5, 1e-4, 1),
            1e-5,
            {"pickscore": 0.1, "hpsv2": 2, "aesthetic": 0.05},
        ),
    ],
)
def test_prdp_has_the_published_values(name, queries, model, rate, weights):
    config = yaml.safe_load((ROOT / "configs" / "paper" / f"{name}.yaml").read_text())
    trainer, settings, data = config["trainer"], config["model"]["init_args"], config["data"]["init_args"]
    batches = trainer["max_epochs"] * trainer["limit_train_batches"]
    assert batches * data["prompts_per_batch"] * data["images_per_prompt"] == queries
    assert (settings["beta"], settings["clip_range"], settings["inner_epochs"]) == model
    optimisation = settings["optimisation"]
    assert optimisation["optimizer"]["init_args"] == {"lr": rate, "weight_decay": 1e-4}
    assert optimisation["clip_norm"] == 1
    assert settings["rewards"]["init_args"]["weights"] == weights
    assert (settings["sampling"]["guidance"], settings["sampler"]["init_args"]["num_steps"]) == (5, 50)
    assert settings["backbone"]["init_args"]["lora"] is None


@pytest.mark.parametrize("name", ["preference", "composition", "fairness", "joint"])
def test_pinterest_has_the_published_values(name):
    config = yaml.safe_load((ROOT / "configs" / "paper" / f"pinterest_{name}.yaml").read_text())
    settings, data = config["model"]["init_args"], config["data"]["init_args"]
    tasks = settings.get("tasks") or {name: settings}
    prompts = data.get("tasks") or {name: data}
    assert set(tasks) == set(prompts)
    for task, sizes in prompts.items():
        assert sizes["prompts_per_batch"] * sizes["images_per_prompt"] == 2048
        assert sizes["images_per_prompt"] == (16 if task == "fairness" else 1)
        assert tasks[task]["advantages"] == {"class_path": "BatchAdvantages", "init_args": {"clip": 10}}
        for reward in tasks[task]["rewards"]["init_args"]["rewards"].values():
            assert reward.get("init_args", {}).get("credit", "shared") == "shared"
    assert settings["optimisation"]["optimizer"]["init_args"] == {
        "lr": 2e-6,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 1e-2,
    }
    assert (settings["clip_range"], settings["shared_timesteps"], settings["sampling"]["guidance"]) == (
        1e-4,
        5,
        7,
    )
    assert settings["sampler"]["init_args"] == {"num_steps": 50, "eta": 1, "noisy_steps": None}
    assert (settings["updates"], settings["inner_epochs"], settings["kl_target"]) == (1, 1, None)
    assert settings["pretraining"]["batch"] == 16 * 128
    assert settings["pretraining"]["order"] == ("after" if name == "joint" else "before")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_no_configuration_validates_on_the_prompts_that_it_tests_on(path: Path):
    data = (yaml.safe_load(path.read_text()).get("data") or {}).get("init_args", {})
    for task in [data, *data.get("tasks", {}).values()]:
        assert "test_source" not in task or task.get("validation_source") != task["test_source"]
