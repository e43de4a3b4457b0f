"""What the methods that train on images of a dataset share: noising, errors, one update a batch, logs.

Shapes: ``B`` pairs (or images), ``D`` latent elements.
"""

import hashlib
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from lit_align.backbones import POLICY, Conditioning, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import PairBatch, PickaPicDataModule
from lit_align.data.images import height_and_width
from lit_align.errors import ConfigError
from lit_align.latents import LatentCache
from lit_align.methods.base import AlignmentModule
from lit_align.methods.metrics import Metrics, pooled
from lit_align.methods.objectives import denoising_error, error_margin, implicit_accuracy, logistic_loss
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.sampling import Sampling
from lit_align.methods.scales import strength_misfit, warn_of
from lit_align.randomness import generator, normal
from lit_align.rewards import RewardBank

OTHER_SIZE = "set data.resolution to it"
"""What to do where the images of a dataset are not of the model's size."""


@dataclass(frozen=True)
class Noised:
    """Clean latents, with the noise and the timestep at which the denoiser is asked about them.

    Attributes:
        latents: ``(B, C, H, W)``.
        noise: ``(B, C, H, W)``, standard normal.
        t: ``(B,)``, on the CPU, where the schedule's tables are.
        cond: Of the same ``B`` images.
    """

    latents: Tensor
    noise: Tensor
    t: Tensor
    cond: Conditioning

    def __getitem__(self, rows: Tensor) -> "Noised":
        """Some images, by their places ``(N,)`` long."""
        return Noised(self.latents[rows], self.noise[rows], self.t[rows], self.cond[rows])

    def __add__(self, other: "Noised") -> "Noised":
        """Both, one after the other: one call of the denoiser for winners and losers."""
        cond = Conditioning.cat([self.cond, other.cond])
        latents, noise = torch.cat([self.latents, other.latents]), torch.cat([self.noise, other.noise])
        return Noised(latents, noise, torch.cat([self.t, other.t]), cond)


Prepared = TypeVar("Prepared")


