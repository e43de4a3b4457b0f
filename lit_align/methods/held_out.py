"""Which data a method can have, and which prompts are held out."""

import json
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_align.data import Batch, MultiTaskDataModule, PickaPicDataModule, PromptDataModule
from lit_align.errors import ConfigError

CHECKED_PROMPTS = 1024
"""Held-out prompts that are compared with what the model was taught."""

KNOWN = PromptDataModule | MultiTaskDataModule | PickaPicDataModule
"""The data modules whose prompts can be listed; of others, and without one, nothing is known."""


def check_data(data: Any, stage: str, method: Any) -> None:
    """Refuse data that a method cannot have.

    Args:
        data: The data module; None for loaders alone.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
        method: Its class.

    Raises:
        ConfigError: The data are loaders alone, or give no batches of this package, or it would learn from
            several tasks or pairs, and cannot.
    """
    if data is None:
        raise ConfigError(
            "data: loaders alone cannot handle ranks and resumed runs; give a data module of "
            "lit_align.data, as in trainer.fit(module, PromptDataModule(...))"
        )
    if not is_overridden("transfer_batch_to_device", data):  # what moves our batches
        raise ConfigError(
            f"data: {type(data).__name__} is not a data module of lit_align.data, whose batches methods "
            "take; use PromptDataModule, with a PromptSource of your own where none of the package fits"
        )
    if stage != "fit":
        return
    if isinstance(data, MultiTaskDataModule) and not method.several_tasks:
        raise ConfigError(
            f"data: MultiTaskDataModule has several tasks, and {method.__name__} learns one; use "
            "PromptDataModule"
        )
    if isinstance(data, PickaPicDataModule) and not method.learns_from_pairs:
        raise ConfigError(
            f"data: {method.__name__} learns from images that it draws, and PickaPicDataModule has those of "
            "a dataset; use PromptDataModule (PickaPicPrompts is a source of the same prompts)"
        )


def held_out_prompts(data: Any, stage: str) -> list[str]:
    """The prompts of this rank that a stage evaluates, each once, at most :data:`CHECKED_PROMPTS`.

    Args:
        data: A data module of this package; of others, and without one, nothing is known.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    if not isinstance(data, KNOWN):
        return []
    prompts: dict[str, None] = {}
    for batch in _batches(data, stage):
        prompts |= dict.fromkeys(batch.prompts)
        if len(prompts) >= CHECKED_PROMPTS:
            break
    return list(prompts)[:CHECKED_PROMPTS]


def first_batches(data: Any, stage: str) -> list[Batch]:
    """The first batch of each task that this rank evaluates in a stage; arguments as above."""
    found: dict[str, Batch] = {}
    for batch in _batches(data, stage) if isinstance(data, KNOWN) else ():
        found.setdefault(batch.task, batch)
        if not isinstance(data, MultiTaskDataModule):
            break
    return list(found.values())


def validated_images(data: Any, limit: float) -> list[tuple[int, str, str]]:
    """The number, the prompt and the columns of each image that this rank validates.

    Args:
        data: A data module of this package; of others, and without one, nothing is known.
        limit: The Trainer's ``limit_val_batches``: so many batches, or that share of them.
    """
    if not limit or not isinstance(data, KNOWN):
        return []
    batches = data.val_dataloader()
    count = limit if isinstance(limit, int) else int(len(batches) * limit)
    return [
        (int(batch.index[row]), prompt, columns_text({name: v[row] for name, v in batch.columns.items()}))
        for batch in islice(batches, count)
        for row, prompt in enumerate(batch.prompts)
    ]


def columns_text(columns: Mapping[str, Any]) -> str:
    """The data's columns of an image, as a text that is the same in every run; empty where there are none."""

    def plain(value: object) -> str:
        return type(value).__name__ if type(value).__repr__ is object.__repr__ else str(value)

    return json.dumps(columns, sort_keys=True, default=plain) if columns else ""


def _batches(data: Any, stage: str) -> Iterable[Batch]:
    split = {"test": data.test_dataloader, "predict": data.predict_dataloader}
    batches: Iterable[Batch] = split.get(stage, data.val_dataloader)()
    return batches
