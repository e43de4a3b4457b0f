"""What every reward class declares is true; classes are found by a walk, so none is forgotten."""

import copy
import inspect
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_align import rewards
from lit_align.rewards import PickScore, Reward, RewardBank
from tests.rewards.servers import answering, serving


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


class Asks(rewards.GenEval):
    """With the data's column, which the calls of these tests do not have."""

    def forward(self, images, prompts, groups=None, columns=None):  # type: ignore[no-untyped-def]
        asked = [{"class": "circle", "count": 5}, {"class": "square", "count": 5}]
        return super().forward(images, prompts, groups, {"include": [asked] * len(images)})


class Small(rewards.HPSv3):
    """With small images and a short text: as published one image takes a second of a CPU."""

    TEMPLATE = "{} <|Reward|>"
    PIXELS = 4 * 28 * 28


class Brightness(nn.Module):
    """Answers with the brightness of the image, and more to a longer question."""

    def answers(self, images: Tensor, texts: list[str], max_new_tokens: int) -> list[str]:
        levels = images.double().mean(dim=(1, 2, 3)).tolist()
        told = zip(levels, texts, strict=True)
        return [f"Final Score: {level + len(text) / 1000:.9f}" for level, text in told]


class Writes(rewards.UnifiedReward):
    """With answers that hold a number, which a model with random weights does not write."""

    def __init__(self, pretrained: str, dtype: Any) -> None:
        super().__init__(pretrained, dtype=dtype)
        self.model = Brightness()  # type: ignore[assignment]


class Reads(rewards.OCR):
    """With a reader that sees more letters in brighter images; the real one takes half a second an image."""

    def __init__(self) -> None:
        pass

    def reader(self, image: Any) -> Any:
        return SimpleNamespace(txts=("a" * int(100 * (image / 255).mean()),))

    def score(self, image: Any, prompt: str) -> float | None:
        return super().score(image, f'{prompt} "{"a" * 100}"')


MAKE: dict[str, Callable[[Path], Reward]] = {
    "AestheticScore": lambda folder: rewards.AestheticScore(
        str(folder.with_name("head.safetensors")), str(folder)
    ),
    "BatchPairwiseDiversity": lambda folder: rewards.BatchPairwiseDiversity(str(folder), credit="shared"),
    "BatchStatisticalParity": lambda folder: rewards.BatchStatisticalParity("shapes", min_confidence=0),
    "Brightness": lambda folder: rewards.Brightness(),
    "CLIPScore": lambda folder: rewards.CLIPScore(str(folder)),
    "ColourFraction": lambda folder: rewards.ColourFraction("teal"),
    "FunctionReward": lambda folder: rewards.FunctionReward(redness, differentiable=True),
    "GenEval": lambda folder: Asks("shapes", "shapes", threshold=0.05),
    "HPSv2": lambda folder: rewards.HPSv2(str(folder.with_name("hps"))),
    "HPSv3": lambda folder: Small(*[str(folder.with_name("hpsv3"))] * 2, dtype="float32"),
    "ImageReward": lambda folder: rewards.ImageReward(str(folder.with_name("image_reward"))),
    "JPEGCompressibility": lambda folder: rewards.JPEGCompressibility(),
    "JPEGIncompressibility": lambda folder: rewards.JPEGIncompressibility(),
    "OCR": lambda folder: Reads(),
    "ObjectCount": lambda folder: rewards.ObjectCount(str(folder.with_name("detector"))),
    "ObjectPresence": lambda folder: rewards.ObjectPresence("shapes"),
    "PairwiseDiversity": lambda folder: rewards.PairwiseDiversity(str(folder), credit="shared"),
    "PickScore": lambda folder: PickScore(str(folder)),
    "Redness": lambda folder: rewards.Redness(),
    "ShapesTruth": lambda folder: rewards.ShapesTruth(),
    "RemoteReward": lambda folder: rewards.RemoteReward(SERVED["bank"], batch=4),
    "SoftJPEGCompressibility": lambda folder: rewards.SoftJPEGCompressibility(),
    "SoftJPEGIncompressibility": lambda folder: rewards.SoftJPEGIncompressibility(),
    "StatisticalParity": lambda folder: rewards.StatisticalParity("shapes", min_confidence=0),
    "UnifiedReward": lambda folder: Writes(str(folder.with_name("qwen")), dtype="float32"),
    "VLMJudge": lambda folder: rewards.VLMJudge(SERVED["judge"], "judge"),
    "VQAScore": lambda folder: rewards.VQAScore(str(folder.with_name("qwen")), dtype="float32"),
}
"""One way to make each reward; a new class without a line here fails by name."""

SERVED: dict[str, str] = {}
"""Addresses of the servers of these tests."""

PROMPTS = ["a red circle", "two blue squares", "a red circle", "a circle and a square"]


