"""What a user may give as a model, and what is said of the rest."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import GGUFQuantizationConfig, UNet2DConditionModel
from jsonargparse import ArgumentParser
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from lit_align.backbones import DiffusersBackbone, StableDiffusionBackbone, StableDiffusionXLBackbone
from lit_align.backbones.loading import _check_quantised
from lit_align.errors import ConfigError
from lit_align.samplers import DDIM
from tests.backbones.conftest import predict
from tests.backbones.fresh import fresh
from tests.backbones.original_layout import save_original

UNET = Path("unet", "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def single(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as one file in the original layout."""
    file = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_original(tiny, file)
    return file


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A folder of the tiny pipeline to break."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def refused(model: Path | str, message: str, **options: object) -> None:
    with pytest.raises(ConfigError, match=message) as told:
        StableDiffusionBackbone(str(model), **options)
    assert "\n" not in str(told.value)


def test_a_single_file_is_the_same_model(tiny: Path, single: Path):
    ours, folder = (
        StableDiffusionBackbone(str(single), config=str(tiny)),
        fresh(StableDiffusionBackbone, tiny),
    )
    assert torch.equal(predict(ours, guidance=2.0), predict(folder, guidance=2.0))
    assert ours.autoencoder_hash() == folder.autoencoder_hash()
    half = StableDiffusionBackbone(str(single), config=str(tiny), dtype="bfloat16")
    assert {p.dtype for p in half.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}


def test_a_single_file_of_xl_is_the_same_model(tiny_xl: Path, single_xl: Path):
    ours, folder = (
        StableDiffusionXLBackbone(str(single_xl), config=str(tiny_xl)),
        fresh(StableDiffusionXLBackbone, tiny_xl),
    )
    assert torch.equal(predict(ours, guidance=2.0), predict(folder, guidance=2.0))
    assert ours.autoencoder_hash() == folder.autoencoder_hash()


def test_a_single_file_of_stable_diffusion_2_is_the_same_model(tiny_v: Path, tmp_path: Path):
    save_original(tiny_v, tmp_path / "model.safetensors", second=True)
    ours = StableDiffusionBackbone(str(tmp_path / "model.safetensors"), config=str(tiny_v))
    assert torch.equal(predict(ours), predict(fresh(StableDiffusionBackbone, tiny_v)))
    sampler = ours.make_sampler(partial(DDIM, num_steps=2))
    assert sampler.schedule.prediction_type == "v_prediction"


def test_a_single_file_may_say_how_it_was_trained(tiny_xl: Path, tmp_path: Path):
    marked = tmp_path / "marked.safetensors"
    save_original(tiny_xl, marked, v_pred=torch.empty(0), ztsnr=torch.empty(0))
    backbone = StableDiffusionXLBackbone(str(marked), config=str(tiny_xl))
    schedule = backbone.make_sampler(partial(DDIM, num_steps=2)).schedule
    assert schedule.prediction_type == "v_prediction"
    assert schedule.alpha(999) == 0
    own = backbone.pipeline.scheduler.config
    assert (own.prediction_type, own.rescale_betas_zero_snr) == ("v_prediction", True)


