"""What a method may ask of a text-to-image diffusion model, whatever its architecture.

Shapes: ``B`` images, ``L`` tokens, ``C H W``. ``k`` is a step index in sampling order, ``t`` a timestep
value.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lit_align.gaussian import GaussianStep
from lit_align.samplers import Sampler

POLICY = "policy"
"""The weight set that is trained."""

REFERENCE = "reference"
"""The weight set of the pretrained model."""

SamplerFactory = Callable[[Mapping[str, Any]], Sampler]
"""A sampler but for its first argument, the scheduler's configuration."""


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
    are frozen. Which parameters require gradients is decided once, at construction; choosing a set for a
    prediction changes nothing but what is computed.
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
        """Latents ``(B, C, H, W)`` to float32 pictures in [0, 1], ``(B, 3, H', W')``; differentiable."""

    @abstractmethod
    def latents(self, images: Tensor) -> Tensor:
        """Pictures in [0, 1], ``(B, 3, H', W')``, to the mode of their latents ``(B, C, H, W)``."""

    @abstractmethod
    def make_sampler(self, factory: SamplerFactory) -> Sampler:
        """Complete a sampler with the configuration of this model's noise schedule."""

    @abstractmethod
    def save_weights(self, folder: Path, weights: str = POLICY) -> None:
        """Write a weight set in the form that diffusers loads (an adapter, or a pipeline folder)."""

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
        t = self.sampler.timesteps[k.cpu() if isinstance(k, Tensor) else k]
        prediction = self.backbone.predict(x, t.to(x.device), self.cond, self.guidance, self.weights)
        return self.sampler.step(x, prediction, k)

    def __getitem__(self, rows: Tensor | slice) -> "DenoisingPolicy":
        """The same policy for some of the images."""
        return DenoisingPolicy(self.backbone, self.sampler, self.cond[rows], self.guidance, self.weights)
