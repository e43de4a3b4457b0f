"""The data of the methods that learn from pairs of images that people compared."""

from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from lit_align.data.batch import Batch, PairBatch
from lit_align.data.loaders import FixedLoader, Rank
from lit_align.data.pair_files import ShapesPick
from lit_align.data.pair_loader import PairLoader, View
from lit_align.data.pairs import PairSource, PickaPicPrompts
from lit_align.data.prompts import PromptDataModule
from lit_align.data.sources import PromptSource
from lit_align.errors import ConfigError
from lit_align.randomness import place, run_seed

FEW = 10_000
"""Larger sources of distinct prompts, which may hold all there are, keep only those in use from training."""


class PickaPicDataModule(LightningDataModule):
    """Pairs of images for training, and fixed prompts for validation, test and predict.

    A pair belongs to a split by a hash of its prompt, as in :class:`~lit_align.data.PromptDataModule`, which
    hands out the prompts. Ties and pairs without a label or a prompt are dropped and counted. A pair that
    cannot be read is reported when its turn comes, and another takes its place. Sizes are global: they do not
    depend on the number of processes.

    Args:
        source: The pairs; the shipped sample of Shapes-Pick if not given.
        view: "winners" (finetuning on them, SPIN), or "pairs" for the losers too (Diffusion-DPO).
        pairs_per_batch: Pairs of one training batch, over all ranks; the number of ranks must divide it.
        resolution: Height and width of the images, in pixels: that of the model.
        batches_per_epoch: Training batches of an epoch; one pass over the training pairs if not given. An
            epoch is only a length: the next one goes on where it ended.
        validation_fraction: Share of the source's prompts that is kept for validation; unused with
            ``validation_source``.
        test_fraction: Share of the source's prompts that is kept for the test; unused with ``test_source``.
        validation_source: Validate on these prompts; training and the test split skip them. What comes with
            the source (the shipped set for Shapes-Pick) if not given, or else ``validation_fraction``.
        test_source: The same for the test. (Of more than 10,000 distinct prompts, only those in use are
            skipped.)
        validation_prompts: How many prompts to validate on; the same ones every time.
        validation_images_per_prompt: Images of each.
        test_prompts: How many prompts to test on; the same ones every time, whatever the seed.
        test_images_per_prompt: Images of each; also for predict.
        eval_batch: Images in a batch of one rank in validation, test and predict, at most; prompts are kept
            whole.
        predict_source: Predict on all of these, in their order; on the test prompts if not given.
        latent_cache: Folder in which the images' latents are kept, so that each is encoded once, in
            all runs that share it; none are kept if not given. A latent takes 64 KiB for an image of 512
            pixels.
        workers: Threads of each rank that read and decode images.
        seed: Seed of the training order alone; that of ``seed_everything`` if not given.

    Raises:
        ConfigError: For a size or fraction that cannot work, here or, where the data is needed, in
            :meth:`setup` and the loaders.
    """

    def __init__(
        self,
        source: PairSource | None = None,
        view: View = "winners",
        pairs_per_batch: int = 32,
        resolution: int = 64,
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
        latent_cache: str | None = None,
        workers: int = 4,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.source = ShapesPick() if source is None else source
        self.view = view
        self.pairs_per_batch = pairs_per_batch
        self.resolution = resolution
        self.batches_per_epoch = batches_per_epoch
        self.latent_cache = latent_cache
        self.workers = workers
        self.seed = run_seed(seed)
        if validation_source is None:
            validation_source = self.source.held_out("validation")
        if test_source is None:
            test_source = self.source.held_out("test")
        self._validation_source, self._test_source = validation_source, test_source
        # Shares of [0, 1) from which the training prompts come, as PromptDataModule cuts them.
        self._low = test_fraction if test_source is None else 0.0
        self._high = 1 - validation_fraction if validation_source is None else 1.0
        self._prompts = PromptDataModule(
            PickaPicPrompts(self.source),
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            validation_source=validation_source,
            test_source=test_source,
            validation_prompts=validation_prompts,
            validation_images_per_prompt=validation_images_per_prompt,
            test_prompts=test_prompts,
            test_images_per_prompt=test_images_per_prompt,
            eval_batch=eval_batch,
            predict_source=predict_source,
            seed=self.seed,
        )
        self._train_loader: PairLoader | None = None
        self._check_arguments()

    def _check_arguments(self) -> None:
        for name in ("pairs_per_batch", "resolution", "batches_per_epoch", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}: give at least 1")
        if self.view not in ("winners", "pairs"):
            raise ConfigError(f"data.view is '{self.view}': give winners (SPIN, finetuning) or pairs (DPO)")

    def prepare_data(self) -> None:
        """Index large sources of prompts, in one process of a machine."""
        self._prompts.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Index the prompts and, for "fit", the pairs; check that they can fill a batch on every rank."""
        self._prompts.trainer = self.trainer
        self._prompts.setup("test")
        if stage in ("fit", None):
            self._train_loader = self._make_train_loader()

    def _make_train_loader(self) -> PairLoader:
        wanted, rank = self.pairs_per_batch, Rank.of(self.trainer)
        if wanted % rank.world:
            raise ConfigError(
                f"data.pairs_per_batch is {wanted}, which {rank.world} ranks cannot share equally: "
                f"give a multiple of {rank.world}"
            )
        rows = self._training_rows()
        if wanted > len(rows):
            raise ConfigError(
                f"data.pairs_per_batch is {wanted}, but {self.source} has only {len(rows)} pairs to train "
                "on: lower it, give more pairs, or lower validation_fraction and test_fraction"
            )
        return PairLoader(
            self.source,
            [
                rows[bisect_left(rows, block.start) : bisect_left(rows, block.stop)]
                for block in self.source.blocks()
            ],
            self.view,
            wanted,
            self.batches_per_epoch or len(rows) // wanted,
            self.resolution,
            self.seed,
            rank,
            self.workers,
        )

    def _training_rows(self) -> Sequence[int]:
        """The rows with a verdict whose prompt is not held out; the others are counted."""
        held = self._held_out_prompts()
        rows, undecided, empty, held_out = array("q"), 0, 0, 0
        for row in range(len(self.source)):
            if self.source.label(row) not in (0.0, 1.0):
                undecided += 1
            elif not (prompt := self.source.prompt(row).strip()):
                empty += 1
            elif not self._low <= place(prompt) < self._high or prompt in held:
                held_out += 1
            else:
                rows.append(row)
        rank_zero_info(
            f"{self.source}: {len(rows)} of {len(self.source)} pairs to train on; {undecided} ties or "
            f"without a label, {empty} without a prompt, {held_out} of held-out prompts"
        )
        return rows

    def _held_out_prompts(self) -> frozenset[str]:
        """The prompts of ``validation_source`` and ``test_source`` that training skips."""
        held = set[str]()
        for source, loader in (
            (self._validation_source, self._prompts.val_dataloader),
            (self._test_source, self._prompts.test_dataloader),
        ):
            if source is None:
                continue
            rows = loader().rows if source.distinct and len(source) > FEW else range(len(source))
            held.update(source.prompt(row).strip() for row in rows)
        return frozenset(held)

    def train_rows(self, start_batch: int, num_batches: int) -> Iterator[tuple[int, str]]:
        """Yield row and prompt of each pair in this rank's share of coming batches, in their order.

        They are what the batches will hold: a pair whose image cannot be read is replaced here too, for
        which the images are decoded, but not kept.

        Args:
            start_batch: Number of the first batch, counted over the run.
            num_batches: How many batches.
        """
        return self.train_dataloader().rows(start_batch, num_batches)

    def train_dataloader(self) -> PairLoader:
        """The train loader: one object a fit, whose position survives a reload between epochs."""
        assert self._train_loader is not None, "setup('fit') comes first"
        return self._train_loader

    def val_dataloader(self) -> FixedLoader:
        """The validation prompts."""
        return self._prompts.val_dataloader()

    def test_dataloader(self) -> FixedLoader:
        """The test prompts."""
        return self._prompts.test_dataloader()

    def predict_dataloader(self) -> FixedLoader:
        """All prompts of ``predict_source``, or the test prompts."""
        return self._prompts.predict_dataloader()

    def transfer_batch_to_device(
        self, batch: Batch | PairBatch, device: torch.device, dataloader_idx: int
    ) -> Batch | PairBatch:
        """Move images; tensors that count stay on the CPU, where the host reads them."""
        return batch.to(device) if isinstance(batch, PairBatch) else batch
