"""A diffusers pipeline from a folder, a hub id or a single file, or a sentence that says why not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from lit_align.errors import ConfigError
from lit_align.pretrained import loading, resolve
from lit_align.shapes import PIPELINE


def load_pipeline(
    pipeline_class: type[DiffusionPipeline],
    pretrained: str,
    without: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    config: str | None,
    variant: str | None,
) -> Any:
    """Load a pipeline's models from safetensors.

    Args:
        pipeline_class: Of the family.
        pretrained: What the user wrote: ``shapes``, a folder, a hub id, or a .safetensors file.
        without: Components and settings that are given instead of loaded.
        dtypes: Of components by name; of all others under ``default``.
        config: Folder or hub id with the configuration of a single file.
        variant: Of the weight files, such as ``fp16``.

    Raises:
        ConfigError: There is no such model, it cannot be read, or it is of another family.
    """
    path = Path(pretrained).expanduser()
    if path.suffix in (".safetensors", ".ckpt"):
        return _from_file(pipeline_class, path, without, dtypes, config)
    with loading(pretrained):
        source = resolve(pretrained, PIPELINE)
        found = pipeline_class.load_config(source).get("_class_name")
        if found != pipeline_class.__name__:
            raise ConfigError(
                f"pretrained: {pretrained!r} is a {found}, and this backbone takes a "
                f"{pipeline_class.__name__}; give such a model"
            )
        if Path(source).is_dir():
            _check_files(pretrained, Path(source), variant)
        return pipeline_class.from_pretrained(
            source, dtype=dtypes, use_safetensors=True, variant=variant, **without
        )


def _check_files(pretrained: str, folder: Path, variant: str | None) -> None:
    """Refuse a folder that has weights, but not those that are asked for."""
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        weights = [path.name for path in part.glob("*.safetensors")]
        if not weights and list(part.glob("*.bin")):
            raise ConfigError(
                f"pretrained: {pretrained!r} has its {part.name} as a .bin file only, which may run code "
                "when it is opened; convert it once: load it in diffusers (use_safetensors=False) where you "
                "trust it, and save it with save_pretrained"
            )
        plain = [name for name in weights if name.count(".") == 1]
        if variant is None and weights and not plain:
            name = weights[0].split(".")[1].partition("-")[0]
            raise ConfigError(
                f"pretrained: {pretrained!r} has its {part.name} as the variant {name} only; "
                f"set variant: {name}"
            )


def _from_file(
    pipeline_class: Any,
    path: Path,
    without: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    config: str | None,
) -> Any:
    if path.suffix == ".ckpt":
        raise ConfigError(
            f"pretrained: {str(path)!r} may run code when it is opened; give a .safetensors file of the same "
            "weights"
        )
    if not path.is_file():
        raise ConfigError(
            f"pretrained: there is no file {str(path)!r} (the working directory is {Path.cwd()})"
        )
    try:
        pipeline = pipeline_class.from_single_file(str(path), dtype=torch.float32, config=config, **without)
    except Exception as error:
        if config is not None and Path(config).expanduser().is_dir():
            remedy = "check that it is a whole checkpoint of this family, and that config is of the same"
        else:
            remedy = (
                "a single file has no configuration: set config to a folder in diffusers' format of the same "
                "family, such as Stable Diffusion 1.5's without its weights, or to its hub id"
            )
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"pretrained: cannot load {str(path)!r} ({reason}); {remedy}") from error
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            component.to(dtypes.get(name, dtypes["default"]))
    return pipeline


def check_inputs(pretrained: str, config: Mapping[str, Any], unknown: Sequence[str], channels: int) -> None:
    """Refuse a denoiser that needs an input which it would not be given.

    Args:
        pretrained: What the user wrote.
        config: Of the denoiser.
        unknown: Entries of it that ask for such an input.
        channels: Of the latents as the denoiser reads and predicts them.

    Raises:
        ConfigError: It has one of the entries, or other channels.
    """
    asked = [f"{name} {config[name]}" for name in unknown if config.get(name) is not None]
    for name in ("in_channels", "out_channels"):
        if config.get(name) not in (None, channels):
            asked.append(f"{name} {config[name]} for latents of {channels}")
    if asked:
        raise ConfigError(
            f"pretrained: {pretrained!r} is no plain text-to-image model (its configuration has "
            f"{', '.join(asked)}); give one that is told nothing but prompts"
        )


def choose_size(
    size: int | Sequence[int] | None, own: int | Sequence[int] | None, scale: int, patch: int
) -> tuple[int, int]:
    """Height and width of the images in pixels.

    Args:
        size: What the user wrote.
        own: The pipeline's own, in latent pixels.
        scale: Pixels of an image to a latent pixel, a side.
        patch: Latent pixels of a patch, a side.

    Raises:
        ConfigError: The model cannot draw images of that size.
    """
    if size is None:
        if own is None:
            raise ConfigError("backbone.size: the model's configuration says none; give height and width")
        height, width = (own, own) if isinstance(own, int) else own
        return height * scale, width * scale
    sides = [size, size] if isinstance(size, int) else list(size)
    unit = scale * patch
    if len(sides) != 2 or any(side < 1 or side % unit for side in sides):
        raise ConfigError(
            f"backbone.size: this model cannot draw {size}; give height and width in pixels, each a multiple "
            f"of {unit}, or one number for both"
        )
    return sides[0], sides[1]
