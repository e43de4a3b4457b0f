"""The autoencoder: 64x64 images to 16x16 latents of 4 channels, each of mean 0 and variance 1."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from lit_align.shapes.recipe.images import Images
from lit_align.shapes.recipe.training import Budget, Stage

CROP_SHARE = 0.25
"""Share of the budget that is spent on crops, which cost a quarter of an image."""


def make_vae() -> AutoencoderKL:
    """An untrained autoencoder in Stable Diffusion's format."""
    channels = (24, 48, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, horizontal and vertical."""
    return images[..., :, 1:] - images[..., :, :-1], images[..., 1:, :] - images[..., :-1, :]


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
        if decoder_only:
            model.encoder.requires_grad_(False)
            model.quant_conv.requires_grad_(False)

    def parameter_groups(self) -> list[dict[str, object]]:
        """Whatever is not frozen."""
        return [
            {"params": [weight for weight in self.model.parameters() if weight.requires_grad], "scale": 1.0}
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        images = self.images.images(batch) * 2 - 1
        if self.spent < self.crop_share:
            top, left = (8 * torch.randint(5, (2,))).tolist()
            images = images[..., top : top + 32, left : left + 32]
        posterior = self.model.encode(images).latent_dist
        output = self.model.decode(posterior.sample()).sample.float()
        error = output - images
        edge = sum(F.l1_loss(ours, theirs) for ours, theirs in zip(edges(output), edges(images), strict=True))
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss: Any = error.abs().mean() + 2 * error.square().mean() + 0.5 * edge + 3e-4 * kl
        decibels = -10 * (error.detach() / 2).square().mean().log10()
        self.log_dict({"loss": loss, "dB": decibels, "kl": kl}, prog_bar=True)
        return loss


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Images, numbers: Tensor, batch_size: int = 250) -> Tensor:
    """Latent means ``(N, 4, 16, 16)`` float16 of the images with these numbers ``(N,)``."""
    parts = []
    for part in numbers.split(batch_size):
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(vae.encode(images.images(part) * 2 - 1).latent_dist.mean.half())
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
