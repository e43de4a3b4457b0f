"""What the data modules share: the sizes of validation, test and predict."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from lit_align.data.batch import Batch, PairBatch
from lit_align.errors import ConfigError
from lit_align.randomness import run_seed


@dataclass(kw_only=True, eq=False, repr=False)
class AlignmentDataModule(LightningDataModule):
    """The base of all data modules. Sizes are global: they do not depend on the number of processes.

    Args:
        batches_per_epoch: Training batches of an epoch; one pass over the training data if not given. An
            epoch is only a length: the next one goes on where it ended.
        validation_fraction: Share of a source's prompts that is kept for validation; unused with
            ``validation_source``.
        test_fraction: Share of a source's prompts that is kept for the test; unused with ``test_source``.
        validation_prompts: How many prompts to validate on; the same ones every time.
        validation_images_per_prompt: Images of each.
        test_prompts: How many prompts to test on; the same ones every time, whatever the seed.
        test_images_per_prompt: Images of each; also for predict.
        eval_batch: Images in a batch of one rank in validation, test and predict, at most; prompts are kept
            whole.
        seed: Seed of the training order alone; that of ``seed_everything`` if not given.
    """

    batches_per_epoch: int | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    validation_prompts: int = 64
    validation_images_per_prompt: int = 4
    test_prompts: int = 128
    test_images_per_prompt: int = 4
    eval_batch: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__init__()
        self.seed = run_seed(self.seed)

    @property
    def order_seed(self) -> int:
        """Seed of the training order."""
        return run_seed(self.seed)

    def shared(self) -> dict[str, Any]:
        """The settings that all data modules have, by name."""
        return {field.name: getattr(self, field.name) for field in fields(AlignmentDataModule)}

    def check_positive(self, *names: str) -> None:
        """Refuse sizes below 1.

        Raises:
            ConfigError: One is.
        """
        for name in names:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"data.{name} is {value}: give at least 1")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move images; tensors that count stay on the CPU, where the host reads them.

        Raises:
            ConfigError: It is no batch of this package.
        """
        for part in batch if isinstance(batch, list) else [batch]:
            if not isinstance(part, Batch | PairBatch):
                raise ConfigError(
                    f"data: {type(self).__name__} gives a {type(part).__name__} as a batch, and methods take "
                    "lit_align.data.Batch(prompts, groups, index=...); let its loaders give these"
                )
        return batch.to(device) if isinstance(batch, PairBatch) else batch
