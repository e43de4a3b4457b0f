"""The forms of an export; each is loaded again by diffusers alone, and compared with the live model."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from torch import Tensor

from lit_align.backbones.adapter_files import to_kohya
from lit_align.backbones.loading import load_pipeline
from lit_align.backbones.options import with_entries
from lit_align.errors import ConfigError
from lit_align.export.live import Live, Run
from lit_align.files import follow_umask, replace_file, replace_folder, writing
from lit_align.identity import ADAPTER, differences, read_stamp, stamp

FORMS = ("adapter", "kohya", "pipeline")
"""``adapter``: diffusers' folder. ``kohya``: one file for A1111, Forge and ComfyUI. ``pipeline``: a whole
model."""

PROMPTS = ("a photograph of an astronaut riding a horse", "a red star and two blue circles")
"""What is drawn for the comparison."""


@dataclass(frozen=True)
class Exported:
    """One export.

    Attributes:
        form: One of :data:`FORMS`.
        path: The folder or file.
        difference: Largest difference of a pixel to the live model's images, of a range of 1.
    """

    form: str
    path: Path
    difference: float


def export(live: Live, forms: Sequence[str], folder: Path, name: str, steps: int) -> list[Exported]:
    """Write a model in some forms, load each in diffusers and compare its images with those of the live one.

    Args:
        live: The model.
        forms: Of :data:`FORMS`.
        folder: Where.
        name: Of kohya's file, which programs show.
        steps: Of the comparison's images.

    Raises:
        ConfigError: A form cannot hold this model.
    """
    if live.whole and (wrong := [form for form in forms if form != "pipeline"]):
        raise ConfigError(
            f"export: all weights were trained, so there is no {wrong[0]}; give --form pipeline"
        )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    expected = draw(_pipeline(live, "live"), live, steps)
    made = []
    for form in forms:
        path = _write(live, form, folder, name)
        images = draw(_pipeline(live, form, path), live, steps)
        made.append(Exported(form, path, float((images - expected).abs().max())))
    return made


def _write(live: Live, form: str, folder: Path, name: str) -> Path:
    sets, path = live.backbone.weight_sets, folder / (f"{name}.safetensors" if form == "kohya" else form)
    if form == "kohya":
        factors = to_kohya(sets.factors(live.name), live.backbone.denoiser)
        rank = max(int(value) for key, value in factors.items() if key.endswith(".alpha"))
        said = {"ss_network_module": "networks.lora", "ss_output_name": name}
        said |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
        values = {key: value.detach().cpu() for key, value in factors.items()}

        def fill(draft: Path) -> None:
            save_file(values, draft, said)
            stamp(draft, facts(live.runs))

        replace_file(path, fill)
        return path
    draft = folder / f".{path.name}.draft"
    with writing(path):
        shutil.rmtree(draft, ignore_errors=True)
        if form == "adapter":
            sets.save(draft, live.name)
            stamp(draft / ADAPTER, facts(live.runs))
        else:
            sets.save_merged(draft, live.name)
        follow_umask(draft)
        replace_folder(path, draft)
    return path


def check_others(runs: Sequence[tuple[Run, float]], folder: Path, name: str) -> None:
    """Refuse to replace what was exported of other runs.

    Raises:
        ConfigError: Something is there that says so.
    """
    now = facts(runs) | {"images": None, "mixture": None}  # the same run may be further by now
    for path in (folder / "adapter", folder / f"{name}.safetensors"):
        if other := differences(read_stamp(path) or {}, now):
            changed, values = next(iter(other.items()))
            raise ConfigError(
                f"export: {path} is of another run ({changed}: {values}); give another --out or --name"
            )


def facts(runs: Sequence[tuple[Run, float]]) -> dict[str, Any]:
    """What an export says of where it comes from: the runs, and the weight of each."""
    if [weight for _, weight in runs] == [1.0]:
        return runs[0][0].facts
    return {"mixture": [{"weight": weight} | run.facts for run, weight in runs]}


def _pipeline(live: Live, form: str, path: Path | None = None) -> Any:
    """A pipeline of diffusers: with the live denoiser, or with what was exported."""
    kind, own, dtypes = type(live.backbone), live.runs[0][0].backbone, {"default": torch.float32}
    if form == "pipeline":
        pipeline = load_pipeline(kind, str(path), dtypes, None, None)
    else:
        weights = live.runs[0][0].weights
        copied = live.whole and weights.is_dir()  # a whole model, in the place of the base
        source = str(weights) if copied else own["pretrained"]
        config, variant = (None if copied else own.get(option) for option in ("config", "variant"))
        pipeline = load_pipeline(kind, source, dtypes, config, variant)
        if own.get("scheduler"):
            pipeline.scheduler = with_entries(pipeline.scheduler, own["scheduler"])
    if form == "adapter":
        pipeline.load_lora_weights(path)
    elif form == "kohya":
        assert path is not None
        pipeline.load_lora_weights(path.parent, weight_name=path.name)
    elif form == "live":
        setattr(pipeline, kind.denoiser, live.backbone.weight_sets.choose(live.name))
    if not type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(live.backbone.device)


def draw(pipeline: Any, live: Live, steps: int) -> Tensor:
    """Images of :data:`PROMPTS` by a pipeline's own loop, without noise in the steps, ``(B, 3, H, W)``."""
    told = call_options(live) | {"num_inference_steps": steps, "output_type": "pt"}
    images: list[Tensor] = [
        pipeline(prompt=prompt, generator=torch.Generator().manual_seed(seed), **told).images
        for seed, prompt in enumerate(PROMPTS)
    ]
    return torch.cat(images).float().cpu()


def call_options(live: Live) -> dict[str, Any]:
    """Arguments with which a pipeline draws as the run did: guidance and size."""
    height, width = live.backbone.size
    guidance = live.runs[0][0].model.get("sampling", {}).get("guidance", 1.0)
    return live.backbone.pipeline_options(guidance) | {"height": height, "width": width}
