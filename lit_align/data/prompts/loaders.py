"""The loaders: rollout batches of prompts for training, fixed prompts for everything else."""

import math
from collections.abc import Iterator
from itertools import islice

from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.batch import Batch
from lit_align.data.loading import Rank, Rows, check_resumed
from lit_align.data.prompts.sets import PromptSet
from lit_align.errors import ConfigError


class RolloutLoader:
    """The train loader: one batch is this rank's part of one global rollout batch.

    Its position counts the batches that were handed out and goes on over the ends of epochs, so an epoch
    that is cut short (``limit_train_batches``) repeats nothing. Lightning saves and restores
    :meth:`state_dict`. A state that is saved while a batch is being worked on counts that batch as done; a
    resume is exact from checkpoints taken at batch ends.

    Each pass over the prompts has its own order. Prompts at the end of a pass that do not fill a rollout
    batch are dropped.

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
        self._pass = self._cursor = self._batches = 0

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        wanted = self._settings["prompts_per_batch"]
        for _ in range(self.batches_per_epoch):
            places, rows = self.rank.share(self._next_rows(wanted))
            groups = [self._batches * wanted + place for place in places]
            self._batches += 1
            yield self.prompts.batch(rows, groups, self._settings["images_per_prompt"])

    def _next_rows(self, wanted: int) -> list[int]:
        """The rows of the next rollout batch; moves the cursor behind them."""
        while True:
            order = self.prompts.training_order(self._settings["seed"], self._pass)
            found = list(islice(self.prompts.walk(order, self._cursor), wanted))
            if len(found) == wanted:
                self._cursor = found[-1][0]
                return [row for _, row in found]
            if self._cursor == 0:
                raise ConfigError(
                    f"data.prompts_per_batch is {wanted}, but {self.prompts.source} has only "
                    f"{len(found)} training prompts: lower it or give more prompts"
                )
            self._pass, self._cursor = self._pass + 1, 0

    @property
    def _sizes(self) -> dict[str, int]:
        return {"usable": self.prompts.usable, "rows": len(self.prompts.rows)}

    def state_dict(self) -> dict[str, int]:
        """Position, and the settings and sizes that give it its meaning, as plain integers."""
        position = {"pass": self._pass, "cursor": self._cursor, "batches": self._batches}
        return position | self._settings | self._sizes

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position.

        Raises:
            ConfigError: The state was saved with another seed, number of prompts per batch or of images per
                prompt.
        """
        check_resumed(self._settings, state)
        now, then = self._sizes, {name: state[name] for name in self._sizes}
        if now != then:
            rank_zero_warn(
                f"{self.prompts.source} has {now['usable']} usable prompts, {then['usable']} when the "
                f"checkpoint was written, and {now['rows']} to draw from, then {then['rows']}: training goes "
                "on, but the prompts of this pass may repeat"
            )
        self._pass, self._cursor, self._batches = state["pass"], state["cursor"], state["batches"]


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
