"""What a training step takes of a device's memory, counted before it is taken.

Activations are the highest sum of live storages in a forward pass on tensors without data (torch's
FakeTensorMode). The backward pass, rewards' activations, kernels' workspaces and fragments come on top, so
that the sum is what a step needs at least.
"""

import os
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lit_align.methods import AlignmentModule

ITEMS = 2
"""Of which activations are counted; those of more add up."""

SHAPE = (128, 64)
"""Of the weight whose optimizer state is looked at: with enough values for states of 8 bits, and factored."""

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where the memory of a container is limited."""


class Live(TorchDispatchMode):
    """The bytes of the storages that are alive, of those that were made in it.

    Args:
        before: Tensors that are there already; their storages, which views show again, do not count.

    Attributes:
        peak: The most at any time.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in before:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    Attributes:
        weights: Of all weights, of the gradients of those that are trained, and of the optimizer's state.
        activations: Of one micro-batch.
        there: What the device has.
        name: Of the device.
    """

    weights: int
    activations: int
    there: int
    name: str


def count(module: AlignmentModule) -> Memory | None:
    """Count what a method takes on its device; None where it is not known how much the device has."""
    there = capacity(module.device)
    if there is None:
        return None
    weights = sum(p.nbytes for p in [*module.parameters(), *module.buffers()])
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    weights += round(trained * (4 + state_bytes(module)))  # gradients in float32
    return Memory(weights, activations(module), there, str(module.device))


def capacity(device: torch.device) -> int | None:
    """The bytes that a device has: of a CPU, the machine's or the container's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [Path(path).read_text("utf-8").strip() for path in LIMITS if Path(path).is_file()]
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def state_bytes(module: AlignmentModule) -> float:
    """Bytes that the optimizer keeps for a trained value, by a step on a weight of its own."""
    weight = nn.Parameter(torch.zeros(SHAPE, device=module.device))
    weight.grad = torch.ones_like(weight)
    optimizer = module.optimisation.optimizer([{"params": [weight]}])
    optimizer.step()
    state = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in state if value.numel() > 1) / weight.numel()


def activations(module: AlignmentModule) -> int:
    """Bytes of a micro-batch's forward pass; 0 of a network that cannot be followed without data."""
    backbone, guidance = module.backbone, module.sampling.guidance
    cond, t = backbone.encode(["a"] * ITEMS), float(module.sampler.timesteps[0])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    there = [fake.from_tensor(tensor) for tensor in [*module.parameters(), *module.buffers()]]
    live = Live(there)
    try:
        with fake, live, torch.enable_grad(), module.trainer.precision_plugin.forward_context():
            x = torch.randn(ITEMS, *backbone.latent_shape, device=module.device)
            prediction = backbone.predict(x, t, cond, guidance)
            del prediction
    except RuntimeError:  # what FakeTensorMode raises where values decide what is computed
        return 0
    return live.peak * module.optimisation.micro_batch // ITEMS
