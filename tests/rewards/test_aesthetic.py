"""Aesthetic heads against LAION's architecture written out, their gradient, and files that do not fit."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel

from lit_align.errors import ConfigError
from lit_align.rewards import AestheticScore, PickScore
from lit_align.rewards.clip import CLIPCosine
from lit_align.shapes import AESTHETIC, CLIP, PREFERENCE

PROMPTS = ["a red circle", "a blue square", "a"]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def laion(sizes: tuple[int, int, int, int, int]) -> nn.Module:
    """The module of the published weights: its attribute is called ``layers``."""
    a, b, c, d, e = sizes
    layers = [
        nn.Linear(a, b),
        nn.Dropout(0.2),
        nn.Linear(b, c),
        nn.Dropout(0.2),
        nn.Linear(c, d),
        nn.Dropout(0.1),
        nn.Linear(d, e),
        nn.Linear(e, 1),
    ]
    return nn.ModuleDict({"layers": nn.Sequential(*layers)}).eval()


@torch.no_grad()
def embeddings(folder: Path, images: Tensor) -> Tensor:
    clip = CLIPCosine(str(folder))
    features = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=clip.preprocess(images))
    return F.normalize(features.pooler_output, dim=-1)


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
def test_scores_equal_laions_architecture(
    suffix: str, clip_folder: Path, head_file: Path, images: Tensor, tmp_path: Path
) -> None:
    state, file = load_file(head_file), tmp_path / f"head.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    module = laion((8, 12, 6, 4, 3))
    module.load_state_dict(state)
    expected = module["layers"](embeddings(clip_folder, images)).squeeze(-1)
    scores = AestheticScore(str(file), str(clip_folder))(images, PROMPTS)
    assert scores.std() > 0.1
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_the_first_predictor_is_one_layer(clip_folder: Path, images: Tensor, tmp_path: Path) -> None:
    layer = nn.Linear(8, 1)
    torch.save(layer.state_dict(), tmp_path / "linear.pth")
    scores = AestheticScore(str(tmp_path / "linear.pth"), str(clip_folder))(images, PROMPTS)
    torch.testing.assert_close(scores, layer(embeddings(clip_folder, images)).squeeze(-1).detach())


def test_gradient_is_the_slope_in_the_pixels(clip_folder: Path, head_file: Path, images: Tensor) -> None:
    reward = AestheticScore(str(head_file), str(clip_folder)).double()
    pixels = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(pixels, PROMPTS).sum(), pixels)
    step = 1e-5 * torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        rise = (reward(pixels + step, PROMPTS) - reward(pixels - step, PROMPTS)).sum() / 2
    assert rise.abs() > 1e-8
    torch.testing.assert_close(rise, (gradient * step).sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layers", [5, 1])
def test_gradient_of_every_pixel(layers: int, clip_folder: Path, head_file: Path, tmp_path: Path) -> None:
    """Of both published formats, through the resize."""
    torch.manual_seed(0)
    torch.save(nn.Linear(8, 1).state_dict(), tmp_path / "linear.pth")
    head = head_file if layers == 5 else tmp_path / "linear.pth"
    reward = AestheticScore(str(head), str(clip_folder)).double()
    assert len(reward.head) == layers
    draw = torch.Generator().manual_seed(5)
    pixels = torch.rand(1, 3, 12, 10, generator=draw, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, [""]), (pixels,))
    (gradient,) = torch.autograd.grad(reward(pixels, [""]).sum(), pixels)
    assert gradient.ne(0).double().mean() > 0.8


def test_the_prompt_plays_no_part(clip_folder: Path, head_file: Path, images: Tensor) -> None:
    reward = AestheticScore(str(head_file), str(clip_folder))
    assert torch.equal(reward(images, PROMPTS), reward(images, PROMPTS[::-1]))


def test_half_precision_weights(clip_folder: Path, head_file: Path, images: Tensor) -> None:
    reward = AestheticScore(str(head_file), str(clip_folder))
    full = reward(images, PROMPTS)
    low = reward.bfloat16()(images, PROMPTS)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.5)


def test_wrong_width_names_both(clip_folder: Path, tmp_path: Path) -> None:
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ConfigError, match=r"768 numbers.* makes 8; .*clip-vit-large-patch14"):
        AestheticScore(str(tmp_path / "head.pth"), str(clip_folder))


def test_heads_that_cannot_be_read(clip_folder: Path, head_file: Path, tmp_path: Path) -> None:
    relu = {f"layers.{n}.{part}": torch.zeros(1) for n in (0, 3, 6, 9, 11) for part in ("weight", "bias")}
    torch.save(relu, tmp_path / "relu.pth")
    torch.save(laion((8, 12, 6, 4, 3)), tmp_path / "module.pth")
    (tmp_path / "cut.safetensors").write_bytes(head_file.read_bytes()[:-8])
    (tmp_path / "empty.pt").write_bytes(b"")
    said = {
        "relu.pth": "not an aesthetic head.*layers.0.bias.*ReLU",
        "module.pth": "cannot read.*not a pickled module",
        "cut.safetensors": "cannot read.*download it again",
        "empty.pt": "cannot read.*download it again",
        "none.pth": "is not a file.*'shapes'",
    }
    for name, sentence in said.items():
        with pytest.raises(ConfigError, match=sentence):
            AestheticScore(str(tmp_path / name), str(clip_folder))
    with pytest.raises(ConfigError, match="is not a file"):
        AestheticScore(str(tmp_path), str(clip_folder))


def test_the_shipped_head_scores_from_1_to_10() -> None:
    """Needs the shipped weights."""
    assert AESTHETIC.is_file()
    assert CLIP.is_dir()
    scores = AestheticScore(pretrained="shapes")(torch.rand(2, 3, 64, 64), PROMPTS[:2])
    assert ((scores > 0) & (scores < 11)).all()


def test_pickscores_shapes_is_the_preference_model() -> None:
    """Needs the shipped weights."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        PickScore("shapes")(images, PROMPTS[:2]),
        PickScore(str(PREFERENCE), str(PREFERENCE))(images, PROMPTS[:2]),
    )
