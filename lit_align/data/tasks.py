"""The data of several tasks that are trained together: prompts of each, in one batch an iteration."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule

from lit_align.data.batch import Batch
from lit_align.data.loaders import FixedLoader, RolloutLoader
from lit_align.data.prompts import PromptDataModule
from lit_align.data.sources import PromptSource
from lit_align.errors import ConfigError


@dataclass
class TaskPrompts:
    """The prompts of one task.

    Args:
        source: The prompts.
        images_per_prompt: Images of one prompt in a rollout batch; the module's if not given.
        prompts_per_batch: Prompts of one rollout batch; the module's if not given.
        validation_source: Validate on these prompts; a share of ``source`` if not given.
        test_source: Test on these prompts; a share of ``source`` if not given.
        validation_prompts: Of this task; the module's if not given, as for all that follow.
        validation_images_per_prompt: Images of each of these.
        test_prompts: Of this task. Many prompts of few images give smaller errors; rewards of a prompt's set
            need several images of each.
        test_images_per_prompt: Images of each of these.
    """

    source: PromptSource
    images_per_prompt: int | None = None
    prompts_per_batch: int | None = None
    validation_source: PromptSource | None = None
    test_source: PromptSource | None = None
    validation_prompts: int | None = None
    validation_images_per_prompt: int | None = None
    test_prompts: int | None = None
    test_images_per_prompt: int | None = None


class JointLoader:
    """The train loader of several tasks: one batch is a rollout batch of each, in the order of the tasks.

    Images and groups are numbered through the tasks, so that no two tasks share noise.

    Args:
        loaders: The loader of each task.
    """

    def __init__(self, loaders: Mapping[str, RolloutLoader]) -> None:
        self.loaders = dict(loaders)

    def __len__(self) -> int:
        return min(len(loader) for loader in self.loaders.values())

    def __iter__(self) -> Iterator[list[Batch]]:
        tasks, count = [(name, iter(loader)) for name, loader in self.loaders.items()], len(self.loaders)
        for _ in range(len(self)):
            yield [_of_task(next(loader), name, count, at) for at, (name, loader) in enumerate(tasks)]

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The position of each task."""
        return {name: loader.state_dict() for name, loader in self.loaders.items()}

    def load_state_dict(self, state: dict[str, dict[str, int]]) -> None:
        """Go to a saved position.

        Raises:
            ConfigError: It was saved with other tasks, or other sizes of them.
        """
        if list(state) != list(self.loaders):
            raise ConfigError(
                f"data.tasks are {', '.join(self.loaders)}, but the checkpoint was written with "
                f"{', '.join(state)}: set them back to resume this run"
            )
        for name, loader in self.loaders.items():
            loader.load_state_dict(state[name])


class JointFixedLoader:
    """The fixed prompts of several tasks, one task after the other.

    Args:
        loaders: The loader of each task.
    """

    def __init__(self, loaders: Mapping[str, FixedLoader]) -> None:
        self.loaders = dict(loaders)

    def __len__(self) -> int:
        return sum(len(loader) for loader in self.loaders.values())

    def __iter__(self) -> Iterator[Batch]:
        prompts = images = 0
        for name, loader in self.loaders.items():
            for batch in loader:
                yield replace(batch, task=name, groups=batch.groups + prompts, index=batch.index + images)
            prompts += len(loader.rows)
            images += len(loader.rows) * loader.images_per_prompt


class MultiTaskDataModule(LightningDataModule):
    """Prompts of several tasks: each is a :class:`PromptDataModule` of its own, with the same settings.

    A training batch is a list with one rollout batch of each task, in their order; in validation, test and
    predict the tasks follow each other.

    Args:
        tasks: Prompts by the name of the task, which the model knows too.
        images_per_prompt: See :class:`PromptDataModule`; so are all that follow.
        prompts_per_batch: Of each task.
        batches_per_epoch: Iterations in an epoch; one pass over the smallest source if not given.
        validation_fraction: Of the sources of tasks without a ``validation_source``.
        test_fraction: Of the sources of tasks without a ``test_source``.
        validation_prompts: Of each task.
        validation_images_per_prompt: Images of each prompt.
        test_prompts: Of each task.
        test_images_per_prompt: Images of each prompt; also for predict, which takes the test prompts.
        eval_batch: Images in a batch of one rank in validation, test and predict, at most.
        seed: Seed of the training order.
        test_split: See :class:`PromptDataModule`.

    Raises:
        ConfigError: There is no task, or a size cannot work.
    """

    def __init__(
        self,
        tasks: dict[str, TaskPrompts],
        images_per_prompt: int = 8,
        prompts_per_batch: int = 16,
        batches_per_epoch: int | None = None,
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        validation_prompts: int = 64,
        validation_images_per_prompt: int = 4,
        test_prompts: int = 128,
        test_images_per_prompt: int = 4,
        eval_batch: int = 64,
        seed: int | None = None,
        test_split: Literal["test", "train"] = "test",
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigError("data.tasks is empty: give the prompts of at least one task, by its name")
        self.test_split = test_split
        common = {
            "images_per_prompt": images_per_prompt,
            "prompts_per_batch": prompts_per_batch,
            "validation_prompts": validation_prompts,
            "validation_images_per_prompt": validation_images_per_prompt,
            "test_prompts": test_prompts,
            "test_images_per_prompt": test_images_per_prompt,
        }
        self.tasks: dict[str, PromptDataModule] = {}
        for name, task in tasks.items():
            try:
                self.tasks[name] = PromptDataModule(
                    task.source,
                    batches_per_epoch=batches_per_epoch,
                    validation_fraction=validation_fraction,
                    test_fraction=test_fraction,
                    validation_source=task.validation_source,
                    test_source=task.test_source,
                    eval_batch=eval_batch,
                    seed=seed,
                    test_split=test_split,
                    **_sizes(task, common),
                )
            except ConfigError as error:
                raise ConfigError(f"tasks.{name}: {error}") from None

    def prepare_data(self) -> None:
        """Index large sources, once a machine."""
        for data in self.tasks.values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Split the prompts of each task."""
        for data in self.tasks.values():
            data.trainer = self.trainer
            data.setup(stage)

    def train_dataloader(self) -> JointLoader:
        """A rollout batch of each task in every batch."""
        return JointLoader({name: data.train_dataloader() for name, data in self.tasks.items()})

    def val_dataloader(self) -> JointFixedLoader:
        """The validation prompts of all tasks."""
        return JointFixedLoader({name: data.val_dataloader() for name, data in self.tasks.items()})

    def test_dataloader(self) -> JointFixedLoader:
        """The prompts of ``test_split`` of all tasks."""
        return JointFixedLoader({name: data.test_dataloader() for name, data in self.tasks.items()})

    def predict_dataloader(self) -> JointFixedLoader:
        """The test prompts of all tasks."""
        return JointFixedLoader({name: data.predict_dataloader() for name, data in self.tasks.items()})

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches on the CPU: their tensors count images and are read by the host."""
        return batch


def _sizes(task: TaskPrompts, common: Mapping[str, int]) -> dict[str, Any]:
    """A task's own sizes where it has them."""
    own = {name: getattr(task, name) for name in common}
    return {name: size if own[name] is None else own[name] for name, size in common.items()}


def _of_task(batch: Batch, name: str, count: int, number: int) -> Batch:
    """A task's batch with numbers that no other task has."""
    groups, index = batch.groups * count + number, batch.index * count + number
    return replace(batch, task=name, groups=groups, index=index)
