"""Objectives on the forward process: DiffusionNFT (arXiv 2509.16117) and AWM (arXiv 2509.25050).

Shapes: ``N`` (image, timestep) pairs; ``...`` are the elements of a latent, of which errors are *means*.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_align.backbones import POLICY
from lit_align.errors import ConfigError, check_not_negative, check_positive
from lit_align.methods.metrics import Metrics
from lit_align.methods.objectives import clipped_surrogate, denoising_error

OLD = "old"
"""The weight set that follows the policy: DiffusionNFT's old policy, AWM's moving average."""


def implicit_policies(x0: Tensor, x0_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The positive and the negative policy that a policy implies, equations 5 and 6 of DiffusionNFT.

    The paper mixes velocities. A clean state is linear in the prediction at a given ``x_t``, whatever the
    prediction type, so the mixture of the clean states is the same policy.

    Args:
        x0: Clean state that the policy predicts, ``(N, ...)``.
        x0_old: That of the old policy.
        beta: Their distance from the old policy, in units of the policy's.
    """
    return x0_old + beta * (x0 - x0_old), x0_old - beta * (x0 - x0_old)


def normalised_error(x0: Tensor, clean: Tensor) -> Tensor:
    """Squared error over the mean absolute one, which passes no gradient: ``(N,)`` float64.

    The paper's adaptive weight (section 3.3): errors of all timesteps count alike.

    Args:
        x0: Predicted clean state, ``(N, ...)``.
        clean: The true one.
    """
    error = (x0.double() - clean.double()).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


def nft_loss(
    x0: Tensor, x0_old: Tensor, clean: Tensor, advantages: Tensor, beta: float, clip: float = 5.0
) -> Tensor:
    r"""DiffusionNFT's loss, ``(clip / beta) [r e(x0^+) + (1 - r) e(x0^-)]`` with :func:`normalised_error` e.

    ``r = 1/2 + A / (2 clip)`` is the probability that an image is a good one. At 1/2 (no advantage) the
    gradient is exactly 0 where policy and old policy agree. Without the adaptive weight the optimum is the
    paper's theorem 3.2: ``old + (2 / beta) E[r | x_t] (x0^good - old)``.

    Args:
        x0: Clean state that the policy predicts, ``(N, ...)``.
        x0_old: That of the old policy, without gradient.
        clean: The image's latent.
        advantages: ``(N,)``, within ``clip``.
        beta: Strength of the guidance towards good images: a small one asks for a larger move.
        clip: Largest advantage; the factor ``clip`` of the released code makes the gradient at the old
            policy proportional to ``A``, whatever the clip.

    Returns:
        ``(N,)``.
    """
    good = (0.5 + advantages.double() / (2 * clip)).clamp(0, 1)
    plus, minus = implicit_policies(x0, x0_old, beta)
    errors = good * normalised_error(plus, clean) + (1 - good) * normalised_error(minus, clean)
    return clip / beta * errors


def awm_log_prob(error: Tensor, sigma: Tensor, power: float) -> Tensor:
    """What AWM uses as a log-probability: ``-(sigma / p) [(e + 1e-10)^p - 1e-10^p]``.

    Args:
        error: Squared error of the policy's prediction, a mean over elements, ``(N,)``.
        sigma: Noise level of the timestep, ``(N,)``: the ``t`` of a flow model.
        power: ``p`` of the released code; 1 is ``-sigma e``.
    """
    return -sigma / power * ((error + 1e-10) ** power - 1e-10**power)


