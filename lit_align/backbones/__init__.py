"""Diffusion models behind one interface; to add one, see CONTRIBUTING.md."""

from lit_align.backbones.adapters import LoRA, whole
from lit_align.backbones.base import Conditioning, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.flux import FluxBackbone
from lit_align.backbones.flux2 import Flux2KleinBackbone
from lit_align.backbones.pipeline import DiffusersBackbone
from lit_align.backbones.sd3 import StableDiffusion3Backbone
from lit_align.backbones.sdxl import StableDiffusionXLBackbone
from lit_align.backbones.stable_diffusion import StableDiffusionBackbone
from lit_align.backbones.weight_sets import POLICY, REFERENCE, WeightSets
from lit_align.backbones.z_image import ZImageBackbone

__all__ = [
    "POLICY",
    "REFERENCE",
    "Conditioning",
    "DenoisingPolicy",
    "DiffusersBackbone",
    "DiffusionBackbone",
    "Flux2KleinBackbone",
    "FluxBackbone",
    "LoRA",
    "StableDiffusion3Backbone",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "WeightSets",
    "ZImageBackbone",
    "whole",
]
