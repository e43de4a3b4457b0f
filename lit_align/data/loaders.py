"""The loaders: rollout batches of prompts for training, fixed prompts for everything else."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.batch import Batch
from lit_align.data.splits import PromptSet, Rows
from lit_align.errors import ConfigError


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
        """The place of this process; the only one without a trainer."""
        # Not the plain world size: ranks that hold shards of one replica must see the same data.
        place: dict[str, Any] | None = trainer.distributed_sampler_kwargs if trainer else None
        return cls(place["rank"], place["num_replicas"]) if place else cls()

    def share(self, rows: Rows) -> tuple[range, list[int]]:
        """Every ``world``-th of ``rows``, whose number ``world`` divides: the positions and the rows.

        Dealt like cards, so that any run of ``world * n`` neighbours is spread evenly: the first half of
        every rank's prompts is the first half of the rollout batch.
        """
        assert len(rows) % self.world == 0, f"{len(rows)} prompts do not divide by {self.world} ranks"
        return range(self.number, len(rows), self.world), [
            int(row) for row in rows[self.number :: self.world]
        ]


class RolloutLoader:
    """The train loader: one batch is this rank's part of one global rollout batch.

    Its position counts the batches that were handed out and goes on over the ends of epochs, so an epoch
    that is cut short (``limit_train_batches``) repeats nothing. Lightning saves and restores
    :meth:`state_dict`. A state that is saved while a batch is being worked on counts that batch as done; a
    resume is exact from checkpoints taken at batch ends.

    Each pass over the prompts has its own order. What is left at the end of a pass and does not fill a
    rollout batch is dropped.

    Args:
        prompts: The training prompts.
        prompts_per_batch: Over all ranks.
        images_per_prompt: Images that share a prompt.
        batches_per_epoch: Length of the loader.
        seed: Seed of the order.
        rank: This process.
    """

    def __init__(
        self,
        prompts: PromptSet,
        prompts_per_batch: int,
        images_per_prompt: int,
        batches_per_epoch: int,
        seed: int = 0,
        rank: Rank = Rank(),
    ) -> None:
        self.prompts = prompts
        self.batches_per_epoch = batches_per_epoch
        self.rank = rank
        self._settings = {
            "prompts_per_batch": prompts_per_batch,
            "images_per_prompt": images_per_prompt,
            "seed": seed,
        }
        self._pass = 0
        self._cursor = 0
        self._collections = 0

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self.batches_per_epoch):
            slots = self._settings["prompts_per_batch"]
            places, rows = self.rank.share(self._advance(slots))
            groups = [self._collections * slots + place for place in places]
            self._collections += 1
            yield self.prompts.batch(rows, groups, self._settings["images_per_prompt"])

    @property
    def _usable(self) -> int:
        return len(self.prompts.rows) if self.prompts.usable is None else self.prompts.usable

    def _advance(self, wanted: int) -> list[int]:
        """The rows of the next rollout batch; moves the cursor behind them."""
        while True:
            order = self.prompts.training_order(self._settings["seed"], self._pass)
            rows: list[int] = []
            for position, row in self.prompts.walk(order, self._cursor):
                rows.append(row)
                if len(rows) == wanted:
                    self._cursor = position
                    return rows
            if self._cursor == 0:
                raise ConfigError(
                    f"data.prompts_per_batch is {wanted}, but {self.prompts.source} has only "
                    f"{len(rows)} training prompts: lower it or give more prompts"
                )
            self._pass += 1
            self._cursor = 0

    def state_dict(self) -> dict[str, int]:
        """Position and the settings that give it its meaning, as plain integers."""
        position = {"pass": self._pass, "cursor": self._cursor, "rollout batches": self._collections}
        return {**position, **self._settings, "rows": self._usable, "pool": len(self.prompts.rows)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position.

        Raises:
            ConfigError: The state was saved with another seed, number of prompts per batch or of images per
                prompt.
        """
        for name, value in self._settings.items():
            if state[name] != value:
                raise ConfigError(
                    f"data.{name} is {value}, but the checkpoint was written with {state[name]}: "
                    "set it back to resume this run, or start a new run without ckpt_path"
                )
        pool, pool_then = len(self.prompts.rows), state.get("pool", state["rows"])
        if (state["rows"], pool_then) != (self._usable, pool):
            rank_zero_warn(
                f"{self.prompts.source} has {self._usable} usable prompts, {state['rows']} when the "
                f"checkpoint was written, and {pool} to draw from, then {pool_then}: training goes on, but "
                "the prompts of this pass may repeat"
            )
        self._pass, self._cursor, self._collections = state["pass"], state["cursor"], state["rollout batches"]


class FixedLoader:
    """The same prompts in the same order every time: for validation, test and predict.

    Every rank gets the same number of batches of the same sizes, so collective calls match, and no prompt is
    padded or repeated. The first ``m`` batches of all ranks together are the first prompts of the order,
    whatever the number of ranks.

    Args:
        prompts: Where the rows come from.
        rows: The rows to hand out, as many as ``rank.world`` divides.
        images_per_prompt: Images that share a prompt.
        prompts_per_batch: Largest number of prompts in a batch of one rank.
        rank: This process.
    """

    def __init__(
        self,
        prompts: PromptSet,
        rows: Rows,
        images_per_prompt: int,
        prompts_per_batch: int,
        rank: Rank = Rank(),
    ) -> None:
        self.prompts = prompts
        self.rows = rows
        self.images_per_prompt = images_per_prompt
        self.rank = rank
        self._stride = prompts_per_batch * rank.world

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self._stride)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self._stride):
            places, rows = self.rank.share(self.rows[start : start + self._stride])
            yield self.prompts.batch(rows, [start + place for place in places], self.images_per_prompt)
