"""What can be seen in a configuration without running it: sizes, schedules, held-out prompts, disk space."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_align.data import MultiTaskDataModule, PromptDataModule
from lit_align.data.loading import Rank
from lit_align.doctor.finding import Finding
from lit_align.errors import ConfigError
from lit_align.methods import AlignmentModule, DDPOModule, NFTModule, PRDPModule, SPINModule
from lit_align.methods.joint import JointModule
from lit_align.methods.pairs import PairModule
from lit_align.methods.scales import clip_range_misfit, strength_misfit
from lit_align.methods.tasks import check_task, check_updates

FEW_IN_AN_UPDATE = 16
"""Images; DDPO's small-scale experiments have 64 (arXiv 2305.13301, table D.5)."""

FEW_OF_A_PROMPT = 4
"""Images of a prompt, below which their mean is mostly the image's own reward; published: 8 to 24."""

FEW_HELD_OUT = 64
"""Images, of which a change of .1 standard deviations is a standard error."""

BYTES_TRAINED = 16
"""Of a trained weight in a checkpoint: the weight, two moments of Adam, and as much again for buffers."""


@dataclass(frozen=True)
class Asked:
    """What a configuration asks of the Trainer.

    Attributes:
        max_epochs: None or -1 where nothing was said.
        max_steps: -1 where nothing was said.
        batches: Rollout batches in an epoch; None for all there are.
        val_batches: ``limit_val_batches``.
        val_every: ``check_val_every_n_epoch``.
        save_dir: Where runs are written.
        processes: That will share the data; 1 where that is not known.
    """

    max_epochs: int | None
    max_steps: int
    batches: int | float | None
    val_batches: int | float | None
    val_every: int | None
    save_dir: Path
    processes: int = 1


def look(module: AlignmentModule, data: Any, asked: Asked) -> Iterator[Finding]:
    """Findings in a configuration whose objects could be made, without a trial.

    Args:
        module: The method.
        data: Its data.
        asked: Of the Trainer.
    """
    yield from _sizes(module, data)
    yield from _ranks(module, data, asked.processes)
    yield from _scales(module)
    yield from _held_out(module, data, asked)
    yield from _length(module, data, asked)
    yield from _room(module, asked)
    if isinstance(module, NFTModule) and (told := module.guidance_is_learnt):
        yield Finding("guidance_is_learnt", "model.sampling.guidance", told, "set it to 1")


def tasks_of(module: AlignmentModule, data: Any) -> dict[str, PromptDataModule]:
    """The prompts of each task that is trained; a single one has an empty name."""
    if isinstance(data, MultiTaskDataModule):
        weights = module.tasks if isinstance(module, JointModule) else {}
        return {
            name: one for name, one in data.modules.items() if name not in weights or weights[name].weight
        }
    return {"": data} if isinstance(data, PromptDataModule) else {}


def _sizes(module: AlignmentModule, data: Any) -> Iterator[Finding]:
    for name, prompts in tasks_of(module, data).items():
        place = f"data.tasks.{name}" if name else "data"
        images = prompts.images_per_prompt * prompts.prompts_per_batch // getattr(module, "updates", 1)
        if isinstance(module, JointModule | PRDPModule) and images < FEW_IN_AN_UPDATE:
            yield Finding(
                "few_images_in_an_update",
                f"{place}.prompts_per_batch",
                f"an update sees {images} images, whose rewards are mostly noise",
                f"raise it, or lower model.updates, to {FEW_IN_AN_UPDATE} or more",
            )
        of_group = isinstance(module, JointModule) and module.tasks[name].advantages.baseline == "group"
        if of_group and prompts.images_per_prompt < FEW_OF_A_PROMPT:
            yield Finding(
                "few_images_of_a_prompt",
                f"{place}.images_per_prompt",
                f"advantages compare the {prompts.images_per_prompt} images of a prompt",
                f"set it to {FEW_OF_A_PROMPT} or more (published: 8 to 24), or use PerPromptAdvantages",
            )


def _ranks(module: AlignmentModule, data: Any, processes: int) -> Iterator[Finding]:
    """What the processes of the real run could not share: the trial has one."""
    if processes < 2:
        return
    for name, prompts in tasks_of(module, data).items():
        updates = getattr(module, "updates", 1)
        if isinstance(module, JointModule):
            yield from _refused(partial(check_task, name, module.tasks[name], prompts, updates, processes))
        else:
            yield from _refused(partial(check_updates, prompts, updates, processes))
    for place, one in (data.modules if isinstance(data, MultiTaskDataModule) else {"": data}).items():
        for name in ("pairs_per_batch", "validation_prompts", "test_prompts"):
            setting = f"tasks.{place}.{name}" if place else name
            yield from _refused(partial(Rank(0, processes).check, setting, getattr(one, name, processes)))


def _refused(check: Callable[[], None]) -> Iterator[Finding]:
    try:
        check()
    except ConfigError as error:
        what, _, remedy = str(error).replace(": give", "; give").partition("; ")
        yield Finding("processes", "trainer.devices", what, remedy or "change it")


