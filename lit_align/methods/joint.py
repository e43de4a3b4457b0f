"""Base of methods that learn from scores of their own images, for one task or several at the same time.

The loop is that of Zhang et al. 2024 (arXiv 2401.12244, algorithm 1): in every iteration each task samples,
scores and updates, and a batch of captioned images may be mixed in. Shapes: ``B`` images.
"""

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_align.backbones import POLICY, REFERENCE, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.methods.base import AlignmentModule
from lit_align.methods.metrics import Loss, Metrics, pooled
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.pretraining import OTHER_SIZE, Pretraining, denoising_loss
from lit_align.methods.sampling import Sampling
from lit_align.methods.tasks import (
    Task,
    check_parts,
    check_same_tasks,
    check_tasks,
    data_of_tasks,
    held_out_rewards,
    joint_scores,
    of_task,
    scored_by_tasks,
)
from lit_align.randomness import generator
from lit_align.replay import Replay, Yardstick
from lit_align.rewards import RewardBank, RewardOutput

TaskOrder = Literal["sequence", "interleaved"]


@dataclass(frozen=True)
class Rollouts(Replay):
    """Images of one task, ready to be replayed with the policy that is trained.

    Attributes:
        reference: The pretrained policy for the rank's images.
        batch: The images' prompts and numbers.
        scores: What the rewards report, by name, ``(B,)`` each on the CPU.
        advantages: ``(B,)``, on the device.
        scored: ``(B,)`` bool, on the device: the others have no part in updates.
        useful: Whether any image of any rank has a score.
        metrics: What was measured while sampling and scoring.
        sampled_at: Optimizer steps that had been made when the images were sampled.
        seconds: For sampling and scoring.
        yardstick: Of the coming updates, for a method that measures how far they move the policy.
    """

    reference: DenoisingPolicy
    batch: Batch
    scores: dict[str, Tensor]
    advantages: Tensor
    scored: Tensor
    useful: bool
    metrics: Metrics
    sampled_at: int
    seconds: float
    yardstick: Yardstick | None = None


