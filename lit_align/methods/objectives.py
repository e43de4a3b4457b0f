"""Pure losses that several methods share: of a denoiser's predictions, and of pairs of images.

Shapes: ``B`` images or pairs, ``T`` steps. A prediction and what it should be are compared in the network's
own space (noise, velocity or clean state), as in the training scripts of diffusers; that is the noise in
every published result here. Another space is another weight of each timestep.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """PPO's form of a policy gradient, ``max(-A w, -A clip(w, 1 - e, 1 + e))``: equation 4 of DDPO (DDPO-IS).

    The gradient is 0 where the ratio has left the range in the direction that the advantage asks for, and
    alive where it has left it in the other.

    Args:
        log_ratio: Log of the importance ratio ``w``, ``(N,)``.
        advantages: ``(N,)``.
        clip_range: ``e``.

    Returns:
        ``(N,)``.
    """
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def denoising_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error of a prediction, its *mean* over the elements of each image, in at least float32.

    Args:
        prediction: The network's output, ``(B, ...)``.
        target: What it should have been, ``(B, ...)``.

    Returns:
        ``(B,)``.
    """
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return (prediction.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def error_margin(
    winner: Tensor, winner_reference: Tensor, loser: Tensor, loser_reference: Tensor, beta: float
) -> Tensor:
    r"""How much more a policy has gained on the winner than on the loser, from prediction errors.

    .. math:: \tfrac12 \beta [(e^l_\theta - e^l_{ref}) - (e^w_\theta - e^w_{ref})]

    The argument of the logistic in Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) and in SPIN's
    approximate objective (Yuan et al. 2024, arXiv 2402.10210, equation 4.9), where the reference is the
    opponent and the loser its image. ``beta`` is in the convention of the released code of Diffusion-DPO:
    errors are means over elements, and the factor 1/2 stands before it. With sums over ``D`` elements and no
    factor the same loss has ``beta / (2 D)``.

    Args:
        winner: Prediction error of the policy on the winners, ``(B,)``.
        winner_reference: That of the reference, at the same noise and timestep.
        loser: Prediction error of the policy on the losers.
        loser_reference: That of the reference.
        beta: Strength; large holds the policy near the reference.

    Returns:
        ``(B,)``; positive where policy and pair agree.
    """
    return 0.5 * beta * ((loser - loser_reference) - (winner - winner_reference))


def trajectory_margin(winner: Tensor, loser: Tensor, beta: float) -> Tensor:
    r"""The same from the log-ratios of whole chains: SPIN's exact objective (equation 4.8).

    .. math:: \beta \Big[\sum_k \log\frac{p_\theta}{p_{ref}}(x^w_{k+1} | x^w_k)
        - \sum_k \log\frac{p_\theta}{p_{ref}}(x^l_{k+1} | x^l_k)\Big]

    Args:
        winner: Log-ratio of policy to reference in each step of the winners' chains, ``(T, B)``.
        loser: That of the losers' chains.
        beta: The paper's lambda where log-ratios are in nats.

    Returns:
        ``(B,)``.
    """
    return beta * (winner.sum(0) - loser.sum(0))


def logistic_loss(margin: Tensor) -> Tensor:
    """``log(1 + exp(-margin))``: log 2 at 0, convex, never negative."""
    return softplus(-margin)


def implicit_accuracy(margin: Tensor) -> Tensor:
    """1 where a margin is positive, 0 where it is negative, a half where policy and reference are equal."""
    return 0.5 * (margin.detach().sign() + 1)
