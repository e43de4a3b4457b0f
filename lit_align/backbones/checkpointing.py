"""Activations that the backward pass computes again instead of keeping them."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_align.backbones.weight_sets import WeightSets

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Run a function and forget its activations; the models are in evaluation mode and draw no random numbers."""


def by_block(sets: WeightSets) -> Callable[..., Any]:
    """How a network of ``sets`` runs one of its blocks: recomputed with the set that was chosen when it ran.

    Outside of what is recomputed the choice would be lost: the backward pass would use whichever set is
    active then.
    """

    # A function, not a method: with a copy of the network a method's object would be copied too.
    def run(block: nn.Module, *inputs: Any) -> Any:
        name = sets.chosen

        def chosen(*inputs: Any) -> Any:
            sets.choose(name)
            return block(*inputs)

        return recompute(chosen, *inputs)

    return run