def concrete(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        if not inspect.isabstract(cls) and cls.__module__.startswith("lit_align."):
            yield cls
        yield from concrete(cls)


def names() -> list[str]:
    return sorted({cls.__name__ for cls in concrete(Reward)})


def says(path: str, body: Any) -> Any:
    """An OpenAI-compatible server that says "Yes" with a probability of its own for each file."""
    (image, _) = body["messages"][0]["content"]
    likely = {"token": "Yes", "logprob": -zlib.crc32(image["image_url"]["url"].encode()) / 2**32}
    return {"choices": [{"logprobs": {"content": [likely]}}]}


@pytest.fixture(scope="module", autouse=True)
def _servers() -> Iterator[None]:
    bank = RewardBank({"red": rewards.Redness()}, {"red": 1.0})
    with serving(bank) as SERVED["bank"], answering(says) as SERVED["judge"]:
        yield


@pytest.fixture(scope="module", params=names())
def reward(
    request: pytest.FixtureRequest,
    clip_folder: Path,
    head_file: Path,
    detector_folder: Path,
    published_folders: Path,
) -> Reward:
    """One of each class, which no test changes."""
    assert request.param in MAKE, f"tell tests/rewards/test_declared.py how to make {request.param}"
    return MAKE[request.param](clip_folder)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_every_class_is_exported() -> None:
    assert set(names()) <= set(rewards.__all__)
    assert set(names()) == set(MAKE)


def test_nothing_is_declared_by_default(reward: Reward) -> None:
    """The defaults of Reward are for rewards that people write; a class of ours says what it is."""
    own = [vars(reward), *(vars(kind) for kind in type(reward).__mro__ if kind not in Reward.__mro__)]
    assert {"differentiable", "scope"} <= set().union(*own)
    assert reward.domain in (None, "shapes")


def test_a_reward_leaves_what_it_is_given(reward: Reward, images: Tensor) -> None:
    """Without the copies that a bank makes; and a bank changes no score."""
    given, prompts, groups = images.clone(), list(PROMPTS), torch.tensor([5, 2, 5, 2])
    scores = reward(given, prompts, groups)
    assert torch.equal(given, images)
    assert prompts == PROMPTS
    assert groups.tolist() == [5, 2, 5, 2]
    parts = RewardBank({"it": reward}, {"it": 1.0})(images, PROMPTS, groups).parts
    assert torch.equal(parts["it"].nan_to_num(9), scores.nan_to_num(9))


def test_contract(reward: Reward, images: Tensor) -> None:
    scores = reward(images, PROMPTS)
    assert scores.shape == (4,)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reward(images, PROMPTS))


def test_differentiable_as_declared(reward: Reward) -> None:
    pixels = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if not reward.differentiable:
        pixels = torch.rand(2, 3, 64, 64)
        assert not reward(pixels.requires_grad_(), PROMPTS[:2]).requires_grad
        return
    reward = copy.deepcopy(reward).double()
    pixels.requires_grad_()
    score = reward(pixels, PROMPTS[:2])
    assert score.requires_grad
    (gradient,) = torch.autograd.grad(score.sum(), pixels)
    assert (gradient.flatten(1).norm(dim=1) > 1e-6).all()
    assert torch.autograd.gradcheck(lambda x: reward(x, PROMPTS[:2]), (pixels,), fast_mode=True)


def test_scope_as_declared(reward: Reward, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    if reward.scope != "sample":
        images = (
            images * torch.tensor([[0.1, 1, 0.1], [1, 0.1, 0.1], [1, 0.1, 0.1], [1, 1, 1]])[..., None, None]
        )
        groups = torch.tensor([5, 2, 5, 2])
        scores, alone = reward(images, PROMPTS, groups), reward(images[::2], PROMPTS[::2], groups[::2])
        assert torch.equal(scores[::2], alone) is (reward.scope == "group")
        return
    scores = reward(images, PROMPTS)
    order = [2, 0, 3, 1]
    permuted = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(permuted, scores[order], rtol=1e-5, atol=1e-5)
    alone = torch.cat([reward(images[i : i + 1], [PROMPTS[i]]) for i in range(4)])
    torch.testing.assert_close(alone, scores, rtol=1e-5, atol=1e-5)
    for part in reward.modules():  # of a batch larger than what is computed at once
        if hasattr(part, "IMAGES_AT_ONCE"):
            monkeypatch.setattr(part, "IMAGES_AT_ONCE", 3)
    torch.testing.assert_close(reward(images, PROMPTS), scores, rtol=1e-5, atol=1e-5)
    assert len(set(scores.tolist())) > 1 or type(reward).__name__ == "ShapesTruth"


def test_a_broken_image_has_no_score(reward: Reward, images: Tensor) -> None:
    scores = reward(images, PROMPTS)
    images[1, 0, 3, 3] = float("nan")
    broken = reward(images, PROMPTS)
    assert broken.isnan().tolist() == [False, True, False, False]
    if reward.scope == "sample":
        torch.testing.assert_close(broken[[0, 2, 3]], scores[[0, 2, 3]])


def test_frozen_and_never_in_training_mode(reward: Reward, images: Tensor) -> None:
    assert not any(weight.requires_grad for weight in reward.parameters())
    before = reward(images, PROMPTS)
    bank = RewardBank({"it": reward}, {"it": 1.0})
    torch.nn.ModuleList([bank]).train()
    assert not any(module.training for module in reward.modules())
    assert torch.equal(reward(images, PROMPTS), before)


def test_no_gradient_reaches_a_weight(reward: Reward, images: Tensor) -> None:
    if reward.differentiable:
        reward(images.requires_grad_(), PROMPTS).sum().backward()
        assert images.grad is not None
    assert all(weight.grad is None for weight in reward.parameters())
