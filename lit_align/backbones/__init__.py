"""Diffusion models behind one interface; to add one, see CONTRIBUTING.md."""

from lit_align.backbones.base import POLICY, REFERENCE, Conditioning, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.stable_diffusion import LoRA, StableDiffusionBackbone

__all__ = [
    "POLICY",
    "REFERENCE",
    "Conditioning",
    "DenoisingPolicy",
    "DiffusionBackbone",
    "LoRA",
    "StableDiffusionBackbone",
]
