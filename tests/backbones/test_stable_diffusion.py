"""Stable Diffusion alone: v-prediction, and the models that look like it and are not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel

from lit_align.backbones import StableDiffusionBackbone
from lit_align.backbones.autoencoder import encode
from lit_align.errors import ConfigError
from lit_align.rollout import rollout
from lit_align.samplers import DDIM
from tests.backbones.conftest import PROMPTS, Family, latents


def test_a_model_that_predicts_v_draws_the_image_that_diffusers_draws(tiny_v: Path):
    family = Family(StableDiffusionBackbone, tiny_v, ())
    backbone = family.backbone(str(tiny_v))
    sampler = backbone.make_sampler(partial(DDIM, num_steps=5, eta=0.0))
    assert (
        sampler.schedule.target(torch.ones(1), torch.zeros(1), 999) < 0
    )  # the clean image counts negatively
    x = latents(backbone)
    with torch.no_grad():
        policy = backbone.policy(sampler, backbone.encode(PROMPTS), 3.0)
        ours = backbone.decode(rollout(policy, x, 5).states[-1])
    theirs = family.pipeline()(
        PROMPTS, latents=x, num_inference_steps=5, guidance_scale=3.0, output_type="pt"
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def saved(tiny: Path, folder: Path, changes: dict[str, object]) -> str:
    """A pipeline whose UNet has another configuration."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny, safety_checker=None, requires_safety_checker=False
    )
    pipeline.unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | changes)
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "in_channels 9 for latents of 4"),
        ({"out_channels": 8}, "out_channels 8 for latents of 4"),
        ({"num_class_embeds": 10}, "num_class_embeds 10"),
        ({"class_embed_type": "timestep"}, "class_embed_type timestep"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim 8"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 32,
            },
            "addition_embed_type text_time",
        ),
    ],
)
def test_a_unet_that_asks_for_more_than_prompts_is_refused(tiny: Path, tmp_path: Path, changes, message):
    folder = saved(tiny, tmp_path / "other", changes)
    with pytest.raises(ConfigError, match=f"not a plain text-to-image model .*{message}"):
        StableDiffusionBackbone(folder)


def test_an_autoencoder_with_a_shift_is_scaled_back_and_forth(tiny: Path, tmp_path: Path):
    family = Family(StableDiffusionBackbone, tiny, ())
    pipeline = family.pipeline()
    plain = family.backbone(str(tiny))
    pipeline.vae.register_to_config(shift_factor=0.25, scaling_factor=1.5)
    pipeline.save_pretrained(tmp_path / "shifted")
    shifted = family.backbone(str(tmp_path / "shifted"))
    images = torch.rand(1, 3, *plain.size)
    raw = plain.latents(images) / plain.vae.config.scaling_factor
    torch.testing.assert_close(shifted.latents(images), (raw - 0.25) * 1.5)
    torch.testing.assert_close(shifted.decode((raw - 0.25) * 1.5), plain.decode(plain.latents(images)))
    assert isinstance(shifted.vae, AutoencoderKL)
    assert shifted.autoencoder_hash() != plain.autoencoder_hash()


def test_an_autoencoder_without_a_distribution_encodes_too():
    vae = AutoencoderTiny(num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(encode(vae, images, 3), vae.encode(2 * images - 1).latents)
