"""Defaults are published models, the bundled ones are asked for, and a bank knows where each belongs."""

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_align import rewards
from lit_align.errors import ConfigError
from lit_align.rewards import CLIPScore, Redness, Reward, RewardBank, ShapesTruth
from lit_align.rewards.clip import PICKSCORE, PICKSCORE_PROCESSOR, CLIPCosine

PUBLISHED = {
    "BatchPairwiseDiversity": "openai/clip-vit-large-patch14",
    "CLIPScore": "openai/clip-vit-large-patch14",
    "GenEval": "hustvl/yolos-base",
    "HPSv2": "xswu/HPSv2",
    "HPSv3": "MizzenAI/HPSv3",
    "ImageReward": "zai-org/ImageReward",
    "ObjectCount": "hustvl/yolos-tiny",
    "ObjectPresence": "google/owlv2-base-patch16-ensemble",
    "PairwiseDiversity": "openai/clip-vit-large-patch14",
    "PickScore": "yuvalkirstain/PickScore_v1",
    "UnifiedReward": "CodeGoat24/UnifiedReward-qwen-7b",
    "VQAScore": "Qwen/Qwen2.5-VL-7B-Instruct",
}
"""What a reward without arguments is, by class."""

FILES = {
    "HPSv2": "HPS_v2.1_compressed.pt",
    "HPSv3": "HPSv3.safetensors",
    "ImageReward": "ImageReward.pt",
}
"""Of those that are one file, its name."""

NEVER_OF_SHAPES = (*FILES, "UnifiedReward", "VQAScore")
"""Rewards without a bundled model."""

EXPLICIT = {"AestheticScore": {}, "StatisticalParity": {}, "BatchStatisticalParity": {}}
"""Those that need an argument: a file to download, a classifier that nobody published."""


def with_a_model() -> list[str]:
    """Every reward that has a model, found by its ``pretrained``."""
    classes = {name: getattr(rewards, name) for name in rewards.__all__ if name != "RewardBank"}
    found = [
        name
        for name, cls in classes.items()
        if inspect.isclass(cls)
        and issubclass(cls, Reward)
        and not inspect.isabstract(cls)
        and "pretrained" in inspect.signature(cls).parameters
    ]
    return sorted(found)


def test_every_class_with_a_model_stands_in_a_table() -> None:
    assert with_a_model() == sorted([*PUBLISHED, *EXPLICIT])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, and nothing downloaded before."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_network_the_default_says_what_to_download(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        getattr(rewards, name)()
    said = str(caught.value)
    file = f"{FILES[name]} " if name in FILES else ""
    assert f"cannot load {file and file + 'of '}'{PUBLISHED[name]}'" in said
    assert f"hf download {PUBLISHED[name]} {file}--local-dir FOLDER" in said
    assert "\n" not in said


def test_the_head_of_the_aesthetic_score_is_a_file_to_download() -> None:
    with pytest.raises(ConfigError, match=r"head is missing; download https://.*linearMSE.pth and"):
        rewards.AestheticScore()


@pytest.mark.parametrize("name", ["StatisticalParity", "BatchStatisticalParity"])
def test_no_classifier_is_the_published_one(name: str) -> None:
    with pytest.raises(TypeError, match="pretrained"):
        getattr(rewards, name)()


def test_pickscore_reads_its_prompts_as_its_card_says(clip_folder: Path, monkeypatch: Any) -> None:
    asked: list[Any] = []

    def made(self: CLIPCosine, *given: Any) -> None:
        asked.append(given[:2])
        original(self, str(clip_folder))

    original = CLIPCosine.__init__
    monkeypatch.setattr(CLIPCosine, "__init__", made)
    rewards.PickScore()
    rewards.PickScore(str(clip_folder))
    assert asked == [(PICKSCORE, PICKSCORE_PROCESSOR), (str(clip_folder), None)]


@pytest.mark.parametrize("name", [name for name in with_a_model() if name not in NEVER_OF_SHAPES])
def test_the_bundled_model_is_of_shapes_and_another_is_not(
    name: str, clip_folder: Path, head_file: Path, detector_folder: Path
) -> None:
    cls = getattr(rewards, name)
    assert cls(pretrained="shapes").domain == "shapes"
    assert cls.domain is None
    folders = {"AestheticScore": {"head": str(head_file)}, "GenEval": {"colours": str(clip_folder)}}
    folder = detector_folder if name.startswith(("Object", "GenEval")) else clip_folder
    if "Parity" not in name:
        assert cls(pretrained=str(folder), **folders.get(name, {})).domain is None


def bank(**made: Reward) -> RewardBank:
    return RewardBank({"red": Redness(), **made}, {"red": 1.0})


def test_a_learned_reward_of_shapes_on_another_model_is_told(clip_folder: Path) -> None:
    clip = CLIPScore("shapes")
    other = CLIPScore(str(clip_folder))
    assert bank(clip=clip, truth=ShapesTruth(), other=other).of_shapes == ("clip", "truth")
    both = bank(clip=clip, again=clip)
    with pytest.warns(UserWarning, match=r"the models of 'clip', 'again' were trained on Shapes"):
        both.check_model(is_shapes=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both.check_model(is_shapes=True)
        bank(other=other).check_model(is_shapes=False)


@pytest.mark.parametrize(
    ("is_shapes", "prompts", "reason"),
    [
        (False, ["a red circle"], "the backbone is another model"),
        (True, ["a red circle", "a cat"], "'a cat'"),
    ],
)
def test_the_judge_of_shapes_is_refused_or_left_out_elsewhere(
    is_shapes: bool, prompts: list[str], reason: str
) -> None:
    trained = RewardBank({"truth": ShapesTruth(), "red": Redness()}, {"truth": 1.0})
    with pytest.raises(ConfigError, match=rf"ShapesTruth \('truth'\).*{reason}.*take 'truth' out of weights"):
        trained.check_model(is_shapes, prompts)
    monitored = bank(truth=ShapesTruth())
    monitored.check_model(True, ["a red circle"])
    assert monitored.monitored == ("truth",)
    with pytest.warns(UserWarning, match=rf"{reason}.*it is left out"):
        monitored.check_model(is_shapes, prompts)
    assert list(monitored(torch.rand(1, 3, 8, 8), ["a cat"]).parts) == ["red"]
