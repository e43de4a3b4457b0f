"""PRDP: proximal reward difference prediction (Deng et al. 2024, arXiv 2402.08714).

The optimum of a reward under a KL penalty is known up to a constant of each prompt, which cancels between
two images of it. So the policy is regressed on pairs: the difference of their log-ratios to the reference
should be the difference of their rewards over ``beta``. Shapes: ``N`` prompts, ``B`` images of each, ``S``
steps with noise, ``D`` latent elements.
"""

import math
import time
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch, PromptDataModule
from lit_align.errors import ConfigError, check_positive
from lit_align.methods.base import AlignmentModule
from lit_align.methods.metrics import Metrics, pooled
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.sampling import Sampling
from lit_align.methods.scales import clip_range_misfit, warn_of
from lit_align.methods.tasks import check_compared, check_rewards, check_updates
from lit_align.replay import Pairs, Replay, Yardstick, draw_few_pairs, measured_one_in
from lit_align.rewards import RewardBank

Convention = Literal["listing", "equations"]
"""The two versions of the loss in the paper: the listing of its supplement, and the equations of its text."""


def predicted_reward(log_ratio: Tensor, convention: Convention = "listing") -> Tensor:
    """The reward over ``beta`` that a policy implies for a chain: its log-ratio to the reference.

    Args:
        log_ratio: Of each step, ``(N, B, S)``.
        convention: The mean over steps in the listing, the sum in the equations.

    Returns:
        ``(N, B)``.
    """
    return log_ratio.mean(-1) if convention == "listing" else log_ratio.sum(-1)


def compared_pairs(rewards: Tensor, convention: Convention = "listing") -> Tensor:
    """Which pairs of images of a prompt are compared, each at most once.

    Args:
        rewards: ``(N, B)``; one that is not finite is no score, and its image is in no pair.
        convention: In the listing image ``i`` must have more reward than image ``j``, so that ties are left
            out; in the equations ``i < j``, so that ties ask for equal log-ratios.

    Returns:
        ``(N, B, B)`` bool.
    """
    scored = rewards.isfinite()
    both = scored[:, :, None] & scored[:, None, :]
    if convention == "listing":
        return both & (rewards[:, :, None] > rewards[:, None, :])
    return both.triu(1)


def reward_difference_loss(
    log_ratio: Tensor,
    old: Tensor,
    rewards: Tensor,
    beta: float,
    clip_range: float | None,
    convention: Convention = "listing",
) -> Tensor:
    r"""Squared error of predicted reward differences: the larger of the unclipped and the clipped one.

    .. math:: \max\big[(\Delta\hat r - \Delta r / \beta)^2, (\Delta\hat r^{clip} - \Delta r / \beta)^2\big]

    where the clip holds each step's log-ratio within ``clip_range`` of what it was at sampling. The gradient
    is 0 where a pair has left the range in the direction that its rewards ask for, and alive in the other.

    Args:
        log_ratio: Log-ratio of the policy to the reference in each step, ``(N, B, S)``.
        old: The same of the policy that sampled.
        rewards: ``(N, B)``.
        beta: Weight of the KL to the reference, in units of the reward.
        clip_range: The paper's epsilon; None does not clip.
        convention: See :func:`predicted_reward` and :func:`compared_pairs`.

    Returns:
        Mean over the compared pairs of each prompt, ``(N,)``; 0 without any.
    """
    target = torch.where(rewards.isfinite(), rewards, 0.0) / beta

    def errors(steps: Tensor) -> Tensor:
        residual = predicted_reward(steps, convention) - target
        return (residual[:, :, None] - residual[:, None, :]).square()

    loss = errors(log_ratio)
    if clip_range is not None:
        loss = torch.maximum(loss, errors(log_ratio.clamp(old - clip_range, old + clip_range)))
    compared = compared_pairs(rewards, convention)
    return torch.where(compared, loss, 0.0).sum((1, 2)) / compared.sum((1, 2)).clamp(min=1)