@pytest.mark.parametrize(
    ("entry", "shape", "kind"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", (8, 9, 3, 3), "an inpainting model"),
        ("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias", (8,), "the refiner of"),
        ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias", (8,), "Diffusion XL"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", (4, 8), "a LoRA, which belongs under"),
        ("model.diffusion_model.out.2.scale_weight", (1,), "a quantised model"),
    ],
)
def test_a_single_file_of_another_kind_is_refused_by_name(tiny: Path, tmp_path: Path, entry, shape, kind):
    save_file({entry: torch.zeros(shape)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", f"is .*{kind}", config=str(tiny))


def test_a_refiner_is_refused_by_name(tiny_xl: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_xl, tmp_path / "model"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / UNET).unlink()
    config["projection_class_embeddings_input_dim"] -= 8  # five time ids
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ConfigError, match=r"not a plain text-to-image model .* as a refiner"):
        StableDiffusionXLBackbone(str(folder))
    rename(folder, "StableDiffusionXLImg2ImgPipeline")
    with pytest.raises(ConfigError, match=r"is a StableDiffusionXLImg2ImgPipeline"):
        StableDiffusionXLBackbone(str(folder))


def test_entries_of_the_schedule_can_be_replaced(tiny: Path):
    plain = fresh(StableDiffusionBackbone, tiny).make_sampler(partial(DDIM, num_steps=4))
    given = {
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    }
    backbone = StableDiffusionBackbone(str(tiny), scheduler=given)
    sampler = backbone.make_sampler(partial(DDIM, num_steps=4))
    assert plain.timesteps.tolist() == [751, 501, 251, 1]
    assert sampler.timesteps.tolist() == [999, 749, 499, 249]
    assert sampler.schedule.alpha(999) == 0
    assert sampler.schedule.prediction_type == "v_prediction"
    assert (sampler.schedule.alpha(500) - plain.schedule.alpha(500)).abs() > 1e-4
    refused(tiny, "backbone.scheduler: the model's PNDMScheduler has no spacing", scheduler={"spacing": 1})
    refused(tiny, "PNDMScheduler cannot be made with beta_start: 'low'", scheduler={"beta_start": "low"})
    other = StableDiffusionBackbone(str(tiny), scheduler={"timestep_spacing": "trail"})
    with pytest.raises(ConfigError, match="timestep_spacing is 'trail'; DDIM knows leading, trailing"):
        other.make_sampler(DDIM)


def test_long_prompts_are_told_once_with_their_number(tiny_xl: Path, capfd):
    backbone = fresh(StableDiffusionXLBackbone, tiny_xl)
    long = [f"{count} red circles and " * 20 + "a star" for count in ("two", "three")]
    with pytest.warns(UserWarning, match="2 of the first 3 prompts are longer than the") as told:
        backbone.encode(["a star", *long])
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.encode([long[0] + " and more"])
    assert "truncated" not in capfd.readouterr().err


def test_text_encoders_wait_on_the_cpu(tiny_xl: Path, monkeypatch):
    plain = fresh(StableDiffusionXLBackbone, tiny_xl)
    backbone = StableDiffusionXLBackbone(str(tiny_xl), offload_text_encoders=True)
    assert not any(name.startswith("text_encoder") for name, _ in backbone.named_parameters())
    assert {n for n, _ in backbone.fixed_parameters()} == {n for n, _ in plain.fixed_parameters()}
    moved: list[torch.device | str] = []
    encoder = backbone.pipeline.text_encoder_2
    monkeypatch.setattr(
        encoder, "to", lambda device: moved.append(device) or type(encoder).to(encoder, device)
    )
    assert torch.equal(predict(backbone), predict(plain))
    assert moved == [backbone.device, "cpu"]
    predict(backbone)
    assert len(moved) == 2  # all prompts are known
    backbone.double()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_a_single_file_without_its_configuration_says_what_to_do(single: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(single, "a single file has no configuration, so set config to a folder")


def test_a_single_file_that_is_no_whole_checkpoint_is_named(tiny: Path, single: Path, tmp_path: Path):
    weights = load_file(single)
    part = {name: value for name, value in weights.items() if not name.startswith("first_stage_model")}
    save_file(part, tmp_path / "part.safetensors")
    refused(tmp_path / "part.safetensors", "part.safetensors.*check that the file", config=str(tiny))
    part = {name: value for name, value in weights.items() if name != "model.diffusion_model.out.0.weight"}
    save_file(part, tmp_path / "part.safetensors")
    refused(
        tmp_path / "part.safetensors",
        "part.safetensors.*check that the file holds all weights",
        config=str(tiny),
    )
    (tmp_path / "noise.safetensors").write_bytes(b"no weights at all")
    refused(tmp_path / "noise.safetensors", "noise.safetensors.*check that the file", config=str(tiny))
    refused(tmp_path / "none.safetensors", "is not a file; give one that exists")
    refused(tmp_path / "old.ckpt", "may run code")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(
        tmp_path / "model.gguf", "is in a form that is not read; give .* as .safetensors", config=str(tiny)
    )


def test_a_config_is_for_a_single_file_of_the_same_family(tiny: Path, single: Path, copy: Path):
    refused(tiny, "config: .* is for a single file", config=str(tiny))
    refused(single, "variant: 'fp16' is for a folder", config=str(tiny), variant="fp16")
    rename(copy, "StableDiffusionXLPipeline")
    refused(single, "config: .* is a StableDiffusionXLPipeline", config=str(copy))


def rename(folder: Path, pipeline_class: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": pipeline_class}))


@pytest.mark.parametrize(
    "pipeline_class", ["StableDiffusionXLPipeline", "StableDiffusionInpaintPipeline", "FluxPipeline"]
)
def test_a_pipeline_of_another_family_is_refused_before_it_is_read(copy: Path, pipeline_class: str):
    rename(copy, pipeline_class)
    (copy / UNET).unlink()
    refused(copy, f"is a {pipeline_class}, and this backbone takes a StableDiffusionPipeline")


def test_a_variant_is_read_where_it_is_asked_for(tiny: Path, copy: Path):
    expected = predict(fresh(StableDiffusionBackbone, tiny))
    for file in copy.rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    refused(copy, "as the variant fp16 only; set variant: fp16")
    assert torch.equal(predict(StableDiffusionBackbone(str(copy), variant="fp16")), expected)
    refused(tiny, "variant=fp16", variant="fp16")


def test_pickled_weights_are_refused_with_the_remedy(copy: Path):
    (copy / UNET).rename(copy / UNET.with_suffix(".bin"))
    refused(copy, "its unet as a .bin file only.*save it with save_pretrained")
    # What is not read may be in any form.
    (copy / UNET.with_suffix(".bin")).rename(copy / UNET)
    (copy / "safety_checker").mkdir()
    (copy / "safety_checker" / "pytorch_model.bin").write_bytes(b"")
    index = json.loads((copy / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (copy / "model_index.json").write_text(json.dumps(index))
    StableDiffusionBackbone(str(copy))


def test_missing_and_corrupt_weights_are_named(copy: Path):
    weights = load_file(copy / UNET)
    weights.pop("conv_norm_out.weight")
    save_file(weights, copy / UNET, {"format": "pt"})
    refused(copy, "the unet of .* lacks 1 of its weights, such as conv_norm_out.weight")
    whole = weights | {"conv_norm_out.weight": torch.full((8,), torch.nan)}
    save_file(whole, copy / UNET, {"format": "pt"})
    refused(copy, "conv_norm_out.weight in the unet of .* holds numbers that are not finite")
    (copy / UNET).write_bytes((copy / UNET).read_bytes()[:1000])
    refused(copy, "model")


def test_a_quantised_model_is_refused_by_name(copy: Path):
    config = json.loads((copy / UNET).with_name("config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (copy / UNET).with_name("config.json").write_text(json.dumps(config))
    refused(copy, r"the unet of .* is quantised \(bitsandbytes\), .*; give the model before that")
    loaded = {"quantization_config": GGUFQuantizationConfig()}  # of a hub id, after it was loaded
    with pytest.raises(ConfigError, match=r"the unet of 'a/b' is quantised \(gguf\)"):
        _check_quantised("a/b", "unet", loaded)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_parts_beside_the_unet_are_whole_too(copy: Path, part: str):
    (file,) = (copy / part).glob("*.safetensors")
    weights = load_file(file)
    lost = next(name for name in weights if name.endswith("layer_norm2.weight" if "text" in part else "bias"))
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    refused(copy, f"the {part} of .* lacks 1 of its weights, such as .*copy or download it again")


def test_a_tokenizer_whose_files_were_left_behind_is_refused(copy: Path, single: Path):
    own = copy / "tokenizer"
    settings = json.loads((own / "tokenizer_config.json").read_text())
    (own / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 10**30}))
    refused(copy, r"the tokenizer of .* has no length, which is in tokenizer_config\.json; copy or download")
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    StableDiffusionBackbone(str(copy))
    (own / "tokenizer.json").unlink()
    refused(copy, "the tokenizer of .* has no words; copy or download all of its files")
    refused(single, f"the tokenizer of '{copy}' has no words", config=str(copy))
    shutil.rmtree(own)
    refused(copy, "the tokenizer of .* has no words")


def test_a_tokenizer_of_another_model_is_refused(copy: Path):
    tokenizer = CLIPTokenizer.from_pretrained(copy / "tokenizer")
    tokenizer.add_tokens(["<cat-toy>"])
    tokenizer.save_pretrained(copy / "tokenizer")
    refused(copy, r"the tokenizer of .* has 630 tokens, of which the text encoder knows 629; give the one of")


def test_a_single_file_has_all_of_its_text_encoder(tiny: Path, single: Path, tmp_path: Path):
    weights = load_file(single)
    del weights[next(name for name in weights if name.endswith("layer_norm2.weight"))]
    save_file(weights, tmp_path / "less.safetensors")
    refused(tmp_path / "less.safetensors", "less.*lacks 1 of its weights", config=str(tiny))


def test_a_model_that_is_not_there_says_what_to_give(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("someone/nothing", r"someone/nothing.*give the folder")
    refused(tmp_path / "nowhere", "is not a folder; give a folder that exists")
    refused(tmp_path, "check that the folder holds the whole model")


def test_a_model_without_a_size_asks_for_one(copy: Path):
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    refused(copy, "backbone.size: the model's configuration has none")
    assert StableDiffusionBackbone(str(copy), size=16).latent_shape == (4, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpointing": True}, "backbone.checkpointing: True must be none, prediction or blocks"),
        ({"dtype": "half"}, "backbone.dtype: 'half' must be float32, bfloat16 or float16"),
        ({"attention": "flash"}, "backbone.attention: 'flash' must be auto, sdpa or plain"),
        ({"decode_batch": 0}, "backbone.decode_batch: 0 must be positive"),
    ],
)
def test_options_that_are_none_are_refused_in_python_too(tiny: Path, options, message):
    refused(tiny, message, **options)


@pytest.mark.parametrize(
    ("given", "size"),
    [("64", 64), ("[64,96]", (64, 96)), ("[64, 96]", (64, 96)), ("null", None)],
)
def test_a_size_is_read_from_the_command_line_and_from_yaml(tmp_path: Path, given: str, size):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--backbone", type=DiffusersBackbone)
    name = "lit_align.backbones.StableDiffusionBackbone"
    line = parser.parse_args([f"--backbone={name}", f"--backbone.size={given}"])
    (tmp_path / "run.yaml").write_text(f"backbone:\n  class_path: {name}\n  init_args:\n    size: {given}\n")
    for read in (line, parser.parse_args([f"--config={tmp_path / 'run.yaml'}"])):
        assert read.backbone.init_args.size == size


def test_the_rank_of_lora_alone_keeps_the_scale():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--backbone", type=DiffusersBackbone)
    read = parser.parse_args(
        ["--backbone=lit_align.backbones.StableDiffusionBackbone", "--backbone.lora.rank=32"]
    )
    assert read.backbone.init_args.lora.rank == 32
    assert read.backbone.init_args.lora.alpha is None


class Doubled(StableDiffusionBackbone):
    """Embeds the empty prompt beside each, as pipelines do for guidance."""

    def embed(self, prompts):
        return {name: torch.cat([value, value]) for name, value in super().embed(prompts).items()}


def test_what_people_give_and_write_in_python(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """Tracebacks, and of the third other prompts, without a word."""
    loaded = fresh(StableDiffusionBackbone, tiny)
    with pytest.raises(ConfigError, match=r"a StableDiffusionPipeline is no name .* of pipeline\.save_pretr"):
        StableDiffusionBackbone(loaded.pipeline)
    refused(tiny, r"backbone\.lora: 4 is none; give LoRA\(rank=16\), or None", lora=4)
    loaded.__class__ = Doubled
    with pytest.raises(ConfigError, match=r"Doubled\.embed must return a dict of tensors with a row"):
        loaded.encode(["a star", "a circle"])
    monkeypatch.delattr(StableDiffusionBackbone, "denoiser")
    refused(tiny, r"StableDiffusionBackbone has no denoiser, which a family must name")
