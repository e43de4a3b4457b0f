"""The Gaussian of one sampling step, and the precision-weighted fusion of several.

Every method of this package sees a sampler as a policy ``(x, k) -> GaussianStep``: the distribution from
which step ``k`` draws the next state. Whatever the dtype of the network, the maths here is at least float32
(float64 stays float64).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: the global CPU generator, one CPU generator for the batch, or one per image."""


@dataclass(frozen=True)
class GaussianStep:
    """Independent Gaussians over the elements of the next state, one per image of the batch.

    Elements whose ``std`` is 0 are deterministic: they have no density, so they add nothing to
    :meth:`log_prob` and :meth:`log_ratio`, and no gradient flows through them. Both can be mixed in one
    batch.

    Attributes:
        mean: ``(B, ...)``; half precision is promoted to float32 at construction.
        std: Not negative, broadcastable to ``mean``; cast to the dtype and device of ``mean``.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        mean = self.mean.to(torch.promote_types(self.mean.dtype, torch.float32))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", self.std.to(mean))

    def rsample(self, generator: Generators = None) -> Tensor:
        """Draw the next state, differentiable with respect to ``mean`` and ``std``.

        Noise is drawn on the CPU and then moved, so that an image does not depend on the device.

        Args:
            generator: None for the global CPU generator, one CPU generator, or a list of ``B``: then the
                noise of image ``i`` comes from generator ``i`` alone and does not depend on the other images
                of the batch.

        Returns:
            ``(B, ...)`` in the dtype of ``mean``.

        Raises:
            ValueError: The number of generators is not the number of images.
        """
        return self.mean + self.std * _noise_like(self.mean, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of ``x`` in nats, summed over the dimensions of each image.

        Args:
            x: ``(B, ...)``.

        Returns:
            ``(B,)``; 0 with zero gradient where ``std`` is 0.
        """
        stochastic = self.std > 0
        # Masked before it divides: 0 * inf would be a NaN in the gradient.
        std = torch.where(stochastic, self.std, 1.0)
        log_density = -0.5 * ((x - self.mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
        return _sum_per_image(torch.where(stochastic, log_density, 0.0))

    def log_ratio(self, other: "GaussianStep", x: Tensor) -> Tensor:
        r"""``self.log_prob(x) - other.log_prob(x)``, computed so that small differences survive float32.

        The two log-densities are numbers of the size of the latent (tens of thousands), their difference may
        be 1e-4. With :math:`d = m - m'` and :math:`r = x - (m + m')/2` each element is

        .. math:: \tfrac12 (s^{-2} + s'^{-2})\, r d + \tfrac12 (s'^{-2} - s^{-2})(r^2 + d^2/4) - \ln(s / s')

        of which only :math:`r d / s^2` is left where the stds agree.

        Args:
            other: The distribution in the denominator.
            x: ``(B, ...)``.

        Returns:
            ``(B,)``; elements where either std is 0 have no common density and count as 0, with zero
            gradient.
        """
        stochastic = (self.std > 0) & (other.std > 0)
        std, other_std = torch.where(stochastic, self.std, 1.0), torch.where(stochastic, other.std, 1.0)
        precision, other_precision = std.square().reciprocal(), other_std.square().reciprocal()
        # s/s' - 1 is exactly 0 where the stds agree, and with it the two terms of unequal stds.
        excess = (std - other_std) / other_std
        precision_gap = excess * (std + other_std) / other_std * precision
        shift, residual = self.mean - other.mean, x - 0.5 * (self.mean + other.mean)
        of_means = 0.5 * (precision + other_precision) * residual * shift
        of_stds = 0.5 * precision_gap * (residual.square() + 0.25 * shift.square()) - excess.log1p()
        return _sum_per_image(torch.where(stochastic, of_means + of_stds, 0.0))

    def kl(self, other: "GaussianStep") -> Tensor:
        """KL(self || other) in nats, summed over the dimensions of each image; stds may differ.

        Returns:
            ``(B,)``. Elements where both stds are 0 count as 0 (no density, as in :meth:`log_ratio`),
            elements where only one of them is 0 as infinity (a point mass and a density are mutually
            singular).
        """
        stochastic = (self.std > 0) & (other.std > 0)
        std, other_std = torch.where(stochastic, self.std, 1.0), torch.where(stochastic, other.std, 1.0)
        excess = (std - other_std) / other_std
        shift = (self.mean - other.mean) / other_std
        kl = 0.5 * (shift.square() + excess * (excess + 2)) - excess.log1p()
        singular = torch.where((self.std > 0) ^ (other.std > 0), math.inf, 0.0).to(kl)
        return _sum_per_image(torch.where(stochastic, kl, singular))


Policy: TypeAlias = Callable[[Tensor, int], GaussianStep]
"""``policy(x, k)``: the Gaussian of the next state, at the states ``x (B, ...)`` of step ``k``."""


def fuse(steps: Sequence[GaussianStep], weights: Sequence[float]) -> GaussianStep:
    r"""The normalised product :math:`\prod_i \pi_i^{w_i}` of Gaussian steps.

    MSDDA's closed form (arXiv 2604.14379, section 4.2):

    .. math:: \sigma^{-2} = \sum_i w_i \sigma_i^{-2}, \qquad \mu = \sigma^2 \sum_i w_i \sigma_i^{-2} \mu_i

    Steps of weight 0 are dropped first; if one is left it is returned as it is. Where the stds agree the
    result is the weighted mean of the means with that same std. Where all stds are 0 it is the weighted mean,
    std 0. Negative weights extrapolate.

    Args:
        steps: Gaussians over the same state.
        weights: One per step, with sum 1.

    Raises:
        ValueError: Weights do not fit the steps or do not sum to 1; some but not all stds of an element are
            0; the fused precision is not positive.
    """
    if len(steps) != len(weights):
        raise ValueError(f"fuse: {len(steps)} steps with {len(weights)} weights; give one weight per step.")
    if not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"fuse: weights {list(weights)} sum to {sum(weights):g}, not 1; divide them by their sum."
        )
    used = [(step, weight) for step, weight in zip(steps, weights, strict=True) if weight != 0]
    if len(used) == 1:
        return used[0][0]
    return _fuse_used([step for step, _ in used], [weight for _, weight in used])


def _fuse_used(steps: list[GaussianStep], weights: list[float]) -> GaussianStep:
    zeros = [step.std == 0 for step in steps]
    deterministic = reduce(torch.logical_and, zeros)
    if bool((reduce(torch.logical_or, zeros) & ~deterministic).any()):
        raise ValueError("fuse: some stds are 0 where others are not; give all policies one sampler.")
    # Precisions relative to the first step's: exactly 1 where stds agree, and where every std is 0 (each
    # stands as 1 there).
    stds = [torch.where(deterministic, 1.0, step.std) for step in steps]
    shares = [weight * (stds[0] / std).square() for weight, std in zip(weights, stds, strict=True)]
    precision = torch.stack(shares).sum(0)
    if not bool((precision > 0).all()):
        raise ValueError(
            f"fuse: weights {weights} leave no positive precision; move the negative weights towards 0."
        )
    mean = torch.stack(
        [share / precision * step.mean for share, step in zip(shares, steps, strict=True)]
    ).sum(0)
    return GaussianStep(mean, torch.where(deterministic, 0.0, stds[0] * precision.rsqrt()))


def _noise_like(mean: Tensor, generator: Generators) -> Tensor:
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
    if len(generator) != len(mean):
        raise ValueError(f"rsample: {len(generator)} generators for {len(mean)} images; give one per image.")
    noise = [torch.randn(mean.shape[1:], generator=one, dtype=mean.dtype) for one in generator]
    return torch.stack(noise).to(mean.device)


def _sum_per_image(elements: Tensor) -> Tensor:
    return elements.flatten(1).sum(1) if elements.ndim > 1 else elements