def awm_loss(log_prob: Tensor, behaviour: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Advantage-weighted matching: PPO's clipped surrogate with :func:`awm_log_prob`.

    Args:
        log_prob: Of the policy, ``(N,)``.
        behaviour: That of the policy that sampled, at the same timestep and noise; without gradient.
        advantages: ``(N,)``.
        clip_range: Of the ratio.

    Returns:
        ``(N,)``.
    """
    return clipped_surrogate(log_prob - behaviour, advantages, clip_range)


@dataclass(frozen=True)
class Matched:
    """Predictions at noised latents of a rollout batch.

    Attributes:
        prediction: The policy's, in the network's own space, ``(N, ...)``; the only one with a gradient.
        old: That of the old policy; None if the objective does not ask for it.
        target: What the prediction should have been.
        x0, x0_old: Clean states that the predictions imply; as ``old``.
        clean: The images' latents.
        sigma: Noise levels, ``(N,)``.
        behaviour: Errors of the policy that sampled, ``(N,)``; None in the first update, whose policy it is.
    """

    prediction: Tensor
    old: Tensor | None
    target: Tensor
    x0: Tensor
    x0_old: Tensor | None
    clean: Tensor
    sigma: Tensor
    behaviour: Tensor | None


class ForwardObjective(ABC):
    """What is asked of predictions at noised images."""

    sampled_with: ClassVar[str]
    """The weight set that draws the images."""

    asks_old: bool = True
    """Whether predictions of the old policy are needed."""

    asks_behaviour: ClassVar[bool] = False
    """Whether later updates on a rollout batch need the errors of the policy that sampled it."""

    @abstractmethod
    def __call__(self, at: Matched, advantages: Tensor, clip: float) -> tuple[Tensor, Metrics]:
        """The loss of each pair, ``(N,)``, from advantages in ``[-clip, clip]``."""


class NFT(ForwardObjective):
    """DiffusionNFT.

    Args:
        beta: See :func:`nft_loss`. 1 in the released configurations with one reward, .1 with several.

    Raises:
        ConfigError: ``beta`` is not positive.
    """

    sampled_with = OLD

    def __init__(self, beta: float = 1.0) -> None:
        check_positive({"objective.beta": beta})
        self.beta = beta

    def __call__(self, at: Matched, advantages: Tensor, clip: float) -> tuple[Tensor, Metrics]:
        assert at.old is not None, "NFT asks for the old policy"
        assert at.x0_old is not None, "NFT asks for the old policy"
        loss = nft_loss(at.x0, at.x0_old, at.clean, advantages, self.beta, clip)
        return loss, {"old_distance": denoising_error(at.prediction, at.old).detach()}


class AWM(ForwardObjective):
    """Advantage-weighted matching; the images come from the policy itself.

    Args:
        clip_range: Of the ratio. The default is DDPO's, whose ratios are of means over elements too.
        power: See :func:`awm_log_prob`; .25 in the released configuration.
        old_weight: Weight of the squared distance to the moving average of the weights, beside that to the
            reference; 1 in the released configuration, the default is ours. Without it training may collapse.

    Raises:
        ConfigError: A value is not positive, or ``old_weight`` negative.
    """

    sampled_with = POLICY
    asks_behaviour = True

    def __init__(self, clip_range: float = 1e-4, power: float = 0.25, old_weight: float = 1e-3) -> None:
        check_positive({"objective.clip_range": clip_range, "objective.power": power})
        check_not_negative({"objective.old_weight": old_weight})
        self.clip_range, self.power, self.old_weight = clip_range, power, old_weight
        self.asks_old = old_weight > 0

    def __call__(self, at: Matched, advantages: Tensor, clip: float) -> tuple[Tensor, Metrics]:
        error = denoising_error(at.prediction, at.target)
        behaviour_error = error.detach() if at.behaviour is None else at.behaviour
        log_prob, behaviour = (awm_log_prob(e, at.sigma, self.power) for e in (error, behaviour_error))
        # The released code divides advantages by their clip.
        loss = awm_loss(log_prob, behaviour, advantages / clip, self.clip_range)
        moved = (log_prob - behaviour).detach().expm1().abs()
        metrics = {"error": error.detach(), "clip_fraction": (moved > self.clip_range).float()}
        if at.old is not None:
            distance = denoising_error(at.prediction, at.old)
            loss, metrics = loss + self.old_weight * distance, metrics | {"old_distance": distance.detach()}
        return loss, metrics


@dataclass(frozen=True)
class OldPolicy:
    """How the old policy follows the policy: ``old <- d old + (1 - d) policy`` after a rollout batch.

    ``d`` is 0 for the first ``flat + 1`` rollout batches (the old policy is the policy), and then grows by
    ``rate`` a batch up to ``hold``. So with ``flat`` 0 the first batch is followed by a copy, whatever
    ``hold`` is.

    Args:
        flat: 0 in DiffusionNFT's configurations for GenEval and PickScore; 75 for OCR, where it counts
            updates, two in a rollout batch.
        rate: .001 in the first two of these configurations; .0075 for OCR.
        hold: .5 in the first two; .999 for OCR. AWM: .3. Below 1.

    Raises:
        ConfigError: A value is outside of its range.
    """

    flat: int = 0
    rate: float = 1e-3
    hold: float = 0.5

    def __post_init__(self) -> None:
        if self.flat < 0 or self.rate < 0 or not 0 <= self.hold < 1:
            raise ConfigError(
                f"old_policy: flat {self.flat} and rate {self.rate} must not be negative, and hold "
                f"{self.hold} must be at least 0 and below 1"
            )

    def decay(self, batches: int) -> float:
        """``d`` after a rollout batch that follows ``batches`` others."""
        return min(max(batches - self.flat, 0) * self.rate, self.hold)
