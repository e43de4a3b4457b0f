"""The denoiser's parameters over several processes."""

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard_network(network: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard a network (FSDP), its blocks one by one; one that is sharded stays as it is."""
    if isinstance(network, FSDPModule):  # a second fit of the same objects
        return
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The parameters outside of the blocks too, which torch would leave whole after a prediction without a
    # gradient: a set that follows another could not be averaged with its shards.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
