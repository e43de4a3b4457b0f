"""The data of the methods that make their own images: prompts, split and handed out in rollout batches."""

from typing import Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray

from lit_align.data.batch import Batch
from lit_align.data.index import index
from lit_align.data.loaders import FixedLoader, Rank, RolloutLoader
from lit_align.data.sources import PromptSource
from lit_align.data.splits import Pool, PromptSet
from lit_align.errors import ConfigError
from lit_align.randomness import run_seed


class PromptDataModule(LightningDataModule):
    """Prompts in rollout batches for training, and fixed prompts for validation, test and predict.

    A prompt belongs to a split by a hash of its text, so splits are disjoint, and stay what they are when
    rows are added or moved. Empty and repeated prompts are dropped. Sizes are global: they do not depend on
    the number of processes.

    Millions of prompts are read and indexed once; both lie in the ``datasets`` cache and are memory-mapped,
    so that later starts take about a second (see :mod:`lit_align.data.sources` for what can be read).

    Args:
        source: The prompts.
        images_per_prompt: Images of one prompt in a rollout batch, kept together on one rank.
        prompts_per_batch: Prompts of one training batch, over all ranks; the number of ranks must divide
            it.
        batches_per_epoch: Training batches of an epoch; one pass over the training prompts if not given.
            An epoch is only a length: the next one goes on where it ended.
        validation_fraction: Share of the source's prompts that is kept for validation; unused with
            ``validation_source``.
        test_fraction: Share of the source's prompts that is kept for the test; unused with ``test_source``.
        validation_source: Validate on these prompts; training and the test split skip them.
        test_source: Test on these prompts; training and the validation split skip them. (Of a source of
            distinct prompts, which may hold millions, only those in use are skipped.)
        validation_prompts: How many prompts to validate on; the same ones every time.
        validation_images_per_prompt: Images of each.
        test_prompts: How many prompts to test on; the same ones every time, whatever the seed.
        test_images_per_prompt: Images of each; also for predict.
        eval_batch: Images in a batch of one rank in validation, test and predict, at most; prompts are kept
            whole.
        predict_source: Predict on all of these, in their order; on the test prompts if not given.
        seed: Seed of the training order alone; that of ``seed_everything`` if not given.
        test_split: ``"test"``, or ``"train"`` to test on the first ``test_prompts`` of the training order of
            this seed: what was learnt on seen prompts, if the run has come so far, beside what holds for
            others. Never for predict.

    Raises:
        ConfigError: For a size or fraction that cannot work, here or, where the data is needed, in
            :meth:`setup` and the loaders.
    """

    def __init__(
        self,
        source: PromptSource,
        images_per_prompt: int = 8,
        prompts_per_batch: int = 16,
        batches_per_epoch: int | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        validation_source: PromptSource | None = None,
        test_source: PromptSource | None = None,
        validation_prompts: int = 64,
        validation_images_per_prompt: int = 4,
        test_prompts: int = 128,
        test_images_per_prompt: int = 4,
        eval_batch: int = 64,
        predict_source: PromptSource | None = None,
        seed: int | None = None,
        test_split: Literal["test", "train"] = "test",
    ) -> None:
        super().__init__()
        self.source = source
        self.images_per_prompt = images_per_prompt
        self.prompts_per_batch = prompts_per_batch
        self.batches_per_epoch = batches_per_epoch
        self.validation_fraction = 0.0 if validation_source else validation_fraction
        self.test_fraction = 0.0 if test_source else test_fraction
        self.validation_source = validation_source
        self.test_source = test_source
        self.validation_prompts = validation_prompts
        self.validation_images_per_prompt = validation_images_per_prompt
        self.test_prompts = test_prompts
        self.test_images_per_prompt = test_images_per_prompt
        self.test_split = test_split
        self.eval_batch = eval_batch
        self.predict_source = predict_source
        self.seed = run_seed(seed)
        self._sets: dict[str, PromptSet] = {}
        self._train_loader: RolloutLoader | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        sizes = ("images_per_prompt", "prompts_per_batch", "batches_per_epoch")
        for name in (*sizes, "validation_prompts", "test_prompts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}: give at least 1")
        if self.test_split not in ("test", "train"):
            raise ConfigError(f"data.test_split is {self.test_split!r}: give test or train")
        for name in ("validation_images_per_prompt", "test_images_per_prompt"):
            if not 1 <= (value := getattr(self, name)) <= self.eval_batch:
                raise ConfigError(f"data.{name} is {value}: give 1 to {self.eval_batch} (data.eval_batch)")
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ConfigError(f"data.{name} is {value}: give a share from 0 to below 1")
        if (held_out := self.validation_fraction + self.test_fraction) >= 1:
            raise ConfigError(
                f"data.validation_fraction + data.test_fraction is {held_out}: leave some for training"
            )

    def prepare_data(self) -> None:
        """Index large sources, in one process of a machine: the others find the index on disk."""
        for source in (self.source, self.validation_source, self.test_source, self.predict_source):
            if source is not None and not source.distinct and source.fingerprint() is not None:
                index(source)

    def setup(self, stage: str | None = None) -> None:
        """Split the prompts, once; for "fit", check that they can fill a rollout batch on every rank."""
        if not self._sets:
            self._pool, self._sets = self._split()
        if stage in ("fit", None):
            self._train_loader = self._make_train_loader()

    def _split(self) -> tuple[Pool, dict[str, PromptSet]]:
        sets: dict[str, PromptSet] = {}
        held_out: list[NDArray[np.uint64]] = []
        for name, source, wanted in (
            ("validation", self.validation_source, self.validation_prompts),
            ("test", self.test_source, self.test_prompts),
        ):
            if source is not None:
                other = Pool(source)
                sets[name] = other.split(0.0, 1.0)
                held_out.append(other.keys(wanted))
        pool = Pool(self.source, held_out)
        # Shares of [0, 1): test from below, validation from above, so that a change of one fraction leaves
        # the other split alone.
        low, high = self.test_fraction, 1 - self.validation_fraction
        for name, start, end in (("test", 0.0, low), ("train", low, high), ("validation", high, 1.0)):
            if name not in sets:
                sets[name] = pool.split(start, end)
        if held_out:
            self._report_overlap(pool)
        return pool, sets

    def _report_overlap(self, pool: Pool) -> None:
        if (shared := pool.overlap()) is None:
            skipped = sum(map(len, pool.held_out))
            rank_zero_info(f"{self.source}: skips {skipped} prompts of validation_source and test_source")
        else:
            removed = f"{shared} prompts removed, which validation_source or test_source has too"
            rank_zero_info(f"{self.source}: {removed}")

    def _make_train_loader(self) -> RolloutLoader:
        wanted, rank, train = self.prompts_per_batch, Rank.of(self.trainer), self._sets["train"]
        if wanted % rank.world:
            raise ConfigError(
                f"data.prompts_per_batch is {wanted}, which {rank.world} ranks cannot share equally: "
                f"give a multiple of {rank.world}"
            )
        count = self._pool.count(self.test_fraction, 1 - self.validation_fraction)
        if wanted > count:
            raise ConfigError(
                f"data.prompts_per_batch is {wanted}, but {self.source} has only {count} training "
                "prompts: lower it, give more prompts, or lower validation_fraction and test_fraction"
            )
        length = self.batches_per_epoch or count // wanted
        return RolloutLoader(train, wanted, self.images_per_prompt, length, self.seed, rank)

    def train_dataloader(self) -> RolloutLoader:
        """The train loader: one object a fit, whose position survives a reload between epochs."""
        assert self._train_loader is not None, "setup('fit') comes first"
        return self._train_loader

    def val_dataloader(self) -> FixedLoader:
        """The validation prompts."""
        return self._fixed("validation", self.validation_prompts, self.validation_images_per_prompt)

    def test_dataloader(self) -> FixedLoader:
        """The prompts of ``test_split``."""
        return self._fixed(self.test_split, self.test_prompts, self.test_images_per_prompt)

    def predict_dataloader(self) -> FixedLoader:
        """All prompts of ``predict_source``, or the test prompts."""
        if self.predict_source is None:
            return self._fixed("test", self.test_prompts, self.test_images_per_prompt)
        rank, prompts = Rank.of(self.trainer), Pool(self.predict_source).split(0.0, 1.0)
        rows = prompts.rows if self.predict_source.distinct else np.sort(prompts.rows)
        if len(rows) % rank.world:
            raise ConfigError(
                f"data.predict_source has {len(rows)} prompts, which {rank.world} ranks cannot share "
                "equally: predict on one device, or give a multiple"
            )
        images = self.test_images_per_prompt
        return FixedLoader(prompts, rows, images, self.eval_batch // images, rank)

    def _fixed(self, split: str, wanted: int, images_per_prompt: int) -> FixedLoader:
        """The first prompts of a split; of training, those with which it begins."""
        prompts, rank = self._sets[split], Rank.of(self.trainer)
        size = f"data.{'test' if split == 'train' else split}_prompts"
        if wanted % rank.world:
            raise ConfigError(
                f"{size} is {wanted}, which {rank.world} ranks cannot share equally: "
                f"give a multiple of {rank.world}"
            )
        rows = prompts.first_trained(wanted, self.seed) if split == "train" else prompts.first(wanted)
        usable = len(rows) - len(rows) % rank.world
        if usable == 0 and split == "train":
            raise ConfigError(
                f"{prompts.source} has {len(rows)} training prompts for {rank.world} ranks: set "
                "data.test_split to test, or lower data.validation_fraction and data.test_fraction"
            )
        if usable == 0:
            raise ConfigError(
                f"{prompts.source} has {len(rows)} {split} prompts for {rank.world} ranks: "
                f"raise data.{split}_fraction, or give data.{split}_source"
            )
        if usable < wanted:
            rank_zero_warn(f"{size} is {wanted}, but {prompts.source} has {len(rows)}: {usable} are used")
        return FixedLoader(
            prompts, rows[:usable], images_per_prompt, self.eval_batch // images_per_prompt, rank
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leave the batch on the CPU: its tensors count images and are read by the host."""
        return batch
