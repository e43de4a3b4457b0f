"""The code on a model card, run as it stands, draws the images of the model that was trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align.backbones import (
    POLICY,
    DiffusersBackbone,
    StableDiffusion3Backbone,
    StableDiffusionBackbone,
    StableDiffusionXLBackbone,
)
from lit_align.export import Live
from lit_align.export.forms import draw as draw_for_comparison
from lit_align.export.live import Run
from lit_align.export.snippet import is_hub_id, snippet
from tests.backbones.conftest import FAMILIES, draw, draw_in_diffusers, perturb
from tests.backbones.original_layout import save_original


def exported(kind: type[DiffusersBackbone], guidance: float, folder: Path, **options: Any) -> Live:
    """A model whose adapter and whole pipeline lie in ``folder``."""
    backbone = perturb(kind(**options))
    sampler = {"class_path": "DDIM", "init_args": {"num_steps": 3, "eta": 1.0, "noisy_steps": 2}}
    training = {"class_path": "DDIM", "init_args": {"num_steps": 5, "eta": 1.0}}
    sampling = {"guidance": guidance, "eval_sampler": sampler}
    model = {"backbone": {"init_args": options}, "sampler": training, "sampling": sampling}
    backbone.weight_sets.save(folder / "adapter")
    backbone.weight_sets.save_merged(folder / "pipeline", POLICY)
    run = Run(folder, folder / "adapter", {"model": {"init_args": model}})
    return Live(backbone, [(run, 1.0)], POLICY, False)


def execute(live: Live, form: str, told: dict[str, Any]) -> Any:
    """The pipeline that the code makes, on the CPU in float32; its call must be told what is expected."""
    text = snippet(live, form)
    for dtype in ("float16", "bfloat16"):
        text = text.replace(f"torch.{dtype})", "torch.float32)")
    names: dict[str, Any] = {}
    exec(compile(text.replace('pipeline.to("cuda")\n', ""), "card.py", "exec"), names)
    height, width = live.backbone.size
    assert names["image"].size == (width, height)
    pipeline = names["pipeline"]
    assert {name: getattr(pipeline, f"_{name}") for name in told} == told
    return pipeline


def check(live: Live, folder: Path, monkeypatch: pytest.MonkeyPatch, guidance: float, **told: Any) -> None:
    """Compare the pipelines of both forms with the policy, drawn by this package's own sampler."""
    monkeypatch.chdir(folder)
    expected = draw(live.backbone, guidance)
    for form in ("adapter", "pipeline"):
        pipeline = execute(live, form, {"num_timesteps": 3} | told)
        pipeline.set_progress_bar_config(disable=True)
        drawn = draw_in_diffusers(pipeline, live.backbone, guidance)
        torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
    assert draw_for_comparison(pipeline, live, 1).isfinite().all()


def test_the_bundled_model_is_found(tmp_path, monkeypatch):
    live = exported(StableDiffusionBackbone, 3.0, tmp_path, pretrained="shapes", size=32)
    check(live, tmp_path, monkeypatch, 3.0, guidance_scale=3.0)
    assert "astronaut" not in snippet(live, "adapter")  # it draws shapes
    assert "eta=" not in snippet(live, "adapter")  # with which all steps would draw noise


def test_so_is_the_bundled_flow_model_without_tokens_in_place_of_t5(tmp_path, monkeypatch):
    live = exported(StableDiffusion3Backbone, 2.0, tmp_path, pretrained="shapes", size=32)
    check(live, tmp_path, monkeypatch, 2.0, guidance_scale=2.0)
    assert "max_sequence_length=0" in snippet(live, "pipeline")


def test_a_single_file_has_its_configuration_and_the_schedule_of_the_run(tiny_xl, tmp_path, monkeypatch):
    file = tmp_path / "file.safetensors"
    save_original(tiny_xl, file, v_pred=torch.empty(0))
    entries = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    options = {"pretrained": str(file), "config": str(tiny_xl), "scheduler": entries, "size": [16, 24]}
    live = exported(StableDiffusionXLBackbone, 1.0, tmp_path, **options)
    check(live, tmp_path, monkeypatch, 1.0, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("family", "guidance", "told"),
    [
        ("z-image", 1.0, {"guidance_scale": 0.0}),
        ("z-image", 3.0, {"guidance_scale": 2.0}),
        ("flux", 3.0, {"guidance_scale": 3.0}),
        ("schnell", 3.0, {}),
    ],
)
@pytest.mark.slow
def test_flow_models_are_guided_as_in_the_run(
    family: str,
    guidance: float,
    told: dict[str, float],
    flow_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    kind, model, _ = FAMILIES[family]
    entries = {"shift": 2.0, "use_dynamic_shifting": False}
    live = exported(kind, guidance, tmp_path, pretrained=str(flow_folder(model)), scheduler=entries)
    check(live, tmp_path, monkeypatch, guidance, **told)


def test_weights_of_a_variant_are_asked_for(tiny, tmp_path, monkeypatch):
    model = shutil.copytree(tiny, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    live = exported(StableDiffusionBackbone, 1.0, tmp_path, pretrained=str(model), variant="fp16")
    check(live, tmp_path, monkeypatch, 1.0, guidance_scale=1.0)


def test_only_what_others_find_is_a_base_model(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    (tiny.parent / "owner" / "name").mkdir(parents=True, exist_ok=True)
    names = ["stabilityai/sdxl-turbo", "shapes", "owner/name", "a/file.safetensors", "./name", str(tiny)]
    assert [is_hub_id(name) for name in names] == [True] + 5 * [False]
