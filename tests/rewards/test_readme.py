"""The rewards' page: its table against the classes, and its Python."""

import inspect
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
import yaml

import lit_align.rewards
from lit_align.rewards import Reward, RewardBank
from tests.rewards import catalogue

PAGE = Path(lit_align.rewards.__file__).with_name("README.md").read_text()


def table() -> dict[str, dict[str, str]]:
    """The rows of the first table by reward."""
    lines = re.search(r"\| reward \| what it measures \|.*?\n\n", PAGE, re.DOTALL)
    assert lines is not None
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[0].strip().splitlines()]
    rows: dict[str, dict[str, str]] = {}
    for row in cells[2:]:
        for name in re.findall(r"`(\w+)`", row[0]):
            assert name not in rows
            rows[name] = dict(zip(cells[0], row, strict=True))
    return rows


def shipped() -> dict[str, type[Reward]]:
    """Every reward class that can be made, by name."""
    there = {name: getattr(lit_align.rewards, name) for name in lit_align.rewards.__all__}
    kinds = {n: c for n, c in there.items() if inspect.isclass(c) and issubclass(c, Reward)}
    return {name: kind for name, kind in kinds.items() if not inspect.isabstract(kind)}


def test_every_reward_has_a_row_and_every_row_a_reward() -> None:
    assert set(table()) == set(shipped())


def test_the_table_says_what_the_classes_declare() -> None:
    for name, kind in shipped().items():
        row, parameters = table()[name], inspect.signature(kind).parameters
        if name == "FunctionReward":
            assert (row["gradient"], row["scope"]) == ("as you say", "as you say")
            continue
        assert row["gradient"] == ("yes" if kind.differentiable else "no"), name
        assert row["scope"] == kind.scope, name
        told = re.match(r"`([^`]*)`|(none)|$", row["model by default"])
        assert told is not None
        if "pretrained" not in parameters:
            assert told[0] == "", name
        elif parameters["pretrained"].default is inspect.Parameter.empty:
            assert told[2] == "none", name
        else:
            assert told[1] == parameters["pretrained"].default, name


def test_the_table_of_scorers_is_the_catalogue() -> None:
    """``python -m tests.rewards.catalogue`` writes it."""
    assert catalogue.found(PAGE) == catalogue.table()


def millions(kind: Any, config: Any, **options: Any) -> float:
    with torch.device("meta"):
        return sum(weight.numel() for weight in kind(config, **options).parameters()) / 1e6


def clip(text: int, text_layers: int, vision: int, vision_layers: int) -> transformers.CLIPConfig:
    def tower(width: int, layers: int, heads: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width}
        return sizes | {"num_hidden_layers": layers, "num_attention_heads": heads}

    return transformers.CLIPConfig(
        text_config=tower(text, text_layers, text // 64),
        vision_config=tower(vision, vision_layers, 16) | {"patch_size": 14},
        projection_dim=text,
    )


def test_sizes_of_the_catalogue() -> None:
    assert millions(transformers.CLIPModel, clip(768, 12, 1024, 24)) == pytest.approx(
        catalogue.CLIP_L, abs=0.1
    )
    assert millions(transformers.CLIPModel, clip(1024, 24, 1280, 32)) == pytest.approx(
        catalogue.CLIP_H, abs=0.1
    )
    vision = transformers.BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
    )
    text = transformers.BlipTextConfig(
        vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=12, is_decoder=True
    )
    size = millions(transformers.BlipVisionModel, vision)
    size += millions(transformers.BlipTextModel, text, add_pooling_layer=False)
    head = sum(a * b + b for a, b in pairwise((768, 1024, 128, 64, 16, 1))) / 1e6
    assert size + head == pytest.approx(catalogue.BLIP, abs=0.2)


@pytest.mark.slow  # 8 CPU-seconds: the file of the model is long
def test_size_of_the_large_model() -> None:
    text = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944}
    heads = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16}
    config = transformers.Qwen2VLConfig(text_config=text | heads, vision_config=vision)
    size = millions(transformers.Qwen2VLForConditionalGeneration, config)
    assert size == pytest.approx(catalogue.QWEN, abs=0.1)


def test_the_python_of_the_page_makes_a_bank() -> None:
    module = ModuleType("page")
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, vars(module))  # our own page
    made = {"blue": module.blueness, "red": module.Colour(0), "contrast": module.Contrast()}
    out = RewardBank(made, {"blue": 1.0})(torch.rand(2, 3, 8, 8), ["", ""])
    assert all(part.isfinite().all() for part in out.parts.values())


def test_the_yaml_of_the_page_is_yaml() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 5
    assert all(isinstance(yaml.safe_load(block), dict) for block in blocks)
