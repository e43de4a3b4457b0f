"""What tells runs apart: hashes of weights, facts in files, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lit_align.backbones import StableDiffusionBackbone
from lit_align.backbones.adapters import LoRA
from lit_align.callbacks.adapter import images_of
from lit_align.errors import ConfigError
from lit_align.identity import ADAPTER, STAMP, differences, read_stamp, stamp, versions, weights_hash
from lit_align.methods.identity import check_checkpoint, check_files, measured_otherwise
from tests.backbones.fresh import fresh


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {"a": torch.randn(64, 50, generator=draw), "b": torch.randn(7, generator=draw)}


def test_a_hash_of_weights_is_that_of_values_names_and_shapes():
    found = weights_hash(weights().items())
    assert re.fullmatch("[0-9a-f]{16}", found)
    assert weights_hash(reversed(weights().items())) == found
    assert weights_hash((n, w.bfloat16()) for n, w in weights().items()) == found
    trained = weights() | {"a": weights()["a"] + 0.02}
    others = [trained, {"a": weights()["a"]}, {"c": weights()["a"], "b": weights()["b"]}]
    others += [weights() | {"a": weights()["a"].T}, weights() | {"a": weights()["a"].reshape(50, 64)}]
    assert len({weights_hash(other.items()) for other in others} | {found}) == 6


def test_a_pretrained_model_is_the_same_whatever_is_trained_of_it(tiny):
    hashes = [
        StableDiffusionBackbone(str(tiny), **options).weight_sets.base_hash
        for options in ({}, {"lora": LoRA(rank=2)}, {"lora": None}, {"dtype": "bfloat16"})
    ]
    assert len(set(hashes)) == 1


def adapter(backbone: StableDiffusionBackbone, folder: Path, **facts: Any) -> Path:
    """An adapter as a run leaves it."""
    backbone.weight_sets.save(folder)
    stamp(folder / ADAPTER, {"base": backbone.weight_sets.base_hash, "images": 8} | facts)
    return folder


def test_equal_adapters_are_equal_to_the_byte(tiny, tmp_path):
    """safetensors writes metadata, and Python sets, in an order that changes from time to time."""
    backbone = fresh(StableDiffusionBackbone, tiny)
    files = [adapter(backbone, tmp_path / str(number)) / ADAPTER for number in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    header = files[0].read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    settings = json.loads(header["__metadata__"]["lora_adapter_metadata"])
    assert settings["unet.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]


def test_an_adapter_says_what_it_is_and_loads_as_before(tiny, tmp_path):
    backbone = fresh(StableDiffusionBackbone, tiny)
    backbone.weight_sets.save(tmp_path / "plain")
    folder = adapter(backbone, tmp_path / "said", method="DDPOModule")
    one, two = (load_file(place / ADAPTER) for place in (tmp_path / "plain", folder))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert read_stamp(folder) == read_stamp(folder / ADAPTER)
    assert read_stamp(folder) == {
        "base": backbone.weight_sets.base_hash,
        "images": 8,
        "method": "DDPOModule",
    }
    assert images_of(folder) == 8
    pipeline = StableDiffusionPipeline.from_pretrained(tiny, safety_checker=None)
    pipeline.load_lora_weights(folder)
    assert pipeline.get_active_adapters()


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0{}", b"\0" * 8])
def test_files_that_say_nothing_have_no_facts(content, tmp_path):
    (tmp_path / ADAPTER).write_bytes(content)
    assert read_stamp(tmp_path) is None
    save_file({"a": torch.zeros(1)}, tmp_path / ADAPTER)
    assert read_stamp(tmp_path) is None
    assert read_stamp(tmp_path / "nowhere") is None
    (tmp_path / STAMP).write_text("[]")
    assert read_stamp(tmp_path) is None


def test_adapters_are_known_with_what_they_say(tiny, tmp_path):
    backbone = fresh(StableDiffusionBackbone, tiny)
    folder = adapter(backbone, tmp_path / "a", guidance=3.0)
    mixed = StableDiffusionBackbone(str(tiny), adapters={str(folder): 0.5}).weight_sets
    assert mixed.stamps[str(folder)]["guidance"] == 3.0
    (found,) = mixed.file_hashes.values()
    for parameter in backbone.weight_sets.parameters_of("policy"):
        torch.nn.init.ones_(parameter)
    adapter(backbone, folder)  # its run went on
    (other,) = StableDiffusionBackbone(
        str(tiny), adapters={str(folder): 0.5}
    ).weight_sets.file_hashes.values()
    assert found.endswith(" x 0.5")
    assert found != other


NOW: dict[str, Any] = {
    "method": "DDPOModule",
    "base": "aaaa",
    "others": "bbbb",
    "files": {},
    "sampler": {"class": "DDIM", "steps": 10, "chain": "cccc"},
    "guidance": 1.0,
    "rewards": {"clip": "CLIPScore x 1"},
    "data": {"prompts": "10 rows dddd"},
    "versions": versions(),
}


def test_adapters_of_another_model_are_refused_or_taken_by_name():
    check_files({"a": NOW, "old": {}}, NOW, accepted=False)
    stamps = {"logs/adapter": NOW | {"base": "eeee"}}
    with pytest.raises(ConfigError, match=r"logs/adapter .*eeee.*aaaa.*--accept_other_base true"):
        check_files(stamps, NOW, accepted=False)
    with pytest.warns(UserWarning, match=r"logs/adapter .*eeee.*aaaa.*accepted anyway"):
        check_files(stamps, NOW, accepted=True)


def test_how_an_adapter_was_sampled_is_told_where_it_differs(caplog):
    with caplog.at_level("INFO", "lit_align"):
        check_files({"a": NOW | {"guidance": 7.5}}, NOW, accepted=False)
    assert caplog.messages == ["a was trained with another guidance 7.5 -> 1"]


@pytest.mark.parametrize(
    ("name", "value", "fit", "test"),
    [
        ("method", "AlignPropModule", "DDPOModule counts and optimises differently", None),
        ("base", "eeee", "another model .*--accept_other_base", "another model .*--accept_other_base"),
        ("others", "eeee", "another model", "another model"),
        ("files", {"policy": "eeee"}, "another model", "another model"),
        ("data", {"prompts": "11 rows eeee"}, "other data .*11 rows eeee -> .*--accept_other_data", None),
        ("guidance", 3.0, None, None),
        ("rewards", {"clip": "CLIPScore x 2"}, None, None),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_or_taken_by_name(name, value, fit, test):
    saved = NOW | {name: value}
    for is_fit, refused in ((True, fit), (False, test)):
        if refused is None:
            check_checkpoint(saved, NOW, is_fit, False, False)
        else:
            with pytest.raises(ConfigError, match=refused):
                check_checkpoint(saved, NOW, is_fit, False, False)
            if name != "method":
                with pytest.warns(UserWarning, match=r"made with .* -> "):
                    check_checkpoint(saved, NOW, is_fit, True, True)
    check_checkpoint(NOW, NOW, True, False, False)
    check_checkpoint({}, NOW, True, False, False)  # of an edition that said nothing
    assert set(measured_otherwise(saved, NOW)) == {name} - {"method"}
    assert not measured_otherwise(NOW, NOW)
    assert not measured_otherwise({}, NOW)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval_sampler", {"class": "DDIM", "steps": 5, "chain": "eeee"}),
        ("seed", 1),
        ("weights", {"a": 0.9, "b": 0.1}),
        ("held_out", "8 images eeee"),
    ],
)
def test_facts_that_earlier_editions_did_not_write_are_compared_where_they_are_there(name, value):
    facts: dict[str, Any] = {"eval_sampler": NOW["sampler"], "seed": 0, "held_out": "8 images ffff"}
    now = NOW | facts | {"weights": {"a": 0.5, "b": 0.5}}
    assert not measured_otherwise(NOW, now)
    assert set(measured_otherwise(now | {name: value}, now)) == {name}


def test_rewards_of_several_tasks_are_compared_where_all_of_them_are_named():
    now = NOW | {"rewards": {"a/clip": "CLIPScore x 1", "b/blue": "Blue x 1"}, "seed": 0}
    assert not measured_otherwise(NOW, now)  # an earlier edition named the first task's
    assert set(measured_otherwise(now | {"rewards": now["rewards"] | {"b/blue": "Blue"}}, now)) == {"rewards"}


def test_other_versions_are_told(caplog):
    saved = NOW | {"versions": versions() | {"torch": "1.0"}}
    with caplog.at_level("INFO", "lit_align"):
        check_checkpoint(saved, NOW, True, False, False)
    assert caplog.messages == [f"the checkpoint was written with torch 1.0 -> {versions()['torch']}"]
    assert not differences(NOW, NOW)
