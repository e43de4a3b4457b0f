"""The families that the protocol runs on: a new one is one more entry here and a fixture of its folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor

from lit_align.backbones import POLICY, DiffusersBackbone, StableDiffusionBackbone, StableDiffusionXLBackbone

PROMPTS = ["a red circle on a white background", "two stars"]


@dataclass(frozen=True)
class Family:
    """A family of pipelines and the folder of a tiny model of it.

    Attributes:
        backbone: Its backbone.
        folder: A pipeline with random weights, in diffusers' format.
        adapted: Ends of layer names beside attention that an adapter may have.
    """

    backbone: type[DiffusersBackbone]
    folder: Path
    adapted: tuple[str, ...]

    def make(self, **options: Any) -> DiffusersBackbone:
        """A backbone whose trained weights are not those it starts with: a new adapter's update is 0."""
        torch.manual_seed(0)
        backbone = self.backbone(str(self.folder), **options)
        return perturb(backbone)

    def pipeline(self, backbone: DiffusersBackbone | None = None) -> DiffusionPipeline:
        """Diffusers' own pipeline with our sampler, and with the policy of a backbone if one is given."""
        loaded: Any = self.backbone.pipeline_class.from_pretrained(self.folder, **self.backbone.without)
        loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, clip_sample=False)
        loaded.set_progress_bar_config(disable=True)
        if backbone is not None:
            setattr(loaded, self.backbone.denoiser, backbone.weight_sets.choose(POLICY))
        return loaded


FAMILIES: dict[str, tuple[type[DiffusersBackbone], str, tuple[str, ...]]] = {
    "stable diffusion": (
        StableDiffusionBackbone,
        "tiny",
        ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"),
    ),
    "stable diffusion xl": (
        StableDiffusionXLBackbone,
        "tiny_xl",
        ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"),
    ),
}
"""Backbone, fixture of the folder, further layers for adapters."""


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    backbone, folder, adapted = FAMILIES[request.param]
    return Family(backbone, request.getfixturevalue(folder), adapted)


def perturb(backbone: DiffusersBackbone, name: str = POLICY, scale: float = 0.3) -> DiffusersBackbone:
    """Give the weights of a set other values; those of a whole network move less, or nothing is left."""
    draw = torch.Generator().manual_seed(2)
    parameters = backbone.weight_sets.parameters_of(name)
    own = scale if len(parameters) < len(list(backbone.network.parameters())) else scale / 10
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(own * torch.randn(parameter.shape, generator=draw))
    return backbone


def latents(backbone: DiffusersBackbone, count: int = 2) -> Tensor:
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))


def predict(backbone: DiffusersBackbone, weights: str = POLICY, guidance: float = 1.0) -> Tensor:
    return backbone.predict(latents(backbone), 500, backbone.encode(PROMPTS), guidance, weights)


def trained(backbone: DiffusersBackbone) -> set[str]:
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
