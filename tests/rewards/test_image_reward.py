"""ImageReward against the models that its checkpoint was written from, and transformers' processor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from lit_align.errors import ConfigError
from lit_align.rewards import ImageReward
from lit_align.shapes.recipe.images import as_images
from tests.rewards import published

PROMPTS = ["a red circle", "Two blue squares", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("image_reward")
    published.image_reward(folder)
    return folder


@pytest.mark.parametrize("shape", [(16, 16), (40, 24), (24, 40)])
def test_scores_are_those_of_the_parts(folder: Path, shape: tuple[int, int], tmp_path: Path) -> None:
    vision, text, head = published.image_reward(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    values = processor(list(pixels), return_tensors="pt").pixel_values
    tokens = published.bert_tokenizer(tmp_path)(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    with torch.no_grad():
        seen = vision(values).last_hidden_state
        read = text(
            tokens.input_ids,
            tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            is_decoder=False,
        )
        expected = (head(read.last_hidden_state[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 1e-3
    scores = ImageReward(str(folder))(as_images(pixels), PROMPTS)
    tolerance = 1e-5 if shape == (16, 16) else 1e-2  # theirs is rounded to 8 bits after the resize
    torch.testing.assert_close(scores, expected, rtol=0, atol=tolerance)


def test_precision_and_a_safetensors_copy(folder: Path, tmp_path: Path) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = ImageReward(str(folder))(images, PROMPTS)
    state = torch.load(folder / "ImageReward.pt", weights_only=True)
    state = {name: weight.clone() for name, weight in state.items()}
    save_file(state, tmp_path / "ImageReward.safetensors")
    copy = ImageReward(str(tmp_path / "ImageReward.safetensors"), processor=str(folder))
    assert torch.equal(copy(images, PROMPTS), expected)
    low = ImageReward(str(folder), dtype="bfloat16")
    assert low.text.dtype == torch.bfloat16
    torch.testing.assert_close(low(images, PROMPTS), expected, rtol=0, atol=0.02)


def test_what_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(
        ConfigError, match=r"not a checkpoint of ImageReward: it has no embeddings.*; give Im"
    ):
        ImageReward(str(tmp_path), processor=str(folder))
    torch.save([1, 2], tmp_path / "ImageReward.pt")
    with pytest.raises(ConfigError, match="does not hold a state dict"):
        ImageReward(str(tmp_path), processor=str(folder))
