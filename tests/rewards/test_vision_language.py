"""Rewards that ask a vision-language model, with a tiny one of Qwen2-VL's form and random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lit_align.errors import ConfigError
from lit_align.rewards import HPSv3, UnifiedReward, VQAScore
from lit_align.rewards.templates import HPSV3, UNIFIED_REWARD
from lit_align.rewards.unified_reward import PATTERN, number
from lit_align.shapes.recipe.images import as_images
from tests.rewards import published

PROMPTS = ["a red circle", "two blue squares", "a {} and the end<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen")
    published.qwen_vl(folder)
    return folder


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)


def direct(tokenizer: Any, model: Any, image: np.ndarray, asked: str, **size: Any) -> Any:
    """The model's own output for one image: no batch, no padding, the chat written out."""
    values = Qwen2VLImageProcessorPil()(Image.fromarray(image), return_tensors="pt", **size)
    marks = "<|image_pad|>" * (int(values.image_grid_thw.prod()) // 4)
    chat = (
        f"<|im_start|>user\n<|vision_start|>{marks}<|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer(chat, return_tensors="pt").input_ids
    types = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    with torch.no_grad():
        return ids, model(ids, mm_token_type_ids=types, **values, output_hidden_states=True)


SMALL = {"size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 4 * 28 * 28}}


def test_vqa_score_is_the_probability_of_yes(folder: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    model, tokenizer = published.qwen_vl(tmp_path), published.qwen_tokenizer()
    expected = []
    for image, prompt in zip(pixels, PROMPTS, strict=True):
        asked = f'Does this figure show "{prompt}"? Please answer Yes or No.'
        _, out = direct(tokenizer, model, image, asked, **SMALL)
        odds = out.logits[0, -1].softmax(-1)
        expected.append(odds[tokenizer.convert_tokens_to_ids("Yes")])
    reward = VQAScore(str(folder), dtype="float32")
    scores = reward(as_images(pixels), PROMPTS)
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=0)
    assert len(set(scores.tolist())) == 3
    no = VQAScore(str(folder), answer="No", dtype="float32")
    assert no.model is reward.model
    assert not torch.equal(no(as_images(pixels), PROMPTS), scores)


def test_questions_of_the_prompt_are_asked_each(folder: Path, pixels: np.ndarray) -> None:
    images = as_images(pixels)
    asked = [[["Is there a dog?", "Yes"], ["Is it blue?", "No"]], [], [["Is there a cat?", "Yes"]]]
    reward = VQAScore(str(folder), questions="vqa_list", dtype="float32")
    scores = reward(images, PROMPTS, columns={"vqa_list": asked})
    single = [
        VQAScore(str(folder), question="Is there a dog?{}", dtype="float32")(images[:1], [""]),
        VQAScore(str(folder), question="Is it blue?{}", answer="No", dtype="float32")(images[:1], [""]),
    ]
    torch.testing.assert_close(scores[:1], (single[0] * single[1]).sqrt(), rtol=1e-4, atol=0)
    assert scores.isnan().tolist() == [False, True, False]
    with pytest.raises(ConfigError, match=r"'vqa_list' holds \['Is it.'\]; give a list of pairs"):
        reward.check_columns({"vqa_list": [None, ["Is it?"]]})
    with pytest.raises(ConfigError, match=r"no column 'vqa_list'; its columns: other. Set questions"):
        reward(images, PROMPTS, columns={"other": [1, 2, 3]})


def test_a_written_score_is_read(folder: Path, pixels: np.ndarray) -> None:
    """A model with random weights writes anything: what it writes is looked for."""
    reward = UnifiedReward(str(folder), max_new_tokens=6, dtype="float32")
    said = reward.model.answers(
        as_images(pixels), [UNIFIED_REWARD.replace("{}", prompt) for prompt in PROMPTS], 6
    )
    assert len(said) == 3
    assert reward(as_images(pixels), PROMPTS).isnan().all()
    reward.pattern = r"^([\s\S])"  # the number is whatever it writes first
    with pytest.raises(ValueError, match="could not convert"):
        reward(as_images(pixels), PROMPTS)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The image shows it.\nFinal Score: 4", 4.0),
        ("final score: 3.25 of 5", 3.25),
        ("Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 3", 3.5),
        ("I cannot tell.", float("nan")),
        ("", float("nan")),
    ],
)
def test_the_forms_of_written_scores(text: str, score: float) -> None:
    assert number(text, PATTERN) == pytest.approx(score, nan_ok=True)


def test_precision_is_bfloat16_unless_asked(folder: Path, pixels: np.ndarray) -> None:
    low, full = VQAScore(str(folder)), VQAScore(str(folder), dtype="float32")
    assert low.model.model.dtype == torch.bfloat16
    scores = low(as_images(pixels), PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, full(as_images(pixels), PROMPTS), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"question": "Is it?"}, r"question 'Is it\?' has no \{\}"),
        ({"pretrained": "./none"}, "is not a folder"),
    ],
)
def test_questions_and_models_that_cannot_work(options: dict[str, str], said: str, folder: Path) -> None:
    for kind in (VQAScore, UnifiedReward):
        with pytest.raises(ConfigError, match=said):
            kind(**({"pretrained": str(folder)} | options))


@pytest.mark.parametrize(("pattern", "said"), [("(", "not a regular expression"), ("a|b", "has 0 groups")])
def test_patterns_that_cannot_work(pattern: str, said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        UnifiedReward(str(folder), pattern=pattern)


def test_a_model_without_a_processor(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ConfigError, match=r"cannot load .*check that the folder"):
        VQAScore(str(tmp_path))


# HPSv3


def test_hpsv3_is_the_head_at_its_token(tmp_path: Path, pixels: np.ndarray) -> None:
    model, head = published.hpsv3(tmp_path)
    tokenizer = published.qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    token = tokenizer.convert_tokens_to_ids("<|Reward|>")
    size = {"size": {"shortest_edge": 256 * 28 * 28, "longest_edge": 256 * 28 * 28}}
    head.eval()
    expected = []
    for image, prompt in zip(pixels[:2], PROMPTS[:2], strict=True):
        ids, out = direct(tokenizer, model, image, HPSV3.replace("{}", prompt), **size)
        assert (ids == model.config.image_token_id).sum() == 15 * 18  # 420 x 504 pixels: about 256 x 28 x 28
        place = int((ids[0] == token).nonzero()[0, 0])
        with torch.no_grad():
            expected.append(head(out.hidden_states[-1][0, place])[0])
    scores = HPSv3(str(tmp_path), str(tmp_path), dtype="float32")(as_images(pixels[:2]), PROMPTS[:2])
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_hpsv3_needs_its_checkpoint_and_its_base(tmp_path: Path) -> None:
    published.hpsv3(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "none.pt")
    with pytest.raises(
        ConfigError, match=r"not a checkpoint of HPSv3: it has no language_model.*HPSv3.safet"
    ):
        HPSv3(str(tmp_path / "none.pt"), str(tmp_path))
    (base := tmp_path / "base").mkdir()
    with pytest.raises(ConfigError, match="cannot load"):
        HPSv3(str(tmp_path), str(base))
    tokenizer = published.qwen_vl(base) and published.qwen_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(base)
    with pytest.raises(ConfigError, match=r"has \d+ tokens with <\|Reward\|>, but the checkpoint has"):
        HPSv3(str(tmp_path), str(base))
