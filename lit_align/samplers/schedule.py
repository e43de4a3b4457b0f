r"""Noise schedules: how much signal and noise a state has at a timestep, and what a prediction means there.

A state is :math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon`, and a prediction is a combination of the same
two unknowns, :math:`p = a_t x_0 + b_t \varepsilon`. A prediction type is the row :math:`(a_t, b_t)`; all else
follows: the training target is the row itself, and the clean state and the noise that a prediction implies
are the solution of the two equations.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from lit_align.errors import ConfigError


class NoiseSchedule(ABC):
    """Signal and noise levels by timestep, and the network's type of prediction.

    A timestep ``t`` is a number for all images, or one each, ``(B,)``, of any dtype. Levels are computed in
    float64, maths on states in at least float32.

    Attributes:
        num_train_timesteps: Timesteps lie in ``[0, num_train_timesteps]``; those of a diffusion model are
            whole and end one before.
    """

    num_train_timesteps: int

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Tensor:
        """Weight of the clean state, float64, in the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Weight of the noise, float64, in the shape of ``t``."""

    @abstractmethod
    def basis(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The row ``(a, b)`` of the prediction type: a prediction is ``a x0 + b noise``; float64."""

    @abstractmethod
    def draw_t(self, draws: Sequence[torch.Generator]) -> Tensor:
        """A timestep for each image from the distribution of training, ``(B,)`` on the CPU."""

    def x0_weights(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the state and of the prediction in the clean state that they imply; float64."""
        (a, b), alpha, sigma = self.basis(t), self.alpha(t), self.sigma(t)
        determinant = alpha * b - sigma * a
        return b / determinant, -sigma / determinant

    def noise_weights(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the state and of the prediction in the noise that they imply; float64."""
        (a, b), alpha, sigma = self.basis(t), self.alpha(t), self.sigma(t)
        determinant = alpha * b - sigma * a
        return -a / determinant, alpha / determinant

    def add_noise(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """The forward process: ``x0`` at timestep ``t``, with standard normal ``noise``."""
        return combine((self.alpha(t), self.sigma(t)), x0, noise)

    def target(self, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
        """What the network should predict at ``add_noise(x0, noise, t)``."""
        return combine(self.basis(t), x0, noise)

    def predict_x0(self, x: Tensor, prediction: Tensor, t: float | Tensor) -> Tensor:
        """The clean state that ``prediction`` implies at state ``x`` and timestep ``t``."""
        return combine(self.x0_weights(t), x, prediction)


class DiffusionSchedule(NoiseSchedule):
    r"""The variance-preserving schedule of a diffusion model: ``alpha^2 + sigma^2 = 1`` at whole timesteps.

    Signal levels :math:`\bar\alpha = \alpha^2` and the timesteps of sampling are those of diffusers'
    ``DDIMScheduler`` for the same config.

    Args:
        scheduler_config: A diffusers scheduler config.

    Raises:
        ConfigError: The config clips or thresholds predictions, or is of another family.
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        _check_config(scheduler_config)
        try:
            self._scheduler: Any = DDIMScheduler.from_config(dict(scheduler_config))
        except (NotImplementedError, TypeError, ValueError) as error:  # as a beta_schedule of DDPM's alone
            said = str(error).partition(" for <class")[0]
            raise ConfigError(
                f"sampler: DDIM cannot be made of the pipeline's scheduler config ({said}); replace entries "
                "of it under backbone.scheduler, or give another model."
            ) from error
        self.num_train_timesteps: int = self._scheduler.config.num_train_timesteps
        if (levels := len(self._scheduler.alphas_cumprod)) != self.num_train_timesteps:
            raise ConfigError(
                f"sampler: the scheduler config's trained_betas are {levels}, and its num_train_timesteps "
                f"{self.num_train_timesteps}; set the second to {levels}, or give the model's own betas."
            )
        self.prediction_type: str = self._scheduler.config.prediction_type
        self.levels: Tensor = self._scheduler.alphas_cumprod.double()
        self.final_level: Tensor = self._scheduler.final_alpha_cumprod.double()
        alpha, sigma = self.levels.sqrt(), (1 - self.levels).sqrt()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        rows = {"epsilon": (zero, one), "v_prediction": (-sigma, alpha), "sample": (one, zero)}
        self._alpha, self._sigma, self._basis = alpha, sigma, rows[self.prediction_type]

    def alpha(self, t: float | Tensor) -> Tensor:
        return look_up(self._alpha, t)

    def sigma(self, t: float | Tensor) -> Tensor:
        return look_up(self._sigma, t)

    def basis(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        return look_up(self._basis[0], t), look_up(self._basis[1], t)

    def draw_t(self, draws: Sequence[torch.Generator]) -> Tensor:
        """A uniform timestep for each image, ``(B,)`` long on the CPU."""
        return torch.stack([torch.randint(self.num_train_timesteps, (), generator=draw) for draw in draws])

    def timesteps(self, num_steps: int) -> Tensor:
        """The ``t`` of each of ``num_steps`` sampling steps, ``(T,)`` long, decreasing.

        Raises:
            ConfigError: There are not so many, or the first is beyond those of training.
        """
        count = self.num_train_timesteps
        if not 1 <= num_steps <= count:
            raise ConfigError(
                f"sampler: num_steps is {num_steps}; choose 1 to {count}, the steps of training."
            )
        try:
            self._scheduler.set_timesteps(num_steps)
        except ValueError as error:
            spacing = self._scheduler.config.timestep_spacing
            raise ConfigError(
                f"sampler: the scheduler config's timestep_spacing is {spacing!r}; DDIM knows leading, "
                "trailing, linspace."
            ) from error
        # Rounding makes diffusers' "trailing" spacing one timestep (-1) too long for some numbers of steps.
        timesteps: Tensor = self._scheduler.timesteps[:num_steps]
        if int(timesteps.max()) >= count:
            raise ConfigError(
                f"sampler: num_steps {num_steps} starts at timestep {int(timesteps.max())}, but the model "
                f"knows 0 to {count - 1} (the scheduler config's steps_offset is "
                f"{self._scheduler.config.steps_offset}); take fewer steps."
            )
        return timesteps


KNOWN = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers that sample a model which was trained on a variance-preserving schedule of whole timesteps: the
noise levels are those of their configs, and DDIM takes the place of their way of sampling."""

OTHERS = {
    "FlowMatch": "of a flow model; DDIM needs a diffusion model: set sampler.class_path to FlowSDE",
    "EDM": "of a model that scales states and predictions in EDM's way, which DDIM does not",
    "CosineDPM": "of a model that scales states and predictions in EDM's way, which DDIM does not",
    "LCM": "of a consistency model, whose steps are not DDIM's; give the model that it was distilled from",
    "TCD": "of a consistency model, whose steps are not DDIM's; give the model that it was distilled from",
}
"""Why schedulers are refused, by the beginning of their names."""


def _check_config(config: Mapping[str, Any]) -> None:
    family = str(config.get("_class_name", "DDIMScheduler"))
    if family not in KNOWN:
        reason = next((told for name, told in OTHERS.items() if family.startswith(name)), None)
        raise ConfigError(
            f"sampler: the pipeline's scheduler is {family}, {reason or 'which DDIM cannot stand in for'}."
        )
    if config.get("use_flow_sigmas"):
        raise ConfigError(
            f"sampler: the pipeline's {family} has use_flow_sigmas, of a flow model; DDIM needs a diffusion "
            "model."
        )
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        raise ConfigError(
            f"sampler: the pipeline's {family} has timestep_type continuous, of a model that gets the "
            "logarithm of the noise in place of timesteps, which DDIM does not."
        )
    # Clipping matters where the scheduler does it: PNDM and Euler have the entry but ignore it, and a
    # config without it must not get the default of DDIMScheduler.
    options = inspect.signature(getattr(diffusers, family)).parameters
    for key in ("clip_sample", "thresholding"):
        if key in options and config.get(key, False):
            raise ConfigError(
                f"sampler: {key} is true in the pipeline's scheduler config, but clipped predictions "
                f"have no gradient. Set {key} to false in the pipeline's scheduler/scheduler_config.json "
                f"or by backbone.scheduler: {{{key}: false}}."
            )
    known = ("epsilon", "v_prediction", "sample")
    if (prediction_type := config.get("prediction_type", "epsilon")) not in known:
        raise ConfigError(
            f"sampler: the scheduler config's prediction_type is {prediction_type!r}; "
            f"DDIM knows {', '.join(known)}."
        )


def look_up(table: Tensor, index: float | Tensor) -> Tensor:
    """Entries of a table on the CPU, in the shape of ``index``, whose numbers must be whole."""
    if not isinstance(index, Tensor):
        index = torch.tensor(index)
    whole = index.to(table.device, torch.long)
    if index.is_floating_point():
        assert torch.equal(whole.to(index), index), f"the table has no entries between timesteps: {index}"
    assert bool(((whole >= 0) & (whole < len(table))).all()), f"{index} is outside 0..{len(table) - 1}"
    return table[whole]


def combine(weights: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """``weights[0] x + weights[1] y`` in at least float32; a weight for all images, or one each, ``(B,)``."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(dtype), y.to(dtype)
    return broadcastable(weights[0], x) * x + broadcastable(weights[1], x) * y


def broadcastable(values: Tensor, like: Tensor) -> Tensor:
    """Values for all images, or one each, shaped to broadcast over ``like``, in its dtype and device."""
    if values.ndim == 0 and values.device.type == "cpu":
        # Filled rather than copied: no transfer that an accelerator would have to wait for.
        return torch.full((1,) * like.ndim, values.item(), dtype=like.dtype, device=like.device)
    return values.to(like).view(-1, *(1,) * (like.ndim - 1))