def _scales(module: AlignmentModule) -> Iterator[Finding]:
    elements = prod(module.backbone.latent_shape)
    if isinstance(module, DDPOModule | PRDPModule):
        unit = module.unit if isinstance(module, PRDPModule) else elements
        if found := clip_range_misfit(module.clip_range, unit):
            yield Finding("clip_range", "model.clip_range", *found)
    for beta in dict.fromkeys(module.strengths) if isinstance(module, PairModule) else ():
        if found := strength_misfit(beta, elements):
            yield Finding("beta", "model.beta", *found)


def _held_out(module: AlignmentModule, data: Any, asked: Asked) -> Iterator[Finding]:
    every, epochs = asked.val_every, asked.max_epochs
    # Without it, batches are counted over the ends of epochs.
    never = every is not None and epochs is not None and 0 <= epochs < every
    if asked.val_batches == 0 or never:
        yield Finding(
            "no_validation",
            "trainer.limit_val_batches" if asked.val_batches == 0 else "trainer.check_val_every_n_epoch",
            "nothing is measured on held-out prompts, and a rollout batch's reward depends on its prompts",
            "let the run validate",
        )
    elif isinstance(asked.val_batches, float | None):
        images = sum(
            one.validation_prompts * one.validation_images_per_prompt
            for one in (data.modules.values() if isinstance(data, MultiTaskDataModule) else [data])
            if hasattr(one, "validation_prompts")
        )
        if 0 < images < FEW_HELD_OUT:
            yield Finding(
                "few_held_out",
                "data.validation_prompts",
                f"{images} held-out images cannot show a change of the size that training makes",
                f"raise it, or data.validation_images_per_prompt, to {FEW_HELD_OUT} images (256 for a claim)",
            )
    for bank in module.reward_banks:
        if bank.weights and not set(bank.names) - set(bank.trained) and "truth" not in bank.names:
            yield Finding(
                "nothing_monitored",
                "model.rewards",
                f"all rewards are trained on ({', '.join(bank.names)}): nothing shows if one is exploited",
                "add a reward without a weight",
            )


def _length(module: AlignmentModule, data: Any, asked: Asked) -> Iterator[Finding]:
    unlimited = asked.max_epochs in (None, -1) and asked.max_steps in (None, -1)
    if unlimited:
        yield Finding(
            "no_end",
            "trainer.max_epochs",
            "nothing says when the run ends",
            "set it, or trainer.max_steps",
        )
        return
    updates = _updates(module, data, asked)
    if isinstance(module, SPINModule) and updates is not None and updates < sum(module.steps):
        yield Finding(
            "iterations_are_cut",
            "trainer.max_epochs",
            f"the Trainer ends after {updates} updates, and the {module.iterations} iterations have "
            f"{sum(module.steps)}",
            "raise it, or trainer.limit_train_batches, or lower model.steps",
        )
    if updates is None or module.optimisation.lr_scheduler is None:
        return
    optimizer = module.optimisation.optimizer([nn.Parameter(torch.zeros(1, 1))])  # Muon's are matrices
    scheduler = module.optimisation.lr_scheduler(optimizer)
    if not hasattr(scheduler, "get_last_lr"):
        return
    for done in range(1, updates + 1):
        optimizer.step()
        problem = ""
        try:
            scheduler.step()
        except ValueError as error:  # OneCycleLR counts its steps
            problem = f"the run would end with an error at update {done} of {updates}: {error}"
        if not any(group["lr"] for group in optimizer.param_groups) and done < 0.9 * updates:
            problem = f"the learning rate is 0 after {done} of {updates} updates"
        if problem:
            yield Finding(
                "schedule_ends",
                "model.optimisation.lr_scheduler",
                problem,
                "it is stepped once per update; make it as long as the run",
            )
            return


def _updates(module: AlignmentModule, data: Any, asked: Asked) -> int | None:
    """Updates of the whole run, as far as the configuration says."""
    if asked.max_steps not in (None, -1):
        return asked.max_steps
    batches = asked.batches if isinstance(asked.batches, int) else getattr(data, "batches_per_epoch", None)
    if not batches or not asked.max_epochs:
        return None
    each = getattr(module, "updates", 1) * getattr(module, "inner_epochs", 1)
    each *= getattr(module, "shared_timesteps", None) or 1
    if isinstance(module, JointModule):
        each *= sum(task.weight > 0 for task in module.tasks.values())
        each += module.pretraining is not None and module.pretraining.order != "every"
    return int(asked.max_epochs * batches * each)


def _room(module: AlignmentModule, asked: Asked) -> Iterator[Finding]:
    existing = next(path for path in (asked.save_dir, *asked.save_dir.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        yield Finding(
            "cannot_write", "trainer.logger", f"{existing} cannot be written", "give another save_dir"
        )
        return
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    wanted, free = 3 * BYTES_TRAINED * trained, shutil.disk_usage(existing).free
    if free < wanted:
        yield Finding(
            "disk_full",
            "trainer.logger",
            f"{existing} has {free / 1e9:.1f} GB left, and checkpoints of {trained:,} trained weights take "
            f"up to {wanted / 1e9:.1f}",
            "make room, or give another save_dir",
        )
