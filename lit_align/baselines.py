"""What MSDDA is compared with: other ways to serve a mixed reward with the same model and the same noise."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, DenoisingPolicy, DiffusionBackbone
from lit_align.data import Batch
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep, Policy
from lit_align.randomness import generator
from lit_align.rewards import RewardBank


class Host(Protocol):
    """What a baseline needs of the method that it is compared with."""

    backbone: DiffusionBackbone
    rewards: RewardBank
    seed: int

    @property
    def experts(self) -> Mapping[str, str | None]:
        """The experts' names, and where they come from."""

    def exponents(self, weights: Mapping[str, float]) -> dict[str, float]:
        """How far the method goes with each expert at these weights; the rest is the reference's."""

    def expert(self, name: str, batch: Batch) -> DenoisingPolicy:
        """The policy of a weight set."""

    def objective(self, name: str, images: Tensor, batch: Batch) -> Tensor:
        """The scaled reward of one objective, ``(B,)``; differentiable where the reward is."""


class Baseline(ABC):
    """One way to serve weights of the objectives.

    Attributes:
        name: In tables and plots; two of one class need names of their own.
        at_experts: Whether it is something of its own where all weight is on one expert.
        has_kl: Whether its steps are Gaussians with the sampler's std.
    """

    name: str
    at_experts: ClassVar[bool] = True
    has_kl: ClassVar[bool] = True

    def prepare(self, host: Host) -> None:
        """Add the weight sets that it needs, once, before anything is trained.

        Raises:
            ConfigError: It cannot serve these experts or rewards.
        """
        del host

    @abstractmethod
    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        """The policy for these weights and images."""


class Soup(Baseline):
    """Rewarded soup (Ramé et al. 2023, arXiv 2306.04488): the model with the weighted sum of the updates.

    It goes as far with each as the fused policy does.
    """

    name = "soup"
    at_experts: ClassVar[bool] = False

    def prepare(self, host: Host) -> None:
        host.backbone.mix_weights(self.name, dict.fromkeys(host.experts, 0.0))  # refuses whole models now

    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        exponents = {name: a for name, a in host.exponents(weights).items() if name != REFERENCE}
        host.backbone.mix_weights(self.name, exponents)
        return host.expert(self.name, batch)


class FactorSoup(Baseline):
    """The soup of public code: the means of the adapters' factors, which is not linear in the updates."""

    name = "soup of factors"
    at_experts: ClassVar[bool] = False

    def prepare(self, host: Host) -> None:
        host.backbone.add_weights("factors")
        host.backbone.average_factors("factors", dict.fromkeys(host.experts, 1.0))  # refuses different ranks

    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        host.backbone.average_factors("factors", weights)
        return host.expert("factors", batch)


class CoDe(Baseline):
    """Candidate search (CoDe, Singh et al. 2025, arXiv 2502.00968) with the pretrained model.

    In every so many steps several next states are drawn, and the one goes on whose predicted clean picture
    scores best: the variant of Diffusion Blend's code, which looks one step ahead, with 20 candidates in
    every 5th of 50 steps. A candidate without a score is never chosen where another has one.

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

    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        draws = [generator(host.seed, "candidates", i) for i in batch.index.tolist()]
        base = host.expert(REFERENCE, batch)

        def search(x: Tensor, k: int | Tensor) -> GaussianStep:
            step = base(x, k)
            assert isinstance(k, int), "a search is one step for all images"
            if k % self.every or k + 1 == base.sampler.num_steps or not base.sampler.stochastic[k]:
                return step
            drawn = [step.rsample(draws) for _ in range(self.candidates)]
            scores = [score_clean(host, base, weights, batch, x, k + 1) for x in drawn]
            best = torch.stack(scores).nan_to_num(nan=-math.inf).argmax(0)
            chosen = torch.stack(drawn)[best, torch.arange(len(best), device=best.device)]
            return GaussianStep(chosen, torch.zeros_like(step.std))

        return search


class RewardGradient(Baseline):
    """Reward-gradient guidance of the pretrained model, as in Diffusion Blend's code.

    The mean of a step moves by ``lambda sigma^2`` times the weighted sum of the objectives' gradients at the
    predicted clean picture, each with its norm over channels set to 1 and divided by 0.1.

    Args:
        growth: ``lambda`` of step ``i`` is ``min(1, (1 + growth)^i - 1)``; 0.024 for 50 steps there.
        temperature: 0.1 there, for 50 steps: with fewer each has more noise, and wants a higher one.
        name: See :class:`Baseline`.
    """

    def __init__(
        self, growth: float = 0.024, temperature: float = 0.1, name: str = "reward gradient"
    ) -> None:
        self.growth = growth
        self.temperature = temperature
        self.name = name

    def prepare(self, host: Host) -> None:
        if blind := [name for name in host.experts if not host.rewards.rewards[name].differentiable]:
            raise ConfigError(
                f"sweep.baselines: RewardGradient needs the gradient of {blind[0]}, "
                "which has none; take it out"
            )

    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        base = host.expert(REFERENCE, batch)

        def guided(x: Tensor, k: int | Tensor) -> GaussianStep:
            assert isinstance(k, int), "guidance is one step for all images"
            step = base(x, k)
            if not base.sampler.stochastic[k]:
                return step
            shift = torch.zeros_like(step.mean)
            for name, weight in weights.items():
                if weight != 0:
                    gradient = self._gradient(host, base, name, batch, x, k)
                    norm = gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
                    shift += weight * gradient / norm / self.temperature
            strength = min(1.0, (1 + self.growth) ** k - 1)
            return GaussianStep(step.mean + strength * step.std.square() * shift, step.std)

        return guided

    def _gradient(
        self, host: Host, base: DenoisingPolicy, name: str, batch: Batch, x: Tensor, k: int
    ) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            # Copies: what was made in inference mode cannot enter a graph.
            cond = replace(base.cond, embeds=base.cond.embeds.clone(), null=base.cond.null.clone())
            state = x.clone().requires_grad_()
            score = score_clean(host, replace(base, cond=cond), {name: 1.0}, batch, state, k)
            (gradient,) = torch.autograd.grad(score.sum(), state)
        return gradient


def score_clean(
    host: Host, policy: DenoisingPolicy, weights: Mapping[str, float], batch: Batch, x: Tensor, k: int
) -> Tensor:
    """The mixed reward ``(B,)`` of the clean pictures that the denoiser predicts at states of step ``k``."""
    t = int(policy.sampler.timesteps[k])
    images = host.backbone.decode(policy.sampler.predict_x0(x, policy.predict(x, k), t))
    return torch.stack([w * host.objective(n, images, batch) for n, w in weights.items() if w != 0]).sum(0)
