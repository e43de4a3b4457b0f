"""The batches: prompts, which every method, reward and callback sees, and pairs of images."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts for ``B`` images, with the numbers that place them in the run.

    The tensors are counters for generators and group statistics: they stay on the CPU.

    Attributes:
        prompts: One per image, length ``B``.
        groups: ``(B,)`` long. Images with the same number belong to the same prompt; numbers are global over
            ranks.
        columns: The data's other columns, one entry per image.
        task: Name of the task that the prompts belong to; empty where there is only one.
        index: ``(B,)`` long. Global image number: unique over the run in training, ``0 .. N - 1`` in
            validation, test and predict.
    """

    prompts: list[str]
    groups: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)
    task: str = ""
    index: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        lengths = {len(self.prompts), len(self.groups), len(self.index), *map(len, self.columns.values())}
        assert len(lengths) == 1, f"prompts, groups, index and columns differ in length: {sorted(lengths)}"

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def firsts(self) -> Tensor:
        """Which images are the first of their prompt, ``(B,)`` bool; those of a prompt stand together."""
        return torch.cat([torch.ones(1, dtype=torch.bool), self.groups[1:] != self.groups[:-1]])[: len(self)]

    def __getitem__(self, rows: Tensor) -> "Batch":
        """Some images, by their places ``(N,)`` long."""
        chosen = rows.tolist()
        return replace(
            self,
            prompts=[self.prompts[i] for i in chosen],
            groups=self.groups[rows],
            columns={name: [values[i] for i in chosen] for name, values in self.columns.items()},
            index=self.index[rows],
        )


@dataclass(frozen=True)
class PairBatch:
    """``B`` pairs of images; people preferred one image of each pair.

    Attributes:
        prompts: One per pair, length ``B``.
        winners: ``(B, 3, H, W)`` float32 in [0, 1], the preferred images.
        losers: ``(B, 3, H, W)`` float32 in [0, 1], the others; None where only winners were asked for.
        index: ``(B,)`` long, on the CPU. Row of the pair in its source: the same in every epoch, on every
            rank and after a resume.
    """

    prompts: list[str]
    winners: Tensor
    losers: Tensor | None
    index: Tensor

    def __post_init__(self) -> None:
        lengths = {len(self.prompts), len(self.winners), len(self.index)}
        lengths |= set() if self.losers is None else {len(self.losers)}
        assert len(lengths) == 1, f"prompts, images and index differ in length: {sorted(lengths)}"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Tensor) -> "PairBatch":
        """Some pairs, by their places ``(N,)`` long."""
        prompts = [self.prompts[i] for i in rows.tolist()]
        losers = None if self.losers is None else self.losers[rows]
        return PairBatch(prompts, self.winners[rows], losers, self.index[rows])

    def to(self, device: torch.device) -> "PairBatch":
        """The same pairs with their images on a device."""
        losers = None if self.losers is None else self.losers.to(device, non_blocking=True)
        return replace(self, winners=self.winners.to(device, non_blocking=True), losers=losers)
