"""A reward that is a plain function is named by its import path, in every place where a reward is named."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning import Callback

from lit_align.cli.bank import read_bank
from lit_align.cli.functions import arguments_with_functions, with_functions
from lit_align.cli.trainer_options import _classes
from lit_align.errors import ConfigError
from lit_align.rewards import FunctionReward

MINE = f"{__name__}.mine"
HALVES = f"{__name__}.halves"


def mine(images: Any, prompts: Any) -> Any:
    return images.mean((1, 2, 3))


def scaled(images: Any, prompts: Any, by: float) -> Any:
    return by * mine(images, prompts)


halves = partial(scaled, by=0.5)


class NoReward:
    """A class that is none."""


MADE = {"class_path": "FunctionReward", "init_args": {"function": MINE}}


@pytest.mark.parametrize("given", [MINE, {"class_path": MINE}, MADE])
def test_a_function_in_a_file(given: Any, tmp_path: Path) -> None:
    root = {"rewards": {"it": given, "red": {"class_path": "Redness"}}, "weights": {"it": 1.0}}
    whole = {"model": {"init_args": {"rewards": {"class_path": "RewardBank", "init_args": root}}}}
    bank = with_functions(whole)["model"]["init_args"]["rewards"]["init_args"]
    assert bank["rewards"] == {"it": MADE, "red": {"class_path": "Redness"}}
    (tmp_path / "bank.yaml").write_text(yaml.safe_dump(whole))
    reward = read_bank(str(tmp_path / "bank.yaml")).rewards["it"]
    assert isinstance(reward, FunctionReward)
    assert reward.function.__name__ == "mine"


def test_another_object_that_can_be_called(tmp_path: Path) -> None:
    assert arguments_with_functions(["--model.rewards.rewards.it", HALVES])[1] == "FunctionReward"
    (tmp_path / "bank.yaml").write_text(f"rewards: {{it: {HALVES}}}\nweights: {{it: 1}}")
    bank = read_bank(str(tmp_path / "bank.yaml"))
    assert bank(torch.ones(2, 3, 8, 8), ["a", "b"]).total.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("NoReward", r"rewards\.rewards: .*\.NoReward is not a subclass of Reward; derive it from Reward"),
        ("nothing", "test_functions has no nothing"),
    ],
)
def test_what_is_no_reward_is_named(given: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bank.yaml").write_text(f"rewards: {{it: {__name__}.{given}}}\nweights: {{it: 1}}")
    with pytest.raises(ConfigError, match=said):
        read_bank(str(tmp_path / "bank.yaml"))


def hello() -> Callback:
    return Callback()


def test_a_function_that_makes_a_callback_is_no_class_of_one() -> None:
    given = [Namespace(class_path=f"{__name__}.hello"), Namespace(class_path="lightning.Callback")]
    assert list(_classes(given)) == [Callback]


def test_a_module_that_raises_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "unlicensed.py").write_text("raise RuntimeError('no licence')")
    (tmp_path / "bank.yaml").write_text("rewards: {it: unlicensed.reward}\nweights: {it: 1}")
    with pytest.raises(ConfigError, match=r"RuntimeError: no licence \(unlicensed\.py, line 1\); correct it"):
        read_bank(str(tmp_path / "bank.yaml"))


def test_options_of_a_function() -> None:
    given = {"rewards": {"it": {"class_path": MINE, "init_args": {"differentiable": True}}}}
    made = {"differentiable": True, "function": MINE}
    assert with_functions(given)["rewards"]["it"]["init_args"] == made


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.rewards.rewards.it", MINE],
        [f"--model.rewards.rewards.it={MINE}"],
        ["--model.init_args.rewards.init_args.rewards.it.class_path", MINE],
        ["--model.tasks.a.rewards.rewards.it", MINE],
    ],
)
def test_a_function_on_the_command_line(arguments: list[str]) -> None:
    option = arguments[0].partition("=")[0].removesuffix(".class_path")
    made = [option, "FunctionReward", f"{option}.function", MINE]
    assert arguments_with_functions(["fit", *arguments, "--x", "1"]) == ["fit", *made, "--x", "1"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model.rewards.rewards", {"it": MINE, "red": {"class_path": "Redness"}}),
        ("--model.rewards", {"class_path": "RewardBank", "init_args": {"rewards": {"it": MINE}}}),
        (
            "--model.tasks",
            {"a": {"rewards": {"init_args": {"rewards": {"it": MINE}, "weights": {"it": 0.1}}}}},
        ),
    ],
)
def test_a_function_in_a_mapping_on_the_command_line(option: str, value: dict[str, Any]) -> None:
    """It was called no subclass of Reward."""
    text = json.dumps(value)
    made = text.replace(json.dumps(MINE), json.dumps(MADE))
    assert arguments_with_functions([option, text]) == [option, made]
    assert arguments_with_functions([f"{option}={text}"]) == [f"{option}={made}"]
    for other in ("{a: 1e-3}", "{a: [", "{}"):
        assert arguments_with_functions([option, other]) == [option, other]


@pytest.mark.parametrize(
    "given",
    ["Redness", "lit_align.rewards.Redness", "no_module.at_all", f"{__name__}.nothing", 3, None, "os.path"],
)
def test_what_is_no_function_stays(given: Any) -> None:
    assert with_functions({"rewards": {"it": given}}) == {"rewards": {"it": given}}
    assert arguments_with_functions(["--model.rewards.rewards.it", str(given)])[1] == str(given)
    assert arguments_with_functions(["--model.sampler", MINE]) == ["--model.sampler", MINE]
