"""The autoencoder: 64x64 images to 8x8 latents of 16 channels, each of mean 0 and variance 1.

Encoder and decoder are first taught apart: the one to say the principal components of the image's patches,
the other to draw the image from them. Trained together from the beginning, the decoder learns nothing while
the encoder says nothing: after 40 CPU-seconds the reconstructions of crops were at 14 dB together, and at
23 dB from true components (one run each).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from lit_align.shapes.recipe.images import Images, frame_half
from lit_align.shapes.recipe.training import Budget, Stage

CHANNELS = 16
PATCH = 8
APART_SHARE = 0.35
"""Share of the budget in which encoder and decoder are taught apart."""

CROP_SHARE = 0.6
"""Share of the budget that is spent on crops, which cost a quarter of an image."""

NOISE = 0.1
"""Standard deviation of the noise on the principal components; those have a variance of 1."""


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder in Stable Diffusion's format."""
    channels = (16, 24, 48, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=CHANNELS,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, horizontal and vertical."""
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


class Components:
    """The leading principal components of 8x8 patches, each of mean 0 and variance 1 over the images given.

    Args:
        images: ``(N, 3, H, W)``.
    """

    def __init__(self, images: Tensor) -> None:
        patches = F.pixel_unshuffle(images, PATCH).movedim(1, -1).flatten(0, 2)
        self.mean = patches.mean(0)
        variances, axes = torch.linalg.eigh(torch.cov(patches.T))
        self.axes = axes[:, -CHANNELS:] / variances[-CHANNELS:].sqrt()

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, 3, H, W)`` to ``(B, CHANNELS, H / 8, W / 8)``."""
        patches = F.pixel_unshuffle(images, PATCH).movedim(1, -1)
        return ((patches - self.mean) @ self.axes).movedim(-1, 1)


class VAEStage(Stage):
    """L1 + 2 L2 + 0.5 L1 of the edges + a small KL, on crops of 32 first and on whole images later.

    Args:
        model: What is trained.
        decoder_only: Leave the encoder, and with it every latent, as it is; no crops.
    """

    def __init__(
        self, model: AutoencoderKL, images: Images, budget: Budget, decoder_only: bool = False
    ) -> None:
        super().__init__(model, peak=1e-3 if decoder_only else 2e-3, budget=budget, decay=0.995)
        self.images, self.crop_share = images, 0.0 if decoder_only else CROP_SHARE
        self.apart_share = 0.0 if decoder_only else APART_SHARE
        self.components = Components(images.images(range(min(500, len(images)))) * 2 - 1)
        if decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        images = frame_half(self.images.images(batch)) * 2 - 1
        if self.spent < self.crop_share:
            top, left = (8 * torch.randint(5, (2,))).tolist()
            images = images[..., top : top + 32, left : left + 32]
        posterior = self.model.encode(images).latent_dist
        if self.spent < self.apart_share:
            components = self.components(images)
            latents = components + NOISE * torch.randn_like(components)
            likeness = posterior.logvar - 2 * math.log(NOISE)
            code = (posterior.mean - components).square().mean() + 0.1 * likeness.square().mean()
        else:
            latents = posterior.sample()
            code = 3e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        error = self.model.decode(latents).sample.float() - images
        edge = sum(part.abs().mean() for part in edges(error))
        loss: Any = error.abs().mean() + 2 * error.square().mean() + 0.5 * edge + code
        decibels = -10 * (error.detach() / 2).square().mean().log10()
        self.log_dict({"loss": loss, "dB": decibels, "code": code}, prog_bar=True)
        return loss


@torch.no_grad()
def encode(
    vae: AutoencoderKL,
    images: Images,
    numbers: Tensor,
    change: Callable[[Tensor], Tensor] = lambda images: images,
    batch_size: int = 250,
) -> Tensor:
    """Latent means ``(N, C, 8, 8)`` float16 of the images with these numbers ``(N,)``, changed if wanted."""
    parts = []
    for part in numbers.split(batch_size):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(change(images.images(part)) * 2 - 1).latent_dist.mean.half())
    return torch.cat(parts)


@torch.no_grad()
def whiten(vae: AutoencoderKL, latents: Tensor) -> None:
    """Fold the channels' mean and deviation into the convolutions beside the latent: same reconstructions.

    Args:
        vae: Changed in place.
        latents: ``(N, C, H, W)``, as the autoencoder gives them now.
    """
    count = latents.shape[1]
    mean, std = latents.float().mean((0, 2, 3)), latents.float().std((0, 2, 3))
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:count] /= std[:, None, None, None]
    into.bias[:count] = (into.bias[:count] - mean) / std
    into.bias[count:] -= 2 * std.log()  # the other half of the channels is the log-variance
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
    back.weight *= std[None, :, None, None]
