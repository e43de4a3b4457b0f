"""What a method may ask of a text-to-image diffusion model, whatever its architecture.

Shapes: ``B`` images, ``C H W`` of a latent. ``k`` is a step index in sampling order, ``t`` a timestep value.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lit_align.backbones.weight_sets import POLICY, WeightSets
from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.samplers import Sampler

SamplerFactory = Callable[[Mapping[str, Any]], Sampler]
"""Makes a sampler from the scheduler's configuration, such as ``partial(DDIM, num_steps=10)``."""


@dataclass(frozen=True)
class Conditioning:
    """The denoiser's inputs about ``B`` prompts, under names that only the backbone knows.

    Attributes:
        prompt: Of the prompts; every tensor has ``B`` rows.
        negative: Of the empty prompt, for classifier-free guidance, under the same names; every tensor has
            one row. None where the model is not guided so.
    """

    prompt: dict[str, Tensor]
    negative: dict[str, Tensor] | None

    def __len__(self) -> int:
        return len(next(iter(self.prompt.values())))

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(iter(self.prompt.values())).device

    def __getitem__(self, rows: Tensor | slice) -> "Conditioning":
        """The conditioning of some images, chosen by a slice, a mask or a tensor of row numbers."""
        chosen = {
            name: value[rows if isinstance(rows, slice) else rows.to(value.device)]
            for name, value in self.prompt.items()
        }
        return Conditioning(chosen, self.negative)

    @staticmethod
    def cat(parts: Sequence["Conditioning"]) -> "Conditioning":
        """The images of all parts, in order; the parts come from one backbone."""
        prompts = [part.prompt for part in parts]
        joined = {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
        return Conditioning(joined, parts[0].negative)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """The same with a function applied to every tensor."""
        prompt, negative = self.prompt, self.negative
        return Conditioning(
            {name: function(value) for name, value in prompt.items()},
            None if negative is None else {name: function(value) for name, value in negative.items()},
        )


def rounds_float32(device: torch.device) -> bool:
    """Whether products of float32 are rounded to TF32: a GPU's convolutions are, by torch's default."""
    if device.type != "cuda":
        return False
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if not hasattr(cudnn, "conv"):  # before torch 2.9
        return bool(cudnn.allow_tf32 or matmul.allow_tf32)
    return "tf32" in (cudnn.conv.fp32_precision, matmul.fp32_precision)


class DiffusionBackbone(nn.Module, ABC):
    """A denoiser with its text encoders and its image autoencoder.

    Attributes:
        weight_sets: The denoiser and its *named weight sets*: ``"policy"`` is trained, ``"reference"`` is the
            pretrained model, further sets (an opponent, an expert) are frozen unless said otherwise.
        size: ``(height, width)`` of an image in pixels.
        elsewhere: Parts of the model that do not move to other devices with this module, by name.
    """

    weight_sets: WeightSets
    size: tuple[int, int]
    elsewhere: Mapping[str, nn.Module] = {}

    def fixed_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters outside of the weight sets, by name, wherever they are."""
        for name, parameter in self.named_parameters():
            if not name.startswith("weight_sets."):
                yield name, parameter
        for part, module in self.elsewhere.items():
            yield from module.named_parameters(part)

    @property
    def is_shapes(self) -> bool:
        """Whether it draws the Shapes world: the bundled model, or one that was trained from it."""
        return False

    @property
    def unread(self) -> tuple[str, ...]:
        """Layers of the denoiser whose output it does not use, so that they get no gradient; by name."""
        return ()

    @property
    def told_guidance(self) -> bool:
        """Whether the scale of guidance is an input of the network, which then predicts once."""
        return False

    def check_guidance(self, scale: float, setting: str = "sampling.guidance") -> None:
        """Refuse a scale of guidance that this model is not to be sampled with.

        Raises:
            ConfigError: It is below 1, and two predictions are made: the prompt would have less effect than
                without guidance.
        """
        if scale < 1 and not self.told_guidance:
            raise ConfigError(
                f"{setting} is {scale:g}: below 1 the prompt has less effect than without guidance, and at 0 "
                "none; set it to 1, which is no guidance (guidance_scale 0 in some pipelines)"
            )

    @property
    def rounds(self) -> bool:
        """Whether predictions are rounded to less than float32 here and now: by autocast, weights or GPU."""
        weights = [*self.weight_sets.parameters()]
        device = weights[0].device
        if torch.is_autocast_enabled(device.type) or rounds_float32(device):
            return True
        return any(weight.is_floating_point() and weight.itemsize < 4 for weight in weights)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one latent."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; each distinct prompt is encoded once and remembered."""

    @abstractmethod
    def predict(
        self, x: Tensor, t: float | Tensor, cond: Conditioning, guidance: float = 1.0, weights: str = POLICY
    ) -> Tensor:
        """The denoiser's guided output, in the scheduler's prediction type and in at least float32.

        Args:
            x: Noisy latents, ``(B, C, H, W)``.
            t: A timestep value for all, or one each, ``(B,)``; whole or real.
            cond: Conditioning of the same ``B`` images.
            guidance: Scale ``w`` of classifier-free guidance, ``negative + w (prompt - negative)``; 1
                computes the half of the prompt only.
            weights: Name of the weight set.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(B, C, H, W)`` to float32 images in [0, 1], ``(B, 3, H', W')``; differentiable."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Images in [0, 1], ``(B, 3, H', W')``, to the mode of their latents ``(B, C, H, W)``."""

    @torch.no_grad()
    def clean_latents(self, images: Tensor, remedy: str) -> Tensor:
        """:meth:`latents` in float32, of a dataset's images.

        Args:
            images: ``(B, 3, H', W')``, in [0, 1].
            remedy: What to do where they have another size than the model's.

        Raises:
            ConfigError: The images are not of the model's size.
        """
        self.check_size((images.shape[-2], images.shape[-1]), remedy)
        return self.latents(images).float().contiguous()

    def check_size(self, size: tuple[int, int], remedy: str) -> None:
        """Refuse a dataset's images of another height and width than the model's.

        Args:
            size: Of the images, in pixels.
            remedy: What to do then.

        Raises:
            ConfigError: They have another.
        """
        if size != self.size:
            raise ConfigError(
                f"the dataset's images are {size[0]} x {size[1]} pixels (height x width), but the model "
                f"draws {self.size[0]} x {self.size[1]}; {remedy}"
            )

    def autoencoder_hash(self) -> str:
        """Changes with what decides :meth:`latents`; needed where latents are kept on disk."""
        raise ConfigError(f"{type(self).__name__} cannot tell one autoencoder from another")

    @abstractmethod
    def make_sampler(self, factory: SamplerFactory) -> Sampler:
        """Complete a sampler with the configuration of this model's noise schedule."""

    @abstractmethod
    def shard(self, mesh: DeviceMesh) -> None:
        """Shard the denoiser's parameters over a device mesh (FSDP)."""

    def policy(
        self, sampler: Sampler, cond: Conditioning, guidance: float = 1.0, weights: str = POLICY
    ) -> "DenoisingPolicy":
        """The policy ``(x, k) -> GaussianStep`` of one weight set for the images of ``cond``."""
        return DenoisingPolicy(self, sampler, cond, guidance, weights)


@dataclass(frozen=True)
class DenoisingPolicy:
    """One step of denoising as a Gaussian: the sampler's step for the denoiser's prediction.

    Attributes:
        backbone: The diffusion model.
        sampler: Turns predictions into steps.
        cond: Encoded prompts of ``B`` images.
        guidance: Scale of classifier-free guidance.
        weights: Name of the weight set.
    """

    backbone: DiffusionBackbone
    sampler: Sampler
    cond: Conditioning
    guidance: float
    weights: str

    def __call__(self, x: Tensor, k: int | Tensor) -> GaussianStep:
        """The distribution of the next state.

        Args:
            x: States before the step, ``(B, C, H, W)``.
            k: Step index, one for all, or one each, ``(B,)``.
        """
        return self.sampler.step(x, self.predict(x, k), k)

    def predict(self, x: Tensor, k: int | Tensor) -> Tensor:
        """The denoiser's guided output at the states of a step; arguments as for a call."""
        t = self._timesteps(k).to(x.device)
        return self.backbone.predict(x, t, self.cond, self.guidance, self.weights)

    def predict_x0(self, x: Tensor, prediction: Tensor, k: int | Tensor) -> Tensor:
        """The clean latents that a prediction implies at the states of a step."""
        return self.sampler.schedule.predict_x0(x, prediction, self._timesteps(k))

    def _timesteps(self, k: int | Tensor) -> Tensor:
        return self.sampler.timesteps[k.cpu() if isinstance(k, Tensor) else k]

    def __getitem__(self, rows: Tensor | slice) -> "DenoisingPolicy":
        """The same policy for some of the images."""
        return DenoisingPolicy(self.backbone, self.sampler, self.cond[rows], self.guidance, self.weights)
