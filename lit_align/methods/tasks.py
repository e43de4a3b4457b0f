"""Tasks: what a run trains on, one reward bank and one normaliser each (arXiv 2401.12244, section 3.3)."""

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from lit_align.advantages import Advantages
from lit_align.data import MultiTaskDataModule, PromptDataModule
from lit_align.errors import ConfigError, check_kinds, check_not_negative, check_same
from lit_align.methods.identity import rewards_of
from lit_align.rewards import RewardBank, Scope, SetReward

BATCH_LEARNS = " (DDPO learns from what a prompt shares with BatchAdvantages)"
"""Where a prompt's mean is taken away and its images share one score."""


def of_task(name: str, task: str) -> str:
    """The name under which a metric of one task is logged; unchanged where there is only one task."""
    return f"{name}/{task}" if task else name


@dataclass
class Task:
    """One of several things to learn at the same time; its prompts stand in the data under the same name.

    Args:
        rewards: What is maximised and what is monitored on the task's prompts.
        advantages: How its rewards become advantages; they never see another task's.
        weight: Factor on the learning rate of the task's updates, 1 for all in the paper. Not on the loss:
            Adam would undo it. What is left of a gradient in Adam's momentum is applied by the updates of
            the other tasks, so that a small weight counts for more than it says: with two tasks of four
            updates each .5 moves by .73 of what 1 does, .1 by .52; with the optimizer's ``betas: [0, 0.999]``
            by .5 and .1. A task of weight 0 is monitored: validated and tested, never trained on.
    """

    rewards: RewardBank
    advantages: Advantages
    weight: float = 1.0

    def __post_init__(self) -> None:
        # A copy: the history of one object would be that of all tasks and modules that are given it.
        self.given, self.advantages = self.advantages, deepcopy(self.advantages)


def make_tasks(
    rewards: RewardBank | None, advantages: Advantages | None, tasks: Mapping[str, Task] | None
) -> dict[str, Task]:
    """The tasks of a module: those that are named, or a single one without a name.

    Raises:
        ConfigError: Both ways were used, or none, or a name or a weight cannot work.
    """
    if not tasks:
        if rewards is None or advantages is None:
            raise ConfigError("model: give rewards and advantages, or tasks that have them")
        check_kinds({"advantages": (advantages, Advantages)})
        return {"": Task(rewards, advantages)}
    if rewards is not None or advantages is not None:
        raise ConfigError(
            "tasks: every task has its own rewards and advantages; set model.rewards and model.advantages to "
            "null, or tasks to null"
        )
    for name, task in tasks.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "truth":
            raise ConfigError(
                f"tasks: the name {name!r} cannot be used as a tag; use letters, digits, '_' and '-', and "
                "not 'truth', which stands for the judge"
            )
        check_not_negative({f"tasks.{name}.weight": task.weight})
    if not any(task.weight for task in tasks.values()):
        raise ConfigError(f"tasks: all weights are 0; give one of {', '.join(tasks)} a positive weight")
    return {name: replace(task) for name, task in tasks.items()}


def data_of_tasks(data: object, tasks: Mapping[str, Task]) -> dict[str, PromptDataModule]:
    """The prompts of each task; empty for data of an unknown kind.

    Raises:
        ConfigError: Data and model name different tasks.
    """
    there: dict[str, PromptDataModule] = {}
    if isinstance(data, MultiTaskDataModule):
        there = data.modules
    elif isinstance(data, PromptDataModule):
        there = {"": data}
    if there and set(there) != set(tasks):
        ours, theirs = (", ".join(names).strip() or "a single one without a name" for names in (tasks, there))
        raise ConfigError(
            f"tasks: the model has {ours}, and the data {theirs}; give model.tasks and data.tasks (of "
            "MultiTaskDataModule) the same names"
        )
    return there


