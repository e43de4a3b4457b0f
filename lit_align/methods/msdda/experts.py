r"""Base of methods with experts: weight sets that each learn one objective at the level of single steps.

The problem at a state :math:`x_t` of the reference's chain is that of MSDDA (Zhang, Wang and Zou 2026, arXiv
2604.14379): the kernel that maximises :math:`E[r] - \beta\, KL(\pi \| \pi_{ref})`. Shapes: ``B`` images,
``T`` steps, ``N`` (image, step) pairs.
"""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, Conditioning, DenoisingPolicy, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch, PromptDataModule
from lit_align.errors import ConfigError, check_positive
from lit_align.methods.base import AlignmentModule
from lit_align.methods.metrics import Metrics, chosen, pooled
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.sampling import Sampling
from lit_align.methods.tasks import check_compared, check_updates
from lit_align.replay import Pairs, Replay, draw_pairs
from lit_align.rewards import RewardBank


def centred(rewards: Tensor, groups: Tensor) -> Tensor:
    """Rewards minus the mean of the prompt's *other* images: an unbiased baseline.

    Args:
        rewards: ``(B,)``; one that is not finite is no score, and gets 0.
        groups: ``(B,)``; images with the same number share their prompt.

    Returns:
        ``(B,)``; 0 for an image without others.
    """
    scored = rewards.isfinite()
    same = ((groups[:, None] == groups[None, :]) & scored[:, None] & scored[None, :]).to(rewards)
    known, others = torch.where(scored, rewards, 0.0), same.sum(1) - 1
    difference = known - (same @ known - known) / others.clamp(min=1)
    return torch.where(others > 0, difference, 0.0)


def comparable(rewards: Tensor, groups: Tensor) -> Tensor:
    """Which images have a score, and another image of their prompt that has one, ``(B,)`` bool."""
    scored = rewards.isfinite()
    same = (groups[:, None] == groups[None, :]) & scored[:, None] & scored[None, :]
    return scored & (same.sum(1) > 1)


def step_loss(log_ratio: Tensor, kl: Tensor, advantages: Tensor, beta: float, max_ratio: float) -> Tensor:
    r"""The step-level objective on samples of the reference: ``-w A + beta KL`` with ``w = pi / pi_ref``.

    Its minimum over all kernels is :math:`\pi_{ref} e^{r / \beta}`. Where ``A`` is positive, ``w`` counts as
    ``max_ratio`` at most, so that few samples cannot dominate an update.

    Args:
        log_ratio: ``log pi - log pi_ref`` of the state that the reference drew, in nats, ``(N,)``.
        kl: KL to the reference's step, in nats, ``(N,)``.
        advantages: ``A``, ``(N,)``.
        beta: KL strength.
        max_ratio: Bound on ``w``.

    Returns:
        ``(N,)``.
    """
    ratio = log_ratio.exp()
    return beta * kl - torch.minimum(advantages * ratio, advantages * ratio.clamp(max=max_ratio))


@dataclass(frozen=True)
class Lesson(Replay):
    """The reference's chains of a rollout batch, for one expert to learn from.

    Attributes:
        name: Of the expert.
        advantages: ``(B,)``, on the device.
        compared: ``(B,)`` bool, on the device: images with a score, and another one of their prompt to
            compare it with. The KL of the others is left out too, or it would weigh more than ``beta``.
    """

    name: str
    advantages: Tensor
    compared: Tensor


