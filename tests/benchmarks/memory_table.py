"""What training takes of a GPU's memory, counted without one: model x method x adapter or all weights.

    python -m tests.benchmarks.memory_table --out counted.json
    python -m tests.benchmarks.memory_table --check --out checked.json      # measured peaks on this CPU
    python -m tests.benchmarks.memory_table --page counted.json checked.json

Weights, gradients, moments and copies are sums over parameters. Activations are those of a micro-batch of
two rows: the highest sum of live storages in a forward and a backward pass on tensors without data
(torch's FakeTensorMode). Not counted: reward models, the CUDA context, workspaces of kernels, fragments.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_align.backbones.checkpointing import recompute
from lit_align.doctor.memory import Live
from tests.benchmarks.machine import each_alone, peak_above, peak_bytes, reset_peak

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "small": {
        "sample_size": 32,
        "cross_attention_dim": 64,
        "block_out_channels": (64, 128, 256),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "middle": {
        "sample_size": 64,
        "cross_attention_dim": 64,
        "block_out_channels": (96, 192, 384),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
}
"""Configurations of UNets as they are published, and two small ones that fit any CPU."""

PAGE = Path(__file__).parent / "results" / "memory.md"

NAMES = {"sd15": "Stable Diffusion 1.5, 512 px", "sdxl": "Stable Diffusion XL, 1024 px"}

OTHERS = {"sd15": (123e6, 84e6), "sdxl": (817e6, 84e6)}
"""Parameters of the text encoders, and of the autoencoder, as they are published."""

RANK = 4
"""Of the adapter: that of configs/backbone/."""


KINDS = {"adapter": True, "all weights": False}

HEAD = """# Memory of training, counted

GB of a training step of two rows of predictions: one image of DDPO, PRDP, AlignProp or MSDDA with
guidance, one pair of DPO, two images of SFT and SPIN. AdamW, block checkpointing (in brackets:
without), text encoders off the device, chains on the CPU. Beside an adapter of rank 4 the frozen
weights are bfloat16 (`dtype: bfloat16`); what is trained, its gradients, moments and copies are
float32, with `precision: bf16-mixed` for all weights.

Reward models, the CUDA context, workspaces and fragments come on top. Nothing here was measured on
a GPU."""

EIGHT_BIT = """With `bitsandbytes.optim.AdamW8bit` the moments take 2 bytes a trained weight instead of 8:
with all weights 5.2 GB less for Stable Diffusion 1.5, 15.4 GB less for XL."""

CHECKED = """The same counting against the highest resident memory of two steps with AdamW in float32 on a
CPU, 2 rows of two small UNets (`python -m tests.benchmarks.memory_table --check`), with an
allocator that gives freed memory back. With glibc's own settings the measured peaks were 1.2 to 2.2
times as high (4 rows): fragments and memory that is kept."""


@dataclass(frozen=True)
class Method:
    """How a method uses a UNet.

    Attributes:
        sets: Trained weight sets.
        frozen: Copies of a whole UNet that is trained: the reference, an opponent, the policy beside experts.
    """

    sets: int = 1
    frozen: int = 1


METHODS = {
    "DDPO, PRDP": Method(),
    "AlignProp": Method(),  # one prediction at a time, with checkpointing: prediction
    "MSDDA, two experts": Method(sets=2, frozen=2),
    "DPO, SFT": Method(),
    "SPIN": Method(frozen=2),
}


class Adapted(nn.Module):
    """A linear layer with an adapter in float32, computed as in PEFT, whose own needs weights with data."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return (y + self.up(self.down(x.to(self.down.weight.dtype)))).to(y.dtype)


def make(name: str, lora: bool, checkpointing: bool) -> tuple[nn.Module, list[nn.Parameter]]:
    """A UNet of a configuration, and what is trained of it."""
    unet: Any = UNet2DConditionModel.from_config(UNETS[name]).requires_grad_(not lora).eval()
    if checkpointing:
        unet.enable_gradient_checkpointing(recompute)
    if lora:
        for attention in [module for module in unet.modules() if isinstance(module, Attention)]:
            for layer in ("to_q", "to_k", "to_v"):
                setattr(attention, layer, Adapted(getattr(attention, layer)))
            attention.to_out[0] = Adapted(attention.to_out[0])
    return unet, [p for p in unet.parameters() if p.requires_grad]


