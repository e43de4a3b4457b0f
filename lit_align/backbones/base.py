"""What a method may ask of a text-to-image diffusion model, whatever its architecture.

Shapes: ``B`` images, ``L`` tokens, ``C H W``. ``k`` is a step index in sampling order, ``t`` a timestep
value.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lit_align.errors import ConfigError
from lit_align.gaussian import GaussianStep
from lit_align.samplers import Sampler

POLICY = "policy"
"""The weight set that is trained."""

REFERENCE = "reference"
"""The weight set of the pretrained model."""

SamplerFactory = Callable[[Mapping[str, Any]], Sampler]
"""A sampler but for its first argument, the scheduler's configuration."""


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, for which all processes must ask; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told about ``B`` images.

    Attributes:
        embeds: Token states of the prompts, ``(B, L, D)``.
        null: Token states of the empty prompt, for classifier-free guidance, ``(1, L, D)``.
    """

    embeds: Tensor
    null: Tensor

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, rows: Tensor | slice) -> "Conditioning":
        """The conditioning of some images, chosen by a slice, a mask or a tensor of row numbers."""
        rows = rows if isinstance(rows, slice) else rows.to(self.embeds.device)
        return Conditioning(self.embeds[rows], self.null)


class DiffusionBackbone(nn.Module, ABC):
    """A denoiser with its text encoder and its image autoencoder, and *named weight sets* of the denoiser.

    ``"policy"`` is trained, ``"reference"`` is the pretrained model, further sets (an opponent, an expert)
    are frozen unless :meth:`train_only` says otherwise. Which parameters require gradients is decided once,
    at construction; choosing a set for a prediction changes nothing but what is computed.
    """

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one latent."""

    @property
    @abstractmethod
    def weight_sets(self) -> tuple[str, ...]:
        """The names that ``weights=`` accepts."""

    @abstractmethod
    def add_weights(self, name: str) -> None:
        """Add a frozen weight set that starts as a copy of the policy."""

    @abstractmethod
    def copy_weights(self, source: str, target: str) -> None:
        """Overwrite the frozen set ``target`` with the values of ``source``."""

    def load_weights(self, name: str, folder: Path) -> None:
        """Add a frozen weight set from a folder that :meth:`save_weights` wrote.

        Raises:
            ConfigError: There is none, or not one for this model.
        """
        raise ConfigError(f"{type(self).__name__} cannot load weight sets")

    def mix_weights(self, name: str, weights: Mapping[str, float]) -> None:
        """Make (or replace) the frozen set whose update of the reference is the weighted sum of others'."""
        raise ConfigError(f"{type(self).__name__} cannot mix weight sets")

    def average_factors(self, name: str, weights: Mapping[str, float]) -> None:
        """As :meth:`mix_weights`, for an added set, but with the means of the adapters' factors."""
        raise ConfigError(f"{type(self).__name__} has no factors to average")

    def train_only(self, names: Collection[str]) -> None:
        """Decide, once and before training, which weight sets are trained; all others are frozen."""
        raise ConfigError(f"{type(self).__name__} trains one weight set")

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters that belong to one weight set alone."""
        raise ConfigError(f"{type(self).__name__} trains one weight set")

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts; each distinct prompt is encoded once and remembered."""

    @abstractmethod
    def predict(
        self, x: Tensor, t: int | Tensor, cond: Conditioning, guidance: float = 1.0, weights: str = POLICY
    ) -> Tensor:
        """The denoiser's guided output, in the scheduler's prediction type.

        Args:
            x: Noisy latents, ``(B, C, H, W)``.
            t: A timestep value for all, or one each, ``(B,)``.
            cond: Conditioning of the same ``B`` images.
            guidance: Scale ``w`` of classifier-free guidance, ``null + w (cond - null)``; 1 computes the
                conditional half only.
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
        clean = self.latents(images).float().contiguous()
        if clean.shape[1:] != self.latent_shape:
            side = images.shape[-1] * self.latent_shape[-1] // clean.shape[-1]
            raise ConfigError(
                f"the dataset's images have {images.shape[-1]} pixels a side, but the model draws {side}; "
                f"{remedy}"
            )
        return clean

    def autoencoder_hash(self) -> str:
        """Changes with what decides :meth:`latents`; needed where latents are kept on disk."""
        raise ConfigError(f"{type(self).__name__} cannot tell one autoencoder from another")

    @abstractmethod
    def make_sampler(self, factory: SamplerFactory) -> Sampler:
        """Complete a sampler with the configuration of this model's noise schedule."""

    @abstractmethod
    def save_weights(self, folder: Path | None, weights: str = POLICY) -> None:
        """Write a weight set in the form that diffusers loads (an adapter, or a pipeline folder).

        Args:
            folder: Where; null on a process that only gives its shards. All processes must call.
            weights: The set.
        """

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
    """One step of denoising as a Gaussian: the denoiser's prediction, put through the sampler."""

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
        t = self.sampler.timesteps[k.cpu() if isinstance(k, Tensor) else k]
        return self.backbone.predict(x, t.to(x.device), self.cond, self.guidance, self.weights)

    def __getitem__(self, rows: Tensor | slice) -> "DenoisingPolicy":
        """The same policy for some of the images."""
        return DenoisingPolicy(self.backbone, self.sampler, self.cond[rows], self.guidance, self.weights)
