"""Counting objects through a detector: hand-made outputs, transformers' own processing, gradients."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, DetrConfig, DetrForObjectDetection, ResNetConfig
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from lit_align.errors import ConfigError
from lit_align.rewards import ObjectCount
from lit_align.rewards.detection import expected
from lit_align.shapes.recipe.quality import draw
from lit_align.shapes.world import SHAPES, parse


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))


def test_expected_number_of_a_hand_made_output() -> None:
    """Three queries: surely a circle; one half square, one half nothing; surely nothing."""
    likely = torch.tensor([[[1, 0, 0], [0, 0.5, 0.5], [0, 0, 1]]])
    logits = likely.clamp(min=1e-9).log()
    assert expected(logits, [0, 1]).tolist() == pytest.approx([1.5], abs=1e-6)
    assert expected(logits, [0]).tolist() == pytest.approx([1.0], abs=1e-6)
    assert expected(logits, [1]).tolist() == pytest.approx([0.5], abs=1e-6)


def test_score_is_fewer_or_nearer(detector_folder: Path, images: torch.Tensor) -> None:
    folder, prompts = str(detector_folder), [""] * 3
    count = ObjectCount(folder).count(images)
    assert ((count > 0) & (count < 5)).all()
    assert torch.equal(ObjectCount(folder)(images, prompts), -count)
    assert torch.equal(ObjectCount(folder, target=2)(images, prompts), -(count - 2).abs())
    kinds = [ObjectCount(folder, label).count(images) for label in ("circle", "square")]
    assert torch.allclose(sum(kinds, torch.zeros(3)), count, atol=1e-5)


def test_gradient_to_pixels(detector_folder: Path, images: torch.Tensor) -> None:
    reward = ObjectCount(str(detector_folder), "circle", 2.0).double()
    pixels = images[:1, :, :6, :7].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reward(x, [""]), (pixels,), atol=1e-6)


@pytest.mark.parametrize(
    "size",
    [
        {"height": 16, "width": 48},
        {"shortest_edge": 40, "longest_edge": 1333},
        {"shortest_edge": 100, "longest_edge": 64},
    ],
)
@pytest.mark.parametrize("shape", [(64, 40), (40, 72), (56, 56)])
def test_prepares_images_as_transformers_does(
    size: dict[str, int], shape: tuple[int, int], detector_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "detector"
    shutil.copytree(detector_folder, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": size}))
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = YolosImageProcessorPil.from_pretrained(folder)(image, return_tensors="pt").pixel_values
    ours = ObjectCount(str(folder)).preprocess(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 2 / 255 / 0.2  # theirs is rounded to 8 bits


def test_unresized_where_the_processor_says_so(detector_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(detector_folder, tmp_path / "detector")
    (tmp_path / "detector" / "preprocessor_config.json").write_text(
        json.dumps({"do_resize": False, "do_normalize": False})
    )
    images = torch.rand(1, 3, 20, 12)
    assert torch.equal(ObjectCount(str(tmp_path / "detector")).preprocess(images), images)


def test_an_unknown_label_names_those_there(detector_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no label 'dog'; give one of these.*: circle, square\."):
        ObjectCount(str(detector_folder), "dog")


@pytest.mark.parametrize("target", [-1.0, float("nan"), float("inf")])
def test_refuses_targets_that_are_no_number_of_objects(target: float, detector_folder: Path) -> None:
    with pytest.raises(ConfigError, match="target is"):
        ObjectCount(str(detector_folder), target=target)


def test_refuses_what_is_no_detector(tmp_path: Path) -> None:
    tiny = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8
    )
    CLIPVisionModel(tiny).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load"):
        ObjectCount(str(tmp_path))


def test_a_detr_counts_too(tmp_path: Path) -> None:
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], out_features=["stage1"])
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        num_queries=3,
        num_labels=4,
    )
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    reward = ObjectCount(str(tmp_path))
    assert reward.preprocess(torch.rand(1, 3, 30, 60)).shape == (1, 3, 666, 1333)  # DETR's own edges
    reward.processor["do_resize"] = False
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    count = reward.count(images)
    assert ((count > 0) & (count < 3)).all()
    (gradient,) = torch.autograd.grad(count.sum(), images)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_the_shipped_detector_counts() -> None:
    captions, images = draw(32, 5, "count")
    groups = [parse(caption).groups for caption in captions]
    there = torch.tensor([float(sum(group.count for group in each)) for each in groups])
    count = ObjectCount("shapes").count(images)
    assert (count - there).abs().mean() < 0.5  # .78 if it always said 2
    assert torch.corrcoef(torch.stack([count, there]))[0, 1] > 0.75
    kinds = [[float(sum(g.count for g in each if g.shape == shape)) for each in groups] for shape in SHAPES]
    seen = torch.stack([ObjectCount("shapes", shape).count(images) for shape in SHAPES])
    assert torch.corrcoef(torch.stack([seen.flatten(), torch.tensor(kinds).flatten()]))[0, 1] > 0.5
