"""The baselines of MSDDA: other policies for a mixed reward, with the same model and the same noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, Conditioning, DenoisingPolicy
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.methods.msdda.fusion import is_one_hot
from lit_align.methods.sampling import BatchPolicy
from lit_align.randomness import generator

if TYPE_CHECKING:
    from lit_align.methods.msdda.module import MSDDAModule


class Baseline(ABC):
    """One way to make a policy for weights of the objectives.

    Attributes:
        name: In tables and plots; two of one class need names of their own.
        has_kl: Whether its steps are Gaussians with the sampler's std.
    """

    name: str
    has_kl: ClassVar[bool] = True

    def prepare(self, host: "MSDDAModule") -> None:
        """Add the weight sets that it needs, once, before anything is trained.

        Raises:
            ConfigError: It cannot use these experts or rewards.
        """
        del host

    @abstractmethod
    def policy(
        self, host: "MSDDAModule", weights: Mapping[str, float], batch: Batch, cond: Conditioning
    ) -> BatchPolicy:
        """The policy for these weights and images, whose encoded prompts are ``cond``."""

    def is_expert(self, host: "MSDDAModule", weights: Mapping[str, float]) -> bool:
        """Whether it is just an expert at these weights, which then is not sampled twice."""
        del host, weights
        return False


class Soup(Baseline):
    """Rewarded soup (Ramé et al. 2023, arXiv 2306.04488): the model with the weighted sum of the updates.

    The updates have the exponents of the fused policy as weights.
    """

    name = "soup"

    def prepare(self, host: "MSDDAModule") -> None:
        host.backbone.weight_sets.mix(self.name, dict.fromkeys(host.experts, 0.0))  # refuses whole models now

    def policy(
        self, host: "MSDDAModule", weights: Mapping[str, float], batch: Batch, cond: Conditioning
    ) -> BatchPolicy:
        exponents = {name: a for name, a in host.exponents(weights).items() if name != REFERENCE}
        host.backbone.weight_sets.mix(self.name, exponents)
        return host.expert(self.name, cond)

    def is_expert(self, host: "MSDDAModule", weights: Mapping[str, float]) -> bool:
        return host.alone(weights) is not None


class FactorSoup(Baseline):
    """The soup of public code: the means of the adapters' factors, which is not linear in the updates.

    It does not use KL strengths. Where weights sum to less than 1, both factors shrink, and the update by the
    square of the sum.
    """

    name = "soup of factors"

    def prepare(self, host: "MSDDAModule") -> None:
        host.backbone.weight_sets.add("factors")
        # Refuses what has no means.
        host.backbone.weight_sets.average_factors("factors", dict.fromkeys(host.experts, 1.0))

    def policy(
        self, host: "MSDDAModule", weights: Mapping[str, float], batch: Batch, cond: Conditioning
    ) -> BatchPolicy:
        host.backbone.weight_sets.average_factors("factors", weights)
        return host.expert("factors", cond)

    def is_expert(self, host: "MSDDAModule", weights: Mapping[str, float]) -> bool:
        del host
        return is_one_hot(weights)


class CoDe(Baseline):
    """Candidate search (CoDe, Singh et al. 2025, arXiv 2502.00968) with the pretrained model.

    In one of ``every`` steps several next states are drawn, and the chain goes on from the one whose
    predicted clean image scores best. This is the variant of Diffusion Blend's code, which looks one step
    ahead, with 20 candidates in every 5th of 50 steps. A candidate without a score is never chosen where
    another has one.

    Args:
        candidates: Next states that are drawn.
        every: Steps from one search to the next; where a step has no noise, all would be alike, and there is
            no search.
        name: See :class:`Baseline`.
    """

    has_kl: ClassVar[bool] = False

    def __init__(self, candidates: int = 20, every: int = 5, name: str = "CoDe") -> None:
        if candidates < 1 or every < 1:
            raise ConfigError(f"CoDe: candidates {candidates} and every {every} must be at least 1")
        self.candidates = candidates
        self.every = every
        self.name = name

    def prepare(self, host: "MSDDAModule") -> None:
        if sets := [name for name in host.experts if name in host.rewards.of_sets]:
            raise ConfigError(
                f"sweep.baselines: CoDe scores candidates one by one, and {sets[0]} is a reward of sets of "
                "images; take CoDe out"
            )

    def policy(
        self, host: "MSDDAModule", weights: Mapping[str, float], batch: Batch, cond: Conditioning
    ) -> BatchPolicy:
        draws = [generator(host.seed, "candidates", i) for i in batch.index.tolist()]
        base = host.expert(REFERENCE, cond)
        return SearchPolicy(host, base, dict(weights), batch, self.candidates, self.every, draws)


@dataclass(frozen=True)
class SearchPolicy:
    """The pretrained model's steps; in some of them the best of several next states is kept.

    Attributes:
        host: The method that it is compared with; gives the rewards.
        base: The pretrained policy for the images.
        weights: Of the objectives.
        batch: The images.
        candidates: Next states that are drawn.
        every: Steps from one search to the next.
        draws: Where the candidates' noise comes from, one an image.
    """

    host: "MSDDAModule"
    base: DenoisingPolicy
    weights: Mapping[str, float]
    batch: Batch
    candidates: int
    every: int
    draws: list[torch.Generator]

    def __call__(self, x: Tensor, k: int) -> GaussianStep:
        """The distribution of the next state; after a search its one value."""
        step, sampler = self.base(x, k), self.base.sampler
        if k % self.every or k + 1 == sampler.num_steps or not sampler.stochastic[k]:
            return step
        drawn = [step.rsample(self.draws) for _ in range(self.candidates)]
        scores = [self._score_clean(state, k + 1) for state in drawn]
        best = torch.stack(scores).nan_to_num(nan=-math.inf).argmax(0)
        chosen = torch.stack(drawn)[best, torch.arange(len(best), device=best.device)]
        return GaussianStep(chosen, torch.zeros_like(step.std))

    def __getitem__(self, rows: Tensor) -> "SearchPolicy":
        """The same policy for some of the images."""
        draws = [self.draws[i] for i in rows.tolist()]
        return replace(self, base=self.base[rows], batch=self.batch[rows], draws=draws)

    def _score_clean(self, x: Tensor, k: int) -> Tensor:
        """The mixed reward ``(B,)`` of the clean images that are predicted at states of step ``k``."""
        latents = self.base.predict_x0(x, self.base.predict(x, k), k)
        images, used = self.host.backbone.decode(latents), self.weights.items()
        return torch.stack([w * self.host.objective(n, images, self.batch) for n, w in used if w != 0]).sum(0)


class RewardGradient(Baseline):
    """Reward-gradient guidance of the pretrained model, as in Diffusion Blend's code.

    The mean of a step moves by ``lambda sigma^2 / temperature`` times the weighted sum of the objectives'
    gradients with respect to the state, through the predicted clean image. Each gradient is divided by its
    norm over channels.

    Args:
        growth: ``lambda`` of step ``i`` is ``min(1, (1 + growth)^i - 1)``; 0.024 in that code, for 50 steps.
        temperature: 0.1 in that code, for 50 steps. With fewer steps each has more noise: give a higher one.
        name: See :class:`Baseline`.
    """

    def __init__(
        self, growth: float = 0.024, temperature: float = 0.1, name: str = "reward gradient"
    ) -> None:
        self.growth = growth
        self.temperature = temperature
        self.name = name

    def prepare(self, host: "MSDDAModule") -> None:
        if blind := [name for name in host.experts if not host.rewards.rewards[name].differentiable]:
            raise ConfigError(
                f"sweep.baselines: RewardGradient needs the gradient of {blind[0]}, "
                "which has none; take it out"
            )

    def policy(
        self, host: "MSDDAModule", weights: Mapping[str, float], batch: Batch, cond: Conditioning
    ) -> BatchPolicy:
        base = host.expert(REFERENCE, cond)
        return GuidedPolicy(host, base, dict(weights), batch, self.growth, self.temperature)


@dataclass(frozen=True)
class GuidedPolicy:
    """The pretrained model's steps, moved along the gradients of the objectives.

    Attributes:
        host: The method that it is compared with; gives the rewards.
        base: The pretrained policy for the images.
        weights: Of the objectives.
        batch: The images.
        growth: See :class:`RewardGradient`.
        temperature: See :class:`RewardGradient`.
    """

    host: "MSDDAModule"
    base: DenoisingPolicy
    weights: Mapping[str, float]
    batch: Batch
    growth: float
    temperature: float

    def __call__(self, x: Tensor, k: int) -> GaussianStep:
        """The distribution of the next state."""
        if not self.base.sampler.stochastic[k]:
            return self.base(x, k)
        prediction, gradients = self._gradients(x, k)
        step = self.base.sampler.step(x, prediction, k)
        shift = torch.zeros_like(step.mean)
        for name, gradient in gradients.items():
            norm = gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
            shift += self.weights[name] * gradient / norm / self.temperature
        strength = min(1.0, (1 + self.growth) ** k - 1)
        return GaussianStep(step.mean + strength * step.std.square() * shift, step.std)

    def __getitem__(self, rows: Tensor) -> "GuidedPolicy":
        """The same policy for some of the images."""
        return replace(self, base=self.base[rows], batch=self.batch[rows])

    def _gradients(self, x: Tensor, k: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction at ``x``, and of each objective that has a weight the gradient at ``x``."""
        with torch.inference_mode(False), torch.enable_grad():
            # Copies: what was made in inference mode cannot enter a graph.
            base = replace(self.base, cond=self.base.cond.map(torch.clone))
            state = x.clone().requires_grad_()
            prediction = base.predict(state, k)
            images = self.host.backbone.decode(base.predict_x0(state, prediction, k))
            names = [name for name, weight in self.weights.items() if weight != 0]
            scores = [self.host.objective(name, images, self.batch).sum() for name in names]
            gradients = [torch.autograd.grad(score, state, retain_graph=True)[0] for score in scores]
        return prediction.detach(), dict(zip(names, gradients, strict=True))
