import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_align.backbones import POLICY, REFERENCE, LoRA, StableDiffusionBackbone, StableDiffusionXLBackbone
from lit_align.backbones.adapter_files import _strength
from lit_align.errors import ConfigError
from lit_align.identity import ADAPTER
from lit_align.rollout import rollout
from lit_align.samplers import DDIM
from tests.backbones.conftest import PROMPTS, trained
from tests.backbones.fresh import fresh

LORAS = {
    "a": LoRA(2, 2.0),
    "b": LoRA(3, 6.0),
    "c": LoRA(2, 1.0, ["to_q", "to_v", "conv1"]),
}
"""Adapters of different ranks, scales and layers."""


def predict(backbone: StableDiffusionBackbone, weights: str = POLICY) -> Tensor:
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    cond = backbone.encode(PROMPTS)
    dtype = next(backbone.network.parameters()).dtype
    with torch.no_grad():
        return backbone.predict(x.to(dtype), torch.tensor(500), cond, 2.0, weights)


def randomise(backbone: StableDiffusionBackbone, name: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.weight_sets.parameters_of(name):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory) -> tuple[dict[str, Path], dict[str, Tensor]]:
    """Folders of three adapters, as runs leave them, and what the models predicted that wrote them."""
    folders, predictions = {}, {}
    for seed, (name, lora) in enumerate(LORAS.items()):
        backbone = fresh(StableDiffusionBackbone, tiny, lora=lora)
        randomise(backbone, POLICY, seed)
        folders[name] = tmp_path_factory.mktemp(name) / "adapter"
        backbone.weight_sets.save(folders[name])
        predictions[name] = predict(backbone)
    return folders, predictions


@pytest.fixture
def backbone(tiny, saved) -> StableDiffusionBackbone:
    """One model with all three as named weight sets."""
    backbone = fresh(StableDiffusionBackbone, tiny)
    for name, folder in saved[0].items():
        backbone.weight_sets.load(name, folder)
    return backbone


def merge(backbone: StableDiffusionBackbone, weights: dict[str, float]) -> None:
    """Add sum of w B A to the layers' own weights, by hand; alpha / rank was in B when they were saved."""
    with torch.no_grad():
        for layer in backbone.unet.modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                for name, share in weights.items():
                    if name in layer.lora_A:
                        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                        weight += share * (b.flatten(1) @ a.flatten(1)).view_as(weight)


def test_a_loaded_set_predicts_what_was_saved_and_all_else_stays(tiny, saved):
    folders, predictions = saved
    backbone = fresh(StableDiffusionBackbone, tiny)
    before, base = trained(backbone), predict(backbone)
    for name, folder in folders.items():
        backbone.weight_sets.load(name, folder)
        assert trained(backbone) == before
    for name, prediction in predictions.items():
        assert torch.equal(predict(backbone, name), prediction)
        assert (prediction - base).abs().max() > 1e-3
    assert backbone.weight_sets.names == (POLICY, REFERENCE, *LORAS)
    assert torch.equal(predict(backbone), base)
    assert torch.equal(predict(backbone, REFERENCE), base)


@pytest.mark.parametrize(
    "weights", [{"a": 0.3, "b": 0.7}, {"a": 0.5, "b": 0.25, "c": 0.25}, {"c": -0.4, "a": 1.0}]
)
def test_a_mixture_is_linear_in_the_updates(backbone, weights):
    backbone.double()
    backbone.weight_sets.mix("mixture", weights)
    mixed = predict(backbone, "mixture")
    reference = predict(backbone, REFERENCE)
    merge(backbone, weights)
    torch.testing.assert_close(predict(backbone, REFERENCE), mixed, rtol=1e-12, atol=1e-12)
    assert (mixed - reference).abs().max() > 1e-3


def test_a_set_is_itself_again_after_a_mixture_of_it_was_chosen(backbone):
    alone = predict(backbone, "a")
    backbone.weight_sets.mix("mixture", {"a": 0.3, "b": 0.7})
    assert not torch.equal(predict(backbone, "mixture"), alone)
    assert torch.equal(predict(backbone, "a"), alone)
    backbone.weight_sets.mix("mixture", {"a": 1.0, "b": 0.0})
    assert torch.equal(predict(backbone, "mixture"), alone)


