"""The weights of a small pipeline of Stable Diffusion 1, 2 or XL under the names of the original
implementations, in one file."""

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_places(unet: Any) -> dict[str, str]:
    """Where each module of the UNet lies in the original: numbered blocks."""
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    number = 1
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        last = 2 if hasattr(block, "attentions") else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{last}.conv"
    return places


def unet_name(name: str, places: dict[str, str]) -> str:
    owner = max((place for place in places if name.startswith(f"{place}.")), key=len)
    rest = name.removeprefix(f"{owner}.")
    if "resnets" in owner:
        part, _, kind = rest.partition(".")
        rest = f"{RESNET[part]}.{kind}"
    return f"model.diffusion_model.{places[owner]}.{rest}"


def vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{levels - 1 - int(found[1])}", name)
    name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
    name = re.sub(r"mid_block\.block\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(ours, theirs)
    return f"first_stage_model.{name}"


def clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """A text encoder as transformers names it."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    return {f"{prefix}.transformer.text_model.{name}": value for name, value in state.items()}


OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks",
    "self_attn": "attn",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}


def open_clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    """The same as open_clip names it, with one matrix for queries, keys and values."""
    state = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    if "text_projection.weight" in state:
        state["text_projection"] = state.pop("text_projection.weight").T
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        found[name] = value
    for name in [name for name in found if ".q_proj." in name]:
        parts = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        found[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return {f"{prefix}.{name}": value for name, value in found.items()}


def save_original(folder: Path, file: Path, second: bool = False, **extra: Tensor) -> None:
    """Write the pipeline of a folder as one file.

    Args:
        folder: Its.
        file: The file.
        second: Whether the one text encoder is of open_clip, as that of Stable Diffusion 2.
        extra: Further entries.
    """
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    places, levels = unet_places(pipeline.unet), len(pipeline.vae.decoder.up_blocks)
    weights: dict[str, Tensor] = {
        unet_name(name, places): value for name, value in pipeline.unet.state_dict().items()
    }
    for name, value in pipeline.vae.state_dict().items():
        convolution = "attentions" in name and name.endswith("weight") and value.ndim == 2
        weights[vae_name(name, levels)] = value[..., None, None] if convolution else value
    if hasattr(pipeline, "text_encoder_2"):
        weights |= clip(pipeline.text_encoder, "conditioner.embedders.0")
        weights |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model")
    elif second:
        weights |= open_clip(pipeline.text_encoder, "cond_stage_model.model")
    else:
        weights |= clip(pipeline.text_encoder, "cond_stage_model")
    save_file({name: value.contiguous() for name, value in (weights | extra).items()}, file)
