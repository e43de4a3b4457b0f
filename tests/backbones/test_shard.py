"""FSDP over two gloo processes."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from lit_align.backbones import REFERENCE, LoRA, StableDiffusionBackbone, whole

PROMPTS = ["a red circle", "two stars", "a heart", "a blue cross"]


def gradients(folder: str, rank: int, world: int, lora: LoRA | None, out: Path) -> dict[str, torch.Tensor]:
    """Gradients of a mean over four images, of which this rank has its share, averaged over ranks.

    The first rank writes the weights.
    """
    torch.manual_seed(0)
    backbone = StableDiffusionBackbone(folder, lora=lora)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if world > 1:
        backbone.shard(init_device_mesh("cpu", (world,)))
    backbone.save_weights(None if rank else out)
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
            found[name] = whole(grad)
    return found


def worker(rank: int, folder: str, lora: LoRA | None, out: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    found = gradients(folder, rank, 2, lora, out / "sharded")
    if rank == 0:
        torch.save(found, out / "gradients.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [LoRA(), None], ids=["adapter", "all weights"])
def test_sharded_gradients_and_files_are_those_of_one_process(tiny: Path, tmp_path: Path, lora: LoRA | None):
    torch.multiprocessing.spawn(worker, (str(tiny), lora, tmp_path), nprocs=2)
    sharded = torch.load(tmp_path / "gradients.pt", weights_only=True)
    alone = gradients(str(tiny), 0, 1, lora, tmp_path / "alone")
    assert sharded.keys() == alone.keys()
    for name in alone:
        torch.testing.assert_close(sharded[name], alone[name], atol=1e-6, rtol=1e-4)
    assert max(gradient.abs().max() for gradient in alone.values()) > 1e-4
    files = [path.relative_to(tmp_path / "alone") for path in (tmp_path / "alone").rglob("*.safetensors")]
    assert files
    for file in files:
        written, expected = load_file(tmp_path / "sharded" / file), load_file(tmp_path / "alone" / file)
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)
