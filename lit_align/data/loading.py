"""What all loaders need: the share of each rank, the check of a saved position, numbers in messages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from numpy.typing import NDArray

from lit_align.errors import ConfigError

Rows = Sequence[int] | NDArray[np.int64]
"""Numbers of rows: a range, a list, or an array that may be memory-mapped."""


@dataclass(frozen=True)
class Rank:
    """Place of a process among those that share the data.

    Attributes:
        number: ``0 .. world - 1``.
        world: How many processes share the data.
    """

    number: int = 0
    world: int = 1

    @classmethod
    def of(cls, trainer: Trainer | None) -> "Rank":
        """The place of this process; without a trainer, that of a single process."""
        # Not the plain world size: ranks that hold shards of one replica must see the same data.
        place: dict[str, Any] | None = trainer.distributed_sampler_kwargs if trainer else None
        return cls(place["rank"], place["num_replicas"]) if place else cls()

    def check(self, setting: str, count: int) -> None:
        """Refuse a number of prompts or pairs that the ranks cannot share equally.

        Raises:
            ConfigError: ``world`` does not divide it.
        """
        if count % self.world:
            raise ConfigError(
                f"data.{setting} is {count}, which {self.world} ranks cannot share equally: "
                f"give a multiple of {self.world}"
            )

    def share(self, rows: Rows) -> tuple[range, list[int]]:
        """The positions and the rows of this rank: every ``world``-th of ``rows``, which divide by ``world``.

        Each rank has its part of any ``world * n`` neighbours: the first half of every rank's prompts is the
        first half of the rollout batch.
        """
        assert len(rows) % self.world == 0, f"{len(rows)} prompts do not divide by {self.world} ranks"
        places = range(self.number, len(rows), self.world)
        return places, [int(rows[place]) for place in places]


def check_resumed(settings: Mapping[str, int], state: Mapping[str, int]) -> None:
    """Refuse a saved position that was saved with other settings.

    Args:
        settings: What gives a position its meaning.
        state: What was saved, with the settings of that time.

    Raises:
        ConfigError: A setting has changed.
    """
    for name, value in settings.items():
        if state[name] != value:
            raise ConfigError(
                f"data.{name} is {value}, but the checkpoint was written with {state[name]}: "
                "set it back to resume this run, or start a new run without ckpt_path"
            )


def counted(number: int, what: str) -> str:
    """``1 prompt``, ``2 prompts``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
