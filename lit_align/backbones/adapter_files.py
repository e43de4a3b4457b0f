"""LoRA files of diffusers, PEFT, kohya and older programs, as factors whose strength is in the weights."""

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from lit_align.errors import LONGEST, ConfigError, first_line
from lit_align.identity import ADAPTER
from lit_align.pretrained import not_finite

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"

PLAIN = {"peft_type": "LORA", "use_dora": False, "bias": "none", "modules_to_save": None}
"""What PEFT's settings are for plain LoRA."""

MOVED = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How PEFT may begin an adapter so that it changes the base model too, which its file does not have."""

WHOLE = (".diff", ".diff_b", ".w_norm", ".b_norm")
"""How names of updates end that are no products of two factors, but as large as a weight or a bias."""

PREFIXES = ("lora_", "text_encoder", "diffusion_model.", "double_blocks.", "single_blocks.")
"""How names begin that are not those of a layer in diffusers; the last are those of FLUX's own code."""

ALPHA_NEEDED = "lora_transformer_"
"""How names begin in files of OneTrainer and the like."""

OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with Tucker factors",
}
"""Parts of names, and the kind of adapter that has them: their updates are no products of two factors."""


def find(path: Path) -> Path:
    """The file of an adapter.

    Args:
        path: A .safetensors file, or a folder with one.

    Raises:
        ConfigError: There is none.
    """
    if path.suffix in (".bin", ".pt", ".ckpt", ".pth"):
        raise ConfigError(
            f"adapters: {path} may run code when it is opened; where you trust it, load it in diffusers with "
            "load_lora_weights and save it with save_lora_adapter, which writes .safetensors"
        )
    if path.suffix == ".safetensors":
        candidates = [path]
    else:
        candidates = [path / ADAPTER, path / PEFT_FILE]
        candidates += others if len(others := sorted(path.glob("*.safetensors"))) == 1 else []
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"there is no {candidates[0].name} in {candidates[0].parent}; give the adapter/ folder of a run, or "
        "a .safetensors file"
    )


def read(file: Path, pipeline_class: Any, part: str, config: Any) -> dict[str, Tensor]:
    """The factors of an adapter, under PEFT's names: ``<layer>.lora_A.weight`` and ``<layer>.lora_B.weight``.

    The update of a layer is ``B A``: what a file says of ``alpha`` is multiplied into ``B``.

    Args:
        file: In any of the forms.
        pipeline_class: Knows the forms of its family.
        part: Name of the denoiser in the pipeline.
        config: Of the denoiser.

    Raises:
        ValueError: It is no adapter of the denoiser alone.
    """
    with safe_open(file, "pt") as opened:
        layers = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        said = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    check_contents(layers, said)
    for name in layers:
        if name.endswith(WHOLE):
            raise ValueError(
                f"{name} is an update of a whole weight; give one that has lora_A and lora_B alone"
            )
        for word, kind in OTHERS.items():
            if word in name:
                raise ValueError(f"it is {kind}, not LoRA; give an adapter with only lora_A and lora_B")
    settings = {key.removeprefix(f"{part}."): value for key, value in said.items() if key.startswith(part)}
    if all(name.startswith("base_model.model.") for name in layers):
        layers = {name.removeprefix("base_model.model."): value for name, value in layers.items()}
        settings = _peft_settings(file)
    if str(begun := settings.get("init_lora_weights")).startswith(MOVED):
        raise ValueError(
            f"its init_lora_weights is {begun}, which changes the base model too; save it in PEFT with "
            "path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    if not any(name.startswith((f"{part}.", *PREFIXES)) for name in layers):
        layers = {f"{part}.{name}": value for name, value in layers.items()}
    _apply_alphas(layers)
    # unet_config is needed to read kohya's names of SDXL, and ignored by families without a UNet.
    layers = pipeline_class.lora_state_dict(layers, unet_config=config, return_lora_metadata=True)[0]
    own = _alone(layers, part)
    for name in own:
        if ".lora_B." in name:
            own[name] = _times(
                own[name], _strength(settings, name.partition(".lora_B.")[0], own[name].shape[1])
            )
    return own


def _times(factor: Tensor, strength: float) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32)) * strength


