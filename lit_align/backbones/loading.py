"""A diffusers pipeline from a folder, a hub id or a single file, or a sentence that says why not."""

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_align.backbones.options import with_entries
from lit_align.backbones.text import check_tokenizer
from lit_align.errors import ConfigError, first_line, tell, user_path
from lit_align.pretrained import loading, not_finite, resolve

if TYPE_CHECKING:
    from lit_align.backbones.pipeline import DiffusersBackbone

KINDS = {
    "inpainting": "an inpainting model",
    "inpainting_v2": "an inpainting model",
    "xl_inpaint": "an inpainting model",
    "xl_base": "Stable Diffusion XL",
    "xl_refiner": "the refiner of Stable Diffusion XL",
    "v2": "Stable Diffusion 2",
    "playground-v2-5": "Playground 2.5, whose states are scaled in EDM's way",
    "upscale": "an upscaler",
    "controlnet": "a ControlNet",
    "instruct-pix2pix": "InstructPix2Pix",
    "codes": "a quantised model, whose weights are not numbers",
    "lora": "a LoRA, which belongs under backbone.adapters",
}
"""Single files that diffusers can tell apart; all others it takes for Stable Diffusion 1."""

FILES: dict[str, tuple[str, ...]] = {
    "StableDiffusionPipeline": ("v2",),
    "StableDiffusionXLPipeline": ("xl_base",),
}
"""Those of KINDS that a pipeline is made of."""

CODED = (".scale_weight", ".weight_scale", "scaled_fp8", ".absmax", ".comfy_quant")
"""Ends of names in single files whose weights are codes, which diffusers would take for numbers."""

