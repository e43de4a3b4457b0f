"""FSDP over two gloo processes."""

from pathlib import Path

import torch
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_align.backbones import REFERENCE, StableDiffusionBackbone

PROMPTS = ["a red circle", "two stars", "a heart", "a blue cross"]


def gradients(folder: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Gradients of a mean over four images, of which this rank has its share, averaged over ranks."""
    torch.manual_seed(0)
    backbone = StableDiffusionBackbone(folder)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if world > 1:
        backbone.shard(init_device_mesh("cpu", (world,)))
    x = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))[rank::world]
    cond = backbone.encode(PROMPTS[rank::world])
    prediction = backbone.predict(x, 500, cond, guidance=2.0)
    with torch.no_grad():
        reference = backbone.predict(x, 500, cond, guidance=2.0, weights=REFERENCE)
    (prediction - reference).square().mean().backward()
    found = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            grad = parameter.grad
            found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def worker(rank: int, folder: str, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = gradients(folder, rank, 2)
    if rank == 0:
        torch.save(found, out)
    torch.distributed.destroy_process_group()


def test_sharded_gradients_are_those_of_one_process(tiny: Path, tmp_path: Path):
    out = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(worker, (str(tiny), str(tmp_path / "store"), str(out)), nprocs=2)
    sharded, whole = torch.load(out, weights_only=True), gradients(str(tiny), 0, 1)
    assert sharded.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in whole.values()) > 1e-4