class JointModule(AlignmentModule):
    """Samples for every task, and lets a subclass :meth:`learn`; its advantages never mix tasks."""

    several_tasks: ClassVar[bool] = True

    sampled_with: str = POLICY
    """The weight set that draws the images that are learned from."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        tasks: Mapping[str, Task],
        task_order: TaskOrder,
        pretraining: Pretraining | None,
        optimisation: Optimisation,
        sampling: Sampling,
    ) -> None:
        """Set up the method; the arguments are documented where a method gives them defaults."""
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=next(iter(tasks.values())).rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        if task_order not in ("sequence", "interleaved"):
            raise ConfigError(f"task_order: {task_order!r} must be sequence or interleaved")
        self.banks = nn.ModuleList(task.rewards for task in tasks.values())  # so that the trainer moves them
        self.tasks = dict(tasks)
        self.task_order = task_order
        self.pretraining = pretraining
        self.step_scale = dict.fromkeys(tasks, 1.0)
        self.denoising_steps = 0

    @property
    def reward_banks(self) -> list[RewardBank]:
        return [task.rewards for task in self.tasks.values()]

    @property
    def held_out(self) -> tuple[str, ...]:
        return held_out_rewards(self.tasks)

    def scored_by(self) -> dict[str, Any]:
        return scored_by_tasks(self.tasks)

    @abstractmethod
    def learn(self, rollouts: Rollouts) -> Iterator[Metrics]:
        """Learn from a rollout batch: yield the metrics after each update, so that tasks can alternate."""

    @abstractmethod
    def look_back(self, rollouts: Rollouts) -> Metrics:
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
            self.backbone.clean_latents(first, OTHER_SIZE)  # refused before anything is sampled

    def check_tasks(self, stage: str, updates: int) -> None:
        """Refuse tasks that could not learn from their prompts in so many updates.

        Raises:
            ConfigError: With what to change.
        """
        check_parts(self.rewards, vars(self).get("advantages"), self.tasks)
        if stage == "fit":
            check_tasks(self.tasks, self.trainer, updates)

    # ---- one iteration

    def training_step(self, batch: Batch | list[Batch], batch_idx: int) -> None:
        """Sample and learn for each task in turn, or first sample for all and then alternate updates."""
        started = time.perf_counter()
        batches = batch if isinstance(batch, list) else [batch]
        batches = [one for one in batches if self.tasks[one.task].weight]
        rounds = [batches] if self.task_order == "interleaved" else [[one] for one in batches]
        measured = [self._denoise("before")]
        scores, sampling = [], 0.0
        for together in rounds:
            done, metrics = self._round(together)
            scores += [reported for reported, _ in done]
            sampling += sum(seconds for _, seconds in done)
            measured.append(metrics)
        measured.append(self._denoise("after"))
        merged = {name: torch.cat([reported[name] for reported in scores]) for name in scores[0]}
        self.log_rollout_batch(merged, pooled(measured), sampling, time.perf_counter() - started)

    def _round(self, batches: Sequence[Batch]) -> tuple[list[tuple[dict[str, Tensor], float]], Metrics]:
        """Sample for some tasks, make all their updates, and free the chains.

        Returns what the rewards report of each task and the seconds that it took, and the metrics.
        """
        sampled = [self.collect(one) for one in batches]
        measured = [rollouts.metrics for rollouts in sampled]
        useful = [rollouts for rollouts in sampled if rollouts.useful]
        measured += [made for turn in zip_longest(*map(self.learn, useful)) for made in turn if made]
        measured += [self.look_back(rollouts) for rollouts in useful]
        return [(rollouts.scores, rollouts.seconds) for rollouts in sampled], pooled(measured)

    def collect(self, batch: Batch) -> Rollouts:
        """Sample images of a task, and score them."""
        started = time.perf_counter()
        cond = self.backbone.encode(batch.prompts)
        drawn = self.backbone.policy(self.sampler, cond, self.sampling.guidance, self.sampled_with)
        samples = self.sample(drawn, batch, "rollout")
        policy = replace(drawn, weights=POLICY)
        scores = self.score(samples.images, batch)
        seconds = time.perf_counter() - started
        self.remember(batch.index, batch.prompts, scores.report)
        rewards = scores.total.float().cpu()
        scored = rewards.isfinite()
        advantages, useful = self._advantages(batch, rewards)
        return Rollouts(
            policy,
            samples.trajectory.tamed(),
            replace(policy, weights=REFERENCE),
            batch,
            scores.report,
            advantages.to(self.device),
            scored.to(self.device),
            useful,
            {of_task("unscored", batch.task): scored.logical_not().float()},
            self.trainer.global_step,
            seconds,
        )

    @torch.no_grad()
    def score(self, images: Tensor, batch: Batch) -> RewardOutput:
        """What the rewards of the batch's task say; of several tasks, reported under names that all have."""
        scores, task = super().score(images, batch), batch.task
        return replace(scores, report=joint_scores(scores.report, task, self.tasks)) if task else scores

    def bank_of(self, batch: Batch) -> RewardBank:
        return self.tasks[batch.task].rewards

    def _advantages(self, batch: Batch, rewards: Tensor) -> tuple[Tensor, bool]:
        """Advantages of this rank's images, by those of all ranks, and whether any of them has a score."""
        ranks = self.gather((batch.index, rewards, batch.groups, batch.prompts))
        index, rewards, groups = (torch.cat([rank[part] for rank in ranks]) for part in range(3))
        prompts = [prompt for rank in ranks for prompt in rank[3]]
        # The global order: statistics must not depend on how images were dealt to ranks.
        order = index.argsort()
        normalise = self.tasks[batch.task].advantages
        ordered = normalise(rewards[order], groups[order], [prompts[i] for i in order.tolist()])
        useful = bool(rewards.isfinite().any())
        if useful and not ordered.any():
            rank_zero_warn(
                f"{of_task('rollout batch', batch.task)}: all advantages are 0, so there is nothing to learn "
                "from: the images have one score, or the normaliser removes what they share"
            )
        return ordered[torch.searchsorted(index[order], batch.index)], useful

    # ---- updates

    def optimise(self, losses: Sequence[Loss], task: str) -> Metrics:
        """One update on a task's losses, at a learning rate scaled by its ``step_scale`` and its weight."""
        extra = self.pretraining
        if extra is not None and extra.order == "every":
            losses = [*losses, *self._denoising_losses(extra, extra.weight)]
        return self.update(losses, self.step_scale[task] * self.tasks[task].weight)

    def _denoise(self, order: str) -> Metrics:
        """The update on captioned images alone, if this is the time for it."""
        extra = self.pretraining
        if extra is None or extra.order != order:
            return {}
        # In the units of the tasks' steps, which kl_target may scale.
        trained = [scale for name, scale in self.step_scale.items() if self.tasks[name].weight]
        measured = self.update(self._denoising_losses(extra, 1.0), extra.weight * min(trained))
        return {"denoising_loss": measured["denoising_loss"]}  # train/grad_norm is that of the tasks

    def _denoising_losses(self, extra: Pretraining, weight: float) -> list[Loss]:
        """The loss of this rank's part of the next captioned images, in micro-batches."""
        start = self.denoising_steps * extra.batch
        own = range(start + self.global_rank, start + extra.batch, self.trainer.world_size)
        self.denoising_steps += 1
        size = self.optimisation.micro_batch
        parts = [own[i : i + size] for i in range(0, len(own), size)]
        return [partial(self._denoising_loss, extra, part, weight / len(own)) for part in parts]

    def _denoising_loss(self, extra: Pretraining, part: range, weight: float) -> tuple[Tensor, Metrics]:
        images, captions = extra.source.batch(extra.rows(self.seed, part))
        images, guidance = images.to(self.device), self.training_guidance
        draws = [generator(self.seed, "pretraining", number) for number in part]
        losses = denoising_loss(self.backbone, self.sampler, images, captions, draws, guidance)
        return weight * losses.sum(), {"denoising_loss": losses.detach()}

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
        fits, saved = self.trainer.state.fn == "fit", checkpoint.get("tasks", {})
        if fits:
            check_same_tasks(self.tasks, saved, type(self).__name__)
        super().on_load_checkpoint(checkpoint)
        if not fits:
            return  # the weights are all that test and predict need
        for name, task in self.tasks.items():
            task.advantages.load_state_dict(saved[name]["advantages"])
            self.step_scale[name] = saved[name]["step_scale"]
        self.denoising_steps = checkpoint["denoising_steps"]
