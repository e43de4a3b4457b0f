"""Sampling: the same function for training, validation and prediction. Shapes: ``B`` images, ``T`` steps."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, Self

import torch
from lightning import LightningModule
from torch import Tensor

from lit_align.backbones import POLICY, Conditioning, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import Batch
from lit_align.errors import ConfigError, check_positive
from lit_align.gaussian import GaussianStep
from lit_align.randomness import generator, normal, run_seed
from lit_align.rollout import Trajectory, rollout
from lit_align.samplers import Sampler
from lit_align.samplers.base import check_sampler


class BatchPolicy(Protocol):
    """A policy for the images of a batch, of which rows can be taken."""

    def __call__(self, x: Tensor, k: int) -> GaussianStep:
        """The distribution of the next state at ``x (B, ...)`` in step ``k``."""

    def __getitem__(self, rows: Tensor) -> Self:
        """The same policy for some of the images."""


def check_factory(name: str, factory: object) -> None:
    """Refuse what is not a function of the scheduler's configuration, such as a sampler that is made already.

    Raises:
        ConfigError: It is none.
    """
    if isinstance(factory, partial) and factory.args and isinstance(factory.func, type):
        kind = factory.func.__name__
        raise ConfigError(
            f"{name}: the first argument of {kind} is the model's schedule, which the method gives; name the "
            f"others, as in partial({kind}, num_steps=10)"
        )
    if not callable(factory):
        kind = type(factory).__name__ if isinstance(factory, Sampler) else "DDIM"
        what = f"this {kind} is made already" if isinstance(factory, Sampler) else f"{factory!r} makes none"
        raise ConfigError(
            f"{name}: {what}, and a method makes its own for its backbone; give "
            f"partial({kind}, num_steps={getattr(factory, 'num_steps', 10)})"
        )


def make_sampler(name: str, factory: SamplerFactory, backbone: DiffusionBackbone) -> Sampler:
    """The sampler of a setting.

    Raises:
        ConfigError: None can be made, or not one for this model.
    """
    check_factory(name, factory)
    sampler = backbone.make_sampler(factory)
    if not isinstance(sampler, Sampler):
        raise ConfigError(
            f"{name}: {factory!r} makes a {type(sampler).__name__}; give what makes a Sampler, as "
            "partial(DDIM, num_steps=10)"
        )
    check_sampler(name, sampler)
    return sampler


@dataclass
class Sampling:
    """How images are sampled.

    Args:
        guidance: Scale of classifier-free guidance, in sampling and, where a method replays its chains, in
            training; 1 is none, at half the cost; less is refused. 7.5 is the pipelines' own.
        batch: Images sampled at once. Bounds memory and changes no result.
        seed: Seed of all noise; that of ``seed_everything`` if not given.
        store: Where the chains of a rollout batch are kept until they have been replayed: on the ``device``,
            or, where it has no room for them, on the ``cpu``. Changes no result.
        eval_sampler: How validation, test and predict sample, such as with more steps or without noise; as
            training if not given. Flow-GRPO (arXiv 2505.05470): 40 steps, and 10 in training.

    Raises:
        ConfigError: The batch is not positive, the guidance not finite, or ``store`` is unknown.
    """

    guidance: float = 7.5
    batch: int = 8
    seed: int | None = None
    store: Literal["device", "cpu"] = "device"
    eval_sampler: SamplerFactory | None = None

    def __post_init__(self) -> None:
        check_positive({"sampling.batch": self.batch})
        if not math.isfinite(self.guidance):
            raise ConfigError(f"sampling.guidance is {self.guidance}; give a finite number, such as 7.5")
        if self.store not in ("device", "cpu"):
            raise ConfigError(f"sampling.store: {self.store!r} must be device or cpu")
        if self.eval_sampler is not None:
            check_factory("sampling.eval_sampler", self.eval_sampler)


@dataclass(frozen=True)
class Samples:
    """Images that were sampled for a batch, and their chains.

    Attributes:
        trajectory: The chain of each image.
        images: ``(B, 3, H, W)`` in [0, 1].
    """

    trajectory: Trajectory
    images: Tensor


class SamplingModule(LightningModule):
    """A module that samples images from its policies."""

    backbone: DiffusionBackbone
    sampler: Sampler
    sampling: Sampling
    _evaluated_with: tuple[SamplerFactory, Sampler] | None = None

    @property
    def eval_sampler(self) -> Sampler:
        """What ``sampling.eval_sampler`` makes, also where that is set later; else :attr:`sampler`."""
        factory, made = self.sampling.eval_sampler, self._evaluated_with
        if factory is None:
            return self.sampler
        if made is None or made[0] is not factory:
            made = factory, make_sampler("sampling.eval_sampler", factory, self.backbone)
            self._evaluated_with = made
        return made[1]

    @property
    def seed(self) -> int:
        """The seed of all noise: ``sampling.seed``."""
        return run_seed(self.sampling.seed)

    @seed.setter
    def seed(self, seed: int) -> None:
        self.sampling.seed = seed

    @property
    def training_guidance(self) -> float:
        """Guidance scale of losses on single predictions: 1, which is none.

        A network that gets the scale as an input is trained with that of sampling, since its images are
        drawn with no other.
        """
        return self.sampling.guidance if self.backbone.told_guidance else 1.0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Sample as ``sampling.eval_sampler`` says."""
        own, self.sampler = self.sampler, self.eval_sampler
        try:
            yield
        finally:
            self.sampler = own

    def policy(self, batch: Batch, cond: Conditioning, weights: str = POLICY) -> BatchPolicy:
        """The policy that samples the images of ``batch``, whose encoded prompts are ``cond``."""
        return self.backbone.policy(self.sampler, cond, self.sampling.guidance, weights)

    @torch.no_grad()
    def sample(
        self,
        policy: BatchPolicy,
        batch: Batch,
        purpose: str,
        seed: int | None = None,
        scored: bool = True,
    ) -> Samples:
        """Sample one image for each row of ``batch``, in chunks of ``sampling.batch``, without gradient.

        Image ``i`` is a pure function of the weights, its prompt, (seed, purpose) and its global number
        ``batch.index[i]``: it depends neither on its batch nor on its rank or device.

        ``scored`` says that the images will be scored: rewards that work elsewhere begin with a chunk while
        the next one is sampled.
        """
        chunks: list[Samples] = []
        for rows in torch.arange(len(batch)).split(self.sampling.batch):
            noise, draws = self.draw_noise(batch.index[rows], purpose, seed)
            trajectory = rollout(policy[rows], noise, self.sampler.num_steps, draws)
            images = self.backbone.decode(trajectory.states[-1])
            stored = trajectory.to("cpu") if self.sampling.store == "cpu" else trajectory
            chunks.append(Samples(stored, images))
            if scored:
                self.score_ahead(images, batch[rows])
        parts = [(c.trajectory.states, c.trajectory.means, c.trajectory.log_probs) for c in chunks]
        states, means, log_probs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return Samples(Trajectory(states, means, log_probs), torch.cat([c.images for c in chunks]))

    def score_ahead(self, images: Tensor, batch: Batch) -> None:
        """Called with sampled images that will be scored, and their rows of the batch."""

    def draw_noise(
        self, index: Tensor, purpose: str, seed: int | None = None
    ) -> tuple[Tensor, list[torch.Generator]]:
        """First states ``(B, C, H, W)`` of the images with these numbers, and generators for their steps."""
        draws = [generator(self.seed if seed is None else seed, purpose, i) for i in index.tolist()]
        return normal(self.backbone.latent_shape, draws).to(self.device), draws

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seed: int | None = None, weights: str = POLICY) -> Tensor:
        """Images of some prompts, ``(B, 3, H, W)`` in [0, 1]: those that ``predict`` writes for them.

        Args:
            prompts: ``B``.
            seed: The module's own if not given.
            weights: ``"policy"``, or ``"reference"`` for the pretrained model.

        Raises:
            ConfigError: It is one text, there is no prompt, or no such weight set.
        """
        texts = [] if isinstance(prompts, str) else [*prompts]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f'generate: {prompts!r} is not a list of prompts; give one, as in ["a red star"]'
            )
        if weights not in (known := self.backbone.weight_sets.names):
            raise ConfigError(f"generate: there are no weights {weights!r}; give {' or '.join(known)}")
        numbers = torch.arange(len(texts))
        batch = Batch(texts, numbers, index=numbers)
        with self.evaluating():
            policy = self.policy(batch, self.backbone.encode(texts), weights)
            return self.sample(policy, batch, "predict", seed, scored=False).images