def test_weights_of_zero_are_the_base_bit_for_bit(backbone, saved, tiny):
    backbone.weight_sets.mix("nothing", {"a": 0.0, "b": 0.0})
    assert torch.equal(predict(backbone, "nothing"), predict(backbone, REFERENCE))
    plain = fresh(StableDiffusionBackbone, tiny, lora=None)
    given = StableDiffusionBackbone(str(tiny), adapters={str(folder): 0.0 for folder in saved[0].values()})
    assert torch.equal(predict(given), predict(plain, REFERENCE))


def test_given_adapters_are_the_policy_and_training_goes_on_from_them(backbone, saved, tiny):
    weights = {"a": 0.3, "b": 0.7}
    backbone.weight_sets.mix("mixture", weights)
    given = StableDiffusionBackbone(str(tiny), adapters={str(saved[0][n]): w for n, w in weights.items()})
    assert trained(given) == trained(fresh(StableDiffusionBackbone, tiny))
    torch.testing.assert_close(predict(given), predict(backbone, "mixture"), rtol=1e-6, atol=1e-6)
    given.weight_sets.add("opponent")
    assert torch.equal(predict(given, "opponent"), predict(given))
    randomise(given, POLICY, 9)
    assert (predict(given, "opponent") - predict(given)).abs().max() > 1e-3
    given.weight_sets.copy(POLICY, "opponent")
    assert torch.equal(predict(given, "opponent"), predict(given))
    torch.testing.assert_close(predict(given, REFERENCE), predict(backbone, REFERENCE), rtol=0, atol=0)


def test_the_mean_of_factors_is_another_model(tiny, saved):
    backbone = fresh(StableDiffusionBackbone, tiny, lora=LORAS["a"])
    backbone.weight_sets.load("a", saved[0]["a"])
    for name in ("second", "factors"):
        backbone.weight_sets.add(name)
    randomise(backbone, "second", 7)
    backbone.weight_sets.average_factors("factors", {"a": 1.0, "second": 0.0})
    assert torch.equal(predict(backbone, "factors"), predict(backbone, "a"))
    weights = {"a": 0.5, "second": 0.5}
    backbone.weight_sets.average_factors("factors", weights)
    backbone.weight_sets.mix("mixture", weights)
    assert (predict(backbone, "factors") - predict(backbone, "mixture")).abs().max() > 1e-3
    backbone.weight_sets.load("b", saved[0]["b"])
    with pytest.raises(ConfigError, match="ranks"):
        backbone.weight_sets.average_factors("factors", {"a": 0.5, "b": 0.5})


def test_a_saved_mixture_is_one_adapter_that_diffusers_loads(backbone, tiny, tmp_path):
    backbone.weight_sets.mix("mixture", {"a": 0.3, "b": 0.5, "c": 0.2})
    backbone.weight_sets.save(tmp_path / "soup", "mixture")
    again = fresh(StableDiffusionBackbone, tiny)
    again.weight_sets.load("soup", tmp_path / "soup")
    torch.testing.assert_close(predict(again, "soup"), predict(backbone, "mixture"), rtol=1e-5, atol=1e-5)
    sampler = backbone.make_sampler(partial(DDIM, num_steps=3, eta=0.0))
    x = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        policy = backbone.policy(sampler, backbone.encode(PROMPTS), 2.0, "mixture")
        live = backbone.decode(rollout(policy, x, 3).states[-1])
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny, safety_checker=None, requires_safety_checker=False
    )
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path / "soup")
    theirs = pipeline(PROMPTS, latents=x, num_inference_steps=3, guidance_scale=2.0, output_type="pt").images
    torch.testing.assert_close(theirs, live, atol=1e-5, rtol=0)


