"""Chains with a gradient through some of their predictions. Shapes: ``B`` images, ``T`` steps."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_align.gaussian import GaussianStep, Generators
from lit_align.samplers import Sampler

Predict = Callable[[Tensor, int], Tensor]
"""``predict(x, k)``: the guided output of the denoiser at the states ``x (B, ...)`` of step ``k``."""


def differentiable_rollout(
    predict: Predict,
    sampler: Sampler,
    noise: Tensor,
    attached: Tensor,
    draws: Generators = None,
    reference: Predict | None = None,
    one_shot: bool = False,
    graphs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Sample a chain whose end is a differentiable function of the attached predictions.

    With :math:`x_{k+1} = a_k x_k + b_k \epsilon_k + \sigma_k z_k` only :math:`\epsilon_k` is detached, as in
    the released code: the sampler's own arithmetic always carries gradient. Steps before the first attached
    one run without a graph and hold no memory.

    Args:
        predict: The denoiser of the policy.
        sampler: Stochastic steps draw by reparametrisation.
        noise: ``(B, ...)``, the first states.
        attached: ``(T, B)`` bool, on the CPU.
        draws: Where the steps' noise comes from.
        reference: The denoiser of the reference, to measure KL on the attached steps.
        one_shot: Return the clean states that the attached predictions imply (ReFL), one per image, in place
            of the ends of the chains.
        graphs: ``(T,)`` bool, the steps that get a graph, if they are more than those with an attached image.

    Returns:
        Clean latents ``(B, ...)``, and the KL to the reference in nats, summed over the attached steps,
        ``(B,)``; zeros without a reference.
    """
    x = jumped = noise
    kl = noise.new_zeros(len(noise))
    graphs = attached.any(1) if graphs is None else graphs
    # A one-shot chain ends at the last attached step.
    steps = int(graphs.nonzero().max()) + 1 if one_shot else sampler.num_steps
    for k in range(steps):
        used, keep = bool(graphs[k]), attached[k].to(x.device)
        here = keep.view(-1, *(1,) * (x.ndim - 1))
        with torch.set_grad_enabled(used and torch.is_grad_enabled()):
            prediction = predict(x, k)
        prediction = torch.where(here, prediction, prediction.detach())
        step = sampler.step(x, prediction, k)
        if reference is not None and used:
            kl = kl + torch.where(keep, step.kl(sampler.step(x, reference(x, k), k)), 0.0)
        if one_shot:
            clean = sampler.schedule.predict_x0(x, prediction, sampler.timesteps[k])
            jumped = torch.where(here, clean, jumped)
        x = step.rsample(draws)
    return jumped if one_shot else x, kl


def last_step_again(
    predict: Predict, sampler: Sampler, clean: Tensor, copies: int, draws: Generators = None
) -> Tensor:
    r"""The ends of chains, and copies of them with a gradient through their last prediction (DRaFT-LV).

    The ends :math:`x_0`, detached, are noised to the level of the last step, which is then taken anew from
    :math:`\alpha\, x_0 + \sigma\, \epsilon^i` for :math:`i = 1 \dots m`.

    Args:
        predict: The denoiser of the policy.
        sampler: Gives the last step and its noise level.
        clean: ``(B, ...)``, the ends of the chains.
        copies: ``m``.
        draws: Where noise comes from.

    Returns:
        ``((1 + m) B, ...)``, ``clean`` first.
    """
    k, standard = sampler.num_steps - 1, GaussianStep(torch.zeros_like(clean), clean.new_ones(()))
    ends = [clean]
    for _ in range(copies):
        x = sampler.schedule.add_noise(clean.detach(), standard.rsample(draws), sampler.timesteps[k])
        ends.append(sampler.step(x, predict(x, k), k).rsample(draws))
    return torch.cat(ends)
