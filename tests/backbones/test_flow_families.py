"""What flow models have beside test_families.py: the pipelines' own loops, encoders that are absent, shifts
by size, and which layers are adapted."""

import shutil
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from safetensors.torch import save_file
from torch import Tensor

from lit_align.backbones import (
    DiffusersBackbone,
    Flux2KleinBackbone,
    FluxBackbone,
    LoRA,
    StableDiffusion3Backbone,
    StableDiffusionBackbone,
    ZImageBackbone,
)
from lit_align.backbones.transformer import TransformerBackbone, pack, unpack
from lit_align.errors import ConfigError
from lit_align.samplers import FlowSDE
from tests.backbones.conftest import PROMPTS, draw_in_diffusers, latents, perturb, predict

CLASSES: dict[str, type[TransformerBackbone]] = {
    "sd3": StableDiffusion3Backbone,
    "sd3_without_t5": StableDiffusion3Backbone,
    "flux": FluxBackbone,
    "schnell": FluxBackbone,
    "klein": Flux2KleinBackbone,
    "klein_distilled": Flux2KleinBackbone,
    "z_image": ZImageBackbone,
}
Folder = Callable[[str], Path]


def test_a_size_beyond_the_positions_is_refused(flow_folder: Folder) -> None:
    place = str(flow_folder("sd3_without_t5"))
    own = StableDiffusion3Backbone(place)
    most = 16 * 2 * own.size[0] // own.latent_shape[1]  # pos_embed_max_size patches of 2 x 2 latent pixels
    backbone = StableDiffusion3Backbone(place, size=(32, most))
    with torch.no_grad():
        backbone.predict(latents(backbone, 1), 500.0, backbone.encode(["a"]))
    with pytest.raises(ConfigError, match=f"backbone.size: .* up to {most} pixels a side"):
        StableDiffusion3Backbone(place, size=(32, most + 32))


def chain(backbone: DiffusersBackbone, folder: Path, guidance: float) -> list[Tensor]:
    """The latents after each step of the pipeline's own loop: its encoders, transformer and scheduler."""
    absent = {name: None for name in backbone.optional if not (folder / name).is_dir()}
    pipeline: Any = backbone.pipeline_class.from_pretrained(folder, **backbone.without | absent)
    pipeline.set_progress_bar_config(disable=True)
    states = [latents(backbone)]

    def keep(pipeline: Any, step: int, t: Any, told: dict[str, Tensor]) -> dict[str, Tensor]:
        x = told["latents"]
        states.append(x if x.ndim == 4 else unpack(x, states[0]))
        return told

    draw_in_diffusers(partial(pipeline, callback_on_step_end=keep), backbone, guidance)
    return states


@pytest.mark.parametrize(
    ("model", "limit"),
    [("sd3", 256), ("sd3_without_t5", 77), ("flux", 512), ("klein", 512), ("z_image", 512)],
)
def test_prompts_are_told_that_are_longer_than_what_is_read(
    model: str, limit: int, flow_folder: Folder
) -> None:
    backbone = CLASSES[model](str(flow_folder(model)), size=(48, 32))
    frame = limit - backbone.prompt_tokens("a")[0][0]  # every further letter is a token
    whole = "a" * frame
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, other = (backbone.encode([whole + end]).prompt for end in "ab")
    assert any(not torch.equal(one[name], other[name]) for name in one)  # the last letter is read
    with pytest.warns(UserWarning, match=f"1 of the first 1 prompts are longer than the {limit} tokens"):
        backbone.encode([whole + "aa"])
    beyond = whole + "a" * 64  # for chats, whose end comes after the prompt
    one, other = (backbone.encode([beyond + end]).prompt for end in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("model", "guidance"),
    [
        ("sd3", 3.0),
        ("sd3_without_t5", 1.0),
        ("flux", 3.0),
        ("schnell", 3.0),
        ("klein", 3.0),
        ("klein_distilled", 1.0),
        ("z_image", 3.0),
    ],
)
def test_policy_means_are_the_states_of_the_pipelines_own_loop(
    model: str, guidance: float, flow_folder: Folder
) -> None:
    backbone = CLASSES[model](str(flow_folder(model)), size=(48, 32))
    theirs = chain(backbone, flow_folder(model), guidance)
    sampler = backbone.make_sampler(partial(FlowSDE, num_steps=4, noise_level=0.0))
    policy = backbone.policy(sampler, backbone.encode(PROMPTS), guidance)
    assert len(theirs) == 5
    with torch.no_grad():
        for k, (before, after) in enumerate(pairwise(theirs)):
            torch.testing.assert_close(policy(before, k).mean, after, atol=1e-5, rtol=0)