def test_a_pipeline_folder_is_a_weight_set_beside_adapters(tiny, saved, tmp_path):
    full = fresh(StableDiffusionBackbone, tiny, lora=None)
    with torch.no_grad():
        for parameter in full.unet.parameters():
            parameter.mul_(1.05)
    full.weight_sets.save(tmp_path / "model")
    for lora in (LoRA(), None):
        backbone = fresh(StableDiffusionBackbone, tiny, lora=lora)
        before = trained(backbone)
        backbone.weight_sets.load("expert", tmp_path / "model")
        assert torch.equal(predict(backbone, "expert"), predict(full))
        assert torch.equal(predict(backbone), predict(full, REFERENCE))
        assert trained(backbone) == before
        with pytest.raises(ConfigError, match="mixture"):
            backbone.weight_sets.mix("mixture", {"expert": 1.0})


@pytest.mark.parametrize("lora", [LoRA(), None])
def test_other_sets_can_be_what_is_trained(tiny, lora):
    backbone = fresh(StableDiffusionBackbone, tiny, lora=lora)
    for name in ("one", "two"):
        backbone.weight_sets.add(name)
    backbone.weight_sets.train_only(["one", "two"])
    own = {id(p) for name in ("one", "two") for p in backbone.weight_sets.parameters_of(name)}
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == own
    x = torch.randn(2, *backbone.latent_shape)
    backbone.predict(x, torch.tensor(500), backbone.encode(PROMPTS), weights="one").sum().backward()
    assert all(p.grad is not None for p in backbone.weight_sets.parameters_of("one"))
    assert all(p.grad is None for p in backbone.weight_sets.parameters_of("two"))


def test_an_adapter_of_lora_has_the_scale_1_unless_said_otherwise(tiny):
    for given in (LoRA(rank=32), {"rank": 32}, {"rank": 32, "alpha": None}):
        backbone = fresh(StableDiffusionBackbone, tiny, lora=given)
        layers = [layer for layer in backbone.unet.modules() if isinstance(layer, LoraLayer)]
        assert {(layer.r[POLICY], layer.scaling[POLICY]) for layer in layers} == {(32, 1.0)}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "dropout": 0.1}, "no dropout; it has rank, alpha and target_modules"),
        (LoRA(rank=0), "lora.rank: 0 must be positive"),
        (LoRA(alpha=-1), "lora.alpha: -1 must be positive"),
        (LoRA(target_modules=["to_nothing"]), "to_nothing.* match no layer of the unet"),
        (LoRA(target_modules=["to_k", "to_qq"]), "the unet has no layer to_qq; did you mean to_q?"),
        (LoRA(target_modules=["to_k", "add_k_proj"]), "the unet has no layer add_k_proj; take it out"),
    ],
)
def test_settings_of_lora_that_cannot_work_are_named(tiny, lora, message):
    with pytest.raises(ConfigError, match=message):
        fresh(StableDiffusionBackbone, tiny, lora=lora)


def test_an_adapter_of_another_network_is_named_by_a_layer(tiny, saved, tmp_path):
    factors = load_file(saved[0]["a"] / ADAPTER)
    renamed = {name.replace("attn", "joint"): value for name, value in factors.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"for another network: this unet has no \S*joint\S*; give"):
        fresh(StableDiffusionBackbone, tiny).weight_sets.load("x", tmp_path / "other.safetensors")


