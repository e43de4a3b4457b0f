"""The bank: weights, monitored rewards, gradients, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.rewards import (
    BlackBoxReward,
    Brightness,
    JPEGIncompressibility,
    PictureReward,
    Redness,
    Reward,
    RewardBank,
)

PROMPTS = ["a", "b", "c"]


class Column(Reward):
    """The data's own number; for the tests of what reaches a reward."""

    differentiable = False
    scope = "group"

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        assert columns is not None
        assert groups is not None
        return torch.tensor(columns["score"]) + 10 * groups


class Attached(Column):
    """Claims to be a black box, and would leak a gradient all the same."""

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        assert not torch.is_grad_enabled()
        return images.sum(dim=(1, 2, 3))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_total_is_the_weighted_sum_of_the_trained_ones(images: Tensor) -> None:
    bank = RewardBank(
        {"red": Redness(), "light": Brightness(), "jpeg": JPEGIncompressibility(), "zero": Brightness()},
        {"red": 2.0, "light": -0.5, "zero": 0.0},
    )
    out = bank(images, PROMPTS)
    torch.testing.assert_close(
        out.total, 2 * Redness()(images, PROMPTS) - 0.5 * Brightness()(images, PROMPTS)
    )
    assert list(out.parts) == ["red", "light", "jpeg", "zero"]
    torch.testing.assert_close(out.parts["jpeg"], JPEGIncompressibility()(images, PROMPTS))
    assert bank.trained == ("red", "light")
    assert bank.monitored == ("jpeg", "zero")


def test_groups_and_columns_reach_the_rewards(images: Tensor) -> None:
    out = RewardBank({"c": Column()}, {"c": 1.0})(
        images, PROMPTS, torch.tensor([0, 0, 1]), {"score": [1.0, 2.0, 3.0]}
    )
    assert out.total.tolist() == [1.0, 2.0, 13.0]


def test_nan_of_a_trained_reward_spreads_and_of_a_monitored_one_does_not(images: Tensor) -> None:
    rewards: dict[str, Reward] = {"red": Redness(), "column": Column()}
    rest = (torch.zeros(3), {"score": [0.0, float("nan"), 0.0]})
    assert RewardBank(rewards, {"red": 1.0})(images, PROMPTS, *rest).total.isfinite().all()
    both = RewardBank(rewards, {"red": 1.0, "column": 1.0})(images, PROMPTS, *rest)
    assert both.total.isnan().tolist() == [False, True, False]
    assert both.parts["red"].isfinite().all()


def test_only_trained_differentiable_rewards_carry_gradient(images: Tensor) -> None:
    rewards: dict[str, Reward] = {"red": Redness(), "light": Brightness(), "box": Attached()}
    out = RewardBank(rewards, {"red": 3.0, "box": 1.0})(images.requires_grad_(), PROMPTS)
    out.total.sum().backward()
    assert images.grad is not None
    expected = 3 / 64 * torch.tensor([1.0, -0.5, -0.5]).view(1, 3, 1, 1).expand_as(images)
    torch.testing.assert_close(images.grad, expected)
    assert not any(part.requires_grad for part in out.parts.values())


def test_a_bank_respects_no_grad_and_half_precision(images: Tensor) -> None:
    bank = RewardBank({"red": Redness()}, {"red": 1.0})
    with torch.no_grad():
        assert not bank(images.requires_grad_(), PROMPTS).total.requires_grad
    assert bank(images.half(), PROMPTS).total.dtype == torch.float32


def test_capabilities(images: Tensor) -> None:
    rewards: dict[str, Reward] = {"red": Redness(), "jpeg": JPEGIncompressibility(), "column": Column()}
    mixed = RewardBank(rewards, {"red": 1.0, "jpeg": 1.0, "column": 1.0})
    assert not mixed.differentiable
    assert mixed.black_box == ("jpeg", "column")
    monitoring = RewardBank(rewards, {"red": 1.0})
    assert monitoring.differentiable
    assert monitoring.black_box == ()


@pytest.mark.parametrize("name", ["type", "keys", "forward", "a-b_9"])
def test_names_that_collide_with_nothing(name: str, images: Tensor) -> None:
    bank = RewardBank({name: Redness()}, {name: 1.0})
    assert list(bank(images, PROMPTS).parts) == [name]
    assert isinstance(bank.rewards[name], Redness)


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        ([], {}, "rewards is empty"),
        (["red"], {}, "no positive weight.*red"),
        (["red"], {"red": 0.0}, "no positive weight"),
        (["red"], {"red": -1.0}, "no positive weight"),
        (["red", "light"], {"red": 1.0, "rde": 1.0}, "'rde'.*red, light"),
        (["red"], {"red": float("nan")}, "'red'.*nan.*finite"),
        (["red/blue"], {"red/blue": 1.0}, "'red/blue'.*letters"),
        (["red\n"], {"red\n": 1.0}, "letters"),
        ([False], {False: 1.0}, "The reward name False .* put it in quotes"),  # no, of YAML
    ],
)
def test_refusals(names: list[Any], weights: dict[Any, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardBank({name: Redness() for name in names}, weights)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Redness, r"'red' is the class Redness; give a Reward that was made, such as Redness\(\)"),
        ("Redness", "'red' is a str"),
        (None, "'red' is a NoneType"),
    ],
)
def test_what_is_no_reward_is_named(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardBank({"red": given}, {"red": 1.0})


@pytest.mark.parametrize(
    ("rewards", "weights", "said"),
    [
        ([Redness()], [1.0], r"RewardBank takes rewards by name and weights by the same names; .* as in Rew"),
        ({"red": Redness()}, 1.0, "RewardBank takes rewards by name and weights by the same names"),
        ({"red": Redness()}, {"red": "1"}, "The weight of 'red' in weights is '1'; give a finite number"),
        ({"red": 1.0}, {"red": Redness()}, r"The weight of 'red' in weights is Redness\(\); give"),
    ],
)
def test_what_is_no_bank_in_python(rewards: Any, weights: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RewardBank(rewards, weights)


def test_the_old_name_of_black_boxes() -> None:
    assert PictureReward is BlackBoxReward
