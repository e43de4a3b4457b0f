"""Every method on every kind of UNet, with an adapter and with all weights: a whole life of a run.

The cells that no mark makes slow are in the default suite; ``README.md`` of the backbones shows the table.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import lit_align.backbones
from lit_align.backbones import POLICY, LoRA
from lit_align.callbacks import BatchCheckpoint
from lit_align.methods import AlignmentModule, MSDDAModule
from tests.methods.build import draw, fit, held_out, trainer
from tests.methods.recorders import Killed, Recorder
from tests.methods.test_protocol import (
    CASES,
    LONG,
    assert_close_gradients,
    assert_close_logs,
    assert_equal,
    descended,
    last_checkpoint,
)

MODELS = {"Stable Diffusion": "tiny", "Stable Diffusion XL": "tiny_xl"}
METHODS = [name for name in CASES if name != "joint"]
TRAINED = {"adapter": LoRA(2, 4.0), "all weights": None}
SIZE = (16, 24)
"""Height and width: no side is taken for the other."""

DEFAULT = {("Stable Diffusion XL", "ddpo", "adapter")}
"""Cells of the default suite."""

CELLS = [
    pytest.param(
        model, method, trained, marks=[] if (model, method, trained) in DEFAULT else [pytest.mark.slow]
    )
    for model in MODELS
    for method in METHODS
    for trained in TRAINED
]


def options(trained: str) -> dict[str, Any]:
    """What the long runs have besides their method's: the memory's options too."""
    return {"lora": TRAINED[trained], "size": SIZE, "store": "cpu", "offload_text_encoders": True}


def data_of(name: str, module: AlignmentModule) -> Any:
    of_pairs = {"resolution": SIZE} if name in ("spin", "dpo", "sft") else {}
    return CASES[name].data(module, **of_pairs)


@pytest.mark.parametrize(("model", "name", "trained"), CELLS)
def test_a_run_lives(
    model: str, name: str, trained: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Fit, kill, resume bit for bit, validate, test, predict, export, and load in diffusers alone."""
    folder, case = request.getfixturevalue(MODELS[model]), CASES[name]
    whole, cut, resumed = (case.make(folder, **options(trained)) for _ in range(3))
    fit(whole, tmp_path / "whole", 2, BatchCheckpoint(), **LONG, data=data_of(name, whole))
    killed = Recorder(4, after=case.updates - 1)
    with pytest.raises(Killed):
        fit(cut, tmp_path / "cut", 2, BatchCheckpoint(), **LONG, data=data_of(name, cut), recorder=killed)
    last = last_checkpoint(tmp_path / "cut")
    fit(resumed, tmp_path / "cut", 2, BatchCheckpoint(), **LONG, data=data_of(name, resumed), ckpt_path=last)
    states = [torch.load(last_checkpoint(tmp_path / one), weights_only=True) for one in ("whole", "cut")]
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "progress", "global_step"):
        assert_equal(*(state[part] for state in states), part)
    runner = trainer(tmp_path / "held out", 1, limit_val_batches=None)
    for stage in (runner.validate, runner.test):
        stage(resumed, data_of(name, resumed), verbose=False)
        assert resumed.latest["reward"].isfinite().all()
    images = runner.predict(resumed, data_of(name, resumed))[0][0]
    assert images.shape[1:] == (3, *SIZE)
    assert (draw(resumed, held_out(resumed, data_of(name, resumed))).images - images[:1]).abs().max() > 0
    assert_diffusers_draws(resumed, tmp_path / "exported", folder)


def assert_diffusers_draws(module: AlignmentModule, exported: Path, folder: Path) -> None:
    """What was exported draws, in a plain pipeline, the images of the live model: no pixel differs."""
    module.export(exported)
    backbone: Any = module.backbone
    plain = type(backbone).pipeline_class.from_pretrained(folder, **backbone.without)
    own = [*(module.trained if isinstance(module, MSDDAModule) else [POLICY])]
    for name in own:
        live = draw_in_diffusers(plain, backbone.weight_sets.choose(name), backbone)
        place = exported / name if isinstance(module, MSDDAModule) else exported
        if (place / "model_index.json").exists():
            loaded = type(backbone).pipeline_class.from_pretrained(place, **backbone.without)
        else:
            loaded = type(backbone).pipeline_class.from_pretrained(folder, **backbone.without)
            loaded.load_lora_weights(place)
        assert torch.equal(draw_in_diffusers(loaded, loaded.unet, backbone), live)
        before = type(backbone).pipeline_class.from_pretrained(folder, **backbone.without)
        assert not torch.equal(draw_in_diffusers(before, before.unet, backbone), live)


def draw_in_diffusers(pipeline: Any, unet: Any, backbone: Any) -> Tensor:
    pipeline.unet = unet
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    draws = torch.Generator().manual_seed(0)
    height, width = backbone.size
    images: Tensor = pipeline(
        "a red star",
        height=height,
        width=width,
        num_inference_steps=2,
        generator=draws,
        output_type="pt",
    ).images
    return images


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_are_one_on_xl(name: str, tiny_xl: Path, tmp_path: Path) -> None:
    case = CASES[name]
    alone = descended(case, tiny_xl, tmp_path / "one", 1, micro_batch=case.items)
    two = descended(case, tiny_xl, tmp_path / "two", 1, micro_batch=case.items // 2, devices=2)
    assert len(two.gradients) == len(alone.gradients) == case.updates
    for one, other in zip(two.gradients, alone.gradients, strict=True):
        assert_close_gradients(one, other)
    assert_close_logs(two.logged, alone.logged)


def table() -> str:
    """The cells as the README shows them."""
    lines = ["| method | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    for method in METHODS:
        cells = []
        for model in MODELS:
            kinds = [cell.values[2] for cell in CELLS if cell.values[:2] == (model, method)]
            cells.append(", ".join(kinds))
        name = CASES[method].method.__name__ + (" with AWM" if method == "awm" else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_table_of_the_readme_is_that_of_the_tests() -> None:
    readme = Path(lit_align.backbones.__file__).with_name("README.md")
    assert table() in readme.read_text()
