"""Pairs in batches: their order, a pure function of counters, and the loader that decodes them in threads."""

import math
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate, chain
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor

from lit_align.data.batch import PairBatch
from lit_align.data.images import UnreadableImage, decode, height_and_width
from lit_align.data.loading import Rank, check_resumed
from lit_align.data.preferences.source import PairSource
from lit_align.data.splits import Permutation
from lit_align.errors import ConfigError

View = Literal["winners", "pairs"]

REPORTED = 20
"""So many pairs that cannot be read are reported one by one by each rank; the others are counted, and their
number is reported when it has doubled."""

TRIED = 32
"""Pairs that are tried at the start, if need be."""


class PairOrder:
    """One pass over some rows: block after block in a random order, a few of them mixed.

    Args:
        blocks: The rows, by the blocks in which they are stored (see :meth:`PairSource.blocks`).
        mixed: How many blocks make a window; the rows of a window are permuted.
        seed: The run's seed.
        number: Of the pass.
    """

    def __init__(self, blocks: Sequence[NDArray[np.int64]], mixed: int, seed: int, number: int) -> None:
        order = Permutation(len(blocks), seed, number, purpose="pair blocks")
        turns = [blocks[order[i]] for i in range(len(blocks))]
        self._windows = [np.concatenate(turns[i : i + mixed]) for i in range(0, len(turns), mixed)]
        self._starts = [0, *accumulate(map(len, self._windows))]
        self._key = (seed, number)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> int:
        """The row at a position."""
        window = bisect_right(self._starts, position) - 1
        place = self._permutation(window, "pair order")[position - self._starts[window]]
        return int(self._windows[window][place])

    def spares(self, position: int) -> Iterator[int]:
        """Rows that can replace the one at a position, in their order: first those of the same window."""
        home = bisect_right(self._starts, position) - 1
        for window in chain(range(home, len(self._windows)), range(home)):
            order = self._permutation(window, "pair spares", position)
            yield from (int(self._windows[window][order[i]]) for i in range(len(order)))

    def _permutation(self, window: int, purpose: str, *counters: int) -> Permutation:
        return Permutation(len(self._windows[window]), *self._key, window, *counters, purpose=purpose)


class Found(NamedTuple):
    """What one slot of a batch got.

    Attributes:
        row: The pair's row.
        images: Those that the view asks for, each ``(3, H, W)``, the winner first.
        passed: Row and reason of each pair that should have come but cannot be read.
    """

    row: int
    images: tuple[Tensor, ...]
    passed: list[tuple[int, str]]


