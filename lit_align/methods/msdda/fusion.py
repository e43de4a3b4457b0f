"""Several policies as one: the fused policy of MSDDA (arXiv 2604.14379), and its cheap approximation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_align.backbones import REFERENCE, DenoisingPolicy
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep, fuse

TOLERANCE = 1e-5
"""How far a sum of weights may be from 1, as people round them (.333333 three times)."""


def fusion_weights(
    weights: Mapping[str, float], beta: float, betas: Mapping[str, float] | None = None
) -> dict[str, float]:
    r"""Exponents of the kernels in the fused one; the reference gets the rest to 1.

    With :math:`\pi_i \propto \pi_{ref} e^{r_i / \beta_i}` the optimum for :math:`\sum_i w_i r_i` at the KL
    strength :math:`\beta` is

    .. math::
        \pi_{ref} e^{\sum_i w_i r_i / \beta} = \pi_{ref}^{1 - \sum_i a_i} \prod_i \pi_i^{a_i},
        \qquad a_i = w_i \beta_i / \beta

    The paper's case is one strength and :math:`\sum_i w_i = 1`: then :math:`a = w`. One expert alone gives
    the realignment of KL strength.

    Args:
        weights: :math:`w_i` by expert.
        beta: KL strength of the fused policy.
        betas: KL strengths of the experts, where they are not ``beta``.

    Returns:
        :math:`a_i` of every expert, and that of the reference.
    """
    exponents = {name: weight * (betas or {}).get(name, beta) / beta for name, weight in weights.items()}
    total = math.fsum(exponents.values())
    if abs(1 - total) <= TOLERANCE:
        return {name: exponent / total for name, exponent in exponents.items()} | {REFERENCE: 0.0}
    return exponents | {REFERENCE: 1 - total}


def is_one_hot(weights: Mapping[str, float]) -> bool:
    """Whether one name has all of the weight, 1."""
    return [weight for weight in weights.values() if weight != 0] == [1]


@dataclass(frozen=True)
class FusedPolicy:
    """The precision-weighted product of several policies (equations 6 and 7); a weight of 0 costs nothing.

    Where all experts have one sampler, their stds agree, a step is linear in the prediction, and so the
    predictions are fused: one sampler step on the weighted mean of them.

    Attributes:
        policies: Policies for the same images.
        weights: One each, with sum 1.
    """

    policies: Sequence[DenoisingPolicy]
    weights: Sequence[float]

    def __call__(self, x: Tensor, k: int | Tensor) -> GaussianStep:
        """The distribution of the next state; arguments as :class:`DenoisingPolicy`'s."""
        used = [(p, w) for p, w in zip(self.policies, self.weights, strict=True) if w != 0]
        first, alone = used[0][0], len(used) == 1
        if alone:
            return first(x, k)
        if all(policy.sampler is first.sampler for policy, _ in used):
            terms = [weight * promoted(policy.predict(x, k)) for policy, weight in used]
            return first.sampler.step(x, torch.stack(terms).sum(0), k)
        return fuse([policy(x, k) for policy, _ in used], [weight for _, weight in used])

    def __getitem__(self, rows: Tensor) -> "FusedPolicy":
        """The same policy for some of the images."""
        return FusedPolicy([policy[rows] for policy in self.policies], self.weights)


@dataclass(frozen=True)
class RandomExpertPolicy:
    """Each image and step follows one expert, drawn with its weight: the cost of one model, not exact.

    The approximation of Diffusion Blend (arXiv 2505.18547, there DB-MPA-LS). Its steps have the right mean
    over draws, but an image sees one expert at a time.

    Attributes:
        policies: Policies for the same images.
        choices: ``(T, B)`` long: which policy each image follows in each step.
    """

    policies: Sequence[DenoisingPolicy]
    choices: Tensor

    def __call__(self, x: Tensor, k: int | Tensor) -> GaussianStep:
        """The distribution of the next state; one step for all images."""
        chosen, mean, std = self.choices[k], torch.zeros_like(x), torch.zeros_like(x)
        for number in chosen.unique().tolist():
            rows = (chosen == number).nonzero().flatten()
            step = self.policies[number][rows](x[rows], k)
            mean[rows], std[rows] = step.mean.to(x), step.std.to(x).expand_as(x[rows])
        return GaussianStep(mean, std)

    def __getitem__(self, rows: Tensor) -> "RandomExpertPolicy":
        """The same policy for some of the images."""
        return RandomExpertPolicy([policy[rows] for policy in self.policies], self.choices[:, rows])


def draw_choices(weights: Sequence[float], steps: int, draws: Sequence[torch.Generator]) -> Tensor:
    """For each step and image the number of a policy, drawn with the chances ``weights``: ``(T, B)``."""
    if min(weights) < 0:
        raise ConfigError(
            f"weights: one expert is drawn for each step, and {min(weights)} is not a probability"
        )
    chances = torch.tensor(weights, dtype=torch.float64)
    drawn = [torch.multinomial(chances, steps, replacement=True, generator=draw) for draw in draws]
    return torch.stack(drawn, dim=1)


def promoted(prediction: Tensor) -> Tensor:
    """At least float32: sums of half-precision predictions would be rounded."""
    return prediction.to(torch.promote_types(prediction.dtype, torch.float32))
