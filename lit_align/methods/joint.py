"""Base of methods that learn from scores of their own images, for one task or several at the same time.

The loop is that of Zhang et al. 2024 (arXiv 2401.12244, algorithm 1): in every iteration each task samples,
scores and updates, and a batch of captioned images may be mixed in. Shapes: ``B`` images.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_align.backbones import REFERENCE, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.methods.base import AlignmentModule
from lit_align.pretraining import OTHER_SIZE, Pretraining, denoising_loss
from lit_align.randomness import generator
from lit_align.replay import Replay
from lit_align.rewards import RewardOutput
from lit_align.tasks import Task, data_of_tasks, joint_scores

Metrics = dict[str, list[Tensor]]
"""Pieces of what was measured in an iteration; the mean over all pieces is logged as ``train/<name>``."""

TaskOrder = Literal["sequence", "interleaved"]


def of_task(name: str, batch: Batch) -> str:
    """The name under which a figure of one task is logged."""
    return f"{name}/{batch.task}" if batch.task else name


@dataclass(frozen=True)
class Collection(Replay):
    """Images of one task, ready to be replayed with the policy that is trained.

    Attributes:
        reference: The pretrained policy for the rank's images.
        batch: The images' prompts and numbers.
        scores: What the rewards report, by name, ``(B,)`` each on the CPU.
        advantages: ``(B,)``, on the device.
        sampled_at: Optimiser steps that had been made when the images were sampled.
        seconds: For sampling and scoring.
    """

    reference: DenoisingPolicy
    batch: Batch
    scores: dict[str, Tensor]
    advantages: Tensor
    sampled_at: int
    seconds: float


class JointModule(AlignmentModule):
    """Collects for every task, and lets a subclass :meth:`learn`; its advantages never mix tasks."""

    several_tasks: ClassVar[bool] = True

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        tasks: Mapping[str, Task],
        task_order: TaskOrder,
        pretraining: Pretraining | None,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        guidance: float,
        clip_norm: float,
        micro_batch: int,
        rollout_batch: int,
        seed: int | None,
    ) -> None:
        """Wire the parts; the arguments are documented where a method gives them defaults."""
        banks = [task.rewards for task in tasks.values()]
        super().__init__(
            backbone,
            sampler,
            banks[0],
            optimizer,
            lr_scheduler,
            guidance,
            clip_norm,
            micro_batch,
            rollout_batch,
            seed,
        )
        if task_order not in ("sequence", "interleaved"):
            raise ConfigError(f"task_order: {task_order!r} must be sequence or interleaved")
        self.banks = nn.ModuleList(banks)  # so that the trainer moves them
        self.tasks = dict(tasks)
        self.task_order = task_order
        self.pretraining = pretraining
        self.step_scale = dict.fromkeys(tasks, 1.0)
        self.denoising_steps = 0

    @abstractmethod
    def learn(self, collection: Collection, metrics: Metrics) -> Iterator[None]:
        """Learn from a rollout batch: one update, made by :meth:`optimise`, each time that it is resumed."""

    @abstractmethod
    def look_back(self, collection: Collection, metrics: Metrics) -> None:
        """Measure what the updates on a rollout batch have done."""

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: The data has other tasks, the ranks cannot share the captioned images, or these are
                not of the model's size.
        """
        super().setup(stage)
        data_of_tasks(self.trainer.datamodule, self.tasks)  # type: ignore[attr-defined]
        if self.pretraining is not None and self.pretraining.batch % self.trainer.world_size:
            raise ConfigError(
                f"pretraining.batch: {self.pretraining.batch} images cannot be shared equally by "
                f"{self.trainer.world_size} processes; give a multiple"
            )
        if stage == "fit" and self.pretraining is not None:
            first, _ = self.pretraining.source.batch([0])
            self.backbone.clean_latents(first, OTHER_SIZE)  # refused before a rollout batch is made

    # ---- one iteration

    def training_step(self, batch: Batch | list[Batch], batch_idx: int) -> None:
        """Collect and learn for each task in turn, or first collect for all and then alternate updates."""
        started, metrics = time.perf_counter(), Metrics()
        batches = batch if isinstance(batch, list) else [batch]
        batches = [one for one in batches if self.tasks[one.task].weight]
        rounds = [batches] if self.task_order == "interleaved" else [[one] for one in batches]
        self._denoise("before", metrics)
        done = [result for together in rounds for result in self._round(together, metrics)]
        self._denoise("after", metrics)
        scores = {name: torch.cat([said[name] for said, _ in done]) for name in done[0][0]}
        sampling = sum(seconds for _, seconds in done)
        self.log_rollout_batch(scores, metrics, sampling, time.perf_counter() - started)

    def _round(self, batches: Sequence[Batch], metrics: Metrics) -> list[tuple[dict[str, Tensor], float]]:
        """Collect for some tasks and make all their updates.

        Returns:
            Of each rollout batch what the rewards report and its seconds; the chains, which are large, go.
        """
        collections = [self.collect(one, metrics) for one in batches]
        self._learn(collections, metrics)
        for collection in collections:
            self.look_back(collection, metrics)
        return [(collection.scores, collection.seconds) for collection in collections]

    def _learn(self, collections: Sequence[Collection], metrics: Metrics) -> None:
        """All updates on some rollout batches, which alternate."""
        for _ in zip_longest(*(self.learn(collection, metrics) for collection in collections)):
            pass

    def collect(self, batch: Batch, metrics: Metrics) -> Collection:
        """Sample images of a task with the weights of now, and score them."""
        started = time.perf_counter()
        with torch.no_grad():
            samples = self.sample(batch, "rollout")
            scores = self.score(samples.images, batch)
        seconds = time.perf_counter() - started
        rewards = scores.total.float().cpu()
        unscored = rewards.isfinite().logical_not().float()
        metrics.setdefault(of_task("unscored", batch), []).append(unscored)
        policy = self.backbone.policy(self.sampler, self.backbone.encode(batch.prompts), self.guidance)
        return Collection(
            policy,
            samples.trajectory,
            replace(policy, weights=REFERENCE),
            batch,
            scores.report,
            self._advantages(batch, rewards).to(self.device),
            self.trainer.global_step,
            seconds,
        )

    def score(self, images: Tensor, batch: Batch) -> RewardOutput:
        """What the rewards of the batch's task say; of several tasks, reported under names that all have."""
        scores = self.tasks[batch.task].rewards(images, batch.prompts, batch.groups, batch.columns)
        if not batch.task:
            return scores
        return replace(scores, report=joint_scores(scores.report, batch.task, self.tasks))

    def _advantages(self, batch: Batch, rewards: Tensor) -> Tensor:
        """Advantages of this rank's images, normalised with the images of all ranks."""
        ranks = self.gather((batch.index, rewards, batch.groups, batch.prompts))
        index, rewards, groups = (torch.cat([rank[part] for rank in ranks]) for part in range(3))
        prompts = [prompt for rank in ranks for prompt in rank[3]]
        # The global order: statistics must not depend on how images were dealt to ranks.
        order = index.argsort()
        normalise = self.tasks[batch.task].advantages
        ordered = normalise(rewards[order], groups[order], [prompts[i] for i in order.tolist()])
        if not ordered.any():
            rank_zero_warn(
                f"{of_task('rollout batch', batch)}: all advantages are 0, so there is nothing to learn from; "
                "the images have one score, or the normaliser takes away what they share"
            )
        return ordered[torch.searchsorted(index[order], batch.index)]

    # ---- updates

    def optimise(self, losses: Sequence[Callable[[], Tensor]], task: str, metrics: Metrics) -> None:
        """One update on a task's losses, as large as its weight and its scale say."""
        extra = self.pretraining
        if extra is not None and extra.order == "every":
            losses = [*losses, *self._denoising_losses(extra, extra.weight, metrics)]
        self.update(losses, self.step_scale[task] * self.tasks[task].weight)
        metrics.setdefault("grad_norm", []).append(self.gradient_norm.detach()[None])

    def _denoise(self, order: str, metrics: Metrics) -> None:
        """The update on captioned images alone, if this is the time for it."""
        extra = self.pretraining
        if extra is not None and extra.order == order:
            # In the units of the tasks' steps, whose scale follows a target where there is one.
            trained = [scale for name, scale in self.step_scale.items() if self.tasks[name].weight]
            scale = extra.weight * min(trained)
            self.update(self._denoising_losses(extra, 1.0, metrics), scale)

    def _denoising_losses(
        self, extra: Pretraining, weight: float, metrics: Metrics
    ) -> list[Callable[[], Tensor]]:
        """The loss of this rank's part of the next captioned images, in micro-batches."""
        start = self.denoising_steps * extra.batch
        own = range(start + self.global_rank, start + extra.batch, self.trainer.world_size)
        self.denoising_steps += 1
        parts = [own[i : i + self.micro_batch] for i in range(0, len(own), self.micro_batch)]
        return [partial(self._denoising_loss, extra, part, weight / len(own), metrics) for part in parts]

    def _denoising_loss(
        self, extra: Pretraining, numbers: Sequence[int], weight: float, metrics: Metrics
    ) -> Tensor:
        images, captions = extra.source.batch(extra.rows(self.seed, numbers))
        draws = [generator(self.seed, "pretraining", number) for number in numbers]
        losses = denoising_loss(self.backbone, self.sampler, images.to(self.device), captions, draws)
        metrics.setdefault("denoising_loss", []).append(losses.detach())
        return weight * losses.sum()

    # ---- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["tasks"] = {
            name: {
                "advantages": task.advantages.state_dict(),
                "normaliser": type(task.advantages).__name__,
                "step_scale": self.step_scale[name],
            }
            for name, task in self.tasks.items()
        }
        checkpoint["denoising_steps"] = self.denoising_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn != "fit":
            return  # the weights are all that test and predict need
        saved = checkpoint.get("tasks", {})
        own = {name: type(task.advantages).__name__ for name, task in self.tasks.items()}
        if own != {name: state["normaliser"] for name, state in saved.items()}:
            described = ", ".join(f"{name or 'one task'} with {kind}" for name, kind in own.items())
            raise ConfigError(
                f"ckpt_path: the checkpoint is not of {type(self).__name__} with these tasks ({described}); "
                "resume with the config.yaml of its run"
            )
        for name, task in self.tasks.items():
            task.advantages.load_state_dict(saved[name]["advantages"])
            self.step_scale[name] = saved[name]["step_scale"]
        self.denoising_steps = checkpoint["denoising_steps"]
