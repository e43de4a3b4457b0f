"""A tiny CLIP with a tokenizer of twenty words, an aesthetic head on it, a tiny YOLOS, saved as real ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, YolosConfig, YolosForObjectDetection

from tests.rewards import published

WORDS = ["a", "red", "blue", "circle", "square", "and", "on", "the"]
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries of a server."""
    monkeypatch.setattr("lit_align.rewards.http.FIRST_WAIT", 1e-3)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("clip")
    special = ["<|startoftext|>", "<|endoftext|>"]
    characters = sorted(set("".join(WORDS)))
    tokens = special + characters + [f"{c}</w>" for c in characters]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=8
    )
    tower: dict[str, float] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tower["attention_dropout"] = 0.5  # must never be felt
    text = {
        **tower,
        "vocab_size": len(tokens),
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    vision = {**tower, "image_size": 8, "patch_size": 4}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8, logit_scale_init_value=3.0)
    torch.manual_seed(0)
    model = CLIPModel(config)
    for weight in model.parameters():  # the default start is so small that all images look alike
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture(scope="session")
def head_file(clip_folder: Path) -> Path:
    """An aesthetic head in LAION's format, beside the CLIP folder."""
    sizes, generator = (8, 12, 6, 4, 3, 1), torch.Generator().manual_seed(0)
    state = {}
    for layer, inputs, outputs in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        state[f"layers.{layer}.weight"] = torch.randn(outputs, inputs, generator=generator)
        state[f"layers.{layer}.bias"] = torch.randn(outputs, generator=generator)
    save_file(state, clip_folder.with_name("head.safetensors"))
    return clip_folder.with_name("head.safetensors")


@pytest.fixture(scope="session")
def detector_folder(clip_folder: Path) -> Path:
    """A detector of two kinds with five queries, beside the CLIP folder."""
    folder = clip_folder.with_name("detector")
    config = YolosConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_dropout_prob=0.5,  # must never be felt
        image_size=[16, 16],
        patch_size=4,
        num_detection_tokens=5,
        id2label={0: "circle", 1: "square"},
        label2id={"circle": 0, "square": 1},
    )
    torch.manual_seed(0)
    model = YolosForObjectDetection(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    processor = {"image_processor_type": "YolosImageProcessor", "size": size, "do_pad": False}
    statistics = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | statistics))
    return folder


@pytest.fixture(scope="session")
def published_folders(clip_folder: Path) -> Path:
    """Checkpoints in the formats of published scorers, beside the CLIP folder."""
    published.hps(clip_folder.with_name("hps"))
    published.hpsv3(clip_folder.with_name("hpsv3"))
    published.image_reward(clip_folder.with_name("image_reward"))
    published.qwen_vl(clip_folder.with_name("qwen"))
    return clip_folder.parent
