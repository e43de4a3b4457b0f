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
from lit_align.fusion import is_one_hot
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

    def alone(self, weights: Mapping[str, float]) -> str | None:
        """The expert that is all that the method does at these weights."""

    def expert(self, name: str, batch: Batch) -> DenoisingPolicy:
        """The policy of a weight set."""

    def objective(self, name: str, images: Tensor, batch: Batch) -> Tensor:
        """The scaled reward of one objective, ``(B,)``; differentiable where the reward is."""


class Baseline(ABC):
    """One way to serve weights of the objectives.

    Attributes:
        name: In tables and plots; two of one class need names of their own.
        has_kl: Whether its steps are Gaussians with the sampler's std.
    """

    name: str
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

    def is_expert(self, host: Host, weights: Mapping[str, float]) -> bool:
        """Whether it is just an expert at these weights, which then is not sampled twice."""
        del host, weights
        return False


class Soup(Baseline):
    """Rewarded soup (Ramé et al. 2023, arXiv 2306.04488): the model with the weighted sum of the updates.

    It goes as far with each as the fused policy does.
    """

    name = "soup"

    def prepare(self, host: Host) -> None:
        host.backbone.mix_weights(self.name, dict.fromkeys(host.experts, 0.0))  # refuses whole models now

    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        exponents = {name: a for name, a in host.exponents(weights).items() if name != REFERENCE}
        host.backbone.mix_weights(self.name, exponents)
        return host.expert(self.name, batch)

    def is_expert(self, host: Host, weights: Mapping[str, float]) -> bool:
        return host.alone(weights) is not None


class FactorSoup(Baseline):
    """The soup of public code: the means of the adapters' factors, which is not linear in the updates.

    It knows no KL strengths, and goes no further than the experts; where weights sum to less than 1, both
    factors shrink, and the update by the square.
    """

    name = "soup of factors"

    def prepare(self, host: Host) -> None:
        host.backbone.add_weights("factors")
        # Refuses what has no means.
        host.backbone.average_factors("factors", dict.fromkeys(host.experts, 1.0))

    def policy(self, host: Host, weights: Mapping[str, float], batch: Batch) -> Policy:
        host.backbone.average_factors("factors", weights)
        return host.expert("factors", batch)

    def is_expert(self, host: Host, weights: Mapping[str, float]) -> bool:
        del host
        return is_one_hot(weights)


class CoDe(Baseline):
    """Candidate search (CoDe, Singh et al. 2025, arXiv 2502.00968) with the pretrained model.

    In every so many steps several next states are drawn, and the one goes on whose predicted clean image
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

    def prepare(self, host: Host) -> None:
        if sets := [name for name in host.experts if name in host.rewards.of_sets]:
            raise ConfigError(
                f"sweep.baselines: CoDe scores candidates one by one, and {sets[0]} is a reward of sets of "
                "images; take CoDe out"
            )

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
    predicted clean image, each with its norm over channels set to 1 and divided by 0.1.

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
            if not base.sampler.stochastic[k]:
                return base(x, k)
            prediction, gradients = self._gradients(host, base, weights, batch, x, k)
            step = base.sampler.step(x, prediction, k)
            shift = torch.zeros_like(step.mean)
            for name, gradient in gradients.items():
                norm = gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)
                shift += weights[name] * gradient / norm / self.temperature
            strength = min(1.0, (1 + self.growth) ** k - 1)
            return GaussianStep(step.mean + strength * step.std.square() * shift, step.std)

        return guided

    def _gradients(
        self,
        host: Host,
        base: DenoisingPolicy,
        weights: Mapping[str, float],
        batch: Batch,
        x: Tensor,
        k: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The prediction at ``x``, and of each objective that has a weight the gradient at ``x``."""
        with torch.inference_mode(False), torch.enable_grad():
            # Copies: what was made in inference mode cannot enter a graph.
            cond = replace(base.cond, embeds=base.cond.embeds.clone(), null=base.cond.null.clone())
            state = x.clone().requires_grad_()
            prediction = replace(base, cond=cond).predict(state, k)
            images = host.backbone.decode(predict_clean(base, state, prediction, k))
            names = [name for name, weight in weights.items() if weight != 0]
            scores = [host.objective(name, images, batch).sum() for name in names]
            gradients = [torch.autograd.grad(score, state, retain_graph=True)[0] for score in scores]
        return prediction.detach(), dict(zip(names, gradients, strict=True))


def predict_clean(policy: DenoisingPolicy, x: Tensor, prediction: Tensor, k: int) -> Tensor:
    """The clean latents that a prediction at states of step ``k`` implies."""
    return policy.sampler.predict_x0(x, prediction, int(policy.sampler.timesteps[k]))


def score_clean(
    host: Host, policy: DenoisingPolicy, weights: Mapping[str, float], batch: Batch, x: Tensor, k: int
) -> Tensor:
    """The mixed reward ``(B,)`` of the clean images that the denoiser predicts at states of step ``k``."""
    images = host.backbone.decode(predict_clean(policy, x, policy.predict(x, k), k))
    return torch.stack([w * host.objective(n, images, batch) for n, w in weights.items() if w != 0]).sum(0)