class PairLoader:
    """The train loader of pairs: one batch is this rank's part of one global batch.

    Its position counts the batches that were handed out and goes on over the ends of epochs, so an epoch that
    is cut short repeats nothing. Lightning saves and restores :meth:`state_dict`; a resume is exact from
    checkpoints taken at batch ends. Pairs at the end of a pass that do not fill a batch are dropped.

    A pair that cannot be read is reported and replaced. The replacement depends on the position alone, so all
    ranks, a resumed run and :meth:`rows` agree.

    Attributes:
        known: Whether the image of a row and a side (0 the winner, 1 the loser) is not needed: it is then not
            read, and all NaN.
        unreadable: Rows that cannot be read, and why.

    Args:
        source: The pairs.
        blocks: The rows to train on, by the blocks in which they are stored.
        view: "winners", or "pairs" for the losers too.
        pairs_per_batch: Over all ranks.
        batches_per_epoch: Length of the loader.
        resolution: Height and width of the images in pixels, or one number for both.
        seed: Seed of the order.
        rank: This process.
        workers: Threads that decode.
        ahead: Batches that are decoded before they are asked for.
    """

    def __init__(
        self,
        source: PairSource,
        blocks: Sequence[NDArray[np.int64]],
        view: View,
        pairs_per_batch: int,
        batches_per_epoch: int,
        resolution: int | Sequence[int],
        seed: int = 0,
        rank: Rank = Rank(),
        workers: int = 4,
        ahead: int = 2,
    ) -> None:
        self.source = source
        self.batches_per_epoch = batches_per_epoch
        self.resolution = resolution
        self.sides = 1 if view == "winners" else 2
        self.rank = rank
        self.workers, self.ahead = workers, ahead
        self.unreadable: dict[int, str] = {}
        self.known: Callable[[int, int], bool] | None = None
        blocks = [block for block in blocks if len(block)]
        self._count = sum(map(len, blocks))
        self._settings = {"pairs_per_batch": pairs_per_batch, "seed": seed}
        self._batches = 0
        self._pass = lru_cache(2)(lambda number: PairOrder(blocks, source.mixed, seed, number))

    def __len__(self) -> int:
        return self.batches_per_epoch

    def check(self) -> None:
        """Read a pair before a run depends on it: that which comes first, or else one of some others.

        Raises:
            ConfigError: None of them can be read.
        """
        order = self._pass(0)
        others = range(0, len(order), math.ceil(len(order) / TRIED))
        for row in (order[position] for position in (0, *others)):
            try:
                self._decode(row)
                return
            except UnreadableImage as error:
                reason = f"{self.source.where(row)}: {error}"
        raise ConfigError(
            f"none of {len(others)} pairs of {self.source} that were tried can be read, the last {reason}: "
            "give pairs whose images are there, as files of PNG, JPEG or the like"
        )

    def __iter__(self) -> Iterator[PairBatch]:
        for found in self._batches_from(self._batches, self.batches_per_epoch):
            rows, images, _ = zip(*found, strict=True)
            winners, *losers = (torch.stack(side) for side in zip(*images, strict=True))
            prompts = [self.source.prompt(row).strip() for row in rows]
            self._batches += 1
            yield PairBatch(prompts, winners, losers[0] if losers else None, torch.tensor(rows))

    def rows(self, start_batch: int, num_batches: int) -> Iterator[tuple[int, str]]:
        """Yield row and prompt of each of this rank's pairs in coming batches, in their order.

        They are what the batches will hold: a pair whose image cannot be read is replaced here too, for
        which the images are decoded, and not kept.

        Args:
            start_batch: Number of the first batch, counted over the run.
            num_batches: How many batches.
        """
        for found in self._batches_from(start_batch, num_batches):
            for row, _, _ in found:
                yield row, self.source.prompt(row).strip()

    def _batches_from(self, start: int, count: int) -> Iterator[list[Found]]:
        """What the slots of coming batches get; the batches after them are read meanwhile."""
        waiting: deque[list[Future[Found]]] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for number in range(start, start + count + self.ahead):
                if number < start + count:
                    waiting.append([pool.submit(self._find, *slot) for slot in self._slots(number)])
                if number >= start + self.ahead:
                    yield [self._report(future.result()) for future in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _slots(self, batch: int) -> list[tuple[int, int]]:
        """Pass and position of this rank's pairs in a batch."""
        size = self._settings["pairs_per_batch"]
        number, place = divmod(batch, self._count // size)
        _, positions = self.rank.share(range(place * size, (place + 1) * size))
        return [(number, position) for position in positions]

    def _find(self, number: int, position: int) -> Found:
        """The pair at a position, or the first of its spares that can be read."""
        order, passed = self._pass(number), list[tuple[int, str]]()
        for row in chain((order[position],), order.spares(position)):
            if row not in self.unreadable:
                try:
                    return Found(row, self._decode(row), passed)
                except UnreadableImage as error:
                    passed.append((row, str(error)))
        reasons = [*self.unreadable.values(), *(reason for _, reason in passed)]
        raise ConfigError(f"no image of {self.source} can be read; the last one: {reasons[-1]}")

    def _decode(self, row: int) -> tuple[Tensor, ...]:
        winner = 0 if float(self.source.label(row)) > 0.5 else 1
        sides = (winner, 1 - winner)[: self.sides]
        return tuple(self._image(row, *turn) for turn in enumerate(sides))

    def _image(self, row: int, place: int, side: int) -> Tensor:
        if self.known is not None and self.known(row, place):
            return torch.full((), math.nan).expand(3, *height_and_width(self.resolution))
        data: object = self.source.image(row, side)
        if not isinstance(data, bytes | bytearray | memoryview):  # of a source that a user wrote
            raise ConfigError(
                f"the image of {self.source.where(row)} is a {type(data).__name__}: give the bytes of its "
                "file, or raise UnreadableImage where there is none"
            )
        return decode(bytes(data), self.resolution)

    def _report(self, found: Found) -> Found:
        """Report, once, what could not be read; every rank reports its own share."""
        for row, reason in found.passed:
            if row not in self.unreadable:
                self.unreadable[row] = reason
                if (count := len(self.unreadable)) <= REPORTED:
                    also = "; later ones are only counted" if count == REPORTED else ""
                    warnings.warn(f"{self.source.where(row)} is skipped: {reason}{also}", stacklevel=2)
                elif count % REPORTED == 0 and (count // REPORTED).bit_count() == 1:
                    warnings.warn(
                        f"{count} of {self._count} pairs of {self.source} are skipped so far; the last one: "
                        f"{reason}",
                        stacklevel=2,
                    )
        return found

    def state_dict(self) -> dict[str, int]:
        """Position and the settings that give it its meaning, as plain integers."""
        return {"batches": self._batches, **self._settings, "rows": self._count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved position.

        Raises:
            ConfigError: The state was saved with another seed or number of pairs per batch.
        """
        check_resumed(self._settings, state)
        if state["rows"] != self._count:
            rank_zero_warn(
                f"{self.source} has {self._count} pairs to train on, {state['rows']} when the checkpoint "
                "was written: training goes on, but in another order"
            )
        self._batches = state["batches"]
