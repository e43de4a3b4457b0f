"""What every backbone keeps, on a tiny model of each family."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE, Conditioning, LoRA
from lit_align.backbones.options import choose_size
from lit_align.backbones.prompt_cache import PromptCache
from lit_align.errors import ConfigError
from tests.backbones.conftest import (
    PROMPTS,
    Family,
    draw,
    draw_in_diffusers,
    latents,
    perturb,
    predict,
    trained,
)
from tests.backbones.fresh import fresh

LORAS = pytest.mark.parametrize("lora", [LoRA(), None], ids=["adapter", "all weights"])


# ---- predictions


@pytest.mark.parametrize(("size", "guidance"), [(None, 1.0), (None, 3.0), ((16, 48), 3.0)])
def test_images_are_those_of_diffusers(family: Family, size: tuple[int, int] | None, guidance: float):
    backbone = fresh(family.backbone, family.folder, size=size)
    if size is not None:
        assert backbone.size == size
    ours = draw(backbone, guidance)
    assert ours.shape[-2:] == backbone.size
    theirs = draw_in_diffusers(family.pipeline(), backbone, guidance)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_guidance_is_the_line_through_both_halves(family: Family):
    backbone = family.make()
    x, cond = latents(backbone), backbone.encode(PROMPTS)
    if cond.negative is None:  # the scale is an input of the network
        with torch.no_grad():
            weak, strong = (backbone.predict(x, 500, cond, guidance) for guidance in (1.0, 4.0))
        assert not torch.equal(weak, strong)
        return
    with torch.no_grad():
        negative = {name: value.expand(2, *value.shape[1:]) for name, value in cond.negative.items()}
        towards, away = (backbone.predict(x, 500, c) for c in (cond, Conditioning(negative, None)))
        guided = backbone.predict(x, 500, cond, guidance=4.0)
    torch.testing.assert_close(guided, away + 4 * (towards - away), atol=1e-5, rtol=1e-5)
    assert (towards - away).abs().max() > 1e-3


def test_a_batch_may_mix_timesteps_of_any_dtype(family: Family):
    backbone = family.make()
    x, cond = latents(backbone), backbone.encode(PROMPTS)
    with torch.no_grad():
        mixed = backbone.predict(x, torch.tensor([900, 100]), cond)
        apart = [backbone.predict(x[i : i + 1], t, cond[i : i + 1]) for i, t in enumerate((900, 100.0))]
        assert torch.equal(backbone.predict(x, torch.tensor([900.0, 100.0]), cond), mixed)
    torch.testing.assert_close(mixed, torch.cat(apart), atol=1e-5, rtol=1e-5)


def test_each_prompt_is_encoded_once_and_independently_of_its_company(family: Family):
    backbone = fresh(family.backbone, family.folder, prompt_cache=8)
    calls: list[int] = []
    backbone.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    together = backbone.encode([*PROMPTS, *PROMPTS])
    assert len(calls) == 3  # two prompts and the empty one
    backbone.encode(PROMPTS)
    assert len(calls) == 3
    alone = fresh(family.backbone, family.folder).encode(PROMPTS[1:])
    for name, value in alone.prompt.items():
        assert torch.equal(value[0], together.prompt[name][1])
        assert torch.equal(value[0], together.prompt[name][3])


def test_the_prompt_cache_keeps_what_was_used_last():
    encoded: list[str] = []

    def embed(prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        encoded.extend(prompts)
        return [{"length": torch.tensor([len(prompt)])} for prompt in prompts]

    cache = PromptCache(embed, 2)
    rows, tensors = cache.get(["a", "bb", "ccc", "a"])
    assert tensors["length"][rows].tolist() == [1, 2, 3, 1]
    assert len(cache) == 2
    for prompts in (["bb"], ["dddd"], ["bb", "dddd"]):
        cache.get(prompts)
    assert encoded == ["a", "bb", "ccc", "dddd"]


def test_conditioning_has_rows_and_joins(family: Family):
    cond = fresh(family.backbone, family.folder).encode(["a star", "a cross", "a heart"])
    chosen = cond[torch.tensor([2, 0])]
    assert (len(cond), len(chosen), len(cond[1:])) == (3, 2, 2)
    joined = Conditioning.cat([cond[:1], chosen])
    for name, value in cond.prompt.items():
        assert torch.equal(joined.prompt[name], value[[0, 2, 0]])
    doubled = cond.map(lambda value: value.double())
    assert {value.dtype for value in doubled.prompt.values()} == {torch.float64}
    if cond.negative is not None:
        assert {len(value) for value in cond.negative.values()} == {1}
        assert joined.negative is cond.negative
    assert Conditioning(cond.prompt, None).map(torch.abs).negative is None


# ---- weight sets


@LORAS
def test_the_policy_starts_as_the_reference_and_only_the_policy_is_trained(family: Family, lora: LoRA | None):
    backbone = fresh(family.backbone, family.folder, lora=lora)
    assert torch.equal(predict(backbone), predict(backbone, REFERENCE))
    before = predict(backbone, REFERENCE).detach()
    perturb(backbone)
    assert not torch.equal(predict(backbone), before)
    assert torch.equal(predict(backbone, REFERENCE), before)
    predict(backbone).sum().backward()
    policy = backbone.weight_sets.parameters_of(POLICY)
    assert {p for p in backbone.parameters() if p.requires_grad} == set(policy)
    assert all(p.grad is not None for p in policy)
    assert not predict(backbone, REFERENCE).requires_grad


@LORAS
def test_an_added_set_is_a_frozen_copy_and_switching_changes_no_requires_grad(
    family: Family, lora: LoRA | None
):
    backbone = family.make(lora=lora)
    before = trained(backbone)
    backbone.weight_sets.add("opponent")
    assert backbone.weight_sets.names == (POLICY, REFERENCE, "opponent")
    frozen = predict(backbone).detach()
    assert torch.equal(predict(backbone, "opponent"), frozen)
    perturb(backbone)
    assert torch.equal(predict(backbone, "opponent"), frozen)
    backbone.weight_sets.copy(POLICY, "opponent")
    assert torch.equal(predict(backbone, "opponent"), predict(backbone))
    assert trained(backbone) == before


@LORAS
@pytest.mark.parametrize("learner", [POLICY, "opponent"])
def test_checkpointing_gives_the_plain_gradient_with_a_switch_before_backward(
    family: Family, lora: LoRA | None, learner: str
):
    gradients = []
    for checkpointing in ("none", "prediction", "blocks"):
        backbone = family.make(lora=lora, checkpointing=checkpointing)
        backbone.weight_sets.add("opponent")
        perturb(backbone, "opponent")
        backbone.weight_sets.train_only([learner])
        loss = predict(backbone, learner, guidance=2.0).square().sum()
        with torch.no_grad():
            predict(backbone, REFERENCE)  # the active set at backward time is now another one
        loss.backward()
        gradients.append([p.grad for p in backbone.weight_sets.parameters_of(learner)])
        assert sum(p.grad is not None for p in backbone.parameters()) == len(gradients[-1])
    for again in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(gradients[0], again, strict=True))
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Elements that are kept for the backward pass, which is run."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = function(x)
    (gradient,) = torch.autograd.grad(made.mean(), x)
    assert gradient.abs().sum() > 0
    return sum(sizes)


@pytest.mark.parametrize(("checkpointing", "forwards"), [("prediction", 2), ("blocks", 1)])
def test_checkpointing_recomputes_and_keeps_less(family: Family, checkpointing: str, forwards: int):
    plain, backbone, calls = family.make(), family.make(checkpointing=checkpointing), []
    backbone.network.register_forward_pre_hook(lambda *_: calls.append(1))
    cond, z = plain.encode(PROMPTS), latents(plain).requires_grad_()
    predictions = [partial(one.predict, t=500, cond=cond) for one in (backbone, plain)]
    assert kept(predictions[0], z) < 0.5 * kept(predictions[1], z)
    assert len(calls) == forwards
    assert kept(backbone.decode, z) < 0.5 * kept(plain.decode, z)


# ---- files


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_saved_and_loaded_exactly(family: Family, tmp_path: Path, dtype: str):
    backbone = family.make(dtype=dtype, lora=LoRA(3, 6.0))
    backbone.weight_sets.save(tmp_path / "adapter")
    backbone.weight_sets.train_only([])  # torch multiplies by a weight that is trained in another order
    other = fresh(family.backbone, family.folder, dtype=dtype)
    before = trained(other)
    other.weight_sets.load("folder", tmp_path / "adapter")
    other.weight_sets.load("file", tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert trained(other) == before
    own = backbone.weight_sets.parameters_of(POLICY)
    for name in ("folder", "file"):
        loaded = other.weight_sets.parameters_of(name)
        assert all(p.dtype == torch.float32 for p in loaded)
        # The strength, alpha / rank = 2, is in the file's second factors, which are every other one.
        assert all(torch.equal(a, (1 + i % 2) * b) for i, (a, b) in enumerate(zip(loaded, own, strict=True)))
        assert torch.equal(predict(other, name), predict(backbone))
    assert (predict(backbone) - predict(backbone, REFERENCE)).abs().max() > 1e-3


@pytest.mark.parametrize("more", [False, True], ids=["attention", "more layers"])
def test_the_adapter_folder_loads_in_diffusers_and_draws_the_live_image(
    family: Family, tmp_path: Path, more: bool
):
    network = getattr(family.pipeline(), family.backbone.denoiser)
    layers = [*family.backbone.adapted(network), *family.adapted] if more else None
    backbone = family.make(lora=LoRA(rank=3, alpha=6.0, target_modules=layers))
    backbone.weight_sets.save(tmp_path / "adapter")
    backbone.weight_sets.train_only([])  # torch multiplies by a weight that is trained in another order
    live = draw_in_diffusers(family.pipeline(backbone), backbone, 2.0)
    pipeline = family.pipeline()
    base = draw_in_diffusers(pipeline, backbone, 2.0)
    pipeline.load_lora_weights(tmp_path / "adapter")
    getattr(pipeline, family.backbone.denoiser).requires_grad_(False)
    assert torch.equal(draw_in_diffusers(pipeline, backbone, 2.0), live)
    assert (base - live).abs().max() > 1e-3
    # Our sampler rounds otherwise, which the wild adapters of more layers amplify.
    torch.testing.assert_close(draw(backbone, 2.0), live, atol=1e-3 if more else 1e-5, rtol=0)


def test_all_weights_are_saved_as_a_pipeline(family: Family, tmp_path: Path):
    backbone = family.make(lora=None)
    backbone.weight_sets.save(tmp_path / "model")
    again = family.backbone(str(tmp_path / "model"))
    assert torch.equal(predict(again), predict(backbone))


# ---- dtypes, sizes, images


@LORAS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_frozen_weights_are_half_and_trained_ones_are_not(family: Family, dtype: str, lora: LoRA | None):
    half = getattr(torch, dtype)
    backbone, full = family.make(dtype=dtype, lora=lora), family.make(lora=lora)
    backbone.weight_sets.add("opponent")
    for name, parameter in backbone.named_parameters():
        own = name.startswith("vae.") or (
            name.startswith("weight_sets.") and (lora is None or "lora_" in name)
        )
        own |= dtype == "float16" and name.endswith("DenseReluDense.wo.weight")  # T5's, by transformers
        assert parameter.dtype == (torch.float32 if own else half), name
    prediction = predict(backbone, guidance=2.0)
    assert prediction.dtype == torch.float32
    expected = predict(full, guidance=2.0)
    assert 0 < (prediction - expected).abs().max() < 0.1 * expected.abs().max()
    prediction.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in backbone.weight_sets.parameters_of(POLICY))
    images = backbone.decode(latents(backbone))
    assert torch.equal(images, full.decode(latents(full)))


def test_images_are_float32_under_autocast(family: Family):
    backbone = family.make()
    z, images = latents(backbone), backbone.decode(latents(backbone))
    clean = backbone.latents(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbone.decode(z), images)
        assert torch.equal(backbone.latents(images), clean)


def test_prompts_are_encoded_alike_whoever_asks_first(family: Family):
    """Under autocast or not; in float16 T5 would overflow."""
    backbone, mixed = family.make(), family.make()
    cond = backbone.encode(PROMPTS)
    with torch.autocast("cpu", torch.float16):
        other = mixed.encode(PROMPTS)
    assert all(torch.equal(value, other.prompt[name]) for name, value in cond.prompt.items())


def test_attention_is_plain_where_asked_for_or_in_bfloat16_on_a_cpu(family: Family):
    backbone, plain, fused = (family.make(attention=kind) for kind in ("auto", "plain", "sdpa"))
    for one in (backbone, plain, fused):
        predict(one)
    assert not getattr(backbone.network, "attends_plainly", False)
    assert plain.network.attends_plainly
    torch.testing.assert_close(predict(plain), predict(fused), atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        for one in (backbone, fused):
            predict(one)
        assert backbone.network.attends_plainly
    assert not getattr(fused.network, "attends_plainly", False)
    exact = predict(backbone)
    assert not backbone.network.attends_plainly
    assert torch.equal(exact, predict(fused))


def test_the_size_decides_latents_and_images(family: Family):
    own = fresh(family.backbone, family.folder)
    unit = own.size[0] // own.latent_shape[1] * own.patch
    backbone = fresh(family.backbone, family.folder, size=[3 * unit, 2 * unit])
    assert backbone.size == (3 * unit, 2 * unit)
    assert backbone.latent_shape == (own.latent_shape[0], 3 * own.patch, 2 * own.patch)
    images = torch.rand(2, 3, *backbone.size)
    clean = backbone.clean_latents(images, "")
    assert clean.shape[1:] == backbone.latent_shape
    assert backbone.decode(clean).shape == images.shape
    with pytest.raises(
        ConfigError, match=f"{2 * unit} x {3 * unit} pixels .* draws {3 * unit} x {2 * unit}; crop"
    ):
        backbone.clean_latents(images.mT, "crop them")
    refused = partial(pytest.raises, ConfigError, match=rf"backbone.size: .* multiple of {unit}")
    with refused():
        family.backbone(str(family.folder), size=unit + 1)
    for size in (0, [unit], [unit, -unit], (unit, unit, unit)):
        with refused():
            choose_size(size, own.network.config, own.pipeline, own.patch)


def test_decode_is_chunked_in_range_and_differentiable(family: Family):
    backbone = fresh(family.backbone, family.folder, decode_batch=2)
    z = latents(backbone, 5).requires_grad_()
    images = backbone.decode(z)
    assert images.shape == (5, 3, *backbone.size)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    torch.testing.assert_close(images[4:], backbone.decode(z[4:]), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(images.mean(), z)
    assert gradient.abs().sum() > 0
    assert backbone.latents(images.detach()).shape == z.shape


@LORAS
def test_train_mode_does_not_reach_the_models(family: Family, lora: LoRA | None):
    backbone = family.make(lora=lora)
    backbone.weight_sets.add("opponent")
    assert not any(module.training for module in backbone.modules())
    backbone.train()
    assert not any(module.training for module in backbone.modules())


@pytest.mark.slow
@LORAS
def test_compiled_blocks_switch_sets_and_keep_names_and_gradients(family: Family, lora: LoRA | None):
    made = []
    for compiled in (False, True):
        backbone = family.make(lora=lora, compile=compiled, checkpointing="blocks")
        backbone.weight_sets.add("opponent")
        perturb(backbone, "opponent", 0.1)
        with torch.no_grad():
            values = [predict(backbone, name) for name in (POLICY, REFERENCE, "opponent", POLICY)]
        loss = predict(backbone).square().sum()
        with torch.no_grad():
            predict(backbone, REFERENCE)
        loss.backward()
        values += [p.grad for p in backbone.weight_sets.parameters_of(POLICY)]
        made.append((list(backbone.state_dict()), values))
    assert made[0][0] == made[1][0]
    for plain, compiled in zip(made[0][1], made[1][1], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
