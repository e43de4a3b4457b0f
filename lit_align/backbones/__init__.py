"""Diffusion models behind one interface; to add one, see CONTRIBUTING.md."""

from lit_align.backbones.adapters import LoRA, whole
from lit_align.backbones.base import Conditioning, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.pipeline import DiffusersBackbone
from lit_align.backbones.sdxl import StableDiffusionXLBackbone
from lit_align.backbones.stable_diffusion import StableDiffusionBackbone
from lit_align.backbones.weight_sets import POLICY, REFERENCE, WeightSets

__all__ = [
    "POLICY",
    "REFERENCE",
    "Conditioning",
    "DenoisingPolicy",
    "DiffusersBackbone",
    "DiffusionBackbone",
    "LoRA",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "WeightSets",
    "whole",
]