def test_what_cannot_be_loaded_is_named(tiny, saved, tmp_path):
    backbone = fresh(StableDiffusionBackbone, tiny)
    with pytest.raises(ConfigError, match="nowhere"):
        backbone.weight_sets.load("x", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no weights.safetensors in .*nowhere"):
        backbone.weight_sets.load("x", tmp_path / "nowhere" / "weights.safetensors")
    with pytest.raises(ConfigError, match="does not fit"):
        StableDiffusionBackbone().weight_sets.load("x", saved[0]["a"])
    with pytest.raises(ConfigError, match="lora"):
        fresh(StableDiffusionBackbone, tiny, lora=None).weight_sets.load("x", saved[0]["a"])
    with pytest.raises(ConfigError, match="lora"):
        StableDiffusionBackbone(str(tiny), lora=None, adapters={str(saved[0]["a"]): 1.0})


def test_the_saved_file_has_its_strength_in_the_weights(saved, tiny):
    """So that programs which read the factors alone apply all of it."""
    for seed, (name, folder) in enumerate(saved[0].items()):
        with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
            layers = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert config["unet.r"] == config["unet.lora_alpha"] == LORAS[name].rank
        backbone = fresh(StableDiffusionBackbone, tiny, lora=LORAS[name])
        randomise(backbone, POLICY, seed)
        strength = LORAS[name].alpha / LORAS[name].rank
        factors = backbone.weight_sets.factors()
        up = [value for key, value in layers.items() if "lora_B" in key or "up" in key.split("lora")[-1]]
        trained = [p for n, p in backbone.named_parameters() if f"lora_B.{POLICY}" in n]
        assert sum(float(value.square().sum()) for value in up) == pytest.approx(
            strength**2 * sum(float(p.detach().square().sum()) for p in trained)
        )
        assert len(factors) == len(layers)


# ---- files of other programs


def in_peft(layers: dict[str, Tensor], folder: Path) -> Path:
    """As PEFT's save_pretrained leaves it."""
    folder.mkdir()
    named = {f"base_model.model.{name}": value for name, value in layers.items()}
    save_file(named, folder / "adapter_model.safetensors")
    first = next(name for name in layers if ".lora_A" in name).removesuffix(".lora_A.weight")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6.0, "alpha_pattern": {first: 1.5}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def in_kohya(layers: dict[str, Tensor], folder: Path) -> Path:
    """As kohya's scripts leave it, each layer with an alpha."""
    found: dict[str, Tensor] = {}
    for number, (name, value) in enumerate(layers.items()):
        layer, _, factor = name.removesuffix(".weight").rpartition(".")
        place = f"lora_unet_{layer.replace('.', '_')}"
        found[f"{place}.lora_{'down' if factor == 'lora_A' else 'up'}.weight"] = value
        found[f"{place}.alpha"] = torch.tensor(1.5 if number < 2 else 6.0)
    save_file(found, folder / "a lora.safetensors")
    return folder / "a lora.safetensors"


def in_sgm(layers: dict[str, Tensor], folder: Path) -> Path:
    """As kohya's scripts name the layers of SDXL: those of the original implementation."""
    blocks = {"down_blocks_1_attentions_0": "input_blocks_3_1", "mid_block_attentions_0": "middle_block_1"}
    blocks |= {f"up_blocks_0_attentions_{i}": f"output_blocks_{i}_1" for i in range(2)}
    with safe_open(in_kohya(layers, folder), "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for ours, theirs in blocks.items():
        found = {name.replace(ours, theirs): value for name, value in found.items()}
    save_file(found, folder / "sgm.safetensors")
    return folder / "sgm.safetensors"


def as_processors(layers: dict[str, Tensor], folder: Path) -> Path:
    """As save_attn_procs of old diffusers leaves it, without a strength."""
    found = {}
    for name, value in layers.items():
        owner, _, rest = name.rpartition(".to_")
        layer, _, factor = rest.removesuffix(".weight").rpartition(".")
        kind = "down" if factor == "lora_A" else "up"
        found[f"{owner}.processor.to_{layer.removesuffix('.0')}_lora.{kind}.weight"] = value
    save_file(found, folder / "pytorch_lora.safetensors")
    return folder


def bare(layers: dict[str, Tensor], folder: Path) -> Path:
    save_file(layers, folder / "bare.safetensors")
    return folder / "bare.safetensors"


@pytest.mark.parametrize(
    ("write", "first", "others"),
    [
        (in_peft, 0.5, 2.0),
        (in_kohya, 0.5, 2.0),
        (in_sgm, 0.5, 2.0),
        (as_processors, 1.0, 1.0),
        (bare, 1.0, 1.0),
    ],
)
def test_adapters_of_other_programs_have_the_strength_that_they_say(
    tiny_xl: Path, tmp_path: Path, write: Callable[..., Path], first: float, others: float
):
    backbone = StableDiffusionXLBackbone(str(tiny_xl), lora=LoRA(3))
    randomise(backbone, POLICY, 1)
    layers = {name: value.clone() for name, value in backbone.weight_sets.factors().items()}
    path = write(layers, tmp_path / "peft" if write is in_peft else tmp_path)
    given = StableDiffusionXLBackbone(str(tiny_xl), adapters={str(path): 1.0})
    scales = [first] * 2 + [others] * len(layers)
    with torch.no_grad():
        for scale, name in zip(scales, layers, strict=False):
            layer = backbone.unet.get_submodule(name.removesuffix(".weight").rpartition(".lora_")[0])
            if ".lora_B" in name:
                layer.lora_B[POLICY].weight.mul_(scale)
    torch.testing.assert_close(predict(given), predict(backbone), atol=1e-6, rtol=1e-6)
    assert (predict(given) - predict(given, REFERENCE)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "strength"),
    [
        ({}, 1.0),
        ({"lora_alpha": 6.0}, 2.0),
        ({"lora_alpha": 6.0, "alpha_pattern": {"to_q": 1.5}}, 0.5),
        ({"lora_alpha": 6.0, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"r": 3}, 8 / 3),  # PEFT's default
    ],
)
def test_the_strength_of_a_layer_is_that_of_its_settings(settings: dict[str, Any], strength: float):
    assert _strength(settings, "mid_block.to_q", 3) == pytest.approx(strength)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lora_unet_mid_block.hada_w1_a", "it is LoHa, not LoRA"),
        ("unet.mid_block.attentions.0.proj_in.lora_magnitude_vector", "it is DoRA"),
        ("text_encoder.layers.0.mlp.fc1.lora_A.weight", "also adapts text_encoder.*only the unet.*fuse_lora"),
        ("unet.mid_block.attentions.0.proj_in.bias", "is not a factor of LoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff_b", "is an update of a whole weight; give one"),
        (
            "unet.mid_block.attentions.0.proj_out.lora_A.weight",
            r"for another base model: its mid_block\S* has the shape \(2, 16\), and .*, 1, 1\)",
        ),
        ("unet.mid_block.nothing.lora_A.weight", "does not fit"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(tiny: Path, tmp_path: Path, entry: str, message: str):
    rest = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.zeros(2, 16, 1, 1)}
    rest["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.zeros(16, 2, 1, 1)
    save_file(rest | {entry: torch.zeros(2, 16)}, tmp_path / "some.safetensors")
    with pytest.raises(ConfigError, match=message):
        StableDiffusionBackbone(str(tiny), adapters={str(tmp_path / "some.safetensors"): 1.0})
    with pytest.raises(ConfigError, match="may run code"):
        StableDiffusionBackbone(str(tiny), adapters={str(tmp_path / "some.bin"): 1.0})
    (tmp_path / "peft").mkdir()
    save_file(
        {f"base_model.model.{name.removeprefix('unet.')}": value for name, value in rest.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    with pytest.raises(ConfigError, match=r"strength is in adapter_config.json, which is missing"):
        StableDiffusionBackbone(str(tiny), adapters={str(tmp_path / "peft"): 1.0})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="init_lora_weights is pissa_niter_4, which changes the base model"):
        StableDiffusionBackbone(str(tiny), adapters={str(tmp_path / "peft"): 1.0})
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings | {"init_lora_weights": True}))
    with pytest.raises(ConfigError, match=r"the weight of .*peft is nan; give a finite number"):
        StableDiffusionBackbone(str(tiny), adapters={str(tmp_path / "peft"): float("nan")})


def test_an_adapter_of_another_family_is_not_taken_for_one_of_text_encoders(tiny: Path, tmp_path: Path):
    of_wan = {f"diffusion_model.blocks.0.self_attn.q.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"}
    save_file(of_wan, tmp_path / "wan.safetensors")
    with pytest.raises(ConfigError, match=r"for another family: it adapts diffusion_model\..*, not the unet"):
        StableDiffusionBackbone(str(tiny), adapters={str(tmp_path / "wan.safetensors"): 1.0})


def test_a_merged_pipeline_predicts_what_the_set_predicts(backbone, tiny, tmp_path):
    backbone.weight_sets.mix("mixture", {"a": 0.3, "b": 0.5, "c": 0.2})
    backbone.weight_sets.save_merged(tmp_path / "merged", "mixture")
    merged = StableDiffusionBackbone(str(tmp_path / "merged"), lora=None)
    torch.testing.assert_close(predict(merged), predict(backbone, "mixture"), atol=1e-5, rtol=1e-5)
    assert (predict(merged) - predict(backbone, REFERENCE)).abs().max() > 1e-3
    assert backbone.pipeline.unet is backbone.network