def _apply_alphas(layers: dict[str, Tensor]) -> None:
    """Multiply second factors by ``alpha / rank`` where entries of the file say it, and take these out."""
    for name in [name for name in layers if name.endswith(".alpha")]:
        layer, alpha = name.removesuffix(".alpha"), float(layers.pop(name))
        places = [f"{layer}.{factor}.weight" for factor in ("lora_up", "lora_B", "lora.up")]
        second = next((place for place in places if place in layers), None)
        if second is None:
            raise ValueError(f"{name} belongs to no layer")
        layers[second] = _times(layers[second], alpha / layers[second].shape[1])
    # A form of FLUX's that diffusers reads only with an alpha: the rank, which changes nothing.
    for name in [name for name in layers if name.startswith(ALPHA_NEEDED)]:
        layer, _, factor = name.partition(".lora_down")
        if factor:
            layers[f"{layer}.alpha"] = torch.tensor(float(len(layers[name])))


def _alone(layers: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Factors of the denoiser, under PEFT's names without its own.

    Raises:
        ValueError: There are others.
    """
    prefix = f"{part}."
    foreign = [name for name in layers if not name.startswith(prefix)]
    if foreign and len(foreign) == len(layers) and not foreign[0].startswith("text_encoder"):
        raise ValueError(f"it is for another family: it adapts {foreign[0]}, not the {part}")
    if foreign:
        raise ValueError(
            f"it also adapts {foreign[0]}, and only the {part} can have an adapter here; "
            "merge it into the model in diffusers (load_lora_weights, fuse_lora, save_pretrained) and give "
            "that as pretrained"
        )
    own = {name.removeprefix(prefix): value for name, value in layers.items()}
    if not all(".lora_A." in name or ".lora_B." in name for name in own):
        own = convert_unet_state_dict_to_peft(own)
    if strange := [name for name in own if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise ValueError(f"{strange[0]} is not a factor of LoRA")
    return own


def _peft_settings(file: Path) -> dict[str, Any]:
    """What PEFT wrote beside its file.

    Raises:
        ValueError: It is not there, or the adapter is of another kind.
    """
    config = file.with_name(PEFT_CONFIG)
    if not config.is_file():
        raise ValueError(f"its strength is in {PEFT_CONFIG}, which is missing; copy it into the same folder")
    settings: dict[str, Any] = json.loads(config.read_text("utf-8"))
    for name, plain in PLAIN.items():
        if settings.get(name, plain) != plain:
            raise ValueError(f"{PEFT_CONFIG} has {name} {settings[name]}, and only plain LoRA can be loaded")
    return settings


def _strength(settings: Mapping[str, Any], layer: str, rank: int) -> float:
    """``alpha / rank`` of a layer, as PEFT computes it from settings; 1 without settings."""
    if not settings:
        return 1.0
    patterns = settings.get("alpha_pattern") or {}
    default = settings.get("lora_alpha", LoraConfig().lora_alpha)
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), default)
    return float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)


def to_kohya(layers: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Factors under kohya's names, with ``alpha`` the rank; for A1111, Forge and ComfyUI.

    Raises:
        ConfigError: The denoiser is no UNet, which is what these names are for.
    """
    if part != "unet":
        raise ConfigError(
            f"kohya's names are those of UNets, and this model has a {part}; ComfyUI reads adapter/ itself"
        )
    found: dict[str, Tensor] = {}
    for name, value in layers.items():
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        place = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{place}.{'lora_down' if factor == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
        if factor == "lora_A":
            found[f"{place}.alpha"] = torch.tensor(float(len(value)))
    return found


def check_contents(layers: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> None:
    """Refuse what would do harm before anything is made of it.

    Raises:
        ValueError: A number is not finite, or the metadata ask for other layers than the file has.
    """
    if broken := not_finite(layers):
        raise ValueError(f"{broken} holds numbers that are not finite")
    largest = max((max(value.shape, default=1) for value in layers.values()), default=1)
    for name, value in (metadata or {}).items():
        named = value.values() if name.endswith(("_pattern",)) and isinstance(value, dict) else [value]
        numbers = [number for number in named if isinstance(number, int | float)]
        if any(not math.isfinite(number) for number in numbers):
            raise ValueError(f"its metadata say {name}: {value}")
        if name.endswith((".r", ".rank_pattern")) and max(numbers, default=1) > largest:
            raise ValueError(f"its metadata say {name}: {value}, and no tensor has so many rows")
        if name.endswith(".r") and not isinstance(value, int):
            raise ValueError(f"its metadata say {name}: {value!r}")
        if name.endswith(".use_dora") and value:
            raise ValueError("it is a DoRA, whose updates cannot be added")


def reason(error: Exception) -> str:
    """The first line of what a library says, with the type where it is no sentence."""
    text = first_line(error)
    if text.endswith(":"):  # what it is about stands below
        text = textwrap.shorten(str(error), LONGEST, placeholder=" ...")
    is_sentence = isinstance(error, ValueError | RuntimeError | OSError)
    return text if is_sentence else f"{type(error).__name__}: {text}"
