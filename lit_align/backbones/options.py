"""The options of every backbone: what they may be, and what they mean for a model."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from diffusers import DDIMScheduler
from torch import nn

from lit_align.backbones.adapter_files import reason
from lit_align.backbones.adapters import LoRA
from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype

Checkpointing = Literal["none", "prediction", "blocks"]
Attention = Literal["auto", "sdpa", "plain"]


def check_choices(dtype: object, checkpointing: object, attention: object) -> None:
    """Refuse a value that an option does not have; on the command line the parser does it.

    Raises:
        ConfigError: It is none.
    """
    kinds = {"dtype": Dtype, "checkpointing": Checkpointing, "attention": Attention}
    for (name, kind), value in zip(kinds.items(), (dtype, checkpointing, attention), strict=True):
        if value not in (known := get_args(kind)):
            raise ConfigError(f"backbone.{name}: {value!r} must be {', '.join(known[:-1])} or {known[-1]}")


def wants_plain(attention: Attention, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention is computed plainly: where asked for, or in bfloat16 on a CPU.

    There the fused one trains more slowly (64 images of Shapes, forward and backward: 0.74 against 0.53
    CPU-seconds, in float32 with bf16-mixed 0.67 against 0.44).
    """
    if attention != "auto" or device.type != "cpu":
        return attention == "plain"
    mixed = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if mixed else dtype) == torch.bfloat16


def check_inputs(
    pretrained: str, config: Mapping[str, Any], unknown: Sequence[str], channels: int, more: Sequence[str]
) -> None:
    """Refuse a denoiser that needs an input which it would not be given.

    Args:
        pretrained: What the user wrote.
        config: Of the denoiser.
        unknown: Entries of it that ask for such an input.
        channels: Of the latents as the denoiser reads and predicts them.
        more: What else it asks for.

    Raises:
        ConfigError: It has one of the entries, or other channels, or asks for more.
    """
    asked = [f"{name} {config[name]}" for name in unknown if config.get(name) is not None] + [*more]
    for name in ("in_channels", "out_channels"):
        if config.get(name) not in (None, channels):
            asked.append(f"{name} {config[name]} for latents of {channels}")
    if asked:
        raise ConfigError(
            f"pretrained: {pretrained!r} is not a plain text-to-image model (its configuration has "
            f"{', '.join(asked)}); give one whose only input is a prompt"
        )


def choose_size(
    size: int | Sequence[int] | None, config: Mapping[str, Any], pipeline: Any, patch: int
) -> tuple[int, int]:
    """Height and width of the images in pixels.

    Args:
        size: What the user wrote.
        config: Of the denoiser.
        pipeline: Which has it.
        patch: Latent pixels of a patch, a side.

    Raises:
        ConfigError: The model cannot draw images of that size.
    """
    scale: int = pipeline.vae_scale_factor
    if size is None:
        own = config.get("sample_size") or getattr(pipeline, "default_sample_size", None)
        if own is None:
            raise ConfigError("backbone.size: the model's configuration has none; give height and width")
        height, width = (own, own) if isinstance(own, int) else own
        return height * scale, width * scale
    sides = [size, size] if isinstance(size, int) else list(size)
    if len(sides) != 2 or any(side < 1 or side % (scale * patch) for side in sides):
        raise ConfigError(
            f"backbone.size: this model cannot draw {size}; give height and width in pixels, each a multiple "
            f"of {scale * patch}, or one number for both"
        )
    if (places := config.get("pos_embed_max_size")) and max(sides) > (
        most := places * config["patch_size"] * scale
    ):
        raise ConfigError(
            f"backbone.size: this model cannot draw {size}: it has positions up to {most} "
            "pixels a side; give no more"
        )
    return sides[0], sides[1]


def with_entries(scheduler: Any, entries: Mapping[str, Any]) -> Any:
    """A pipeline's scheduler with other entries of its configuration.

    Raises:
        ConfigError: Neither it nor DDIM, which may stand in for it, has such an entry.
    """
    known = {name for kind in (type(scheduler), DDIMScheduler) for name in inspect.signature(kind).parameters}
    if unknown := set(entries) - known:
        raise ConfigError(
            f"backbone.scheduler: the model's {type(scheduler).__name__} has no "
            f"{', '.join(sorted(unknown))}; it has {', '.join(sorted(known))}"
        )
    config = dict(scheduler.config) | dict(entries)
    # What the folder did not say is dropped when another class reads the configuration.
    config["_use_default_values"] = [n for n in config.get("_use_default_values", []) if n not in entries]
    try:
        return type(scheduler).from_config(config)
    except Exception as error:  # whatever its constructor makes of the values
        said = ", ".join(f"{name}: {value!r}" for name, value in entries.items())
        raise ConfigError(
            f"backbone.scheduler: {type(scheduler).__name__} cannot be made with {said} ({reason(error)}); "
            "give other values"
        ) from error


def targeted(lora: LoRA | None, network: nn.Module, part: str, layers: list[str]) -> LoRA | None:
    """The adapter with the layers of its family, if a user gave none.

    Args:
        lora: Its settings.
        network: The denoiser.
        part: What the pipeline calls it.
        layers: Ends of the names of the family's layers. A model with a single block lacks some, so that
            they are not checked.

    Raises:
        ConfigError: No layer has one name that was given, which peft passes over; if none has any, peft says
            so.
    """
    if lora is None or not (ends := lora.target_modules):
        return lora and lora.on(layers)
    names = [name for name, _ in network.named_modules()]
    lost = [end for end in ends if not any(f".{name}".endswith(f".{end}") for name in names)]
    if lost and len(lost) < len(ends):
        near = difflib.get_close_matches(lost[0], {name.rpartition(".")[2] for name in names}, n=1)
        remedy = f"did you mean {near[0]}?" if near else "take it out, or give null for the family's"
        raise ConfigError(f"lora.target_modules: the {part} has no layer {lost[0]}; {remedy}")
    return lora
