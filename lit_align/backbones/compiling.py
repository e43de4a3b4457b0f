"""The denoiser's blocks through torch's compiler."""

from collections.abc import Sequence

from diffusers.models.attention import BasicTransformerBlock
from torch import nn

VARIANTS = 64
"""Versions of one block that are kept: one for each weight set, width, kind of batch, and with or without
gradients. Beyond them a block runs uncompiled."""


def compile_blocks(network: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Compile a denoiser block by block, in place: its parameters keep their names.

    Of a UNet only the transformer blocks, as diffusers' ``compile_repeated_blocks`` does: compiled whole, it
    lost the gradient below its upsampling on a CPU (torch 2.13), while its predictions were right.

    Args:
        network: The denoiser.
        blocks: Its blocks, where it is no UNet.
    """
    parts = [module for module in network.modules() if isinstance(module, BasicTransformerBlock)]
    for block in parts or blocks:
        block.compile(recompile_limit=VARIANTS)