def check_parts(rewards: RewardBank, advantages: object, tasks: Mapping[str, Task]) -> None:
    """Refuse rewards or advantages that were set on a module after it was built: its tasks have others.

    Args:
        rewards: Of the module now.
        advantages: The same; a module has none, unless a class of the user's keeps those of a task so.
        tasks: What it was built with.

    Raises:
        ConfigError: There are some.
    """
    known = (None, *(own for task in tasks.values() for own in (task.given, task.advantages)))
    same = rewards is next(iter(tasks.values())).rewards and any(advantages is one for one in known)
    check_same("rewards, advantages", same)


def check_tasks(tasks: Mapping[str, Task], trainer: Trainer, updates: int) -> None:
    """Refuse trained tasks that could not learn from their prompts; see :func:`check_task`."""
    for name, there in data_of_tasks(trainer.datamodule, tasks).items():  # type: ignore[attr-defined]
        if tasks[name].weight:
            check_task(name, tasks[name], there, updates, trainer.world_size)


def check_task(name: str, task: Task, data: PromptDataModule, updates: int, world: int) -> None:
    """Refuse a task that could not learn from its prompts.

    Args:
        name: Of the task.
        task: Its rewards and advantages.
        data: Its prompts.
        updates: Into how many parts a rollout batch is divided.
        world: Number of processes.

    Raises:
        ConfigError: With what to change.
    """
    place, normaliser = f"tasks.{name}: " if name else "", type(task.advantages).__name__
    if task.advantages.baseline == "group":
        check_compared(data, normaliser, place, ", or use BatchAdvantages")
    check_updates(data, updates, world, place)
    check_rewards(task.rewards, data, world, normaliser, *_baseline(task.advantages, data), place)


def check_compared(data: PromptDataModule, learner: str, place: str = "", remedy: str = "") -> None:
    """Refuse a single image of each prompt, for a learner that compares the images of a prompt."""
    if data.images_per_prompt < 2:
        raise ConfigError(
            f"{place}images_per_prompt: {learner} compares the images of a prompt, and there is "
            f"{data.images_per_prompt} of each; set data.images_per_prompt to 2 or more{remedy}"
        )


def check_updates(data: PromptDataModule, updates: int, world: int, place: str = "") -> None:
    """Refuse prompts of a rollout batch that do not divide into its updates.

    Raises:
        ConfigError: With what to change; ``place`` stands before it.
    """
    if data.prompts_per_batch % (updates * world):
        raise ConfigError(
            f"{place}updates: the {data.prompts_per_batch} prompts of a rollout batch do not divide into "
            f"{updates} updates on {world} processes; change model.updates or data.prompts_per_batch"
        )


def check_rewards(
    rewards: RewardBank,
    data: PromptDataModule,
    world: int,
    learner: str,
    baseline: Scope,
    remedy: str = BATCH_LEARNS,
    place: str = "",
) -> None:
    """Refuse trained rewards that could say nothing of a rollout batch's images, or not what they mean.

    Args:
        rewards: Of a task.
        data: Its prompts.
        world: Number of processes.
        learner: What compares the scores, for messages.
        baseline: Whose mean it subtracts: that of a prompt's images (``group``), of all (``batch``), or none.
        remedy: What helps, beside another credit, where it subtracts a prompt's mean.
        place: Of the bank, for messages.

    Raises:
        ConfigError: With what to change.
    """
    for reward_name in rewards.trained:
        reward = rewards.rewards[reward_name]
        where = f"{place}reward '{reward_name}' ({type(reward).__name__})"
        if not isinstance(reward, SetReward):
            if reward.scope == "batch" and world > 1:
                raise ConfigError(
                    f"{where}: its scope is the batch, of which each of {world} processes sees a part; train "
                    "on one device, or derive it from SetReward, which gathers what it needs"
                )
        elif reward.scope == "group" and (few := _too_few(data, reward.smallest)):
            raise ConfigError(
                f"{where}: with credit {reward.credit} it needs {reward.smallest} images of a prompt, and "
                f"there are {getattr(data, few)}; raise data.{few}"
            )
        elif reward.credit == "shared" and (baseline == "group" or baseline == reward.scope == "batch"):
            prompts = reward.scope == "group"
            raise ConfigError(
                f"{where}: all images of a {'prompt' if prompts else 'rollout batch'} share one "
                f"score, and {learner} takes their mean away: nothing would be left to learn from. Set its "
                f"credit to leave_one_out{remedy if prompts else ''}"
            )


