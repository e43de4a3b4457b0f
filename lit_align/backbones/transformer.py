"""What the flow models share whose denoiser is a transformer over patches of latents."""

from collections.abc import Mapping
from functools import cache, wraps
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lit_align.backbones.base import SamplerFactory
from lit_align.backbones.pipeline import DiffusersBackbone
from lit_align.samplers import Sampler


class TransformerBackbone(DiffusersBackbone):
    """A pipeline with a transformer, which predicts the velocity of a flow.

    Latents are ``(B, C, H, W)`` everywhere else; a family that packs them does so in :meth:`denoise`.
    """

    denoiser: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 2

    @property
    def transformer(self) -> nn.Module:
        """The transformer that holds the policy."""
        return self.network

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        _, height, width = self.latent_shape
        return (height // self.patch) * (width // self.patch)

    def blocks(self, network: Any) -> list[nn.Module]:
        return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]

    def attend(self, network: Any, plain: bool) -> None:
        for module in network.modules():
            processor = getattr(module, "processor", None)
            if processor is not None:
                own: Any = getattr(type(processor), "fused", type(processor))
                processor.__class__ = plainly(own) if plain else own

    def mu(self, num_steps: int) -> float:
        """The shift of the noise levels for images of this size, where it is dynamic.

        Linear in the number of tokens between two points that the scheduler's config has.
        """
        del num_steps
        config: Any = self.pipeline.scheduler.config
        tokens, shift = (
            (config.get(f"base_{of}"), config.get(f"max_{of}")) for of in ("image_seq_len", "shift")
        )
        slope = (shift[1] - shift[0]) / (tokens[1] - tokens[0])
        return float(shift[0] + slope * (self.tokens - tokens[0]))

    def make_sampler(self, factory: SamplerFactory) -> Sampler:
        config: Mapping[str, Any] = dict(self.pipeline.scheduler.config)
        return factory({**config, "mu": self.mu})


@cache
def plainly(fused: Any) -> Any:
    """A class of attention processors with torch's fused kernels switched off: two products and a softmax.

    It has the signature of the other: diffusers drops arguments that a processor does not name.
    """

    @wraps(fused.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return fused.__call__(self, *args, **kwargs)

    return type(f"Plain{fused.__name__}", (fused,), {"__call__": call, "fused": fused})


def pack(x: Tensor) -> Tensor:
    """Latents ``(B, C, H, W)`` to tokens of 2 x 2 patches, ``(B, H/2 * W/2, 4 C)``, row by row."""
    return pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`pack`, to the shape of ``like``."""
    height, width = (side // 2 for side in like.shape[-2:])
    return pixel_shuffle(tokens.mT.unflatten(2, (height, width)), 2)


def grid(x: Tensor) -> Tensor:
    """Row and column of each patch of latents ``x``, ``(H/2 * W/2, 2)`` float32."""
    rows, columns = (torch.arange(side // 2, device=x.device, dtype=torch.float32) for side in x.shape[-2:])
    return torch.cartesian_prod(rows, columns)
