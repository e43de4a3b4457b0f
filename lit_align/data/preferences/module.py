"""The data of the methods that learn from pairs of images that people compared."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lit_align.data.images import height_and_width
from lit_align.data.loading import Rank, counted
from lit_align.data.module import AlignmentDataModule
from lit_align.data.preferences.loader import PairLoader, View
from lit_align.data.preferences.pickapic import ShapesPick
from lit_align.data.preferences.source import PairSource, PickaPicPrompts
from lit_align.data.prompts import PromptDataModule, PromptSource
from lit_align.data.prompts.index import read_keys
from lit_align.data.prompts.loaders import FixedLoader
from lit_align.data.splits import EMPTY, lowest_key
from lit_align.errors import ConfigError, tell

FEW = 10_000
"""Of more distinct prompts, which could be all there are, training skips only those that are in use."""


@dataclass(eq=False, repr=False)
class PickaPicDataModule(AlignmentDataModule):
    """Pairs of images for training, and fixed prompts for validation, test and predict.

    A pair belongs to a split by a hash of its prompt, as in :class:`~lit_align.data.PromptDataModule`, which
    hands out the prompts. Ties and pairs without a label or a prompt are dropped and counted. A pair that
    cannot be read is reported when its turn comes, and another takes its place.

    Args:
        source: The pairs; the shipped sample of Shapes-Pick if not given.
        view: "winners" (finetuning on them, SPIN), or "pairs" for the losers too (Diffusion-DPO).
        pairs_per_batch: Pairs of one training batch, over all ranks; the number of ranks must divide it.
        resolution: Height and width of the images in pixels, ``512`` or ``[512, 768]``: those of the model.
        validation_source: Validate on these prompts; training and a test split of ``source`` skip them. If
            not given, those that come with the source (the shipped set for Shapes-Pick), or
            ``validation_fraction``.
        test_source: The same for the test, without the prompts that are validated on. (Of more than 10,000
            distinct prompts, only those in use are skipped.)
        predict_source: Predict on all of these, in their order; on the test prompts if not given.
        latent_cache: Folder in which the images' latents are kept, so that each is encoded once, in
            all runs that share it; none are kept if not given. A latent takes 64 KiB for an image of 512
            pixels.
        workers: Threads of each rank that read and decode images.

    Attributes:
        pairs: The pairs.

    Raises:
        ConfigError: For a size or fraction that cannot work, here or, where the data is needed, in
            :meth:`setup` and the loaders.
    """

    source: PairSource | None = None
    view: View = "winners"
    pairs_per_batch: int = 32
    resolution: int | tuple[int, int] = 64
    validation_source: PromptSource | None = None
    test_source: PromptSource | None = None
    predict_source: PromptSource | None = None
    latent_cache: str | None = None
    workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pairs = self.source = ShapesPick() if self.source is None else self.source
        self._prompts = PromptDataModule(
            PickaPicPrompts(self.pairs),
            validation_source=self.validation_source or self.pairs.held_out("validation"),
            test_source=self.test_source or self.pairs.held_out("test"),
            predict_source=self.predict_source,
            **self.shared(),
        )
        self._train_loader: PairLoader | None = None
        self.check_positive("pairs_per_batch", "workers")
        height_and_width(self.resolution)
        if self.view not in ("winners", "pairs"):
            raise ConfigError(f"data.view is '{self.view}': give winners (SPIN, finetuning) or pairs (DPO)")

    def prepare_data(self) -> None:
        """Index large sources of prompts, in one process of a machine."""
        self._prompts.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Index the prompts and, for "fit", the pairs; check that they can fill a batch on every rank."""
        vars(self._prompts).update(self.shared())  # which may have been set since
        self._prompts.trainer = self.trainer
        self._prompts.setup("validate" if stage in ("fit", None) else stage)
        if stage in ("fit", None):
            self._train_loader = self._make_train_loader()

    def _make_train_loader(self) -> PairLoader:
        wanted, rank = self.pairs_per_batch, Rank.of(self.trainer)
        rank.check("pairs_per_batch", wanted)
        rows = self._training_rows()
        if wanted > len(rows):
            lower = f"lower it to at most {len(rows)}, " if len(rows) else ""
            raise ConfigError(
                f"data.pairs_per_batch is {wanted}, but {self.pairs} has only {len(rows)} pairs to train on: "
                f"{lower}give more pairs, lower validation_fraction and test_fraction, or give "
                "validation_source and test_source prompts of their own"
            )
        blocks = np.searchsorted(rows, [(block.start, block.stop) for block in self.pairs.blocks()])
        loader = PairLoader(
            self.pairs,
            [rows[start:stop] for start, stop in blocks],
            self.view,
            wanted,
            self.batches_per_epoch or len(rows) // wanted,
            self.resolution,
            self.order_seed,
            rank,
            self.workers,
        )
        if self.latent_cache is None or not Path(self.latent_cache).exists():  # what is kept needs no images
            loader.check()
        return loader

    def _training_rows(self) -> NDArray[np.int64]:
        """The rows with a label whose prompt is not held out; the others are counted."""
        try:
            labels = np.array([self.pairs.label(row) for row in range(len(self.pairs))], float)  # None is NaN
        except (TypeError, ValueError) as error:  # of a source that a user wrote
            raise ConfigError(
                f"{self.pairs} has a label that is not a number ({error}): give 1, 0 or 0.5"
            ) from error
        keys = read_keys(PickaPicPrompts(self.pairs))
        low, high = self._prompts.test_fraction, 1 - self._prompts.validation_fraction
        inside = (keys >= lowest_key(low)) & (keys < lowest_key(high)) & ~np.isin(keys, self._held_out_keys())
        decided, empty = (labels == 0) | (labels == 1), keys == EMPTY
        rows, held_out = np.flatnonzero(decided & ~empty & inside), np.sum(decided & ~empty & ~inside)
        ties = int(np.sum(~decided))
        tell(
            f"{self.pairs}: {len(rows)} of {len(labels)} pairs to train on; {ties} ties or "
            f"without a label, {np.sum(decided & empty)} without a prompt, "
            f"{held_out} of held-out prompts; "
            f"the first image is preferred in {int(labels[rows].sum())} of those to train on"
        )
        if ties == len(labels):
            raise ConfigError(
                f"{self.pairs} has 0 pairs to train on: all {ties} are ties or without a label; give pairs "
                "with a winner, or name the column that says it"
            )
        if held_out and not len(rows):
            raise ConfigError(
                f"{self.pairs} has 0 pairs to train on: {counted(int(held_out), 'pair')} with a label, all "
                f"of held-out prompts (data.validation_fraction is {self._prompts.validation_fraction}, "
                f"data.test_fraction {self._prompts.test_fraction}); make pairs of training prompts (predict "
                "draws those of data.predict_source), or give data.validation_source and data.test_source "
                "prompts that it does not have"
            )
        return rows

    def _held_out_keys(self) -> NDArray[np.uint64]:
        """The keys of the prompts of ``validation_source`` and ``test_source`` that training skips."""
        held = [EMPTY[None]]
        for split, prompts in self._prompts.others.items():
            few, wanted = len(prompts.source), getattr(self._prompts, f"{split}_prompts")
            held.append(prompts.keys(few if few <= FEW else wanted))
        return np.concatenate(held)

    def train_dataloader(self) -> PairLoader:
        """The train loader: one object a fit, whose position survives a reload between epochs."""
        if self._train_loader is None:  # asked for by hand
            self.setup("fit")
        assert self._train_loader is not None, "made by setup"
        return self._train_loader

    def val_dataloader(self) -> FixedLoader:
        """The validation prompts."""
        return self._prompts.val_dataloader()

    def test_dataloader(self) -> FixedLoader:
        """The test prompts."""
        return self._prompts.fixed("test", "give data.test_source prompts of its own")

    def predict_dataloader(self) -> FixedLoader:
        """All prompts of ``predict_source``, or the test prompts."""
        return self._prompts.predict_dataloader()
