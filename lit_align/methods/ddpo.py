"""DDPO: policy gradient on the denoising chain (Black et al. 2023, arXiv 2305.13301).

With the penalty of DPOK (Fan et al. 2023, arXiv 2305.16381) as an option. The chain is a Markov decision
process: the state is ``(prompt, t, x_t)``, the action is the next latent, the reward comes once, for the
image. Shapes: ``B`` images, ``N`` (image, step) pairs, ``D`` latent elements.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.advantages import Advantages
from lit_align.backbones import DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_not_negative, check_positive
from lit_align.methods.joint import JointModule, Rollouts, TaskOrder
from lit_align.methods.metrics import Metrics, chosen
from lit_align.methods.objectives import clipped_surrogate as clipped_surrogate
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.pretraining import Pretraining
from lit_align.methods.sampling import Sampling
from lit_align.methods.scales import clip_range_misfit, warn_of
from lit_align.methods.tasks import Task, make_tasks, of_task
from lit_align.randomness import generator
from lit_align.replay import Pairs, Yardstick, draw_few_pairs, draw_pairs, measured_one_in
from lit_align.rewards import RewardBank
from lit_align.samplers import Sampler


def score_function_loss(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """DDPO-SF, equation 3 of the paper: the loss whose gradient is ``-A grad log p``.

    Args:
        log_ratio: Log-probability now minus log-probability at sampling, ``(N,)``; only its gradient matters.
        advantages: ``(N,)``.

    Returns:
        ``(N,)``.
    """
    return -advantages * log_ratio


class DDPOModule(JointModule):
    """Policy gradient on the denoising chain, for any reward, differentiable or not."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank | None = None,
        advantages: Advantages | None = None,
        clip_range: float | None = 1e-4,
        updates: int = 1,
        inner_epochs: int = 1,
        timestep_fraction: float = 1.0,
        shared_timesteps: int | None = None,
        kl_weight: float = 0.0,
        kl_target: float | None = None,
        tasks: dict[str, Task] | None = None,
        task_order: TaskOrder = "sequence",
        pretraining: Pretraining | None = None,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(guidance=5.0),
    ) -> None:
        """Set up the method.

        Args:
            backbone: The diffusion model.
            sampler: How it is sampled; at least one step must be stochastic (eta above 0). With
                ``FlowSDE`` and ``GroupAdvantages`` this is Flow-GRPO (arXiv 2505.05470).
            rewards: What is maximised and what is monitored; null with ``tasks``.
            advantages: How rewards become advantages. The paper normalises with running statistics of each
                prompt.
            clip_range: PPO's clip of the ratio, null for the score-function form. As in all published code
                the ratio is that of the *mean* over latent elements, so ``e`` is about ``e * D`` nats of a
                step: 1e-4 (table D.5) belongs to D = 16384, 1.6 nats.
            updates: Optimizer steps per pass over a rollout batch; each takes whole prompts. 4 in table D.5,
                1 for the score function.
            inner_epochs: Passes over a rollout batch; each draws its own timesteps. 1 in ddpo-pytorch.
            timestep_fraction: Share of the stochastic steps, at random for each image, that is replayed. 1 in
                ddpo-pytorch.
            shared_timesteps: Instead of ``updates`` and ``timestep_fraction``, which must then be 1: this
                number of stochastic steps, at random and the same for all images, each with an optimizer step
                of its own on the whole rollout batch. 5 of 50 in Zhang et al. 2024 (arXiv 2401.12244).
            kl_weight: Weight of the KL of each step to the reference, DPOK's penalty, as a mean over latent
                elements. The KL is exact; DPOK's code drops its factor of the schedule.
            kl_target: KL by which one rollout batch should move the policy, in nats per step; the learning
                rate is scaled towards it, unless rounding hides the KL. A task's weight, a schedule and a
                guard scale the rate too: the target is multiplied by the square of their factors. Interleaved
                tasks are measured together. Own addition, after the adaptive penalty of PPO (Schulman et al.
                2017, section 4): the useful range of learning rates is narrow and moves during a run.
            tasks: Instead of ``rewards`` and ``advantages``: several tasks by name, each with the prompts of
                the same name in ``MultiTaskDataModule``. As in Zhang et al., one iteration takes each in
                turn, and no two rewards are added up.
            task_order: ``sequence``: a task samples with the weights that the tasks before it have left, as
                in the paper. ``interleaved``: all sample with the same weights, then their updates alternate.
            pretraining: Captioned images whose denoising loss is mixed in; off if not given.
            optimisation: How the weights are updated. The paper's optimizer: AdamW, lr 1e-5 for all weights
                (table D.5); ddpo-pytorch: 3e-4 for LoRA. ``micro_batch`` counts (image, step) pairs.
            sampling: How images are sampled. Guidance is used in training too: 5 in table D.5.

        Raises:
            ConfigError: The sampler is deterministic, or the options exclude each other.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            tasks=make_tasks(rewards, advantages, tasks),
            task_order=task_order,
            pretraining=pretraining,
            optimisation=optimisation,
            sampling=sampling,
        )
        self.stochastic_steps = self.sampler.stochastic.nonzero().flatten()
        counts = {"updates": updates, "inner_epochs": inner_epochs, "shared_timesteps": shared_timesteps}
        sizes = {"timestep_fraction": timestep_fraction, "clip_range": clip_range, "kl_target": kl_target}
        check_positive(counts | sizes)
        check_not_negative({"kl_weight": kl_weight})
        _check_steps(self.sampler, updates, timestep_fraction, shared_timesteps)
        steps = updates * inner_epochs * (shared_timesteps or 1)
        if clip_range is None and steps > 1:
            raise ConfigError(
                "clip_range: the score-function form (null) allows one update per rollout batch, but updates "
                f"is {updates}, inner_epochs {inner_epochs} and shared_timesteps {shared_timesteps}; "
                "allow one, or set clip_range"
            )
        trained = sum(task.weight > 0 for task in self.tasks.values())
        if clip_range is None and task_order == "interleaved" and trained > 1:
            raise ConfigError(
                "clip_range: the score-function form (null) needs the weights that sampled, but with "
                "task_order interleaved another task has moved them; set it to sequence, or set clip_range"
            )
        self.clip_range = clip_range
        self.updates = updates
        self.inner_epochs = inner_epochs
        share = max(1, round(timestep_fraction * len(self.stochastic_steps)))
        self.steps_per_image = shared_timesteps or share
        self.shared_timesteps = shared_timesteps
        self.kl_weight = kl_weight
        self.kl_target = kl_target

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: The advantages need several images per prompt, or the prompts of a rollout batch do
                not divide into the updates.
        """
        super().setup(stage)
        self.check_tasks(stage, self.updates)
        if stage == "fit":
            warn_of("clip_range", clip_range_misfit(self.clip_range, prod(self.backbone.latent_shape)))

    def make_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """As for every method.

        Raises:
            ConfigError: There is a target for the step, and no rate that could be scaled towards it.
        """
        optimizer = super().make_optimizer(groups)
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.kl_target is not None and not all(rates):
            raise ConfigError(
                f"kl_target: it scales the learning rate, and that of the optimizer is {rates[0]}; give "
                "optimisation.optimizer a positive lr, or set kl_target to null"
            )
        return optimizer

    def learn(self, rollouts: Rollouts) -> Iterator[Metrics]:
        """All updates on a rollout batch."""
        size = self.optimisation.micro_batch
        for epoch in range(self.inner_epochs):
            for part in self._draw_updates(rollouts.batch, epoch):
                losses = [partial(self._loss, rollouts, micro, len(part.rows)) for micro in part.split(size)]
                yield self.optimise(losses, rollouts.batch.task)

    def _draw_updates(self, batch: Batch, epoch: int) -> list[Pairs]:
        """What each update of a pass replays: whole prompts with steps of their own, or one step for all."""
        if self.shared_timesteps is None:
            pairs = draw_pairs(batch.index, self.stochastic_steps, self.steps_per_image, self.seed, epoch)
            return pairs.split(len(pairs.rows) // self.updates)
        draw = generator(self.seed, "shared steps", self.images, list(self.tasks).index(batch.task), epoch)
        chosen = torch.randperm(len(self.stochastic_steps), generator=draw)[: self.shared_timesteps]
        rows = torch.arange(len(batch))
        return [Pairs(rows, step.expand(len(batch))) for step in self.stochastic_steps[chosen]]

    def _loss(self, rollouts: Rollouts, pairs: Pairs, size: int) -> tuple[Tensor, Metrics]:
        """What some pairs add to the mean loss of an update of ``size`` pairs."""
        new, old, x_next = rollouts.step(pairs)
        # The mean over D: the convention of published clip ranges.
        log_ratio = new.log_ratio(old, x_next) / x_next[0].numel()
        advantages = rollouts.advantages[pairs.rows.to(self.device)]
        metrics: Metrics = {}
        if self.clip_range is None:
            loss = score_function_loss(log_ratio, advantages)
        else:
            loss = clipped_surrogate(log_ratio, advantages, self.clip_range)
            metrics["clip_fraction"] = ((log_ratio.detach().exp() - 1).abs() > self.clip_range).float()
        metrics["loss"] = loss.detach()
        # Until the first update the weights are those that sampled, so this is rounding alone.
        if self.trainer.global_step == rollouts.sampled_at:
            metrics["ratio_deviation"] = log_ratio.detach().expm1().abs()
        if self.kl_weight:
            with torch.no_grad():
                reference = rollouts.reference[pairs.rows](rollouts.states(pairs), pairs.steps)
            penalty = new.kl(reference) / x_next[0].numel()
            metrics["kl_penalty"] = penalty.detach()
            loss = loss + self.kl_weight * penalty
        loss = torch.where(rollouts.scored[pairs.rows.to(self.device)], loss, 0.0)
        return loss.sum() / size, chosen(metrics, rollouts.trajectory.finite[pairs.rows])

    def collect(self, batch: Batch) -> Rollouts:
        """Sample images of a task, score them, and prepare to measure how far they move the policy."""
        rollouts = super().collect(batch)
        some = draw_few_pairs(
            batch.index,
            batch.firsts,
            self.stochastic_steps,
            self.steps_per_image,
            measured_one_in(self.backbone.rounds, followed=self.kl_target is not None),
            self.seed,
            self.inner_epochs,
        )
        size = self.optimisation.micro_batch
        return replace(rollouts, yardstick=Yardstick.of(rollouts, some, size, batch.index, self.seed))

    def look_back(self, rollouts: Rollouts) -> Metrics:
        """Measure how far the rollout batch moved the policy; scale the next steps to ``kl_target``."""
        assert rollouts.yardstick is not None, "made by collect"
        task = rollouts.batch.task
        ranks = self.gather((rollouts.yardstick.read(), bool(rollouts.advantages.any())))
        kl, informative = torch.cat([one.kl for one, _ in ranks]).mean(), any(signal for _, signal in ranks)
        variances = torch.cat([one.variance for one, _ in ranks])
        error = (variances.sum().sqrt() / len(variances)).item()
        metrics = {of_task("kl", task): kl[None]}
        if error > 0:
            metrics[of_task("kl_error", task)] = torch.tensor([error])
        # Without a signal, or after a skipped update, the KL does not measure the step size.
        measured = informative and kl.isfinite() and self.gradient_norm.isfinite()
        if self.kl_target is not None and measured:
            scale = self._scale_step(task, kl, self.kl_target, error)
            metrics[of_task("step_scale", task)] = torch.tensor([scale])
        return metrics

    def _scale_step(self, task: str, kl: Tensor, target: float, error: float = 0.0) -> float:
        """The factor on the learning rate with which the next rollout batch should move by ``target``.

        It stays where the KL is within two standard errors of the aim: noise must not change it.
        """
        group = self.trainer.optimizers[0].param_groups[0]
        initial = group.get("initial_lr", group["lr"])
        # A weight, a schedule and a guard scale the step on purpose: the target follows them.
        factor = self.tasks[task].weight * (group["lr"] / initial if initial else 1.0) * self.rate_factor
        aim = factor**2 * target
        if aim > 0 and 2 * error > max(aim, kl.item()):  # a KL that is far too large is not hidden
            rank_zero_warn(
                f"kl_target: rounding hides a KL of {aim:g} nats a step (see train/kl_error), so the "
                "learning rate is hardly scaled; use precision 32-true and dtype float32 (on a GPU with "
                "torch.backends.cudnn.allow_tf32 false), or a larger target"
            )
        kl = torch.full_like(kl, aim).clamp(kl - 2 * error, kl + 2 * error) if error else kl
        # KL grows with the square of the step; bounded, since it is measured on few pairs.
        change = (aim / kl.clamp(min=1e-12)).sqrt().clamp(0.5, 1.5).item()
        self.step_scale[task] = min(max(self.step_scale[task] * change, 1e-3), 1e3)
        return self.step_scale[task]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.kl_target is None:  # nothing would scale them back
            self.step_scale = dict.fromkeys(self.tasks, 1.0)


def _check_steps(sampler: Sampler, updates: int, fraction: float, shared: int | None) -> None:
    """Refuse a choice of steps that cannot be made."""
    stochastic = int(sampler.stochastic.sum())
    if not stochastic:
        raise ConfigError(f"sampler: DDPO needs noise in the steps, and {sampler.no_noise}")
    if fraction > 1:
        raise ConfigError(f"timestep_fraction: {fraction} is more than 1, all of the steps")
    if shared is not None and (updates, fraction) != (1, 1):
        raise ConfigError(
            f"shared_timesteps: every step has an update of its own, but updates is {updates} and "
            f"timestep_fraction {fraction}; set both to 1, or shared_timesteps to null"
        )
    if shared is not None and shared > stochastic:
        raise ConfigError(
            f"shared_timesteps: {shared} is more than the {stochastic} noisy steps of the sampler"
        )