class PRDPModule(AlignmentModule):
    """Regression of the policy's log-ratios on reward differences, for any reward, differentiable or not.

    The loss couples all steps of all images of a prompt. Its gradient is taken in two passes. The first
    computes all log-ratios without a graph, and the derivative of the loss with respect to each. The second
    differentiates the log-ratios times these derivatives, one micro-batch after another. The gradient is
    that of the whole graph, and the memory that of one micro-batch.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        beta: float = 3e-5,
        clip_range: float | None = 1e-4,
        convention: Convention = "listing",
        updates: int = 1,
        inner_epochs: int = 1,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(guidance=5.0),
    ) -> None:
        """Set up the method. "Small" and "large" are the scales of table 4 of the paper's supplement.

        Args:
            backbone: The diffusion model. The paper trains all weights.
            sampler: How it is sampled; at least one step must be stochastic (eta above 0), and only such
                steps count. The paper: DDPM (here DDIM with eta 1), 50 steps.
            rewards: What is maximised and what is monitored.
            beta: Weight of the KL, in units of the reward: 3e-5 (small, and large with several rewards) or
                3e-6 (large with one). In the listing's convention it belongs to log-ratios that are means
                over steps and latent elements: as the weight of a KL in nats it is ``beta / (S * D)``. With
                "equations" it is that weight. A small one asks for more than is ever reached; then the clip
                and the learning rate decide how far a rollout batch moves the policy.
            clip_range: How far the log-ratio of a step may move in one rollout batch: 1e-6 (small) or 1e-4
                (large); null does not clip. In the listing's convention as a *mean* over latent elements, so
                it is ``clip_range * D`` nats: 1e-4 and D = 16384 are 1.6 nats a step. With "equations", nats.
            convention: "listing" for the loss of the supplement's listing: means over steps (and, as in
                ddpo-pytorch, over latent elements; the paper leaves open which log-probability it is), pairs
                with unequal rewards. "equations" for that of the text: sums, all pairs.
            updates: Optimizer steps per pass over a rollout batch; each takes whole prompts. 1 in the paper's
                algorithm.
            inner_epochs: Passes over a rollout batch: the paper's K, 10 (small) or 1 (large).
            optimisation: How the weights are updated. The paper: AdamW, weight decay 1e-4, lr 1e-5 (small) or
                7e-6 (large), clip 1. ``micro_batch`` counts (image, step) pairs.
            sampling: How images are sampled. Guidance is used in training too; the paper: 5. ``batch`` also
                bounds the pairs that are evaluated without gradient at once.

        Raises:
            ConfigError: The sampler is deterministic, or a value is not positive.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        self.stochastic_steps = self.sampler.stochastic.nonzero().flatten()
        if not len(self.stochastic_steps):
            raise ConfigError(f"sampler: PRDP needs noise in the steps, and {self.sampler.no_noise}")
        counts = {"updates": updates, "inner_epochs": inner_epochs}
        check_positive(counts | {"beta": beta, "clip_range": clip_range})
        self.beta = beta
        self.clip_range = clip_range
        self.convention: Convention = convention
        self.updates = updates
        self.inner_epochs = inner_epochs

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: There are no pairs, the rewards cannot tell their images apart, or the prompts of a
                rollout batch do not divide into the updates.
        """
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage != "fit" or not isinstance(data, PromptDataModule):
            return
        check_compared(data, "PRDP")
        check_updates(data, self.updates, self.trainer.world_size)
        check_rewards(self.rewards, data, self.trainer.world_size, "PRDP", "group")
        warn_of("clip_range", clip_range_misfit(self.clip_range, self.unit))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Sample images and score them, then regress on the stored chains."""
        started = time.perf_counter()
        policy = self.backbone.policy(
            self.sampler, self.backbone.encode(batch.prompts), self.sampling.guidance
        )
        samples = self.sample(policy, batch, "rollout")
        scores = self.score(samples.images, batch)
        sampled = time.perf_counter()
        self.remember(batch.index, batch.prompts, scores.report)
        replay = Replay(policy, samples.trajectory.tamed())
        images = int((batch.groups == batch.groups[0]).sum())
        assert bool((batch.groups.view(-1, images).diff() == 0).all()), "prompts stand together, of one size"
        rewards = scores.total.cpu().double().view(-1, images)
        metrics: Metrics = {}
        if any(self.gather(bool(rewards.isfinite().any()))):
            steps, one_in = self.stochastic_steps, measured_one_in(self.backbone.rounds)
            few = draw_few_pairs(batch.index, batch.firsts, steps, len(steps), one_in, self.seed, 0)
            yardstick = Yardstick.of(replay, few, self.sampling.batch, batch.index, self.seed)
            old, compared = self._compare(replay)
            learnt = self._learn(replay, old.view(len(rewards), images, -1), rewards)
            metrics = compared | learnt | {"kl": self._move(yardstick)}
        self.log_rollout_batch(scores.report, metrics, sampled - started, time.perf_counter() - started)

    @torch.no_grad()
    def _compare(self, replay: Replay) -> tuple[Tensor, Metrics]:
        """Log-ratio of the policy that sampled to the reference, ``(N * B, S)``: once a rollout batch."""
        before = replace(replay, policy=replace(replay.policy, weights=REFERENCE))
        pieces, kls = [], []
        for pairs in self._pairs(torch.arange(len(replay.policy.cond))).split(self.sampling.batch):
            reference, old, x_next = before.step(pairs)
            pieces.append(old.log_ratio(reference, x_next) / self.unit)
            kls.append(old.kl(reference))
        steps = len(self.stochastic_steps)
        metrics = {"reference_kl": torch.cat(kls).view(-1, steps).sum(1)[replay.trajectory.finite]}
        return torch.cat(pieces).cpu().double().view(-1, steps), metrics

    def _learn(self, replay: Replay, old: Tensor, rewards: Tensor) -> Metrics:
        """All updates on a rollout batch."""
        images, measured = rewards.shape[1], []
        on_policy = True  # until the first update the weights are those that sampled
        for _ in range(self.inner_epochs):
            for prompts in torch.arange(len(rewards)).split(len(rewards) // self.updates):
                pairs = self._pairs((prompts[:, None] * images + torch.arange(images)).flatten())
                moved = self._moved(replay, pairs, on_policy).view_as(old[prompts])
                gradient, metrics = self._regress(moved, old[prompts], rewards[prompts])
                if self.clip_range is not None:
                    clipped = (moved.abs() > self.clip_range).flatten()
                    metrics["clip_fraction"] = clipped[replay.trajectory.finite[pairs.rows]]
                size = self.optimisation.micro_batch
                micro = zip(pairs.split(size), gradient.flatten().split(size), strict=True)
                losses = [partial(self._surrogate, replay, *part, on_policy) for part in micro]
                measured += [metrics, self.update(losses)]
                on_policy = False
        return pooled(measured)

    def _pairs(self, rows: Tensor) -> Pairs:
        """All steps with noise of some images: images in order, and the steps of each in order."""
        steps = self.stochastic_steps
        return Pairs(rows.repeat_interleave(len(steps)), steps.repeat(len(rows)))

    def _log_ratio(self, replay: Replay, pairs: Pairs) -> Tensor:
        """Log-ratio of the policy now to the policy that sampled, ``(N,)``."""
        new, old, x_next = replay.step(pairs)
        return new.log_ratio(old, x_next) / self.unit

    @torch.no_grad()
    def _moved(self, replay: Replay, pairs: Pairs, on_policy: bool) -> Tensor:
        """The first pass: how far the log-ratio of each step has moved since sampling, ``(N,)``."""
        if on_policy:
            return torch.zeros(len(pairs.rows), dtype=torch.float64)
        parts = [self._log_ratio(replay, part) for part in pairs.split(self.sampling.batch)]
        return torch.cat(parts).cpu().double()

    def _regress(self, moved: Tensor, old: Tensor, rewards: Tensor) -> tuple[Tensor, Metrics]:
        """The gradient of the loss with respect to the log-ratio of each step, ``(N, B, S)``."""
        with torch.enable_grad():
            log_ratio = (old + moved).requires_grad_()
            loss = reward_difference_loss(
                log_ratio, old, rewards, self.beta, self.clip_range, self.convention
            )
            (gradient,) = torch.autograd.grad(loss.mean(), log_ratio)
        pairs = compared_pairs(rewards, self.convention).sum((1, 2))
        metrics = {"loss": loss.detach(), "compared_pairs": pairs}
        return gradient, metrics

    def _surrogate(
        self, replay: Replay, pairs: Pairs, gradient: Tensor, on_policy: bool
    ) -> tuple[Tensor, Metrics]:
        """The second pass: log-ratios times the derivatives of the loss, which have its gradient."""
        log_ratio = self._log_ratio(replay, pairs)
        metrics: Metrics = {}
        if on_policy:  # at the first update rounding alone
            deviation = log_ratio.detach().expm1().abs()
            metrics["ratio_deviation"] = deviation[replay.trajectory.finite[pairs.rows]]
        return (gradient.to(log_ratio) * log_ratio).sum(), metrics

    def _move(self, yardstick: Yardstick) -> Tensor:
        """How far the updates moved the policy, in nats a step; benchmarks time it by its name."""
        return yardstick.read().kl

    @property
    def unit(self) -> int:
        """Nats in one unit of a step's log-ratio: the listing's are means over latent elements."""
        return math.prod(self.backbone.latent_shape) if self.convention == "listing" else 1
