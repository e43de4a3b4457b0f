"""The data of several tasks that are trained together: a rollout batch of each task in every batch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_align.data.batch import Batch
from lit_align.data.loading import counted
from lit_align.data.module import AlignmentDataModule
from lit_align.data.prompts.loaders import FixedLoader, RolloutLoader
from lit_align.data.prompts.module import PromptDataModule
from lit_align.data.prompts.sources import PromptSource
from lit_align.errors import ConfigError


@dataclass
class TaskPrompts:
    """The prompts of one task.

    Args:
        source: The prompts.
        images_per_prompt: Images of one prompt in a rollout batch; the module's if not given.
        prompts_per_batch: Prompts of one rollout batch; the module's if not given.
        validation_source: Validate on these prompts; a share of ``source`` if not given.
        test_source: Test on these prompts, without those that are validated on; a share of ``source`` if not
            given.
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
        count, iterators = len(self.loaders), [iter(loader) for loader in self.loaders.values()]
        for _ in range(len(self)):
            batches = [next(iterator) for iterator in iterators]
            yield [
                replace(batch, task=name, groups=batch.groups * count + at, index=batch.index * count + at)
                for at, (name, batch) in enumerate(zip(self.loaders, batches, strict=True))
            ]

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


@dataclass(eq=False, repr=False)
class MultiTaskDataModule(AlignmentDataModule):
    """Prompts of several tasks: each is a :class:`PromptDataModule` of its own, with the same settings.

    A training batch is a list with one rollout batch of each task, in their order; in validation, test and
    predict the tasks follow each other. Without ``batches_per_epoch`` an epoch is one pass over the smallest
    source.

    Args:
        tasks: Prompts by the name of the task; the model has the same names.
        images_per_prompt: Images of one prompt in a rollout batch of each task.
        prompts_per_batch: Prompts of one rollout batch of each task.
        test_split: See :class:`PromptDataModule`.

    Attributes:
        modules: The data module of each task.

    Raises:
        ConfigError: There is no task, or a size cannot work.
    """

    tasks: dict[str, TaskPrompts]
    images_per_prompt: int = 8
    prompts_per_batch: int = 16
    test_split: Literal["test", "train"] = "test"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tasks:
            raise ConfigError("data.tasks is empty: give the prompts of at least one task, by its name")
        common = {
            name: getattr(self, name) for name in ("images_per_prompt", "prompts_per_batch", "test_split")
        }
        self.modules: dict[str, PromptDataModule] = {}
        for name, task in self.tasks.items():
            own = {setting: value for setting, value in vars(task).items() if value is not None}
            try:
                self.modules[name] = PromptDataModule(**self.shared() | common | own)
            except ConfigError as error:
                raise ConfigError(f"tasks.{name}: {error}") from None

    def prepare_data(self) -> None:
        """Index large sources, once a machine."""
        for data in self.modules.values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Split the prompts of each task; tell of held-out prompts of one that another trains on."""
        for data in self.modules.values():
            data.trainer = self.trainer
            data.setup(stage)
        for name, other in permutations(self.modules, 2) if stage in ("fit", None) else ():
            for split, count in self.modules[name].trained_elsewhere(self.modules[other]).items():
                if count:
                    rank_zero_warn(
                        f"the task {other} trains on {counted(count, f'{split} prompt')} of the task {name}, "
                        "whose metrics are then not of prompts that the run has never seen; take them out of "
                        f"data.tasks.{other}.source"
                    )

    def train_dataloader(self) -> JointLoader:
        """A rollout batch of each task in every batch."""
        return JointLoader({name: data.train_dataloader() for name, data in self.modules.items()})

    def val_dataloader(self) -> JointFixedLoader:
        """The validation prompts of all tasks."""
        return JointFixedLoader({name: data.val_dataloader() for name, data in self.modules.items()})

    def test_dataloader(self) -> JointFixedLoader:
        """The prompts of ``test_split`` of all tasks."""
        return JointFixedLoader({name: data.test_dataloader() for name, data in self.modules.items()})

    def predict_dataloader(self) -> JointFixedLoader:
        """The test prompts of all tasks."""
        return JointFixedLoader({name: data.predict_dataloader() for name, data in self.modules.items()})
