"""Diffusion models behind one interface; to add one, see CONTRIBUTING.md."""

from lit_align.backbones.adapters import LoRA
from lit_align.backbones.base import (
    POLICY,
    REFERENCE,
    Conditioning,
    DenoisingPolicy,
    DiffusionBackbone,
    whole,
)
from lit_align.backbones.stable_diffusion import StableDiffusionBackbone

__all__ = [
    "POLICY",
    "REFERENCE",
    "Conditioning",
    "DenoisingPolicy",
    "DiffusionBackbone",
    "LoRA",
    "StableDiffusionBackbone",
    "whole",
]