class PairModule(AlignmentModule, Generic[Prepared]):
    """Base of the methods on images of a dataset: one batch of the loader is one update.

    They draw no images of their own to be scored, so rewards are only monitored, at validation; what has a
    weight in the bank makes ``val/reward``, by which the best checkpoint is chosen, and nothing is trained on
    it. ``progress/images`` counts the images that updates have looked at.
    """

    learns_from_pairs: ClassVar[bool] = True

    strengths: Sequence[float] = ()
    """Every ``beta`` of the differences of errors in the loss; none where the loss has no such."""

    @property
    def held_out(self) -> tuple[str, ...]:
        return tuple(f"reward/{name}" for name in self.rewards.names)

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(),
    ) -> None:
        """Set up the method.

        Args:
            backbone: The diffusion model.
            sampler: How validation, test and predict sample; training uses its noise schedule alone.
            rewards: What is monitored; the weights make ``val/reward``, and nothing is trained on it.
            optimisation: How the weights are updated. ``micro_batch`` counts pairs.
            sampling: How images are sampled; training uses no guidance.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        self.batches = 0
        self.sampling_seconds = 0.0  # since the last update, for what a method draws itself, waiting included
        self._latents: LatentCache | None = None

    @abstractmethod
    def prepare(self, batch: PairBatch) -> Prepared:
        """Everything that the losses of a batch need and that carries no gradient."""

    @abstractmethod
    def loss(self, prepared: Prepared, rows: Tensor) -> tuple[Tensor, Metrics]:
        """The loss of each of some pairs, ``(N,)``, and metrics."""

    # ---- the pieces

    def winners(self, batch: PairBatch) -> Tensor:
        """The latents of the preferred images, ``(B, C, H, W)``.

        Raises:
            ConfigError: The images are not of the model's size.
        """
        return self._clean(batch.winners, batch.index, 0)

    def losers(self, batch: PairBatch) -> Tensor:
        """The latents of the other images, ``(B, C, H, W)``."""
        assert batch.losers is not None, "the view has winners only"
        return self._clean(batch.losers, batch.index, 1)

    def _clean(self, images: Tensor, rows: Tensor, side: int) -> Tensor:
        if self._latents is None:
            return self._encode(images)
        return self._latents.get(rows, side, lambda places: self._encode(images[places])).to(self.device)

    def _encode(self, images: Tensor) -> Tensor:
        return self.backbone.clean_latents(images.to(self.device), OTHER_SIZE)

    def draws(self, index: Tensor) -> list[torch.Generator]:
        """Generators of the timestep and the noise of each pair of this batch, the same on any rank."""
        return [generator(self.seed, "noising", self.batches, i) for i in index.tolist()]

    def noise(self, draws: list[torch.Generator]) -> Tensor:
        """Noise for each pair, ``(B, C, H, W)``."""
        return normal(self.backbone.latent_shape, draws).to(self.device)

    def noised_pairs(self, batch: PairBatch, losers: Tensor, shared_noise: bool) -> tuple[Noised, Noised]:
        """Winners and losers (latents) of a batch at one timestep a pair, ready for their errors."""
        draws, cond = self.draws(batch.index), self.backbone.encode(batch.prompts)
        t, noise = self.sampler.schedule.draw_t(draws), self.noise(draws)
        other = noise if shared_noise else self.noise(draws)
        return Noised(self.winners(batch), noise, t, cond), Noised(losers, other, t, cond)

    def errors(self, noised: Noised, weights: str = POLICY) -> Tensor:
        """Prediction error of a weight set, ``(B,)``: a mean over elements, of single predictions."""
        schedule = self.sampler.schedule
        x = schedule.add_noise(noised.latents, noised.noise, noised.t)
        prediction = self.backbone.predict(x, noised.t, noised.cond, self.training_guidance, weights)
        return denoising_error(prediction, schedule.target(noised.latents, noised.noise, noised.t))

    def preference(
        self, pairs: tuple[Noised, Noised], rows: Tensor, reference: str, beta: float
    ) -> tuple[Tensor, Metrics]:
        """Logistic loss of the policy's errors on some pairs, against those of a reference, ``(N,)``."""
        winners, losers = pairs
        both = winners[rows] + losers[rows]
        winner, loser = self.errors(both).chunk(2)
        with torch.no_grad():
            winner_reference, loser_reference = self.errors(both, reference).chunk(2)
        found = {"winner_error": winner, "loser_error": loser}
        found |= {"winner_shift": winner - winner_reference, "loser_shift": loser - loser_reference}
        loss, metrics = logistic_preference(
            error_margin(winner, winner_reference, loser, loser_reference, beta)
        )
        return loss, {name: values.detach() for name, values in found.items()} | metrics

    # ---- one batch

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: The data has no images, or they are not of the model's size.
        """
        super().setup(stage)
        if stage != "fit":
            return
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PickaPicDataModule):
            raise ConfigError(
                f"data: {type(self).__name__} learns from images of a dataset, and {type(data).__name__} "
                "has none; use PickaPicDataModule"
            )
        self.backbone.check_size(height_and_width(data.resolution), OTHER_SIZE)
        for beta in dict.fromkeys(self.strengths):
            warn_of("beta", strength_misfit(beta, prod(self.backbone.latent_shape)))
        dry = self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if data.latent_cache is not None and not dry:
            self._latents = LatentCache(Path(data.latent_cache), self._latent_key(data))
            data.train_dataloader().known = self._latents.known

    def _latent_key(self, data: PickaPicDataModule) -> str:
        """Changes with all that decides the latents: the autoencoder, its precision, the images."""
        given = data.resolution
        resolution = given if isinstance(given, int) else list(given)
        settings = [self.backbone.autoencoder_hash(), self.trainer.precision, resolution]
        return hashlib.sha256(f"{settings} {data.pairs.fingerprint()}".encode()).hexdigest()[:16]

    def training_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Prepare the pairs, then one update in micro-batches."""
        started = time.perf_counter()
        with torch.no_grad():
            prepared = self.prepare(batch)
        preparing = time.perf_counter() - started
        self._rows = []
        self.remember(batch.index, batch.prompts, {})
        parts = torch.arange(len(batch)).split(self.optimisation.micro_batch)
        metrics = self.update([partial(self._part, prepared, rows, len(batch)) for rows in parts])
        self.batches += 1
        self._log(metrics, len(batch), preparing, time.perf_counter() - started)
        self.sampling_seconds = 0.0

    def _part(self, prepared: Prepared, rows: Tensor, size: int) -> tuple[Tensor, Metrics]:
        """What some pairs add to the mean loss of the batch."""
        loss, metrics = self.loss(prepared, rows)
        return loss.sum() / size, metrics | {"loss": loss.detach()}

    def _log(self, metrics: Metrics, pairs: int, preparing: float, total: float) -> None:
        ranks = self.gather(({name: values.cpu().double() for name, values in metrics.items()}, pairs))
        count = sum(rank[1] for rank in ranks) * self.images_per_pair
        self.images += count
        logged: dict[str, Tensor | float] = {
            f"train/{name}": values.mean() for name, values in pooled(rank[0] for rank in ranks).items()
        }
        logged["perf/preparing_fraction"] = preparing / total
        sampling = self.sampling_seconds / (self.sampling_seconds + total)
        self.log_progress(logged, count / total, sampling, bar="loss")

    @property
    def images_per_pair(self) -> int:
        """Images that a pair brings to an update."""
        return 2

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["progress"]["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.batches = checkpoint["progress"].get("batches", 0)


def logistic_preference(margin: Tensor) -> tuple[Tensor, Metrics]:
    """Logistic loss of margins ``(N,)``, and as metrics the margins and whether they are positive."""
    return logistic_loss(margin), {"margin": margin.detach(), "accuracy": implicit_accuracy(margin)}