MARKS: dict[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
"""Empty entries of single files, by which programs know how they were trained."""

LIBRARIES = ("diffusers", "transformers")
"""Whose classes the parts of a pipeline are."""


def load_pipeline(
    family: "type[DiffusersBackbone]",
    pretrained: str,
    dtypes: Mapping[str, torch.dtype],
    config: str | None,
    variant: str | None,
) -> Any:
    """Load a pipeline's models from safetensors.

    Args:
        family: A class of backbones.
        pretrained: What the user wrote: ``shapes``, a folder, a hub id, or a .safetensors file.
        dtypes: Of components by name; of all others under ``default``.
        config: Folder or hub id with the configuration of a single file.
        variant: Of the weight files of a folder or hub id, such as ``fp16``.

    Raises:
        ConfigError: There is no such model, it cannot be read, or it is of another family.
    """
    for name in ("pipeline_class", "denoiser"):
        if not hasattr(family, name):
            raise ConfigError(f"{family.__name__} has no {name}, which a family must name; define it")
    if not isinstance(pretrained, str | PathLike):
        raise ConfigError(
            f"pretrained: a {type(pretrained).__name__} is no name of a model; give a hub id, or a folder, "
            "such as that of pipeline.save_pretrained(FOLDER)"
        )
    pipeline_class, without = family.pipeline_class, family.without
    file = user_path(pretrained)
    if (file.is_file() or file.suffix in (".safetensors", ".ckpt")) and not file.is_dir():
        if variant is not None:
            raise ConfigError(
                f"variant: {variant!r} is for a folder or a hub id, and {pretrained!r} is a single file; "
                "take variant out, or give the file with those weights"
            )
        pipeline = _load_file(pipeline_class, file, without, dtypes, config)
        _check_complete(pretrained, pipeline, config or pretrained)
        return pipeline
    if config is not None:
        raise ConfigError(f"config: {config!r} is for a single file; take it out, or give one as pretrained")
    with loading(pretrained):
        source = resolve(pretrained, family.bundled)
        index = pipeline_class.load_config(source)
        _check_class(pipeline_class, index, f"pretrained: {pretrained!r}")
        without = {**without, **{part: None for part in family.optional if _is_absent(index, source, part)}}
        parts = [name for name, found in index.items() if isinstance(found, list) and found[0]]
        for part in parts:
            if part not in without:
                _check_code(pretrained, part, index[part])
                _check_weights(pretrained, Path(source) / part, variant)
        file = Path(source) / family.denoiser / "config.json"
        _check_quantised(
            pretrained, family.denoiser, json.loads(file.read_text("utf-8")) if file.is_file() else {}
        )
        without |= {
            part: _whole(pretrained, source, part, kind, dtypes.get(part, dtypes["default"]), variant)
            for part in parts
            if part not in without and (kind := _of_transformers(*index[part]))
        }
        pipeline = pipeline_class.from_pretrained(
            source, dtype=dict(dtypes), use_safetensors=True, variant=variant, **without
        )
    _check_quantised(pretrained, family.denoiser, getattr(pipeline, family.denoiser).config)
    _check_complete(pretrained, pipeline, pretrained)
    return pipeline


def _of_transformers(library: str, name: str) -> Any:
    """The class of a part that is a model of transformers; None for any other."""
    kind = getattr(transformers, name, None) if library == "transformers" else None
    return kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else None


def _whole(
    pretrained: str, source: str, part: str, kind: Any, dtype: torch.dtype, variant: str | None
) -> Any:
    """A text encoder with all of its weights: where some are missing transformers draws them at random."""
    options = {"subfolder": part, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        model, info = kind.from_pretrained(source, variant=variant, **options)
    except OSError:  # as diffusers does: a part may not have the variant
        if variant is None:
            raise
        model, info = kind.from_pretrained(source, **options)
    if info["missing_keys"]:
        raise _lacking(pretrained, part, sorted(info["missing_keys"]))
    return model


def _is_absent(index: Mapping[str, Any], source: str | Path, part: str) -> bool:
    """Whether a pipeline has not this part: its index says so, or the folder was copied without it."""
    folder = Path(source)
    return not (index.get(part) or [None])[0] or (folder.is_dir() and not (folder / part).is_dir())


def _check_complete(pretrained: str, pipeline: Any, config: str) -> None:
    for part, component in pipeline.components.items():
        weights = dict(component.named_parameters()) if isinstance(component, nn.Module) else {}
        if missing := [name for name, weight in weights.items() if weight.is_meta]:
            raise _lacking(pretrained, part, missing)
        if broken := not_finite(weights):
            raise ConfigError(
                f"pretrained: {broken} in the {part} of {pretrained!r} holds numbers that are not finite, "
                "and no image can be drawn with it; copy or download it again, or give another model"
            )
        if isinstance(component, PreTrainedTokenizerBase):
            encoder = getattr(pipeline, part.replace("tokenizer", "text_encoder"), None)
            check_tokenizer(config, part, component, encoder)


def _lacking(pretrained: str, part: str, missing: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"pretrained: the {part} of {pretrained!r} lacks {len(missing)} of its weights, such as "
        f"{missing[0]}; copy or download it again"
    )


def _check_class(pipeline_class: Any, index: Mapping[str, Any], place: str) -> None:
    if (found := index.get("_class_name")) != pipeline_class.__name__:
        raise ConfigError(
            f"{place} is a {found}, and this backbone takes a {pipeline_class.__name__}; give such a model, "
            "or the backbone of its family (lit_align/backbones/README.md)"
        )


def _check_code(pretrained: str, part: str, found: list[Any]) -> None:
    """Refuse a part of a pipeline whose class is of a module that comes with the model, or from elsewhere."""
    library = str(found[0])
    if library not in LIBRARIES and not hasattr(diffusers.pipelines, library):
        raise ConfigError(
            f"pretrained: the {part} of {pretrained!r} is a class of {library}, and only those of "
            f"{' and '.join(LIBRARIES)} are loaded: code of a model is never run; give one without"
        )


def _check_weights(pretrained: str, folder: Path, variant: str | None) -> None:
    """Refuse a part of a pipeline that has weights, but not those that would be read."""
    weights = [path.name for path in folder.glob("*.safetensors")]
    if not weights and list(folder.glob("*.bin")):
        raise ConfigError(
            f"pretrained: {pretrained!r} has its {folder.name} as a .bin file only, which may run code when "
            "it is opened; where you trust it, load it in diffusers with use_safetensors=False and save it "
            "with save_pretrained"
        )
    if weights and variant is None and all(name.count(".") > 1 for name in weights):
        only = weights[0].split(".")[1].partition("-")[0]
        raise ConfigError(
            f"pretrained: {pretrained!r} has its {folder.name} as the variant {only} only; "
            f"set variant: {only}"
        )


def _check_quantised(pretrained: str, part: str, config: Any) -> None:
    """Refuse a denoiser in a quantised form, whose weights are codes; a loaded one has an object for it."""
    if isinstance(config, dict) and (form := config.get("quantization_config")):
        method = form.get("quant_method") if isinstance(form, dict) else form.quant_method.value
        raise ConfigError(
            f"pretrained: the {part} of {pretrained!r} is quantised ({method}), and is "
            "trained as numbers; give the model before that (dtype: bfloat16 halves its memory)"
        )


def schedule_of(file: Path) -> dict[str, Any]:
    """What the empty entries of a single file say of its noise schedule; nothing if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            names = set(opened.keys())
    except (OSError, SafetensorError):
        return {}
    return {key: value for name, (key, value) in MARKS.items() if name in names}


def _check_file(pipeline_class: Any, file: Path, place: str) -> None:
    """Refuse a single file that holds another kind of model."""
    try:
        with safe_open(file, "pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError:
        return  # said when it is loaded
    names = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    kind = infer_diffusers_model_type(names)
    kind = "lora" if any("lora_" in name for name in names) else kind
    kind = "codes" if any(name.endswith(CODED) for name in names) else kind
    own = FILES.get(pipeline_class.__name__, ())
    if kind in KINDS and kind not in own:
        raise ConfigError(f"{place} is {KINDS[kind]}, and this backbone takes a {pipeline_class.__name__}")


def _load_file(
    pipeline_class: Any,
    file: Path,
    without: Mapping[str, Any],
    dtypes: Mapping[str, torch.dtype],
    config: str | None,
) -> Any:
    place = f"pretrained: {str(file)!r}"
    if file.suffix != ".safetensors":
        what = "may run code when it is opened" if file.suffix == ".ckpt" else "is in a form that is not read"
        raise ConfigError(f"{place} {what}; give the weights as .safetensors")
    if not file.is_file():
        raise ConfigError(
            f"{place} is not a file; give one that exists (the working directory is {Path.cwd()})"
        )
    _check_file(pipeline_class, file, place)
    entries = schedule_of(file)
    folder = None if config is None else user_path(config)
    if folder is not None and folder.is_dir():
        with loading(str(folder)):
            _check_class(pipeline_class, pipeline_class.load_config(folder), f"config: {config!r}")
        remedy = "check that the file holds all weights of such a model and that config fits them"
    else:
        remedy = (
            "a single file has no configuration, so set config to a folder in diffusers' format of the same "
            "family (its weights are not read), or to the hub id of one"
        )
    try:
        pipeline = pipeline_class.from_single_file(
            str(file), dtype=torch.float32, config=None if folder is None else str(folder), **without
        )
    except Exception as error:  # whatever a wrong file makes of the conversion of names
        raise ConfigError(f"{place} cannot be loaded ({first_line(error)}); {remedy}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module):
            nn.Module.to(component, dtypes.get(name, dtypes["default"]))
    if entries:
        tell(f"{file.name} says of its noise schedule: {entries}")
        pipeline.scheduler = with_entries(pipeline.scheduler, entries)
    return pipeline