def predict(unet: Any, name: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """One prediction of ``rows`` rows."""
    side, width = UNETS[name]["sample_size"], UNETS[name]["cross_attention_dim"]
    told = {"text_embeds": torch.randn(rows, 1280, dtype=dtype), "time_ids": torch.full((rows, 6), 1024)}
    x, states = torch.randn(rows, 4, side, side, dtype=dtype), torch.randn(rows, 77, width, dtype=dtype)
    more = {"added_cond_kwargs": told} if "addition_embed_type" in UNETS[name] else {}
    prediction: torch.Tensor = unet(x, torch.full((rows,), 500), states, return_dict=False, **more)[0]
    return prediction.float()


def counted(name: str, lora: bool, checkpointing: bool, half: bool, rows: int = 2) -> dict[str, float]:
    """Parameters of a UNet and of what is trained, and bytes that a micro-batch of ``rows`` rows adds."""
    dtype = torch.bfloat16 if half else torch.float32
    with FakeTensorMode():
        unet, trained = make(name, lora, checkpointing)
        for parameter in unet.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        for (
            parameter
        ) in trained:  # gradients are counted apart, since they stay from one micro-batch to the next
            parameter.register_post_accumulate_grad_hook(forget_gradient)
        live = Live([*unet.parameters(), *unet.buffers()])
        with live, torch.autocast("cpu", dtype, half and not lora, cache_enabled=False):
            predict(unet, name, rows, dtype if lora else torch.float32).square().mean().backward()
    return {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "trained": sum(p.numel() for p in trained),
        "activations": live.peak,
    }


def forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def estimate(parts: dict[str, float], frozen_bytes: int, moments: float) -> float:
    """Bytes of one training step: weights, gradients, moments, activations."""
    fixed = parts["parameters"] - parts["trained"]
    trained = parts["trained"] * (4 + 4 + moments)
    return fixed * frozen_bytes + trained + parts["activations"]


def measured(name: str, lora: bool, checkpointing: bool, rows: int) -> dict[str, Any]:
    """The same on this CPU: resident memory that the UNet and two steps with AdamW add."""
    torch.manual_seed(0)
    small, own = make("small", False, False)
    predict(small, "small", 1, torch.float32).mean().backward()  # loads what the libraries load at first
    del small, own
    reset_peak()
    before = peak_bytes()
    unet, trained = make(name, lora, checkpointing)
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)
    for _ in range(2):
        predict(unet, name, rows, torch.float32).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return {"peak": peak_above(before)}


def check(rows: int = 2) -> list[dict[str, Any]]:
    """The estimator against measured peaks, for two sizes, with an adapter and with all weights."""
    found = []
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # what is freed goes back to the system
    for name in ("small", "middle"):
        for lora in (True, False):
            for checkpointing in (False, True):
                parts = counted(name, lora, checkpointing, half=False, rows=rows)
                (seen,) = each_alone([partial(measured, name, lora, checkpointing, rows)])
                told = estimate(parts, 4, 8)
                cell = {"unet": name, "lora": lora, "checkpointing": checkpointing, "rows": rows}
                found.append(cell | {"counted": told, "measured": seen["peak"], "parts": parts})
    return found


def total(model: str, method: Method, parts: dict[str, Any], moments: float) -> float:
    """Bytes of a training step of a model by a method, as the page says."""
    copies = 0 if parts["lora"] else method.frozen
    more = parts["trained"] * (method.sets - 1)
    own = {**parts, "parameters": parts["parameters"] + more, "trained": parts["trained"] + more}
    own["activations"] += 4 * copies * parts["parameters"]
    return estimate(own, 2, moments) + 4 * OTHERS[model][1]


def tables(cells: Sequence[dict[str, Any]], checked: Sequence[dict[str, Any]]) -> str:
    """The page: what training takes, and how far the counting is from a measured peak."""
    columns = " | ".join(f"{NAMES[model]}, {kind}" for model in NAMES for kind in KINDS)
    lines = [HEAD, "", f"| method | {columns} |", "|---|" + "---:|" * (len(NAMES) * len(KINDS))]
    by_key = {(c["model"], c["lora"], c["checkpointing"]): c for c in cells}
    for name, method in METHODS.items():
        row = []
        for model in NAMES:
            for lora in (True, False):
                values = [total(model, method, by_key[model, lora, b], 8) for b in (True, False)]
                row.append(f"{values[0] / 1e9:.1f} ({values[1] / 1e9:.1f})")
        lines.append(f"| {name} | " + " | ".join(row) + " |")
    lines += ["", "Its parts:", ""]
    lines += ["| model | trained | weights | trained weights | activations, blocks | activations |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for model in NAMES:
        for kind, lora in KINDS.items():
            with_blocks, without = (by_key[model, lora, blocks] for blocks in (True, False))
            parts = (f"{without['parameters'] / 1e6:,.0f} M", f"{without['trained'] / 1e6:,.1f} M")
            sizes = (f"{one['activations'] / 1e9:.2f} GB" for one in (with_blocks, without))
            lines.append(f"| {NAMES[model]} | {kind} | " + " | ".join((*parts, *sizes)) + " |")
    lines += ["", EIGHT_BIT, "", CHECKED, ""]
    lines += [
        "| UNet | trained | checkpointing | counted, MB | measured, MB | error |",
        "|---|---|---|---:|---:|---:|",
    ]
    for c in checked:
        error = c["counted"] / c["measured"] - 1
        kind = "adapter" if c["lora"] else "all weights"
        how = "blocks" if c["checkpointing"] else "none"
        told = f"{c['counted'] / 1e6:,.0f} | {c['measured'] / 1e6:,.0f} | {error:+.0%}"
        lines.append(f"| {c['unet']}, {c['parts']['parameters'] / 1e6:.1f} M | {kind} | {how} | {told} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Count or check; writes JSON, and a table from it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", default=["sd15", "sdxl"], choices=NAMES)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument(
        "--page", nargs=2, type=Path, help="only write the page of two JSON files, that of --check last"
    )
    options = parser.parse_args(arguments)
    if options.page:
        found = [json.loads(path.read_text()) for path in options.page]
        PAGE.write_text(tables(*found))
        return []
    if options.check:
        cells = check()
    else:
        cells = [
            {"model": name, "lora": lora, "checkpointing": blocks} | counted(name, lora, blocks, half=True)
            for name in options.models
            for lora in (True, False)
            for blocks in (True, False)
        ]
    for cell in cells:
        print(json.dumps(cell))
    if options.out:
        options.out.write_text(json.dumps(cells, indent=1))
    return cells


if __name__ == "__main__":
    main()