def _baseline(advantages: Advantages, data: PromptDataModule) -> tuple[Scope, str]:
    """Whose mean a normaliser subtracts, and, if it is that of a prompt's images, what else would help."""
    match advantages.baseline:
        case "group":
            return "group", BATCH_LEARNS
        case "batch" if data.prompts_per_batch == 1:
            return "group", ", or data.prompts_per_batch above 1"
        case "batch":
            return "batch", ""
        case "history" if advantages.memory <= data.images_per_prompt:
            memory = f"its buffer_size, {advantages.memory}, to several times data.images_per_prompt"
            return "group", f", or give {type(advantages).__name__} a memory: {memory}"
    return "sample", ""


def _too_few(data: PromptDataModule, smallest: int) -> str | None:
    """The setting that asks for fewer images of a prompt than this."""
    names = ("images_per_prompt", "validation_images_per_prompt", "test_images_per_prompt")
    return next((name for name in names if getattr(data, name) < smallest), None)


def held_out_rewards(tasks: Mapping[str, Task]) -> tuple[str, ...]:
    """What is reported of rewards that no task is trained on; those of one name are one reward."""
    trained = {name for task in tasks.values() if task.weight for name in task.rewards.trained}
    return tuple(
        f"reward/{task}/{name}" if task else f"reward/{name}"
        for task, its in tasks.items()
        for name in its.rewards.names
        if name not in trained
    )


def scored_by_tasks(tasks: Mapping[str, Task]) -> dict[str, dict[str, str]]:
    """Class and weight of each reward by task and name, and what computes it.

    Those of a task of weight 0 are monitored.
    """
    rewards: dict[str, str] = {}
    contents: dict[str, str] = {}
    for task, its in tasks.items():
        rewards |= rewards_of(its.rewards, task, its.weight > 0)
        own = its.rewards.contents
        contents |= {f"{task}/{name}" if task else name: content for name, content in own.items()}
    return {"rewards": rewards, "reward_contents": contents}


def check_same_tasks(tasks: Mapping[str, Task], saved: Mapping[str, Any], method: str) -> None:
    """Refuse the checkpoint of other tasks, or with other normalisers.

    Args:
        tasks: Those of this run.
        saved: The state of each in the checkpoint.
        method: For the message.

    Raises:
        ConfigError: It is one.
    """
    own = {name: type(task.advantages).__name__ for name, task in tasks.items()}
    if own != {name: state["normaliser"] for name, state in saved.items()}:
        described = ", ".join(f"{name or 'one task'} with {kind}" for name, kind in own.items())
        raise ConfigError(
            f"ckpt_path: the checkpoint is not of {method} with these tasks ({described}); resume with the "
            "config.yaml of its run"
        )


def joint_scores(scores: Mapping[str, Tensor], task: str, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
    """Scores of one task's images under names that the images of all tasks have.

    ``reward/<task>`` and ``reward/<task>/<name>`` are NaN for the images of another task, ``reward`` for
    those of a task that is only monitored; ``reward/truth`` stays what it is.

    Args:
        scores: ``reward`` and ``reward/<name>``, ``(B,)`` each.
        task: Whose images they are.
        tasks: All of them.
    """
    nothing = torch.full_like(scores["reward"], torch.nan)
    joint = {"reward": scores["reward"] if tasks[task].weight else nothing}
    for name, other in tasks.items():
        parts = {f"reward/{name}": "reward"}
        parts |= {f"reward/{name}/{part}": f"reward/{part}" for part in other.rewards.names}
        joint |= {label: scores[part] if name == task else nothing for label, part in parts.items()}
    if any("truth" in other.rewards.names for other in tasks.values()):
        joint["reward/truth"] = scores.get("reward/truth", nothing)
    return joint
