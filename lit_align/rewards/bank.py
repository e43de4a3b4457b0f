"""A set of weighted rewards: those with a weight are trained on, the others are only monitored."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsFloat, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_align.errors import ConfigError
from lit_align.rewards.base import Reward, are_whole
from lit_align.rewards.contents import contents
from lit_align.rewards.function import FunctionReward
from lit_align.rewards.scoring import score, try_out
from lit_align.rewards.shapes import ShapesTruth
from lit_align.shapes.world import in_grammar


@dataclass(frozen=True)
class RewardOutput:
    """What a bank says about B images.

    Attributes:
        total: ``(B,)`` weighted sum of the trained rewards; NaN where one of them is. Carries gradient for
            differentiable rewards.
        parts: Every reward's own score by name, ``(B,)`` each, unweighted and detached.
        report: What is reported, on the CPU: ``{"reward": (B,), "reward/<name>": (B,)}``, the total and the
            parts, with the value of the set in place of an image's credit for it.
    """

    total: Tensor
    parts: dict[str, Tensor]
    report: dict[str, Tensor]


class RewardBank(nn.Module):
    """Weighs rewards and keeps monitored ones out of training.

    A reward without a weight, or with weight 0, is *monitored*: it is computed without gradient and reported,
    and never touches the total, not even by a NaN. Monitor what you do not train on: it shows when the
    trained reward is exploited.

    By convention the reward named ``truth`` is the one that knows what an image really shows (for Shapes,
    its judge); methods log it as ``val/truth`` besides ``val/reward/truth``.

    Rewards that are not of this package are tried on two images (see
    :func:`lit_align.rewards.scoring.try_out`).

    Args:
        rewards: The rewards by name. Names become TensorBoard tags and columns: letters, digits, ``_`` and
            ``-``. In Python a plain function may stand for its :class:`FunctionReward`.
        weights: Weight by reward name; at least one must be positive. A negative weight makes a penalty.

    Attributes:
        kinds: The class of each reward that was given, by name; :meth:`check_model` may leave some out.
        contents: What computes each of them (see :func:`lit_align.rewards.contents.contents`).

    Raises:
        ConfigError: No reward, a bad name, a weight that is not finite or has no reward, no positive weight,
            or a reward that fails on two images.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        super().__init__()
        _check(rewards, weights)
        self.names = tuple(rewards)
        self.weights = {name: float(weights[name]) for name in rewards if weights.get(name, 0) != 0}
        # A list: a ModuleDict refuses names like "type" or "keys".
        self._rewards = nn.ModuleList(_reward(name, given).freeze() for name, given in rewards.items())
        self.kinds = {name: type(reward).__name__ for name, reward in self.rewards.items()}
        self.contents = {name: contents(reward) for name, reward in self.rewards.items()}
        for name, reward in self.rewards.items():
            try_out(name, reward)
            reward.freeze()  # again: some load their model when they are first called

    @property
    def rewards(self) -> Mapping[str, Reward]:
        """All rewards by name; they were tried when the bank was built, so that none can be put in."""
        found = dict(zip(self.names, cast(Iterable[Reward], self._rewards), strict=True))
        return MappingProxyType(found)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the rewards that the total is made of."""
        return tuple(self.weights)

    @property
    def monitored(self) -> tuple[str, ...]:
        """Names of the rewards that are only reported."""
        return tuple(name for name in self.names if name not in self.weights)

    @property
    def black_box(self) -> tuple[str, ...]:
        """Names of the trained rewards that have no gradient."""
        return tuple(name for name in self.trained if not self.rewards[name].differentiable)

    @property
    def of_sets(self) -> tuple[str, ...]:
        """Names of the trained rewards that score sets of images."""
        return tuple(name for name in self.trained if self.rewards[name].scope != "sample")

    @property
    def of_shapes(self) -> tuple[str, ...]:
        """Names of the rewards whose scores mean nothing outside the Shapes world."""
        return tuple(name for name in self.names if self.rewards[name].domain == "shapes")

    @property
    def differentiable(self) -> bool:
        """Whether every trained reward has a gradient."""
        return not self.black_box

    def check_model(self, is_shapes: bool, prompts: Sequence[str] = ()) -> None:
        """Find what cannot score the images of a model: rewards of the Shapes world on another one.

        The judge of Shapes is left out where it is only monitored, with a warning. Learned models of Shapes
        stay, with a warning.

        Args:
            is_shapes: Whether the images come from the bundled Shapes pipeline.
            prompts: Some of the prompts.

        Raises:
            ConfigError: The judge is trained on, and cannot judge such images or prompts.
        """
        judges = [name for name, reward in self.rewards.items() if isinstance(reward, ShapesTruth)]
        foreign = [prompt for prompt in prompts if not in_grammar(prompt)]
        if judges and (foreign or not is_shapes):
            what = f"the prompt {foreign[0]!r} is none" if is_shapes else "the backbone is another model"
            reason = f"ShapesTruth ({_quoted(judges)}) judges images of Shapes prompts, and {what}"
            if trained := [name for name in judges if name in self.weights]:
                raise ConfigError(
                    f"rewards: {reason}; take {_quoted(trained)} out of weights, and train on another reward"
                )
            rank_zero_warn(f"rewards: {reason}; it is left out")
            self._leave_out(judges)
        if self.of_shapes and not is_shapes:
            rank_zero_warn(
                f"rewards: the models of {_quoted(self.of_shapes)} were trained on Shapes images, and the "
                "backbone is another model: their scores say nothing about its images; leave out "
                "'pretrained: shapes' for the published models, or name others under 'pretrained'"
            )

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        """Refuse data that lack a column which a reward's code names.

        Args:
            columns: The data's columns of some images.

        Raises:
            ConfigError: They do.
        """
        for reward in self.rewards.values():
            reward.check_columns(columns)

    def _leave_out(self, names: Collection[str]) -> None:
        kept = {name: reward for name, reward in self.rewards.items() if name not in names}
        self.names, self._rewards = tuple(kept), nn.ModuleList(kept.values())

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> RewardOutput:
        """Score images with every reward; arguments as in :meth:`Reward.forward`."""
        images = at_least_float32(images)
        whole = are_whole(images)
        total, worth = images.new_zeros(len(images)), images.new_zeros(len(images))
        parts: dict[str, Tensor] = {}
        shown: dict[str, Tensor] = {}
        for name, reward in self.rewards.items():
            attach = torch.is_grad_enabled() and name in self.weights and reward.differentiable
            with torch.set_grad_enabled(attach):
                scores, value = score(name, reward, images, prompts, groups, columns)
            if not bool(whole.all()):  # whatever a reward says of what is no image
                scores, value = (one.masked_fill(~whole, torch.nan) for one in (scores, value))
            if name in self.weights:
                total = total + self.weights[name] * scores
                worth = worth + self.weights[name] * value.detach()
            parts[name], shown[f"reward/{name}"] = scores.detach(), value.detach()
        finite = total.detach().isfinite() & worth.isfinite()  # a sum of huge rewards may not be
        if not bool(finite.all()):
            total, worth = (one.masked_fill(~finite, torch.nan) for one in (total, worth))
        report = {name: value.float().cpu() for name, value in ({"reward": worth} | shown).items()}
        return RewardOutput(total, parts, report)

    def ahead(self, images: Tensor, prompts: list[str], columns: dict[str, list[Any]] | None = None) -> None:
        """Let rewards that work elsewhere begin with images that :meth:`forward` will get."""
        images = at_least_float32(images.detach())
        for reward in self.rewards.values():
            reward.ahead(images, prompts, columns)

    def weighted(
        self,
        name: str,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """One trained reward times its weight, ``(B,)``, with gradient; arguments as in :meth:`forward`."""
        images = at_least_float32(images)
        return self.weights[name] * score(name, self.rewards[name], images, prompts, groups, columns)[0]


def at_least_float32(images: Tensor) -> Tensor:
    """Images as rewards take them: sums are rounded otherwise where the channels lie innermost."""
    return images.to(torch.promote_types(images.dtype, torch.float32)).contiguous()


def _reward(name: str, given: object) -> Reward:
    """The reward that was given under a name, or that a given function is."""
    if isinstance(given, Reward):
        return given
    if isinstance(given, type) or not callable(given):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
        raise ConfigError(
            f"rewards: '{name}' is {what}; give a Reward that was made, such as Redness(), or a function of "
            "images and prompts."
        )
    return FunctionReward(given)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _check(rewards: dict[str, Reward], weights: dict[str, float]) -> None:
    """Refuse a bank that cannot work, and say what would."""
    if not isinstance(rewards, Mapping) or not isinstance(weights, Mapping):
        raise ConfigError(
            "RewardBank takes rewards by name and weights by the same names; give both, as in "
            "RewardBank({'red': Redness()}, {'red': 1.0})."
        )
    if not rewards:
        raise ConfigError("rewards is empty; give the bank at least one reward, by name.")
    for name in rewards:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            remedy = "use letters, digits, '_' and '-' only"
            if not isinstance(name, str):  # 1, yes and no are no text in YAML
                remedy = "put it in quotes, so that it is text, or use another"
            raise ConfigError(f"The reward name {name!r} in rewards cannot be used as a tag; {remedy}.")
    there = ", ".join(rewards)
    for name, weight in weights.items():
        if name not in rewards:
            raise ConfigError(
                f"weights names '{name}', but there is no such reward; the rewards there are: {there}."
            )
        if not isinstance(weight, SupportsFloat) or not math.isfinite(weight):
            raise ConfigError(f"The weight of '{name}' in weights is {weight!r}; give a finite number.")
    if not any(weight > 0 for weight in weights.values()):
        raise ConfigError(
            f"weights {weights} has no positive weight, so there is nothing to train on; "
            f"give one of these rewards a positive weight: {there}."
        )
