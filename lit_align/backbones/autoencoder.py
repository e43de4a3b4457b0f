"""The image autoencoder of a pipeline: always in its own precision, and in chunks that fit the memory."""

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_align.backbones.checkpointing import recompute


def decoded(vae: Any, z: Tensor, batch: int, again: bool) -> Tensor:
    """Latents as the autoencoder has them, to images ``(B, 3, H, W)`` in [0, 1], float32; differentiable.

    Args:
        vae: The autoencoder.
        z: ``(B, C, H, W)``, in its dtype.
        batch: Images at once.
        again: The backward pass decodes anew, instead of keeping activations.
    """
    decode: Any = partial(vae.decode, return_dict=False)
    again = again and z.requires_grad
    with torch.autocast(z.device.type, enabled=False):  # in half precision images lose their last bits
        chunks = [(recompute(decode, part) if again else decode(part))[0] for part in z.split(batch)]
    return (torch.cat(chunks).float() / 2 + 0.5).clamp(0, 1)


def encoded(vae: Any, images: Tensor, batch: int) -> Tensor:
    """Images in [0, 1] to the modes of their latents, as the autoencoder has them."""
    pixels = 2 * images.to(next(vae.parameters()).dtype) - 1
    with torch.autocast(images.device.type, enabled=False):
        return torch.cat([vae.encode(x).latent_dist.mode() for x in pixels.split(batch)])


def digest(vae: Any) -> str:
    """Changes with the weights and the scale of an autoencoder."""
    config: Any = vae.config
    shift = [config.shift_factor] if config.get("shift_factor") else []
    scale = [config.get("scaling_factor"), *shift]
    found = hashlib.sha256(" ".join(map(str, scale)).encode())
    for name, value in vae.state_dict().items():
        found.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
