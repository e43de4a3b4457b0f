"""Flow models: their noise schedule, and samplers with the published amounts of noise, or none."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.samplers.base import Sampler
from lit_align.samplers.schedule import NoiseSchedule, broadcastable, combine, look_up

Rule = Literal["flow-sde", "dance", "cps", "precise"]
"""How much noise a step draws, by publication; see :class:`FlowSDE`."""

PUBLISHED: dict[Rule, float] = {"flow-sde": 0.7, "dance": 0.3, "cps": 0.8, "precise": 1.5}
"""The noise level of each rule: that of flow_grpo for the first, as in the papers' code for the others."""


class FlowSchedule(NoiseSchedule):
    r"""The straight path of a flow model: :math:`x_t = (1 - \sigma) x_0 + \sigma \varepsilon`.

    Predictions are velocities :math:`v = \varepsilon - x_0`, and :math:`\sigma = t / 1000`. Timesteps are
    those of diffusers' ``FlowMatchEulerDiscreteScheduler`` for the same config and
    :math:`\sigma = 1, 1 - 1/T, \dots, 1/T`, shifted *once*: by the config's ``shift``, or by a ``mu`` that
    depends on the resolution. (Without ``sigmas``, ``StableDiffusion3Pipeline`` shifts a grid that ends at
    the shifted smallest level, and so twice: diffusers issue 13243.)

    Args:
        scheduler_config: A diffusers scheduler config. A backbone adds ``mu``, a function of the number of
            steps, where the config shifts dynamically.

    Raises:
        ConfigError: The config is of another family, or goes backwards.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        config = dict(scheduler_config)
        self._mu: Callable[[int], float] | None = config.pop("mu", None)
        _check_config(config)
        self._scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        self.num_train_timesteps: int = self._scheduler.config.num_train_timesteps
        # A static shift is in it, a dynamic one is not, as in diffusers' training scripts.
        self._trained_on: Tensor = self._scheduler.timesteps

    def alpha(self, t: float | Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: float | Tensor) -> Tensor:
        return torch.as_tensor(t, dtype=torch.float64, device="cpu") / self.num_train_timesteps

    def basis(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(self.sigma(t))
        return -one, one

    def draw_t(self, draws: Sequence[torch.Generator]) -> Tensor:
        """A timestep for each image, ``(B,)`` float32 on the CPU: uniform over the scheduler's own.

        So do diffusers' training scripts of SD 3 and FLUX with ``weighting_scheme`` none.
        """
        places = [torch.randint(self.num_train_timesteps, (), generator=draw) for draw in draws]
        return self._trained_on[torch.stack(places)]

    def timesteps(self, num_steps: int) -> Tensor:
        """The ``t`` of each of ``num_steps`` sampling steps, ``(T,)`` float32; the last goes to 0.

        Raises:
            ConfigError: There cannot be so many.
        """
        if not 1 <= num_steps <= self.num_train_timesteps:
            raise ConfigError(
                f"sampler: num_steps is {num_steps}; choose 1 to {self.num_train_timesteps}, the steps of "
                "training."
            )
        mu = None
        if self._scheduler.config.use_dynamic_shifting:
            if self._mu is None:
                raise ConfigError(
                    "sampler: the scheduler config's use_dynamic_shifting asks for a shift by resolution, "
                    "which this backbone does not give; set it to false in scheduler/scheduler_config.json."
                )
            mu = self._mu(num_steps)
        self._scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist(), mu=mu)
        timesteps: Tensor = self._scheduler.timesteps
        if not bool((timesteps.diff() < 0).all() and (timesteps > 0).all()):
            raise ConfigError(
                f"sampler: the scheduler config has no {num_steps} decreasing steps; take more."
            )
        return timesteps


class FlowSDE(Sampler):
    r"""Flow sampling with noise, by one of four published rules; without noise it is Euler's method.

    A step goes from :math:`\sigma` to :math:`\sigma'`; :math:`\hat x_0 = x - \sigma v` and
    :math:`\hat\varepsilon = x + (1 - \sigma) v` are what the prediction implies, :math:`a` is
    ``noise_level``, and :math:`d` the std. There are two means:

    .. math::
        \mu_{SDE} &= x - (\sigma - \sigma') v - \frac{d^2}{2 \sigma} \hat\varepsilon \\
        \mu_{DDIM} &= (1 - \sigma') \hat x_0 + \sqrt{\sigma'^2 - d^2}\, \hat\varepsilon

    ============  ====  ==================================================================================
    rule          mean  std
    ============  ====  ==================================================================================
    ``flow-sde``  SDE   :math:`a \sqrt{\sigma / (1 - \sigma)} \sqrt{\sigma - \sigma'}`: Flow-GRPO (arXiv
                        2505.05470). At :math:`\sigma = 1` the divisor is that of the next level, as in
                        the released code
    ``dance``     SDE   :math:`a \sqrt{\sigma - \sigma'}`: DanceGRPO (arXiv 2505.07818)
    ``cps``       DDIM  :math:`\sigma' \sin(a \pi / 2)`: coefficients-preserving sampling, which flow_grpo
                        advises. It draws and takes away noise in the ratio of the schedule, but contracts:
                        its images vary less than the model's, whatever the number of steps
    ``precise``   DDIM  :math:`\sigma' \sqrt{1 - r^{a^2}}`,
                        :math:`r = \sigma' (1 - \sigma) / (\sigma (1 - \sigma'))`: Precise (arXiv
                        2605.23522); with :math:`a = \sqrt 2` DDPM's posterior. The released code draws at
                        least 1e-6; here the step to :math:`\sigma' = 0` is deterministic
    ============  ====  ==================================================================================

    All but ``cps`` keep the marginals of the flow as steps become many. With ``flow-sde`` and ``dance`` the
    noise of the last step stays in the image, unless ``noisy_steps`` leaves that step out.

    Args:
        scheduler_config: A diffusers scheduler config; given by the backbone, never in YAML.
        num_steps: Number of sampling steps. 10 in flow_grpo's training.
        rule: One of the four.
        noise_level: :math:`a`; null is the published one, 0.7, 0.3, 0.8 and 1.5. 0 draws no noise.
        noisy_steps: Which steps draw noise, the others are deterministic: the first so many, or from the
            first of two numbers up to the second, which is not among them; all if not given. flow_grpo's
            "fast" runs have noise in 3 of the first half of 10 steps.

    Raises:
        ConfigError: The config is of a diffusion model, or does not allow these arguments.
    """

    noise_option: ClassVar[str] = "noise_level"
    published_noise: ClassVar[str] = "null, the published one"

    def __init__(
        self,
        scheduler_config: Mapping[str, Any],
        num_steps: int = 10,
        rule: Rule = "flow-sde",
        noise_level: float | None = None,
        noisy_steps: int | tuple[int, int] | None = None,
    ) -> None:
        if rule not in get_args(Rule):
            raise ConfigError(f"FlowSDE: rule is {rule!r}; choose {', '.join(get_args(Rule))}.")
        level = PUBLISHED[rule] if noise_level is None else noise_level
        if not 0 <= level < math.inf or (rule == "cps" and level > 1):
            most = ", to at most 1" if rule == "cps" else ""
            raise ConfigError(f"FlowSDE: noise_level is {level}; choose 0 (deterministic) or more{most}.")
        schedule = FlowSchedule(scheduler_config)
        self.schedule, self.num_steps = schedule, num_steps
        self.timesteps = schedule.timesteps(num_steps)
        before = schedule.sigma(self.timesteps)
        after = torch.cat([before[1:], before.new_zeros(1)])
        self.noise, self.may_be_noisy = level, torch.zeros(num_steps, dtype=torch.bool)
        self.may_be_noisy[_window(noisy_steps, num_steps)] = True
        noisy = self.may_be_noisy & (level > 0)
        self._std = torch.where(noisy, _std(rule, level, before, after), 0.0)
        self.stochastic = self._std.float().square() > 0  # a density in float32
        # Two rows: the weight of the state, the weight of the prediction.
        x0 = torch.stack(schedule.x0_weights(self.timesteps))
        noise = torch.stack(schedule.noise_weights(self.timesteps))
        euler = torch.stack([torch.ones_like(before), after - before])
        # A step of the SDE is the first order of it, and its noise may stay after the last step.
        self.keeps_forward_process = rule in ("cps", "precise") or not bool(self.stochastic.any())
        if rule in ("flow-sde", "dance"):
            self._step_weights = euler - self._std.square() / (2 * before) * noise
        else:
            kept = (after.square() - self._std.square()).clamp(min=0).sqrt()
            self._step_weights = torch.where(noisy, (1 - after) * x0 + kept * noise, euler)

    def step(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> GaussianStep:
        """See :meth:`Sampler.step`; the std is ``(1, 1, ...)``, or ``(B, 1, ...)`` for a tensor ``k``."""
        of_x, of_prediction = self._step_weights
        mean = combine((look_up(of_x, k), look_up(of_prediction, k)), x, prediction)
        return GaussianStep(mean, broadcastable(look_up(self._std, k), mean))


def _std(rule: Rule, level: float, before: Tensor, after: Tensor) -> Tensor:
    """The noise of each step ``(T,)``, from the noise level before it to that after it."""
    if rule == "flow-sde":
        divisor = 1 - torch.where(before == 1, after, before)
        return level * (before / divisor * (before - after)).sqrt()
    if rule == "dance":
        return level * (before - after).sqrt()
    if rule == "cps":
        return after * math.sin(level * math.pi / 2)
    # In logarithms: where steps are small, r is near 1.
    log_r = after.log() + (-before).log1p() - before.log() - (-after).log1p()
    return after * (-(level**2 * log_r).expm1()).sqrt()


def _window(noisy_steps: int | Sequence[int] | None, num_steps: int) -> slice:
    if noisy_steps is None:
        return slice(num_steps)
    first, end = (0, noisy_steps) if isinstance(noisy_steps, int) else noisy_steps
    if not 0 <= first <= end <= num_steps:
        raise ConfigError(
            f"FlowSDE: noisy_steps is {noisy_steps}; choose from 0 to num_steps, {num_steps}, or two such "
            "numbers in order."
        )
    return slice(first, end)


def _check_config(config: Mapping[str, Any]) -> None:
    family = str(config.get("_class_name", "FlowMatch"))
    if config.get("use_flow_sigmas") and not family.startswith("FlowMatch"):  # else a trace of another one
        raise ConfigError(
            f"sampler: the pipeline's scheduler is {family} with use_flow_sigmas; put the model's own in its "
            "place, a FlowMatchEulerDiscreteScheduler, in scheduler/ and model_index.json (flow_shift "
            f"{config.get('flow_shift')} is its shift)."
        )
    if family == "FlowMatchLCMScheduler" or config.get("stochastic_sampling"):
        raise ConfigError(
            f"sampler: in each step the pipeline's {family} goes to the clean image and adds new noise, for "
            "a model that was distilled so, and FlowSDE does not; give the model that it was distilled from."
        )
    if not family.startswith("FlowMatch"):
        raise ConfigError(
            f"sampler: the pipeline's scheduler is {family}, of a diffusion model; FlowSDE needs a flow "
            "model. Set sampler.class_path to DDIM."
        )
    if config.get("invert_sigmas"):
        raise ConfigError(
            "sampler: the scheduler config's invert_sigmas goes from images to noise; unset it."
        )
    lost = config.get("flow_shift")  # of the scheduler that this one was made of, which calls it so
    own = "shift" in config and "shift" not in config.get("_use_default_values", [])
    if lost not in (None, 1) and not own and not config.get("use_dynamic_shifting"):
        rank_zero_warn(
            f"sampler: the pipeline's {family} has no shift of its own and takes 1, as in diffusers, and the "
            f"scheduler that it was made of had {lost:g}: set backbone.scheduler: {{shift: {lost:g}}} for it"
        )
