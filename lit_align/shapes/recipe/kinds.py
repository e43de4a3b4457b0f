"""The two kinds of denoisers: how each is trained and written."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTokenizer

from lit_align.shapes.recipe.flow import POSITIONS as FLOW_POSITIONS
from lit_align.shapes.recipe.flow import FlowStage, Teacher
from lit_align.shapes.recipe.pipeline import save_flow_pipeline, save_pipeline
from lit_align.shapes.recipe.tokenizer import POSITIONS
from lit_align.shapes.recipe.unet import UNetStage


@dataclass(frozen=True)
class Kind:
    """A kind of denoiser.

    Attributes:
        stage: How it is trained.
        part: Its name in the stage's model.
        save: How its pipeline is written: folder, tokenizer, text tower, autoencoder, denoiser.
        positions: Tokens that the saved pipeline pads or cuts a prompt to.
        batch_size: Images of a step, in all processes.
    """

    stage: Callable[..., UNetStage | FlowStage]
    part: str
    save: Callable[[Path, CLIPTokenizer, Any, AutoencoderKL, Any], None]
    positions: int
    batch_size: int


UNET = Kind(UNetStage, "unet", save_pipeline, POSITIONS, 64)


def flow_kind(teacher: Any, rate: float) -> Kind:
    """The kind of the flow model that learns from this pipeline's denoiser, at this learning rate."""
    teacher.unet.set_attn_processor(AttnProcessor())
    unet = teacher.unet.requires_grad_(False)
    stage = partial(FlowStage, teacher=Teacher(unet, teacher.scheduler), rate=rate)
    return Kind(stage, "transformer", save_flow_pipeline, FLOW_POSITIONS, 32)
