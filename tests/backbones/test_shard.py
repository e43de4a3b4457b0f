"""FSDP over two gloo processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from lit_align.backbones import POLICY, REFERENCE, LoRA, StableDiffusionBackbone, whole
from lit_align.errors import ConfigError

PROMPTS = ["a red circle", "two stars", "a heart", "a blue cross"]
KINDS: dict[str, tuple[LoRA | None, dict[str, Any]]] = {
    "adapter": (LoRA(), {"checkpointing": "blocks"}),
    "half": (LoRA(), {"dtype": "bfloat16"}),
    "all weights": (None, {}),
}


def gradients(
    folder: str, rank: int, world: int, lora: LoRA | None, out: Path, options: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Gradients of a mean over four images, of which this rank has its share, averaged over ranks.

    The first rank writes the weights. Among what is returned is a set that follows the policy, after it has
    predicted without a gradient, as that of NFT.
    """
    torch.manual_seed(0)
    backbone = StableDiffusionBackbone(folder, lora=lora, **options)
    backbone.weight_sets.add("old")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    if world > 1:
        backbone.shard(init_device_mesh("cpu", (world,)))
    backbone.weight_sets.save(None if rank else out)
    x = torch.randn(4, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))[rank::world]
    cond = backbone.encode(PROMPTS[rank::world])
    prediction = backbone.predict(x, 500, cond, guidance=2.0)
    with torch.no_grad():
        reference = backbone.predict(x, 500, cond, guidance=2.0, weights=REFERENCE)
        backbone.predict(x, 500, cond, weights="old")
    (prediction - reference).square().mean().backward()
    backbone.weight_sets.follow(POLICY, "old", 0.5)
    found = {}
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            grad = parameter.grad
            found[name] = whole(grad)
    old = enumerate(backbone.weight_sets.parameters_of("old"))
    return found | {f"old {number}": whole(parameter.detach()) for number, parameter in old}


def worker(rank: int, folder: str, out: Path) -> None:
    torch.set_num_threads(1)  # a forked process would wait for the threads of its parent, which it has not
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    for kind, (lora, options) in KINDS.items():
        found = gradients(folder, rank, 2, lora, out / kind / "sharded", options)
        if rank == 0:
            torch.save(found, out / kind / "gradients.pt")
    torch.distributed.destroy_process_group()


def test_sharded_gradients_and_files_are_those_of_one_process(tiny: Path, tmp_path: Path):
    torch.multiprocessing.start_processes(worker, (str(tiny), tmp_path), nprocs=2, start_method="fork")
    for kind, (lora, options) in KINDS.items():
        folder = tmp_path / kind
        sharded = torch.load(folder / "gradients.pt", weights_only=True)
        alone = gradients(str(tiny), 0, 1, lora, folder / "alone", options)
        assert sharded.keys() == alone.keys()
        exact = "dtype" not in options  # else the order of the ranks' rounding shows
        for name in alone:
            torch.testing.assert_close(
                sharded[name], alone[name], atol=1e-6 if exact else 1e-3, rtol=1e-4 if exact else 2e-2
            )
        assert max(value.abs().max() for name, value in alone.items() if not name.startswith("old")) > 1e-4
        files = [path.relative_to(folder / "alone") for path in (folder / "alone").rglob("*.safetensors")]
        assert files
        for file in files:
            written, expected = load_file(folder / "sharded" / file), load_file(folder / "alone" / file)
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_compiled_model_is_not_sharded(tiny: Path):
    backbone = StableDiffusionBackbone(str(tiny), compile=True)
    with pytest.raises(ConfigError, match=r"compile: true .* set it to false"):
        backbone.shard(None)
