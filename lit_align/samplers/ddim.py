"""DDIM: the samplers of diffusion models, from deterministic to ancestral."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.samplers.base import Sampler
from lit_align.samplers.schedule import DiffusionSchedule, broadcastable, combine, look_up


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
        schedule = DiffusionSchedule(scheduler_config)
        self.schedule, self.timesteps = schedule, schedule.timesteps(num_steps)
        if noisy_steps is not None and not 0 <= noisy_steps <= num_steps:
            raise ConfigError(f"DDIM: noisy_steps is {noisy_steps}; choose from 0 to num_steps, {num_steps}.")
        if not eta >= 0:
            raise ConfigError(f"DDIM: eta is {eta}; choose 0 (deterministic) to 1 (DDPM).")
        self.num_steps, self.noise = num_steps, eta
        self.may_be_noisy = torch.arange(num_steps) < (num_steps if noisy_steps is None else noisy_steps)
        # The noise of each step: eta in the first ones, none in the others.
        etas = torch.zeros(num_steps, dtype=torch.float64)
        etas[self.may_be_noisy] = eta
        self._tabulate(schedule, etas)

    def _tabulate(self, schedule: DiffusionSchedule, etas: Tensor) -> None:
        levels = schedule.levels
        previous = self.timesteps - len(levels) // self.num_steps
        before = levels[self.timesteps]
        after = torch.where(previous >= 0, levels[previous.clamp(min=0)], schedule.final_level)
        if schedule.prediction_type == "epsilon" and bool((before == 0).any()):
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
        x0_weights = torch.stack(schedule.x0_weights(self.timesteps))
        noise_weights = torch.stack(schedule.noise_weights(self.timesteps))
        self._step_weights = after.sqrt() * x0_weights + rest.clamp(min=0).sqrt() * noise_weights
        self._std = variance.sqrt()
        # Steps are float32: where the variance is 0 in it, there is noise perhaps, but no density.
        self.stochastic = self._std.float().square() > 0

    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        """See :meth:`Sampler.step`; the std is ``(1, 1, ...)``, or ``(B, 1, ...)`` for a tensor ``k``."""
        of_x, of_prediction = self._step_weights
        mean = combine((look_up(of_x, k), look_up(of_prediction, k)), x, prediction)
        return GaussianStep(mean, broadcastable(look_up(self._std, k), mean))
