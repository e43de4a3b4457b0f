"""The families that the protocol runs on: a new one is one more entry here and a fixture of its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, Flux2KleinPipeline, FluxPipeline
from torch import Tensor

from lit_align.backbones import (
    POLICY,
    DiffusersBackbone,
    Flux2KleinBackbone,
    FluxBackbone,
    StableDiffusion3Backbone,
    StableDiffusionBackbone,
    StableDiffusionXLBackbone,
    ZImageBackbone,
)
from lit_align.backbones.transformer import TransformerBackbone
from lit_align.rollout import rollout
from lit_align.samplers import DDIM, FlowSDE, Sampler
from tests.backbones.flow_models import MODELS
from tests.backbones.fresh import fresh

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
        return perturb(fresh(self.backbone, self.folder, **options))

    def pipeline(self, backbone: DiffusersBackbone | None = None) -> DiffusionPipeline:
        """Diffusers' own pipeline with our sampler, and with the policy of a backbone if one is given."""
        loaded: Any = self.backbone.pipeline_class.from_pretrained(self.folder, **self.backbone.without)
        if not issubclass(self.backbone, TransformerBackbone):
            loaded.scheduler = DDIMScheduler.from_config(loaded.scheduler.config, clip_sample=False)
        loaded.set_progress_bar_config(disable=True)
        if backbone is not None:
            setattr(loaded, self.backbone.denoiser, backbone.weight_sets.choose(POLICY))
        return loaded


class SmallFlux(FluxBackbone):
    """Its pipeline's own size is 1024, whatever the model's."""

    def __init__(self, pretrained: str, size: Any = None, **options: Any) -> None:
        super().__init__(pretrained, size=32 if size is None else size, **options)


class SmallKlein(Flux2KleinBackbone):
    """The same."""

    def __init__(self, pretrained: str, size: Any = None, **options: Any) -> None:
        super().__init__(pretrained, size=32 if size is None else size, **options)


class SmallZImage(ZImageBackbone):
    """Its pipeline says no size."""

    def __init__(self, pretrained: str, size: Any = None, **options: Any) -> None:
        super().__init__(pretrained, size=32 if size is None else size, **options)


FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj")

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
    "stable diffusion 3": (StableDiffusion3Backbone, "sd3", (*FORWARD, "norm1.linear", "proj_out")),
    "flux": (SmallFlux, "flux", ("norm1.linear", "proj_mlp", "proj_out")),
    "schnell": (SmallFlux, "schnell", ("norm1.linear", "proj_mlp", "proj_out")),
    "z-image": (SmallZImage, "z_image", ("feed_forward.w1", "feed_forward.w2")),
    "klein": (SmallKlein, "klein", ("ff.linear_in", "ff_context.linear_out")),
}
"""Backbone, fixture of the folder, further layers for adapters."""


BY_DEFAULT = ("stable diffusion", "stable diffusion xl")
"""Families whose tests are not slow."""

MARKED = [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(params=MARKED)
def family(request: pytest.FixtureRequest, flow_folder: Callable[[str], Path]) -> Family:
    return family_of(request, request.param, flow_folder)


def family_of(request: pytest.FixtureRequest, name: str, flow_folder: Callable[[str], Path]) -> Family:
    backbone, model, adapted = FAMILIES[name]
    folder = flow_folder(model) if model in MODELS else request.getfixturevalue(model)
    return Family(backbone, folder, adapted)


def still(backbone: DiffusersBackbone, steps: int) -> Sampler:
    """A sampler without noise."""
    if isinstance(backbone, TransformerBackbone):
        return backbone.make_sampler(partial(FlowSDE, num_steps=steps, noise_level=0.0))
    return backbone.make_sampler(partial(DDIM, num_steps=steps, eta=0.0))


def draw(backbone: DiffusersBackbone, guidance: float, weights: str = POLICY) -> Tensor:
    """Images of four deterministic steps."""
    with torch.no_grad():
        policy = backbone.policy(still(backbone, 4), backbone.encode(PROMPTS), guidance, weights)
        return backbone.decode(rollout(policy, latents(backbone), 4).states[-1])


def draw_in_diffusers(pipeline: Any, backbone: DiffusersBackbone, guidance: float) -> Tensor:
    """The same from the pipeline's own loop: its encoders, denoiser and scheduler."""
    height, width = backbone.size
    x = latents(backbone)
    told: dict[str, Any] = {"latents": x} | backbone.pipeline_options(guidance)
    if "negative_prompt" in told:
        told["negative_prompt"] = [told["negative_prompt"]] * len(PROMPTS)
    if isinstance(backbone, StableDiffusion3Backbone):
        told["sigmas"] = [1.0, 0.75, 0.5, 0.25]  # else the shift is made twice
    if isinstance(backbone, FluxBackbone):
        told["latents"] = FluxPipeline._pack_latents(x, *x.shape)
    if isinstance(backbone, Flux2KleinBackbone):
        told["latents"] = Flux2KleinPipeline._patchify_latents(x)
        told["text_encoder_out_layers"] = (0, 1, 2)  # the tiny encoder has no more
    images: Tensor = pipeline(
        prompt=[*PROMPTS], num_inference_steps=4, height=height, width=width, output_type="pt", **told
    ).images
    return images


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
