"""Advantages: how a batch of rewards becomes the signal of a policy gradient.

Every class sees the rewards of a whole rollout batch (gathered over all ranks), and gives an advantage of 0
to an image without a score.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_align.errors import ConfigError


class Advantages(ABC):
    """Normalises the rewards of one rollout batch.

    The statistics are computed in float64, so that equal rewards give exactly 0.

    Args:
        clip: Largest absolute advantage. DDPO's PyTorch code clips at 5, its JAX code at 10.

    Raises:
        ConfigError: ``clip`` is not positive.
    """

    baseline: ClassVar[Literal["none", "group", "batch", "history"]] = "none"
    """Whose mean is subtracted from a reward: that of the prompt's images in this rollout batch (``group``,
    which needs at least two of each), of the whole ``batch``, of the prompt's ``history``, or none."""

    memory: int = 0
    """Newest rewards of a prompt that a ``history`` holds."""

    clip: float = 5.0
    """Largest absolute advantage, also of a class whose constructor does not call that of its base."""

    def __init__(self, clip: float = 5.0) -> None:
        if not clip > 0:
            raise ConfigError(f"{type(self).__name__}: clip is {clip}; it must be positive (DDPO: 5).")
        self.clip = clip

    def __call__(self, rewards: Tensor, groups: Tensor, prompts: list[str]) -> Tensor:
        """Advantages of one rollout batch; running statistics, where a class has them, are updated.

        Args:
            rewards: ``(N,)``; one that is not finite is no score: left out of all statistics, its advantage
                is 0.
            groups: ``(N,)`` long; images of the same number share their prompt.
            prompts: ``N`` prompts.

        Returns:
            ``(N,)`` in the dtype and on the device of ``rewards``, without gradient.
        """
        assert len(rewards) == len(groups) == len(prompts), "rewards, groups and prompts differ in length"
        scored = rewards.detach().isfinite()
        advantages = torch.zeros_like(rewards, requires_grad=False)
        if scored.any():
            kept = [prompt for prompt, keep in zip(prompts, scored.tolist(), strict=True) if keep]
            groups = groups.to(rewards.device)[scored]
            returned: Any = self._normalise(rewards.detach()[scored].double(), groups, kept)
            normalised = torch.as_tensor(torch.nan if returned is None else returned)
            if normalised.shape != groups.shape or bool(normalised.isnan().any()):
                raise ConfigError(
                    f"{type(self).__name__}._normalise gave {list(normalised.shape)} numbers for "
                    f"{len(groups)} rewards, {int(normalised.isnan().sum())} NaN; let it return one for each"
                )
            advantages[scored] = normalised.clamp(-self.clip, self.clip).to(rewards.dtype)
        return advantages

    @abstractmethod
    def _normalise(self, rewards: Tensor, groups: Tensor, prompts: list[str]) -> Tensor:
        """Unclipped advantages of ``N >= 1`` finite float64 rewards."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain lists, dicts and floats."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ConfigError: There is some, and the class does not define how.
        """
        if state:
            raise ConfigError(
                f"{type(self).__name__}: the checkpoint has {', '.join(state)} of it, and the class has no "
                "load_state_dict that takes it up; define it beside state_dict"
            )


class BatchAdvantages(Advantages):
    """Rewards standardised over the whole rollout batch.

    DDPO's normaliser where its per-prompt tracker is off (arXiv 2305.13301, as in its PyTorch code).

    Args:
        clip: Largest absolute advantage.
    """

    baseline: ClassVar[Literal["batch"]] = "batch"
    EPSILON: ClassVar[float] = 1e-8

    def _normalise(self, rewards: Tensor, groups: Tensor, prompts: list[str]) -> Tensor:
        return (rewards - rewards.mean()) / (rewards.std(correction=0) + self.EPSILON)


class GroupAdvantages(Advantages):
    """Rewards relative to the mean of the same prompt's images.

    GRPO's baseline, as in Flow-GRPO (arXiv 2505.05470), 1e-4 added to the std as in its code. An image that
    is alone in its group has the advantage 0.

    Args:
        divide_by: The standard deviation that divides the difference: of the image's own ``group`` (the
            paper), of the whole ``batch`` of rewards (its code), or ``none``.
        clip: Largest absolute advantage.
    """

    baseline: ClassVar[Literal["group"]] = "group"
    EPSILON: ClassVar[float] = 1e-4

    def __init__(self, divide_by: Literal["group", "batch", "none"] = "group", clip: float = 5.0) -> None:
        super().__init__(clip)
        if divide_by not in ("group", "batch", "none"):
            raise ConfigError(f"GroupAdvantages: divide_by is {divide_by!r}; choose group, batch or none.")
        self.divide_by = divide_by

    def _normalise(self, rewards: Tensor, groups: Tensor, prompts: list[str]) -> Tensor:
        same_group = (groups[:, None] == groups[None, :]).to(rewards)
        sizes = same_group.sum(1)
        centred = rewards - same_group @ rewards / sizes
        match self.divide_by:
            case "group":
                return centred / ((same_group @ centred.square() / sizes).sqrt() + self.EPSILON)
            case "batch":
                return centred / (rewards.std(correction=0) + self.EPSILON)
            case _:
                return centred


class PerPromptAdvantages(Advantages):
    """Rewards standardised by a running history per prompt.

    DDPO's tracker (arXiv 2305.13301, as in its PyTorch code, 1e-6 added to the std). The new rewards enter
    the history first. A prompt whose history is still shorter than ``min_count`` uses the mean and std of the
    current rollout batch. With many prompts that is nearly always so (398 prompts and 256 images a batch: for
    the first 25 batches).

    Args:
        buffer_size: Newest rewards that are remembered per prompt.
        min_count: Rewards of a prompt from which its own statistics are used.
        clip: Largest absolute advantage.

    Raises:
        ConfigError: ``min_count`` is not between 1 and ``buffer_size``.
    """

    baseline: ClassVar[Literal["history"]] = "history"
    EPSILON: ClassVar[float] = 1e-6

    def __init__(self, buffer_size: int = 32, min_count: int = 16, clip: float = 5.0) -> None:
        super().__init__(clip)
        if not 1 <= min_count <= buffer_size:
            raise ConfigError(
                f"PerPromptAdvantages: min_count is {min_count}; choose 1 to buffer_size ({buffer_size}), "
                "or no prompt ever has enough rewards of its own."
            )
        self.memory = buffer_size
        self.min_count = min_count
        self._history: dict[str, deque[float]] = {}

    def _normalise(self, rewards: Tensor, groups: Tensor, prompts: list[str]) -> Tensor:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._history.setdefault(prompt, deque(maxlen=self.memory)).append(reward)
        statistics = {prompt: self._statistics(prompt, rewards) for prompt in dict.fromkeys(prompts)}
        mean, std = rewards.new_tensor([statistics[prompt] for prompt in prompts]).unbind(1)
        return (rewards - mean) / (std + self.EPSILON)

    def _statistics(self, prompt: str, batch: Tensor) -> tuple[float, float]:
        history = self._history[prompt]
        values = batch if len(history) < self.min_count else torch.tensor(history, dtype=batch.dtype)
        return values.mean().item(), values.std(correction=0).item()

    def state_dict(self) -> dict[str, Any]:
        """The history: prompt to list of rewards, oldest first."""
        return {"history": {prompt: list(rewards) for prompt, rewards in self._history.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a history; a smaller ``buffer_size`` than it was made with keeps the newest rewards."""
        history: Mapping[str, list[float]] = state["history"]
        self._history = {prompt: deque(rewards, self.memory) for prompt, rewards in history.items()}