class ExpertModule(AlignmentModule):
    r"""Trains experts side by side over one frozen model, on images of the reference.

    The step reward :math:`r_t(x_{t-1})` is the mean reward of the images that the *reference* makes from
    :math:`x_{t-1}`. Its samples are the rewards of the reference's own images, so one rollout batch serves
    all experts and all steps, with importance weights of one step.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        objectives: dict[str, dict[str, float]],
        expert_betas: dict[str, float],
        max_ratio: float,
        updates: int,
        inner_epochs: int,
        timestep_fraction: float,
        optimisation: Optimisation,
        sampling: Sampling,
    ) -> None:
        """Set up the method; a method that gives an argument a default documents it in full.

        Args:
            backbone: The diffusion model, which gets a weight set for each objective. When all weight sets
                are there, a subclass says which are trained: ``weight_sets.train_only(self.trained)``.
            sampler: How it is sampled.
            rewards: The objectives' parts.
            objectives: For each expert the weights of the rewards, as scaled in the bank, that it maximises.
            expert_betas: The KL strength of each expert.
            max_ratio: Bound on importance weights.
            updates: Optimizer steps per pass over a rollout batch.
            inner_epochs: Passes over a rollout batch.
            timestep_fraction: Share of the stochastic steps of each image that an update uses.
            optimisation: How the experts are updated; each gradient is clipped by itself.
            sampling: How images are sampled.

        Raises:
            ConfigError: A size is not positive.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        sizes = {"max_ratio": max_ratio, "updates": updates, "inner_epochs": inner_epochs}
        check_positive(sizes | {"timestep_fraction": timestep_fraction})
        self.objectives, self.trained = objectives, list(objectives)
        self.expert_betas = expert_betas
        self.max_ratio = max_ratio
        self.updates, self.inner_epochs = updates, inner_epochs
        self.stochastic_steps = self.sampler.stochastic.nonzero().flatten()
        self.steps_per_image = max(1, round(min(timestep_fraction, 1) * len(self.stochastic_steps)))
        for name in self.trained:
            if name not in backbone.weight_sets.names:  # those that a module before has trained stay
                backbone.weight_sets.add(name)

    @abstractmethod
    def expert(self, name: str, cond: Conditioning) -> DenoisingPolicy:
        """One expert's policy, or the reference's, for the images of ``cond``."""

    def objective(self, name: str, images: Tensor, batch: Batch) -> Tensor:
        """The scaled reward of one objective, ``(B,)``, with its gradient."""
        return self.rewards.weighted(name, images, batch.prompts, batch.groups, batch.columns)

    def weighted_reward(self, scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
        """``(B,)``: the sum of the scaled objectives with these weights, from scores by name."""
        scales = self.rewards.weights
        terms = [w * scales[n] * scores[n] for n, w in weights.items() if w != 0]
        return torch.stack(terms).sum(0) if terms else torch.zeros_like(next(iter(scores.values())))

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: There is nothing to train, or the data cannot train it.
        """
        super().setup(stage)
        if stage != "fit":
            return
        if not self.trained:
            raise ConfigError(
                "experts: all are loaded, and nothing is left to train; run test, or set one to null"
            )
        used = {
            name for objective in self.objectives.values() for name, weight in objective.items() if weight
        }
        if sets := sorted(used & set(self.rewards.of_sets)):
            raise ConfigError(
                f"experts: {sets[0]} is a reward of sets of images, which no step of one image has; "
                "train it with DDPOModule, give the adapter/ folder of that run, and take it out of joint"
            )
        if not len(self.stochastic_steps):
            raise ConfigError(f"sampler: fit needs noise in the steps, and {self.sampler.no_noise}")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PromptDataModule):
            return
        check_compared(data, "fit")
        check_updates(data, self.updates, self.trainer.world_size)

    def parameter_groups(self) -> list[list[torch.nn.Parameter]]:
        """The experts', apart: training side by side is training alone."""
        return [self.backbone.weight_sets.parameters_of(name) for name in self.trained]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Sample images of the reference and score them, then update all experts on them."""
        started = time.perf_counter()
        cond = self.backbone.encode(batch.prompts)
        samples = self.sample(self.policy(batch, cond, REFERENCE), batch, "rollout")
        scores = self.score(samples.images, batch)
        sampled = time.perf_counter()
        self.remember(batch.index, batch.prompts, scores.report)
        parts = {name: part.float().cpu() for name, part in scores.parts.items()}
        chains = samples.trajectory.tamed()
        lessons, missing = [], torch.ones(len(batch), dtype=torch.bool)
        for name, objective in self.objectives.items():
            rewards = self.weighted_reward(parts, objective)
            missing &= ~rewards.isfinite()
            compared = comparable(rewards, batch.groups).to(self.device)
            advantages = centred(rewards, batch.groups).to(self.device)
            lessons.append(Lesson(self.expert(name, cond), chains, name, advantages, compared))
        useful = any(self.gather(any(bool(lesson.compared.any()) for lesson in lessons)))
        metrics = self._learn(lessons, batch) if useful else {}
        metrics["unscored"] = missing.float()
        self.log_rollout_batch(scores.report, metrics, sampled - started, time.perf_counter() - started)

    def _learn(self, lessons: Sequence[Lesson], batch: Batch) -> Metrics:
        """All updates on a rollout batch."""
        measured = []
        for epoch in range(self.inner_epochs):
            pairs = draw_pairs(batch.index, self.stochastic_steps, self.steps_per_image, self.seed, epoch)
            size = len(pairs.rows) // self.updates
            for part in pairs.split(size):
                micros = part.split(self.optimisation.micro_batch)
                measured.append(self.update([partial(self._loss, lessons, micro, size) for micro in micros]))
        return pooled(measured)

    def _loss(self, lessons: Sequence[Lesson], pairs: Pairs, size: int) -> tuple[Tensor, Metrics]:
        """What some (image, step) pairs add to the loss of an update of ``size`` pairs, over all experts.

        One loss for all: with several processes every backward pass must reach every trained weight.
        """
        total, measured = torch.zeros((), device=self.device), []
        for lesson in lessons:
            expert, reference, x_next = lesson.step(pairs)  # the reference sampled the chains
            kl, advantages = expert.kl(reference), lesson.advantages[pairs.rows.to(self.device)]
            log_ratio, beta = expert.log_ratio(reference, x_next), self.expert_betas[lesson.name]
            loss = step_loss(log_ratio, kl, advantages, beta, self.max_ratio)
            loss = torch.where(lesson.compared[pairs.rows.to(self.device)], loss, 0.0)
            own = chosen({"loss": loss.detach(), "kl": kl.detach()}, lesson.trajectory.finite[pairs.rows])
            measured += [own, {f"{metric}/{lesson.name}": values for metric, values in own.items()}]
            total = total + loss.sum() / size
        return total, pooled(measured)