def test_tokens_are_packed_as_the_pipelines_do(flow_folder: Folder) -> None:
    x = torch.randn(2, 16, 6, 4)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, *x.shape))
    patches = Flux2KleinPipeline._patchify_latents(x)
    assert torch.equal(pack(x), Flux2KleinPipeline._pack_latents(patches))
    assert torch.equal(unpack(pack(x), x), x)


def test_a_folder_that_was_copied_without_t5_is_one_without(flow_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(flow_folder("sd3"), tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "text_encoder_3")
    shutil.rmtree(tmp_path / "copy" / "tokenizer_3")
    copied = StableDiffusion3Backbone(str(tmp_path / "copy"), size=16)
    states = copied.encode(PROMPTS).prompt["encoder_hidden_states"]
    assert not states[:, 77:].any()
    own = StableDiffusion3Backbone(str(flow_folder("sd3")), size=16).encode(PROMPTS)
    assert torch.equal(own.prompt["encoder_hidden_states"][:, :77], states[:, :77])
    assert own.prompt["encoder_hidden_states"][:, 77:].any()
    shutil.rmtree(tmp_path / "copy" / "text_encoder_2")
    with pytest.raises(ConfigError):
        StableDiffusion3Backbone(str(tmp_path / "copy"))


def test_guidance_is_an_input_two_predictions_or_refused(flow_folder: Folder) -> None:
    dev, schnell = (FluxBackbone(str(flow_folder(name)), size=16) for name in ("flux", "schnell"))
    assert (dev.encode(PROMPTS).negative is None, schnell.encode(PROMPTS).negative is None) == (True, False)
    distilled = Flux2KleinBackbone(str(flow_folder("klein_distilled")), size=16)
    with pytest.raises(ConfigError, match=r"guidance: 3\.0 has no effect on this model.*set it to 1"):
        distilled.predict(latents(distilled), 500, distilled.encode(PROMPTS), guidance=3.0)
    with pytest.raises(ConfigError, match=r"opponent_guidance: 0\.0 has no effect on this model"):
        distilled.check_guidance(0.0, "opponent_guidance")
    with pytest.raises(ConfigError, match=r"sampling\.guidance is 0: "):
        schnell.check_guidance(0.0)
    dev.check_guidance(0.0)  # it is told so


@pytest.mark.parametrize(("size", "mu"), [(256, 0.5), (1024, 1.15), ((512, 1024), 0.5 + 0.65 * 1792 / 3840)])
def test_the_shift_of_flux_depends_on_the_size(size: Any, mu: float, flow_folder: Folder) -> None:
    backbone = FluxBackbone(str(flow_folder("flux")), size=size)
    assert backbone.mu(10) == pytest.approx(mu)
    sampler = backbone.make_sampler(partial(FlowSDE, num_steps=2))
    assert sampler.timesteps[1].item() == pytest.approx(1000 / (1 + torch.tensor(-mu).exp().item()))


def test_the_shift_of_klein_depends_on_size_and_steps(flow_folder: Folder) -> None:
    backbone = Flux2KleinBackbone(str(flow_folder("klein")), size=1024)
    assert backbone.mu(4) > backbone.mu(10) > backbone.mu(50)
    assert Flux2KleinBackbone(str(flow_folder("klein")), size=512).mu(10) < backbone.mu(10)


def test_entries_of_the_scheduler_replace_the_models(flow_folder: Folder) -> None:
    static = FluxBackbone(
        str(flow_folder("flux")), size=16, scheduler={"use_dynamic_shifting": False, "shift": 3.0}
    )
    timesteps = static.make_sampler(partial(FlowSDE, num_steps=2)).timesteps
    torch.testing.assert_close(timesteps, torch.tensor([1000.0, 750.0]))


@pytest.mark.parametrize("model", ["sd3", "flux", "klein"])
def test_latents_are_scaled_back_and_forth(model: str, flow_folder: Folder) -> None:
    backbone = CLASSES[model](str(flow_folder(model)), size=(32, 16))
    images = torch.rand(2, 3, 32, 16)
    raw = backbone.pipeline.vae.encode(2 * images - 1).latent_dist.mode()
    scaled = backbone.latents(images)
    assert scaled.shape[1:] == backbone.latent_shape
    torch.testing.assert_close(backbone.denormalise(scaled), raw)
    if model == "klein":
        mean = backbone.pipeline.vae.bn.running_mean
        patches = Flux2KleinPipeline._patchify_latents(scaled)
        expected = Flux2KleinPipeline._patchify_latents(raw) - mean.view(1, -1, 1, 1)
        variance = backbone.pipeline.vae.bn.running_var + backbone.pipeline.vae.config.batch_norm_eps
        torch.testing.assert_close(patches, expected / variance.sqrt().view(1, -1, 1, 1))
    else:
        config = backbone.pipeline.vae.config
        torch.testing.assert_close(scaled, (raw - config.shift_factor) * config.scaling_factor)


ATTENTION = {"to_q", "to_k", "to_v", "to_out.0"}
PROMPT = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
LAYERS = {
    "sd3": (ATTENTION | PROMPT, ["attn.to_q", "attn2.to_q", "attn.to_add_out"]),
    "flux": (
        ATTENTION | PROMPT | {"ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"},
        ["single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff_context.net.2"],
    ),
    "klein": (
        ATTENTION | {"to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"},
        ["single_transformer_blocks.0.attn.to_qkv_mlp_proj", "transformer_blocks.0.attn.to_out.0"],
    ),
}


@pytest.mark.parametrize("model", LAYERS)
def test_the_layers_of_adapters_are_the_familys(model: str, flow_folder: Folder) -> None:
    targets, among = LAYERS[model]
    backbone = CLASSES[model](str(flow_folder(model)), size=32)
    assert set(backbone.adapted(backbone.network)) == targets
    adapted = {name.rpartition(".lora_A")[0] for name, _ in backbone.named_parameters() if ".lora_A" in name}
    assert all(any(name.endswith(target) for target in targets) for name in adapted)
    assert all(any(name.endswith(layer) for name in adapted) for layer in among)
    predict(perturb(backbone)).square().sum().backward()
    trained = {name: weight for name, weight in backbone.named_parameters() if weight.requires_grad}
    still = {name for name, weight in trained.items() if weight.grad is None or not weight.grad.any()}
    assert still == {name for name in trained if any(f".{layer}." in name for layer in backbone.unread)}
    assert bool(still) == (model == "sd3")
    few = CLASSES[model](str(flow_folder(model)), size=16, lora=LoRA(2, target_modules=["to_q"]))
    names = {name for name, _ in few.named_parameters() if ".lora_A" in name}
    assert names
    assert all(".to_q." in name for name in names)


def test_a_flow_model_is_refused_by_the_backbone_of_another_family(flow_folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"StableDiffusion3Pipeline.*takes a StableDiffusionPipeline"):
        StableDiffusionBackbone(str(flow_folder("sd3")))
    with pytest.raises(ConfigError, match=r"Flux2KleinPipeline.*takes a FluxPipeline"):
        FluxBackbone(str(flow_folder("klein")))


def test_adapters_of_flux_in_other_forms(flow_folder: Folder, tmp_path: Path) -> None:
    place, down, up = str(flow_folder("flux")), torch.randn(2, 32), torch.randn(96, 2)
    of_xlabs = {
        f"double_blocks.0.processor.{kind}_lora1.down.weight": down.clone() for kind in ("qkv", "proj")
    }
    of_xlabs["double_blocks.0.processor.qkv_lora1.up.weight"] = up
    of_xlabs["double_blocks.0.processor.proj_lora1.up.weight"] = up[:32].clone()
    save_file(of_xlabs, tmp_path / "xlabs.safetensors")
    given = FluxBackbone(place, size=16, adapters={str(tmp_path / "xlabs.safetensors"): 1.0})
    layer: Any = given.weight_sets.choose("policy").get_submodule("transformer_blocks.0.attn.to_k")
    torch.testing.assert_close(layer.get_delta_weight("_start0"), up[32:64] @ down)
    name = "lora_transformer_transformer_blocks_0_attn_to_k"
    of_one = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up[:32].contiguous()}
    save_file(of_one | {f"{name}.alpha": torch.tensor(1.0)}, tmp_path / "one.safetensors")
    given = FluxBackbone(place, size=16, adapters={str(tmp_path / "one.safetensors"): 1.0})
    layer = given.weight_sets.choose("policy").get_submodule("transformer_blocks.0.attn.to_k")
    torch.testing.assert_close(layer.get_delta_weight("_start0"), 0.5 * up[:32] @ down)
    of_unet = {
        f"lora_unet_mid_block_attentions_0_proj_in.lora_{way}.weight": down.clone() for way in ("down", "up")
    }
    save_file(of_unet, tmp_path / "unet.safetensors")
    with pytest.raises(
        ConfigError, match=r"Incompatible keys detected: lora_unet_mid_block\S+, lora_\S+; give"
    ):
        FluxBackbone(place, size=16, adapters={str(tmp_path / "unet.safetensors"): 1.0})
