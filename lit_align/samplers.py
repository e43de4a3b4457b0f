"""Samplers: from a network's prediction to the Gaussian of the next state.

A sampler has no state. It is built from a diffusers scheduler config (the backbone hands it over; a user
never writes it) and from what the user chooses: how many steps, how much noise.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep


class Sampler(ABC):
    """Turns predictions into Gaussian steps.

    ``k`` is a step index in sampling order, ``t`` a timestep value of the network.

    Attributes:
        num_steps: Number of steps ``T``.
        timesteps: ``(T,)`` long, on the CPU: the ``t`` of each ``k``, decreasing.
        stochastic: ``(T,)`` bool, on the CPU: whether step ``k`` draws noise; only such steps have a
            log-probability.
        num_train_timesteps: How many timesteps the network knows, ``0 .. num_train_timesteps - 1``.
    """

    num_train_timesteps: int
    num_steps: int
    timesteps: Tensor
    stochastic: Tensor

    @abstractmethod
    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        """The Gaussian of the state after step ``k``.

        Args:
            x: ``(B, ...)`` state before the step.
            prediction: ``(B, ...)`` the network's output at ``x``, after guidance.
            k: Step index; or ``(B,)`` long (best on the CPU, where the tables are), so that a batch may mix
                steps.
        """

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """The forward process: ``x0`` at timestep ``t`` (int or ``(B,)``), with standard normal ``noise``."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """What the network should predict at ``add_noise(x0, noise, t)``: noise, velocity or ``x0``."""

    @abstractmethod
    def predict_x0(self, x: Tensor, prediction: Tensor, t: int | Tensor) -> Tensor:
        """The clean state that ``prediction`` implies at state ``x`` and timestep ``t`` (int or ``(B,)``)."""


class DDIM(Sampler):
    r"""The DDIM family (arXiv 2010.02502, equations 12 and 16) over a variance-preserving noise schedule.

    With :math:`\bar\alpha` the cumulative signal level before (t) and after (s) the step,

    .. math::
        \sigma^2 &= \eta^2 \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}
            \left(1 - \frac{\bar\alpha_t}{\bar\alpha_s}\right) \\
        \mu &= \sqrt{\bar\alpha_s}\, \hat x_0 + \sqrt{1 - \bar\alpha_s - \sigma^2}\, \hat\varepsilon

    ``eta`` 1 is DDPM's posterior (arXiv 2006.11239, equation 7), ``eta`` 0 is deterministic. Signal levels,
    timesteps and the level after the last step are those of diffusers' ``DDIMScheduler`` for the same config.
    Since :math:`\hat x_0` and :math:`\hat\varepsilon` are linear in state and prediction, a step is two
    coefficients, tabulated in float64.

    Args:
        scheduler_config: A diffusers scheduler config; given by the backbone, never in YAML.
        num_steps: Number of sampling steps.
        eta: Noise of the steps, from 0 (none) to 1 (DDPM's).
        noisy_steps: Only the first so many steps draw noise, the others are deterministic (eta 0); all of
            them if not given. A policy gradient then spends neither work nor KL on the last steps, whose
            noise decides little of an image; mixed ODE-SDE sampling, as in MixGRPO.

    Raises:
        ConfigError: The config clips or thresholds predictions, is of another family, or does not allow these
            arguments.
    """

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        num_steps: int = 50,
        eta: float = 1.0,
        noisy_steps: int | None = None,
    ) -> None:
        _check_config(scheduler_config)
        scheduler: Any = DDIMScheduler.from_config(dict(scheduler_config))
        num_train_timesteps: int = scheduler.config.num_train_timesteps
        if not 1 <= num_steps <= num_train_timesteps:
            raise ConfigError(
                f"DDIM: num_steps is {num_steps}; choose 1 to {num_train_timesteps}, the steps of training."
            )
        if noisy_steps is not None and not 0 <= noisy_steps <= num_steps:
            raise ConfigError(f"DDIM: noisy_steps is {noisy_steps}; choose from 0 to num_steps, {num_steps}.")
        if not eta >= 0:
            raise ConfigError(f"DDIM: eta is {eta}; choose 0 (deterministic) to 1 (DDPM).")
        scheduler.set_timesteps(num_steps)
        self.num_train_timesteps = num_train_timesteps
        self.num_steps = num_steps
        # Rounding makes diffusers' "trailing" spacing one timestep (-1) too long for some numbers of steps.
        self.timesteps = scheduler.timesteps[:num_steps]
        if int(self.timesteps.max()) >= num_train_timesteps:
            raise ConfigError(
                f"DDIM: num_steps {num_steps} starts at timestep {int(self.timesteps.max())}, but the model "
                f"knows 0 to {num_train_timesteps - 1} (the scheduler config's steps_offset is "
                f"{scheduler.config.steps_offset}); take fewer steps."
            )
        levels, final_level = scheduler.alphas_cumprod.double(), scheduler.final_alpha_cumprod.double()
        # The noise of each step: eta in the first ones, none in the others.
        etas = torch.zeros(num_steps, dtype=torch.float64)
        etas[:noisy_steps] = eta
        self._tabulate(levels, final_level, scheduler.config.prediction_type, etas)

    def _tabulate(self, levels: Tensor, final_level: Tensor, prediction_type: str, etas: Tensor) -> None:
        previous = self.timesteps - len(levels) // self.num_steps
        before = levels[self.timesteps]
        after = torch.where(previous >= 0, levels[previous.clamp(min=0)], final_level)
        if prediction_type == "epsilon" and bool((before == 0).any()):
            raise ConfigError(
                "DDIM: the scheduler config's rescale_betas_zero_snr starts from pure noise, where an "
                "epsilon prediction says nothing; use a model with prediction_type v_prediction."
            )
        variance = etas**2 * (1 - after) / (1 - before) * (1 - before / after)
        rest = 1 - after - variance
        if bool((rest < -1e-9).any()):
            raise ConfigError(
                f"DDIM: eta {float(etas.max())} asks for more noise than the schedule has; take at most 1."
            )
        # Two rows each: the weight of the state, the weight of the prediction.
        self._x0_weights = _x0_weights(levels, prediction_type)
        x0_weights = torch.stack(self._x0_weights)[:, self.timesteps]
        noise_weights = torch.stack(_noise_weights(before, prediction_type))
        self._step_weights = after.sqrt() * x0_weights + rest.clamp(min=0).sqrt() * noise_weights
        self._std = variance.sqrt()
        self.stochastic = self._std > 0
        self._signal, self._noise = levels.sqrt(), (1 - levels).sqrt()
        self._target_weights = _target_weights(levels, prediction_type)

    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        """See :meth:`Sampler.step`; the std is ``(1, 1, ...)``, or ``(B, 1, ...)`` for a tensor ``k``."""
        x, prediction = _promote(x, prediction)
        mean = _at(self._step_weights[0], k, x) * x + _at(self._step_weights[1], k, x) * prediction
        return GaussianStep(mean, _at(self._std, k, x))

    def add_noise(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """See :meth:`Sampler.add_noise`."""
        x0, noise = _promote(x0, noise)
        return _at(self._signal, t, x0) * x0 + _at(self._noise, t, x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: int | Tensor) -> Tensor:
        """See :meth:`Sampler.target`."""
        x0, noise = _promote(x0, noise)
        return _at(self._target_weights[0], t, x0) * x0 + _at(self._target_weights[1], t, x0) * noise

    def predict_x0(self, x: Tensor, prediction: Tensor, t: int | Tensor) -> Tensor:
        """See :meth:`Sampler.predict_x0`."""
        x, prediction = _promote(x, prediction)
        return _at(self._x0_weights[0], t, x) * x + _at(self._x0_weights[1], t, x) * prediction


def _check_config(config: Mapping[str, Any]) -> None:
    family = str(config.get("_class_name", ""))
    if family.startswith("FlowMatch"):
        raise ConfigError(
            f"DDIM: the pipeline's scheduler is {family}, of a flow model; DDIM needs a diffusion model."
        )
    # A config without these keys (PNDM, Euler) does neither; DDIMScheduler's own default of clipping must not
    # stand in for it.
    for key in ("clip_sample", "thresholding"):
        if config.get(key, False):
            raise ConfigError(
                f"DDIM: {key} is true in the pipeline's scheduler config, but where predictions are cut "
                f"there is no gradient. Set {key} to false in the pipeline's scheduler/scheduler_config.json."
            )
    known = ("epsilon", "v_prediction", "sample")
    if (prediction_type := config.get("prediction_type", "epsilon")) not in known:
        raise ConfigError(
            f"DDIM: the scheduler config's prediction_type is {prediction_type!r}; "
            f"DDIM knows {', '.join(known)}."
        )


def _x0_weights(level: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Weights of the state and of the prediction in the clean state that the prediction implies."""
    match prediction_type:
        case "epsilon":
            return level.rsqrt(), -((1 - level) / level).sqrt()
        case "v_prediction":
            return level.sqrt(), -(1 - level).sqrt()
        case _:
            return torch.zeros_like(level), torch.ones_like(level)


def _noise_weights(level: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Weights of the state and of the prediction in the noise that the prediction implies."""
    match prediction_type:
        case "epsilon":
            return torch.zeros_like(level), torch.ones_like(level)
        case "v_prediction":
            return (1 - level).sqrt(), level.sqrt()
        case _:
            return (1 - level).rsqrt(), -(level / (1 - level)).sqrt()


def _target_weights(level: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Weights of the clean state and of the noise in the prediction that would be right."""
    match prediction_type:
        case "epsilon":
            return torch.zeros_like(level), torch.ones_like(level)
        case "v_prediction":
            return -(1 - level).sqrt(), level.sqrt()
        case _:
            return torch.ones_like(level), torch.zeros_like(level)


def _promote(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _at(table: Tensor, index: int | Tensor, like: Tensor) -> Tensor:
    """The table's entry (or one per image), shaped to broadcast over ``like`` and in its dtype and device."""
    if isinstance(index, int):
        assert 0 <= index < len(table), f"index {index} outside 0..{len(table) - 1}"
        # Filled rather than copied: no transfer that an accelerator would have to wait for.
        return torch.full((1,) * like.ndim, table[index].item(), dtype=like.dtype, device=like.device)
    return table[index.to(table.device)].to(like).view(-1, *(1,) * (like.ndim - 1))
