"""Supervised finetuning on preferred images: the plainest baseline. Shapes: ``B`` images."""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_align.backbones import DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import PairBatch
from lit_align.methods.pairs import Metrics, Noised, PairModule
from lit_align.rewards import RewardBank


class SFTModule(PairModule[Noised]):
    """Supervised finetuning: ordinary diffusion training on the winners of pairs."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        guidance: float = 7.5,
        clip_norm: float = 1.0,
        micro_batch: int = 8,
        rollout_batch: int = 8,
        seed: int | None = None,
    ) -> None:
        """Wire the parts.

        Args:
            backbone: The diffusion model.
            sampler: How validation, test and predict sample; training uses its noise schedule alone.
            rewards: What is monitored; the weights make ``val/reward``, and nothing is trained on it.
            optimizer: Of the trained weights.
            lr_scheduler: Stepped once per update.
            guidance: Scale of classifier-free guidance in sampling; training uses none.
            clip_norm: Largest norm of the gradient.
            micro_batch: Images in one backward pass. Bounds memory and changes no result.
            rollout_batch: Images sampled at once in validation, test and predict.
            seed: Seed of timesteps and noise; that of ``seed_everything`` if not given.
        """
        super().__init__(
            backbone,
            sampler,
            rewards,
            optimizer,
            lr_scheduler,
            guidance,
            clip_norm,
            micro_batch,
            rollout_batch,
            seed,
        )

    @property
    def images_per_pair(self) -> int:
        return 1

    def prepare(self, batch: PairBatch) -> Noised:
        draws = self.draws(batch.index)
        t, noise = self.timesteps(draws), self.noise(draws)
        return Noised(self.winners(batch), noise, t, self.backbone.encode(batch.prompts))

    def loss(self, prepared: Noised, rows: Tensor, metrics: Metrics) -> Tensor:
        return self.errors(prepared[rows])
