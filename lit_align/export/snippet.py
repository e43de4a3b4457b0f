"""The lines of Python with which diffusers alone draws what was exported."""

import json
from collections.abc import Mapping
from typing import Any

from lit_align.backbones.loading import schedule_of
from lit_align.errors import user_path
from lit_align.export.forms import PROMPTS, call_options
from lit_align.export.live import Live
from lit_align.shapes import FLOW_PIPELINE, PIPELINE

BUNDLED = "shapes"
"""How ``backbone.pretrained`` names a model that ships with lit_align."""

FOLDERS = {PIPELINE: "PIPELINE", FLOW_PIPELINE: "FLOW_PIPELINE"}
"""The folders of these, and their names in :mod:`lit_align.shapes`."""


def is_hub_id(pretrained: str) -> bool:
    """Whether others find a base model under its name: it is neither the bundled one nor a file or folder."""
    path = user_path(pretrained)
    written_as_path = pretrained.startswith((".", "~", "/")) or path.suffix == ".safetensors"
    return pretrained.count("/") == 1 and not written_as_path and not path.exists()


def snippet(live: Live, form: str) -> str:
    """Load an export and draw an image with the steps, the guidance and the size of the run.

    Args:
        live: The model.
        form: ``adapter`` or ``pipeline``; the export is a folder of that name.
    """
    whole = "", _load(live, '"pipeline"', _absent(live)), dict[str, Any]()
    imports, load, entries = _base(live) if form == "adapter" else whole
    lines, classes = [f"pipeline = {load}"], [type(live.backbone).pipeline_class.__name__]
    scheduler = type(live.backbone.pipeline.scheduler).__name__
    if not scheduler.startswith("FlowMatch"):  # as for the comparison
        scheduler, entries = "DDIMScheduler", {"clip_sample": False} | entries
    if entries:
        classes.append(scheduler)
        told = _arguments(entries)
        lines.append(f"pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config, {told})")
    if form == "adapter":
        lines.append('pipeline.load_lora_weights("adapter")')
    lines.append('pipeline.to("cuda")')
    prompt = PROMPTS[1] if live.backbone.is_shapes else PROMPTS[0]
    told = "\n".join(f"    {name}={_literal(value)}," for name, value in _call(live).items())
    lines.append(f'image = pipeline(\n    "{prompt}",\n{told}\n).images[0]')
    head = f"import torch\nfrom diffusers import {', '.join(sorted(classes))}\n{imports}"
    return f"{head}\n" + "\n".join(lines)


def _base(live: Live) -> tuple[str, str, dict[str, Any]]:
    """How the base model is loaded: imports, an expression, and other entries of its noise schedule."""
    options = live.runs[0][0].backbone
    base, entries = str(options["pretrained"]), dict(options.get("scheduler") or {})
    if base == BUNDLED:
        name = FOLDERS[type(live.backbone).bundled]
        return f"from lit_align.shapes import {name}\n", _load(live, name, _absent(live)), entries
    path = user_path(base)
    given = {name: options[name] for name in ("config", "variant") if options.get(name)}
    if path.suffix == ".safetensors" and not path.is_dir():
        return "", _load(live, _literal(str(path)), given, "from_single_file"), schedule_of(path) | entries
    return "", _load(live, _literal(str(path) if path.is_dir() else base), given | _absent(live)), entries


def _absent(live: Live) -> dict[str, None]:
    """Parts that the model does without, of which diffusers must be told."""
    parts = live.backbone.pipeline.components
    return {name: None for name in type(live.backbone).optional if parts.get(name) is None}


def _load(
    live: Live, place: str, options: Mapping[str, Any] | None = None, how: str = "from_pretrained"
) -> str:
    kind = type(live.backbone)
    # Flow models are published in bfloat16, and some overflow in float16.
    dtype = "float16" if kind.denoiser == "unet" else "bfloat16"
    told = f", {_arguments(options)}" if options else ""
    return f"{kind.pipeline_class.__name__}.{how}({place}{told}, torch_dtype=torch.{dtype})"


def _call(live: Live) -> dict[str, Any]:
    """Arguments of the pipeline's call; ``eta`` only where all steps have noise."""
    model = live.runs[0][0].model
    sampler = (model.get("sampling", {}).get("eval_sampler") or model["sampler"])["init_args"]
    options = {"num_inference_steps": sampler["num_steps"]}
    if sampler.get("eta") and sampler.get("noisy_steps") is None:
        options["eta"] = sampler["eta"]
    return options | call_options(live)


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_literal(value)}" for name, value in options.items())


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
