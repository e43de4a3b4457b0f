import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from lit_align.backbones import POLICY, REFERENCE, LoRA, StableDiffusionBackbone
from lit_align.errors import ConfigError
from lit_align.rollout import rollout
from lit_align.samplers import DDIM

PROMPTS = ["a red circle on a white background", "two stars"]


def latents(backbone: StableDiffusionBackbone, count: int = 2) -> torch.Tensor:
    return torch.randn(count, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))


def perturb(backbone: StableDiffusionBackbone, scale: float = 0.3) -> None:
    """Give the trained weights values: a fresh adapter's update is 0."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))


def predict(backbone: StableDiffusionBackbone, weights: str = POLICY, guidance: float = 1.0) -> torch.Tensor:
    return backbone.predict(latents(backbone), 500, backbone.encode(PROMPTS), guidance, weights)


@pytest.mark.parametrize("folder", ["tiny", "tiny_v"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_deterministic_rollout_draws_the_image_that_diffusers_draws(folder, guidance, request):
    path = request.getfixturevalue(folder)
    backbone = StableDiffusionBackbone(str(path))
    sampler = backbone.make_sampler(partial(DDIM, num_steps=5, eta=0.0))
    x_T = latents(backbone)
    with torch.no_grad():
        policy = backbone.policy(sampler, backbone.encode(PROMPTS), guidance)
        ours = backbone.decode(rollout(policy, x_T, 5).states[-1])
    pipeline = StableDiffusionPipeline.from_pretrained(
        path, safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS, latents=x_T, num_inference_steps=5, guidance_scale=guidance, eta=0.0, output_type="pt"
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_guidance_is_the_line_through_both_halves(tiny):
    backbone = StableDiffusionBackbone(str(tiny))
    x, cond = latents(backbone), backbone.encode(PROMPTS)
    with torch.no_grad():
        conditional = backbone.predict(x, 500, cond)
        null = backbone.predict(x, 500, backbone.encode(["", ""]))
        guided = backbone.predict(x, 500, cond, guidance=4.0)
    torch.testing.assert_close(guided, null + 4 * (conditional - null), atol=1e-5, rtol=1e-5)


def test_a_batch_may_mix_timesteps(tiny):
    backbone = StableDiffusionBackbone(str(tiny))
    x, cond = latents(backbone), backbone.encode(PROMPTS)
    with torch.no_grad():
        mixed = backbone.predict(x, torch.tensor([900, 100]), cond)
        apart = [backbone.predict(x[i : i + 1], t, cond[i : i + 1]) for i, t in enumerate((900, 100))]
    torch.testing.assert_close(mixed, torch.cat(apart), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [LoRA(), None])
def test_the_policy_starts_as_the_reference_and_only_the_policy_is_trained(tiny, lora):
    backbone = StableDiffusionBackbone(str(tiny), lora=lora)
    assert torch.equal(predict(backbone), predict(backbone, REFERENCE))
    before = predict(backbone, REFERENCE).detach()
    perturb(backbone)
    assert not torch.equal(predict(backbone), before)
    assert torch.equal(predict(backbone, REFERENCE), before)
    predict(backbone).sum().backward()
    trained = [p for p in backbone.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)
    assert not predict(backbone, REFERENCE).requires_grad


@pytest.mark.parametrize("lora", [LoRA(), None])
def test_added_weights_are_a_frozen_copy_and_change_no_requires_grad(tiny, lora):
    backbone = StableDiffusionBackbone(str(tiny), lora=lora)
    perturb(backbone)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    backbone.add_weights("opponent")
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == trained
    assert backbone.weight_sets == (POLICY, REFERENCE, "opponent")
    frozen = predict(backbone).detach()
    assert torch.equal(predict(backbone, "opponent"), frozen)
    perturb(backbone)
    assert torch.equal(predict(backbone, "opponent"), frozen)
    backbone.copy_weights(POLICY, "opponent")
    assert torch.equal(predict(backbone, "opponent"), predict(backbone))
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("lora", [LoRA(), None])
def test_checkpointing_gives_the_plain_gradient_with_a_switch_before_backward(tiny, lora):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        backbone = StableDiffusionBackbone(str(tiny), lora=lora, checkpointing=checkpointing)
        perturb(backbone)
        loss = predict(backbone, guidance=2.0).square().sum()
        with torch.no_grad():
            predict(backbone, REFERENCE)  # the active set at backward time is now another one
        loss.backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert any(plain.abs().sum() > 0 for plain in gradients[0])


def test_each_prompt_is_encoded_once_and_independently_of_its_company(tiny):
    backbone = StableDiffusionBackbone(str(tiny), prompt_cache=8)
    calls = []
    backbone.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    together = backbone.encode([*PROMPTS, *PROMPTS])
    assert len(calls) == 3  # two prompts and the empty one
    backbone.encode(PROMPTS)
    assert len(calls) == 3
    alone = StableDiffusionBackbone(str(tiny)).encode(PROMPTS[1:])
    assert torch.equal(alone.embeds[0], together.embeds[1])
    assert torch.equal(alone.embeds[0], together.embeds[3])


def test_the_prompt_cache_is_bounded(tiny):
    backbone = StableDiffusionBackbone(str(tiny), prompt_cache=2)
    many = backbone.encode(["a star", "a cross", "a heart", "a square"])
    assert len(many) == 4
    assert len(backbone._cache) == 2


def test_decode_is_chunked_in_range_and_differentiable(tiny):
    backbone = StableDiffusionBackbone(str(tiny), decode_batch=2)
    z = latents(backbone, 5).requires_grad_()
    images = backbone.decode(z)
    assert images.shape == (5, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(images[4:], backbone.decode(z[4:]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(images.mean(), z)
    assert gradient.abs().sum() > 0
    assert backbone.latents(images.detach()).shape == z.shape


def test_train_mode_does_not_reach_the_models(tiny):
    backbone = StableDiffusionBackbone(str(tiny))
    backbone.train()
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    "further", [[], ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2"]], ids=len
)
def test_the_adapter_folder_loads_in_diffusers_and_draws_the_live_image(tiny, tmp_path, further):
    lora = LoRA(rank=3, alpha=6.0)
    lora.target_modules += further
    backbone = StableDiffusionBackbone(str(tiny), lora=lora)
    perturb(backbone)
    backbone.save_weights(tmp_path / "adapter")
    sampler = backbone.make_sampler(partial(DDIM, num_steps=4, eta=0.0))
    x_T = latents(backbone)
    with torch.no_grad():
        policy = backbone.policy(sampler, backbone.encode(PROMPTS), 2.0)
        live = backbone.decode(rollout(policy, x_T, 4).states[-1])
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny, safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"latents": x_T, "num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "pt"}
    base = pipeline(PROMPTS, **arguments).images
    pipeline.load_lora_weights(tmp_path / "adapter")
    loaded = pipeline(PROMPTS, **arguments).images
    torch.testing.assert_close(loaded, live, atol=1e-5, rtol=0)
    assert (base - live).abs().max() > 1e-3


def test_full_weights_are_saved_as_a_pipeline(tiny, tmp_path):
    backbone = StableDiffusionBackbone(str(tiny), lora=None)
    perturb(backbone, 0.05)
    backbone.save_weights(tmp_path / "model")
    again = StableDiffusionBackbone(str(tmp_path / "model"))
    assert torch.equal(predict(again), predict(backbone))


def test_unreachable_hub_id_says_what_to_do(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"someone/nothing.*give the folder"):
        StableDiffusionBackbone("someone/nothing")


def test_corrupt_weights_are_named(tiny, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="broken"):
        StableDiffusionBackbone(str(folder))


def test_target_modules_that_match_nothing_are_named(tiny: Path):
    with pytest.raises(ConfigError, match="to_nothing"):
        StableDiffusionBackbone(str(tiny), lora=LoRA(target_modules=["to_nothing"]))
