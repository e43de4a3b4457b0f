"""CLIP rewards against transformers and PIL, their prompt cache, and models that cannot be loaded."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lit_align.errors import ConfigError
from lit_align.rewards import CLIPScore, PickScore, RewardBank
from lit_align.rewards.clip import MEAN, CLIPCosine
from lit_align.shapes import PIPELINE

PROMPTS = ["a red circle", "the blue square and the red square on a circle", "a red circle"]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def encodings(cosine: CLIPCosine) -> list[int]:
    """Record how many prompts each later call of the text tower encodes."""
    counts: list[int] = []
    cosine.model.text_model.register_forward_hook(lambda *args: counts.append(len(args[2].pooler_output)))
    return counts


def direct(folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and logits by transformers' own forward pass, with normalisation written out."""
    model = CLIPModel.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding=True, truncation=True, max_length=8, return_tensors="pt"
    )
    statistics = json.loads((folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(statistics[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        out = model(**tokens, pixel_values=(images - mean) / std)
    return (out.image_embeds * out.text_embeds).sum(-1), out.logits_per_image.diagonal()


def test_scores_equal_transformers(clip_folder: Path, images: Tensor) -> None:
    cosines, logits = direct(clip_folder, images)
    assert cosines.std() > 0.01
    torch.testing.assert_close(CLIPScore(str(clip_folder))(images, PROMPTS), cosines, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        CLIPScore(str(clip_folder), scale=2.5)(images, PROMPTS), 2.5 * cosines, rtol=0, atol=1e-5
    )
    pick = PickScore(str(clip_folder))
    torch.testing.assert_close(pick(images, PROMPTS), logits, rtol=0, atol=1e-4)
    assert pick.scale == pytest.approx(float(torch.tensor(3.0).exp()), rel=1e-6)


@pytest.mark.parametrize("shape", [(20, 20), (16, 31), (31, 17), (5, 7), (8, 8)])
def test_preprocessing_is_pils_without_the_rounding(shape: tuple[int, int], clip_folder: Path) -> None:
    pixels = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (*shape, 3))  # hard edges
    size = [8 * n // min(shape) for n in shape]
    top, left = (size[0] - 8) // 2, (size[1] - 8) // 2
    small = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(small)[top : top + 8, left : left + 8]).permute(2, 0, 1) / 255
    cosine = CLIPCosine(str(clip_folder))
    prepared = cosine.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    torch.testing.assert_close((prepared * cosine.std + cosine.mean)[0], expected, rtol=0, atol=1.5 / 255)


@pytest.mark.parametrize("shape", [(40, 40), (64, 47), (16, 31), (6, 5)])
def test_prepares_images_as_transformers_does(shape: tuple[int, int], clip_folder: Path) -> None:
    """Theirs is rounded to 8 bits after the resize, hence the tolerance: 1.5 of 255, in units of the std."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder, **sizes)
    theirs = processor(image, return_tensors="pt").pixel_values
    cosine = CLIPCosine(str(clip_folder))
    ours = cosine.preprocess(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    assert ours.shape == theirs.shape == (1, 3, 8, 8)
    assert ((ours - theirs).abs() * cosine.std < 1.5 / 255).all()


@pytest.mark.parametrize("score", [CLIPScore, PickScore])
@pytest.mark.parametrize("shape", [(8, 8), (12, 10), (5, 7)], ids=["as it is", "smaller, cropped", "larger"])
def test_gradient_of_every_pixel(
    score: type[CLIPScore | PickScore], shape: tuple[int, int], clip_folder: Path
) -> None:
    reward = score(str(clip_folder)).double()
    draw = torch.Generator().manual_seed(5)
    pixels = torch.rand(1, 3, *shape, generator=draw, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS[1:2]), (pixels,))
    (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS[1:2]).sum(), pixels)
    assert gradient.ne(0).double().mean() > 0.8  # the crop leaves some pixels out


def test_a_prompt_is_encoded_once(clip_folder: Path, images: Tensor) -> None:
    clip = CLIPCosine(str(clip_folder))
    counts = encodings(clip)
    first = clip(images, PROMPTS)
    assert torch.equal(clip(images, PROMPTS), first)
    clip(images, [*PROMPTS[:2], "a square"])
    assert counts == [1, 1, 1]
    clip.double()
    assert clip(images, PROMPTS).dtype == torch.float64
    assert counts == [1, 1, 1, 1, 1]


def test_the_cache_is_bounded_and_forgets_the_oldest(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CLIPCosine, "CACHED_PROMPTS", 2)
    clip = CLIPCosine(str(clip_folder))
    counts = encodings(clip)
    assert clip.embed(["a", "red", "blue"]).shape == (3, 8)
    clip.embed(["red"])
    clip.embed(["a"])  # pushes out blue, the least recently used
    clip.embed(["red"])
    clip.embed(["blue"])
    assert counts == [1, 1, 1, 1, 1]


def test_embeddings_cached_in_inference_mode_serve_training(clip_folder: Path, images: Tensor) -> None:
    bank = RewardBank({"clip": CLIPScore(str(clip_folder))}, {"clip": 1.0})
    with torch.inference_mode():
        validation = bank(images, PROMPTS).total
    training = bank(images.requires_grad_(), PROMPTS).total
    training.sum().backward()
    assert images.grad is not None
    assert torch.equal(training.detach(), validation.clone())


def test_scores_do_not_change_under_autocast(clip_folder: Path, images: Tensor) -> None:
    bank = RewardBank({"pick": PickScore(str(clip_folder))}, {"pick": 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        mixed = bank(images, PROMPTS).total
    assert torch.equal(mixed, bank(images, PROMPTS).total)


def test_bfloat16_weights_keep_the_logit_scale(clip_folder: Path, images: Tensor) -> None:
    pick = PickScore(str(clip_folder))
    full = pick(images, PROMPTS)
    low = pick.bfloat16()(images, PROMPTS)
    assert low.dtype == torch.float32
    assert pick.scale == pytest.approx(20.0855, rel=1e-4)
    torch.testing.assert_close(low, full, rtol=0, atol=1.0)


def test_long_prompts_are_truncated(clip_folder: Path) -> None:
    clip = CLIPCosine(str(clip_folder))
    start = "a a a a a a"  # start, six words, end: the eight positions
    assert torch.equal(clip.embed([start]), clip.embed([start + " red circle"]))
    assert not torch.equal(clip.embed([start]), clip.embed(["a a a"]))


def test_another_place_for_the_tokenizer(clip_folder: Path, images: Tensor, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(clip_folder).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no tokenizer in .*'processor'"):
        PickScore(str(tmp_path))
    whole, split = PickScore(str(clip_folder)), PickScore(str(tmp_path), processor=str(clip_folder))
    assert torch.equal(whole(images, PROMPTS), split(images, PROMPTS))
    with pytest.raises(ConfigError, match=r"has \d+ tokens, of which .* knows 32; name under 'processor'"):
        PickScore(str(tmp_path), processor=str(PIPELINE / "tokenizer"))


def test_published_statistics_without_a_configuration(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    assert CLIPCosine(str(folder)).mean.flatten().tolist() == pytest.approx(MEAN)


def broken(folder: Path, copy: Path, how: str) -> str:
    shutil.copytree(folder, copy)
    weights, config = copy / "model.safetensors", copy / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        config.write_text("{")
    elif how == "no numbers":
        model = CLIPModel.from_pretrained(copy)
        model.text_projection.weight.data[0, 0] = torch.nan
        model.save_pretrained(copy)
    elif how == "text tower only":
        CLIPModel.from_pretrained(copy).text_model.save_pretrained(copy)
        shutil.copy(folder / "config.json", config)
    return str(copy)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "corrupt.*download them again"),
        ("empty", "corrupt.*download them again"),
        ("no numbers", "text_projection.weight of .* holds numbers that are not finite"),
        ("no weights", "no file named model.safetensors.*check that the folder"),
        ("no config", "not a valid JSON file.*check that the folder"),
        ("text tower only", "not a complete CLIP model"),
    ],
)
def test_broken_folders(how: str, said: str, clip_folder: Path, tmp_path: Path) -> None:
    pretrained = broken(clip_folder, tmp_path / "copy", how)
    with pytest.raises(ConfigError, match=said) as caught:
        CLIPScore(pretrained)
    assert pretrained in str(caught.value)


@pytest.mark.parametrize(
    "pretrained", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c", "~/no-such-folder"]
)
def test_missing_folders(pretrained: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a folder.*'shapes'") as caught:
        CLIPScore(pretrained)
    assert repr(pretrained) in str(caught.value)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match=r"'nobody-here/no-such-model'.*download it elsewhere .* and give the folder"
    ):
        CLIPScore("nobody-here/no-such-model")
