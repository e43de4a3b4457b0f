"""Object presence: hand-made detections, the shipped detector, and every family of detectors, tiny."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertTokenizerFast,
    DetrConfig,
    DetrForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTImageProcessor,
    OwlViTProcessor,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
)
from transformers.utils.import_utils import BACKENDS_MAPPING

from lit_align.errors import ConfigError
from lit_align.rewards import ObjectPresence
from lit_align.rewards.detectors import BLANK, Detector
from lit_align.shapes import CLIP
from lit_align.shapes.recipe.quality import draw
from lit_align.shapes.world import SHAPES, parse

OBJECTS: dict[str, list[Any]] = {"objects": [["circle", "star"], ["circle"], "star, heart"]}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "circle", "star", "heart"]


def save(model: PreTrainedModel, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    model.save_pretrained(folder)


def detr(folder: Path) -> None:
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], out_features=["stage1"])
    labels = {0: "circle", 1: "star", 2: "heart"}
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
        num_queries=7,
        id2label=labels,
        label2id={label: number for number, label in labels.items()},
    )
    save(DetrForObjectDetection(config), folder)
    size = {"shortest_edge": 32, "longest_edge": 48}
    processor = {"image_processor_type": "DetrImageProcessor", "size": size, "do_pad": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


TOWERS: dict[str, Any] = {
    "text_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 700,
        "max_position_embeddings": 24,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "projection_dim": 16,
}
SQUARE = {"height": 32, "width": 32}


def owlvit(folder: Path) -> None:
    save(OwlViTForObjectDetection(OwlViTConfig(**TOWERS)), folder)
    images = OwlViTImageProcessor(size=SQUARE, crop_size=SQUARE)
    OwlViTProcessor(images, AutoTokenizer.from_pretrained(CLIP)).save_pretrained(folder)


def owlv2(folder: Path) -> None:
    save(Owlv2ForObjectDetection(Owlv2Config(**TOWERS)), folder)
    tokenizer = AutoTokenizer.from_pretrained(CLIP)
    Owlv2Processor(Owlv2ImageProcessor(size=SQUARE), tokenizer).save_pretrained(folder)


def grounding_dino(folder: Path) -> None:
    save_grounding(GroundingDinoConfig, GroundingDinoForObjectDetection, folder)


def mm_grounding_dino(folder: Path) -> None:
    save_grounding(MMGroundingDinoConfig, MMGroundingDinoForObjectDetection, folder)


def save_grounding(config_class: Any, model_class: Any, folder: Path) -> None:
    text = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    vision = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=2, out_indices=[2, 3]
    )
    config = config_class(
        backbone_config=vision,
        text_config=text,
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        num_feature_levels=2,
        max_text_len=24,
    )
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    images = GroundingDinoImageProcessor(size={"shortest_edge": 32, "longest_edge": 48})
    GroundingDinoProcessor(images, BertTokenizerFast(str(folder / "vocab.txt"))).save_pretrained(folder)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "make", [detr, owlvit, owlv2, grounding_dino, mm_grounding_dino], ids=lambda m: m.__name__
)
def test_every_family_is_loaded_and_asked(
    make: Callable[[Path], None], tmp_path: Path, images: Tensor
) -> None:
    make(tmp_path)
    reward = ObjectPresence(str(tmp_path), column="objects")
    scores = reward(images, [""] * 3, columns=OBJECTS)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert len(set(scores.tolist())) > 1
    one = {"objects": [["circle"], ["star"], None]}
    each = torch.stack([reward(images[[0, 0, 0]], [""] * 3, columns=one)[i] for i in range(3)])
    assert scores[0] == pytest.approx(float(each[:2].mean()), abs=1e-5)  # the mean over an image's objects
    assert each[2].isnan()  # no objects, no score


@pytest.mark.parametrize("make", [owlvit, owlv2, grounding_dino, mm_grounding_dino], ids=lambda m: m.__name__)
def test_objects_may_have_names_of_any_length(
    make: Callable[[Path], None], tmp_path: Path, images: Tensor
) -> None:
    make(tmp_path)
    reward = ObjectPresence(str(tmp_path), column="objects")
    names: list[list[str]] = [["circle", "star heart circle"], ["st. star"], ["heart" + " circle" * 30]]
    with pytest.warns(UserWarning, match=r"1 of the first 4 names of objects are longer than the 24 tokens"):
        together = reward(images, [""] * 3, columns={"objects": names})
    for row, those in enumerate(names):
        alone = [reward(images[[row]], [""], columns={"objects": [[name]]}).item() for name in those]
        assert together[row].item() == pytest.approx(sum(alone) / len(alone), abs=1e-5)


def test_a_missing_package_is_named_at_construction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owlv2(tmp_path)
    monkeypatch.setitem(BACKENDS_MAPPING, "scipy", (lambda: False, BACKENDS_MAPPING["scipy"][1]))
    with pytest.raises(ConfigError, match=r"a package is missing.*scipy"):
        ObjectPresence(str(tmp_path), column="objects")


class Said(Detector):
    """Has the same confidences for every image."""

    def forward(self, images: Any, objects: Any) -> list[Tensor]:
        sure = {"circle": 0.5, "star": 1.0, "heart": 0.25}
        return [torch.tensor([sure[name] for name in names]) for names in objects]

    def boxes(self, images: Any, objects: Any, threshold: float) -> Any:
        raise NotImplementedError


def test_the_mean_over_distinct_objects(detector_folder: Path, images: Tensor) -> None:
    reward = ObjectPresence("shapes")
    reward.detector = Said()
    prompts = ["a circle and a star", "two red circles and a blue circle", "a heart"]
    assert reward(images, prompts).tolist() == [0.75, 0.5, 0.25]
    reward.column = "objects"
    assert reward(images, prompts, columns=OBJECTS).tolist() == [0.75, 0.5, 0.625]


def test_confidence_is_the_highest_detection_of_the_label(detector_folder: Path, images: Tensor) -> None:
    reward = ObjectPresence(str(detector_folder))
    pixels = np.concatenate([np.full_like(BLANK, 80), BLANK])
    likely = reward.detector.run(pixels).logits.softmax(-1)[..., :-1]
    found = reward.detector(pixels, [["circle", "square"]] * 2)
    for image in range(2):
        score, label = likely[image].max(-1)
        for number in range(2):
            mine = score[label == number]
            wanted = float(mine.max()) if len(mine) else 0.0
            assert float(found[image][number]) == pytest.approx(wanted, abs=1e-6)


def test_unknown_labels_and_columns_are_named(detector_folder: Path, images: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"no label 'star'.*circle, square"):
        ObjectPresence(str(detector_folder))(images, [""] * 3, columns={"objects": ["star"] * 3})
    with pytest.raises(ConfigError, match="no column 'things'; its columns: objects"):
        ObjectPresence(str(detector_folder), column="things")(images, [""] * 3, columns=OBJECTS)
    with pytest.raises(ConfigError, match="no column 'objects'; its columns: none"):
        ObjectPresence(str(detector_folder))(images, ["a star"] * 3)
    for wrong in ("['circle', 'star']", 7, [None]):
        with pytest.raises(ConfigError, match=r"names no objects; give a list of texts, or one text with"):
            ObjectPresence(str(detector_folder)).check_columns({"objects": [["circle"], wrong]})
    with pytest.raises(ConfigError, match=r"cannot read 'photo'.*name under 'column'"):
        ObjectPresence("shapes")(images, ["a photo of a cat"] * 3)


def test_a_folder_without_a_processor_is_refused(detector_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(detector_folder, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="cannot load"):
        ObjectPresence(str(tmp_path / "bare"))


def test_the_shipped_detector_tells_true_captions_from_wrong_ones() -> None:
    captions, images = draw(64, 5, "presence")
    said = [{group.shape for group in parse(caption).groups} for caption in captions]
    others = [next(shape for shape in SHAPES if shape not in shapes) for shapes in said]
    reward = ObjectPresence("shapes")
    assert reward(images, list(captions)).mean() > 0.9
    assert reward(images, [f"a {shape}" for shape in others]).mean() < 0.1
