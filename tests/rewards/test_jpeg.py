"""The estimate of a JPEG's size against closed forms, and against the files."""

import math
from io import BytesIO

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.rewards import JPEGIncompressibility, SoftJPEGCompressibility, SoftJPEGIncompressibility
from lit_align.rewards.jpeg import BITS, CHROMA, HEADER, LUMA, UNIT, quantisation
from lit_align.shapes import PIPELINE
from lit_align.shapes.recipe.quality import RECOMMENDED, draw, sample
from lit_align.shapes.recipe.seeing import soften


@pytest.fixture(scope="module")
def renders() -> Tensor:
    return draw(96, 8, "jpeg")[1]


@pytest.fixture(scope="module")
def generated() -> Tensor:
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE)
    pipeline.set_progress_bar_config(disable=True)
    return sample(pipeline, draw(24, 10, "jpeg")[0], RECOMMENDED, seed=1)


def soft(images: Tensor) -> Tensor:
    return SoftJPEGIncompressibility()(images, [""] * len(images))


def true(images: Tensor) -> Tensor:
    return JPEGIncompressibility()(images, [""] * len(images))


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.parametrize("quality", [20, 50, 75, 95, 100])
def test_tables_are_those_of_pil(quality: int) -> None:
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    written = Image.open(file).quantization
    assert quantisation(LUMA, quality).flatten().tolist() == list(written[0])
    assert quantisation(CHROMA, quality).flatten().tolist() == list(written[1])


@pytest.mark.parametrize("size", [(64, 64), (45, 37), (16, 130), (1, 1)])
def test_a_flat_image_costs_what_its_file_does(size: tuple[int, int]) -> None:
    colours = torch.tensor([[0, 0, 0], [1, 1, 1], [1, 0, 0], [0.2, 0.5, 0.9]]).view(4, 3, 1, 1)
    images = colours.expand(4, 3, *size)
    assert (soft(images) - true(images)).abs().max() <= 0.004
    grey = torch.full((1, 3, *size), 128 / 255)
    units = math.ceil(size[0] / 16) * math.ceil(size[1] / 16)
    assert soft(grey).item() == pytest.approx((HEADER + UNIT * units) / 1000, abs=1e-6)


def test_one_wave_costs_its_coefficient() -> None:
    level = 3.0
    wave = torch.cos((2 * torch.arange(8.0) + 1) * math.pi / 16) * math.sqrt(1 / 8) * math.sqrt(2 / 8)
    row = (128 + level * quantisation(LUMA, 95)[0, 1] * wave) / 255
    images = row.repeat(4).expand(1, 3, 16, 32)  # 2 x 4 blocks, in two coding units
    sizes = SoftJPEGIncompressibility().sizes(images)[0].tolist()
    assert sizes == pytest.approx([0, 8 * math.log2(1 + 4 * level**2) / 2, 0], abs=1e-4)


def test_means_step_in_the_order_of_the_file() -> None:
    """Blocks 0 to 3 of a unit, then those of the next: the image steps three times, at blocks 2, 4, 6."""
    blocks = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3]]) * quantisation(LUMA, 95)[0, 0] / 8 + 128
    images = (blocks / 255).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(1, 3, 16, 32)
    steps = SoftJPEGIncompressibility().sizes(images)[0, 0].item()
    assert steps == pytest.approx(3 * math.log2(5) / 2, abs=1e-3)


def test_flat_is_cheapest_and_noise_costs_more_and_more(renders: Tensor) -> None:
    noise = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sizes = torch.stack([soft((renders[:8] + level * noise).clamp(0, 1)) for level in (0, 0.01, 0.05, 0.2)])
    assert (sizes.diff(dim=0) > 0).all()
    flat = renders[:8].mean((2, 3), keepdim=True).expand(8, 3, 64, 64)
    assert (soft(flat) < soft(renders[:8])).all()


def test_ranks_images_as_their_files(renders: Tensor) -> None:
    softened = soften(renders, torch.Generator().manual_seed(0))
    for images in (renders, softened, renders[:, :, 3:48, 5:42]):
        assert spearman(soft(images), true(images)) > 0.97
        assert ((soft(images) - true(images)) / true(images)).abs().mean() < 0.06


def test_the_constants_are_about_the_best_for_generated_images(generated: Tensor) -> None:
    """A fit to these very images errs hardly less; its constants vary more: luma and chroma go together."""
    kilobytes = true(generated)
    assert spearman(soft(generated), kilobytes) > 0.95
    bits = SoftJPEGIncompressibility().sizes(generated) / 8000 / kilobytes[:, None]
    rest = 1 - (HEADER + UNIT * 16) / 1000 / kilobytes - BITS[0] * bits[:, 0]
    fit = torch.linalg.lstsq(bits[:, 1:], rest[:, None]).solution[:, 0]
    best = (bits[:, 1:] @ fit - rest).square().mean().sqrt()
    ours = (soft(generated) / kilobytes - 1).square().mean().sqrt()
    assert best <= ours < best + 0.01


def test_gradient_of_an_odd_size() -> None:
    pixels = torch.rand(1, 3, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = SoftJPEGCompressibility().double()
    assert torch.autograd.gradcheck(lambda x: reward(x, [""]), (pixels.requires_grad_(),))


def test_saturated_images_have_finite_gradients() -> None:
    images = torch.stack(
        [torch.zeros(3, 20, 20), torch.ones(3, 20, 20), (torch.rand(3, 20, 20) > 0.5).float()]
    )
    score = SoftJPEGCompressibility()(images.requires_grad_(), [""] * 3)
    score.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad[2].abs().max() > 0
    assert torch.equal(soft(3 * images.detach() - 1), soft(images.detach()))  # clamped, as files are


def test_following_the_gradient_makes_the_file_smaller(renders: Tensor) -> None:
    images = soften(renders[:4], torch.Generator().manual_seed(2)).requires_grad_()
    before = true(images)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(soft(images).sum(), images)
        images = (images - 0.002 * gradient.sign()).clamp(0, 1)
    assert (true(images) < 0.9 * before).all()


def test_signs_and_qualities(renders: Tensor) -> None:
    prompts = [""] * 4
    assert torch.equal(SoftJPEGCompressibility()(renders[:4], prompts), -soft(renders[:4]))
    assert (SoftJPEGIncompressibility(50)(renders[:4], prompts) < soft(renders[:4])).all()
    with pytest.raises(ConfigError, match="quality is 0; give a JPEG quality from 1 to 100"):
        SoftJPEGCompressibility(0)
