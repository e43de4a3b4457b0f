"""Tiny pipelines with random weights, of the architectures that users have."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from lit_align.shapes import PIPELINE

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""The noise schedule of Stable Diffusion."""

SCHEDULE_XL = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
"""The noise schedule of Stable Diffusion XL."""

CARRIED = {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True}
"""What its configuration says beside, for other schedulers than its own."""


def make_pipeline(
    scheduler: DDIMScheduler | PNDMScheduler, sample_size: int = 8, attentive: bool = False
) -> StableDiffusionPipeline:
    """A Stable Diffusion of the usual architecture with random weights, small enough for a CPU.

    Args:
        scheduler: Its own.
        sample_size: Of its latents.
        attentive: Whether the last block reads the prompt too: adapters move such a model further, and a pass
            takes 1.7 times as long.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    text = _text_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D" if attentive else "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D" if attentive else "UpBlock2D"),
    )
    vae = _autoencoder(sample_size)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def make_xl_pipeline(sample_size: int = 8) -> StableDiffusionXLPipeline:
    """A Stable Diffusion XL of the usual architecture and schedule with random weights."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PIPELINE / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16 + 24,  # both encoders, side by side
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 1),
        use_linear_projection=True,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=12 + 6 * 8,
    )
    vae = _autoencoder(sample_size, scaling_factor=0.13025)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, num_layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(
            _text_config(tokenizer, num_layers=2, width=24, projection=12)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(**SCHEDULE_XL),
        add_watermarker=False,
    )


def _text_config(
    tokenizer: CLIPTokenizer, num_layers: int = 1, width: int = 16, projection: int = 512
) -> CLIPTextConfig:
    """Of a text tower for this tokenizer; 512 is the projection of CLIP's own configuration."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=projection,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _autoencoder(sample_size: int, scaling_factor: float = 0.18215) -> AutoencoderKL:
    """For latents of this size; 0.18215 is the factor of Stable Diffusion 1 and of the class."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=2 * sample_size,
        scaling_factor=scaling_factor,
    )
