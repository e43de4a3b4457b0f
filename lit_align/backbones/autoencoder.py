"""The image autoencoder: always in its own precision, some images at once."""

import hashlib
from functools import partial
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor, nn

from lit_align.backbones.checkpointing import recompute

STATISTICS = ("latents_mean", "latents_std")
"""Of the channels, in the configurations of some autoencoders."""


def fingerprint(vae: nn.Module) -> str:
    """Changes with what decides the latents of an image: the weights and the scale."""
    config: Any = vae.config
    scale = [config.get("scaling_factor"), *([config.shift_factor] if config.get("shift_factor") else [])]
    scale += [config[name] for name in STATISTICS if config.get(name)]
    digest = hashlib.sha256(" ".join(map(str, scale)).encode())
    for name, value in vae.state_dict().items():
        digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def decode(vae: Any, z: Tensor, batch: int, again: bool) -> Tensor:
    """Latents in the autoencoder's scale and dtype to images in [0, 1].

    Args:
        vae: The autoencoder.
        z: ``(B, C, H, W)``.
        batch: Images at once.
        again: Compute activations again in the backward pass.
    """
    run: Any = partial(vae.decode, return_dict=False)
    with torch.autocast(z.device.type, enabled=False):  # in half precision images lose their last bits
        chunks = [(recompute(run, x) if again and x.requires_grad else run(x))[0] for x in z.split(batch)]
    return (torch.cat(chunks).float() / 2 + 0.5).clamp(0, 1)


def encode(vae: Any, images: Tensor, batch: int) -> Tensor:
    """Images in [0, 1] to the mode of their latents in the autoencoder's scale, some at once."""
    pixels = 2 * images.to(next(vae.parameters()).dtype) - 1
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([retrieve_latents(vae.encode(x), None, "argmax") for x in pixels.split(batch)])
