"""The rewards' page: its table against the classes, and its Python."""

import inspect
import re
from pathlib import Path
from types import ModuleType

import torch
import yaml

import lit_align.rewards
from lit_align.rewards import Reward, RewardBank

PAGE = Path(lit_align.rewards.__file__).with_name("README.md").read_text()


def table() -> dict[str, dict[str, str]]:
    """The rows of the first table by reward."""
    lines = re.search(r"\| reward \|.*?\n\n", PAGE, re.DOTALL)
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


def test_the_python_of_the_page_makes_a_bank() -> None:
    module = ModuleType("page")
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, vars(module))  # our own page
    made = {"blue": module.blueness, "red": module.Colour(0), "contrast": module.Contrast()}
    out = RewardBank(made, {"blue": 1.0})(torch.rand(2, 3, 8, 8), ["", ""])
    assert all(part.isfinite().all() for part in out.parts.values())


def test_the_yaml_of_the_page_is_yaml() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    assert all(isinstance(yaml.safe_load(block), dict) for block in blocks)
