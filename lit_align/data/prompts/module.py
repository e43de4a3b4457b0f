"""The data of the methods that make their own images: prompts, split and handed out in rollout batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.loading import Rank, counted
from lit_align.data.module import AlignmentDataModule
from lit_align.data.prompts.index import ON_DISK, index
from lit_align.data.prompts.loaders import FixedLoader, RolloutLoader
from lit_align.data.prompts.sets import PromptSet
from lit_align.data.prompts.sources import PromptSource
from lit_align.data.splits import Keys
from lit_align.errors import ConfigError, check_kinds, tell

SPLIT = ("source", "validation_source", "test_source")
SOURCES = (*SPLIT, "predict_source")
SPLIT_BY = (*SPLIT, "validation_fraction", "test_fraction", "validation_prompts", "test_prompts")
"""The settings by which prompts are split; they are split again where one is set later."""


@dataclass(eq=False, repr=False)
class PromptDataModule(AlignmentDataModule):
    """Prompts in rollout batches for training, and fixed prompts for validation, test and predict.

    A prompt belongs to a split by a hash of its text, so splits are disjoint, and do not change when rows are
    added or moved. Empty and repeated prompts are dropped.

    Millions of prompts are read and indexed once; both lie in the ``datasets`` cache and are memory-mapped,
    so that later starts take about a second (see :mod:`lit_align.data.prompts.sources` for what can be read).

    Args:
        source: The prompts.
        images_per_prompt: Images of one prompt in a rollout batch, kept together on one rank.
        prompts_per_batch: Prompts of one training batch, over all ranks; the number of ranks must divide
            it.
        validation_source: Validate on these prompts; training and a test split of ``source`` skip them.
        test_source: Test on these prompts, without those of ``validation_source`` that are validated on;
            training and a validation split of ``source`` skip them. (Of a source of distinct prompts, which
            may hold millions, only those in use are skipped.)
        predict_source: Predict on all of these, in their order; on the test prompts if not given.
        test_split: ``"test"``, or ``"train"`` to test on the first ``test_prompts`` of the training order of
            this seed. They show what was learnt on the training prompts, if the run has reached all of them.
            Predict never uses them.

    Attributes:
        others: The prompts of ``validation_source`` and ``test_source``, by the name of the split, after
            :meth:`setup`.

    Raises:
        ConfigError: For a size or fraction that cannot work, here or, where the data is needed, in
            :meth:`setup` and the loaders.
    """

    source: PromptSource
    images_per_prompt: int = 8
    prompts_per_batch: int = 16
    validation_source: PromptSource | None = None
    test_source: PromptSource | None = None
    predict_source: PromptSource | None = None
    test_split: Literal["test", "train"] = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.others: dict[str, PromptSet] = {}
        self._sets: dict[str, PromptSet] = {}
        self._train_loader: RolloutLoader | None = None
        self._split_by: list[Any] = []
        self._check_arguments()

    def _check_arguments(self) -> None:
        sources = {name: value for name in SOURCES if (value := getattr(self, name)) is not None}
        check_kinds({f"data.{name}": (value, PromptSource) for name, value in sources.items()})
        self.validation_fraction = 0.0 if self.validation_source else self.validation_fraction
        self.test_fraction = 0.0 if self.test_source else self.test_fraction
        self.check_positive("images_per_prompt", "prompts_per_batch", "batches_per_epoch")
        self.check_positive("validation_prompts", "test_prompts")
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
        for source in (getattr(self, name) for name in SOURCES):
            if source is not None and not source.distinct and len(source) >= ON_DISK and source.fingerprint():
                index(source)

    def setup(self, stage: str | None = None) -> None:
        """Split the prompts, anew if a setting has changed; for "fit", check that they fill a batch."""
        self._check_arguments()
        if self._split_by != (given := [getattr(self, name) for name in SPLIT_BY]):
            self._split(tested=stage == "test")
            self._split_by = given
        if stage in ("fit", None):
            self._train_loader = self._make_train_loader()

    def _split(self, tested: bool) -> None:
        self.others, validated = {}, []
        if self.validation_source is not None:
            self.others["validation"] = chosen = _all_prompts(self.validation_source)
            validated = [chosen.keys_in_use(self.validation_prompts)]
        # It may be the same file, and the best checkpoint is chosen by validation.
        if self.test_source is not None:
            self.others["test"] = _all_prompts(self.test_source, validated, "validation_source")
        held_out = [other.keys(getattr(self, f"{name}_prompts")) for name, other in self.others.items()]
        usable = _all_prompts(self.source, held_out, "validation_source or test_source", tested)
        # Shares of [0, 1): test from below, validation from above, so that a change of one fraction does not
        # change the other split.
        low, high = self.test_fraction, 1 - self.validation_fraction
        shares = {"test": (0.0, low), "train": (low, high), "validation": (high, 1.0)}
        self._sets = {name: usable.split(*share) for name, share in shares.items()} | self.others

    def _make_train_loader(self) -> RolloutLoader:
        wanted, rank, train = self.prompts_per_batch, Rank.of(self.trainer), self._sets["train"]
        rank.check("prompts_per_batch", wanted)
        if not (count := train.count()):
            raise ConfigError(
                f"{self.source} has {counted(train.usable, 'prompt')}, and none of them is left to train on: "
                "set data.validation_fraction and data.test_fraction to 0, and give data.validation_source "
                "and data.test_source prompts that it does not have"
            )
        if wanted > count:
            raise ConfigError(
                f"data.prompts_per_batch is {wanted}, but {self.source} has only "
                f"{counted(count, 'training prompt')}: lower it to at most {count}, give more prompts, or "
                "lower the held-out fractions"
            )
        length = self.batches_per_epoch or count // wanted
        return RolloutLoader(train, wanted, self.images_per_prompt, length, self.order_seed, rank)

    def trained_elsewhere(self, other: "PromptDataModule") -> dict[str, int]:
        """How many of the prompts that are validated and tested on here another module trains on."""
        splits = ("validation", "test") if self.test_split == "test" else ("validation",)
        used = {name: self._sets[name].keys_in_use(getattr(self, f"{name}_prompts")) for name in splits}
        return {name: other._sets["train"].has(keys) for name, keys in used.items()}

    def train_dataloader(self) -> RolloutLoader:
        """The train loader: one object a fit, whose position survives a reload between epochs."""
        if self._train_loader is None:  # asked for by hand
            self.setup("fit")
        assert self._train_loader is not None, "made by setup"
        return self._train_loader

    def val_dataloader(self) -> FixedLoader:
        """The validation prompts."""
        return self.fixed("validation", "give data.validation_source prompts of its own")

    def test_dataloader(self) -> FixedLoader:
        """The prompts of ``test_split``."""
        if self.test_split == "train":
            return self.fixed("train", "set data.test_split to test, or lower the held-out fractions")
        return self.fixed("test", "give data.test_source prompts of its own, or set data.test_split to train")

    def predict_dataloader(self) -> FixedLoader:
        """All prompts of ``predict_source``, or the test prompts."""
        if self.predict_source is None:
            return self.fixed("test", "give data.predict_source")
        rank, prompts = Rank.of(self.trainer), _all_prompts(self.predict_source)
        rows = prompts.rows if self.predict_source.distinct else np.sort(prompts.rows)
        if len(rows) % rank.world:
            raise ConfigError(
                f"data.predict_source has {len(rows)} prompts, which {rank.world} ranks cannot share "
                "equally: predict on one device, or give a multiple"
            )
        images = self.test_images_per_prompt
        return FixedLoader(prompts, rows, images, self.eval_batch // images, rank)

    def fixed(self, split: str, remedy: str) -> FixedLoader:
        """The first prompts of a split, in the order of training if it is that split.

        Args:
            split: "train", "validation" or "test".
            remedy: What to do if it has no prompts, for messages.

        Raises:
            ConfigError: It has none, or their number cannot be shared by the ranks.
        """
        if not self._sets:  # asked for by hand
            self.setup("validate")
        kind, prompts, rank = "test" if split == "train" else split, self._sets[split], Rank.of(self.trainer)
        wanted, images = getattr(self, f"{kind}_prompts"), getattr(self, f"{kind}_images_per_prompt")
        rank.check(f"{kind}_prompts", wanted)
        order = prompts.training_order(self.order_seed, 0) if split == "train" else prompts.fixed_order()
        rows = prompts.first(wanted, order)
        usable = len(rows) - len(rows) % rank.world
        validated = prompts.removed() if split == "test" and split in self.others else 0
        if usable == 0:
            there = counted(len(rows), f"{'training' if split == 'train' else split} prompt")
            ranks = f"for {counted(rank.world, 'rank')}, of {prompts.usable} in all"
            taken = f", {validated} of which are validated on" if validated else ""
            remedy = f"{self._larger_share(split, rank.world)}{remedy}"
            raise ConfigError(f"{prompts.source} has {there} {ranks}{taken}: {remedy}")
        if usable < wanted:
            others = f" besides the {validated} that are validated on" if validated else ""
            rank_zero_warn(
                f"data.{kind}_prompts is {wanted}, but {prompts.source} has {len(rows)}{others}: {usable} "
                "are used"
            )
        return FixedLoader(prompts, rows[:usable], images, self.eval_batch // images, rank)

    def _larger_share(self, split: str, wanted: int) -> str:
        """The remedy of a larger fraction, or nothing where half of the prompts would not be enough."""
        train, raised = self._sets["train"], f"raise data.{split}_fraction"
        if split == "train" or split in self.others or train.usable < 2:  # a single one would leave another
            return ""
        if (places := train.places()) is None:
            return f"{raised}, or "
        if len(places) <= wanted:
            return ""
        needed = 1 - places[-wanted] if split == "validation" else places[wanted - 1]
        return f"{raised} to at least {needed + 0.005:.2f}, or " if needed < 0.5 else ""  # rounded up


def _all_prompts(
    source: PromptSource, held_out: Sequence[Keys] = (), by: str = "", tested: bool = False
) -> PromptSet:
    """All prompts of a source but those held out by others; says how many were read.

    ``tested`` says that they are removed for a test, when the training is over.
    """
    prompts, told = PromptSet(source, held_out), f"{source}: {counted(len(source), 'prompt')} read"
    if (found := prompts.index) and (found.empty or found.repeated):
        told += f"; {found.empty} empty and {found.repeated} repeated prompts dropped, {len(found)} left"
    if removed := prompts.removed():
        told += f"; {removed} prompts removed, which {by} has too"
        told += ": a run that was fitted without it may have been trained on them" if tested else ""
    elif held_out and not found:
        told += f"; {sum(map(len, held_out))} prompts of {by} are skipped"
    tell(told)
    return prompts
