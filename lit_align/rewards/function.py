"""A plain Python function as a reward."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_align.rewards.base import Reward, Scope
from lit_align.rewards.calling import accepted, as_scores, title


class FunctionReward(Reward):
    """A reward that is a function ``def my_reward(images, prompts)``, named in YAML by its import path.

    The function gets images ``(B, 3, H, W)`` in [0, 1] and the B prompts. Further parameters receive the
    column of the data that has their name, ``groups``, or with ``**columns`` all columns.

    Args:
        function: The function, or any object that can be called in this way.
        differentiable: Whether its scores carry a gradient to the pixels.
        scope: What the score of an image may depend on (see :class:`Reward`).
    """

    def __init__(
        self, function: Callable[..., Any], differentiable: bool = False, scope: Scope = "sample"
    ) -> None:
        super().__init__()
        self.function, self.differentiable, self.scope = function, differentiable, scope

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        """Call the function and read what it returns (see :func:`lit_align.rewards.calling.as_scores`)."""
        returned, _ = self.shared_out(images, prompts, groups, columns)
        return as_scores(returned, images, f"The function {title(self.function)}")

    def check_columns(self, columns: Mapping[str, list[Any]]) -> None:
        accepted(self._code, torch.empty(0), [], None, columns)

    @property
    def _code(self) -> Callable[..., Any]:
        """What says by its parameters what it takes."""
        return self.function.forward if isinstance(self.function, nn.Module) else self.function

    def shared_out(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> tuple[Any, Any]:
        """What the function returns, unread: a bank reads it and knows the reward's name."""
        given, named = accepted(self._code, images, prompts, groups, columns)
        returned = self.function(*given, **named)
        return returned, returned


def code_of(reward: Reward) -> Any:
    """What the user wrote: the function of a :class:`FunctionReward`, or the class."""
    return reward.function if isinstance(reward, FunctionReward) else type(reward)
