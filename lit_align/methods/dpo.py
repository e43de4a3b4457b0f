"""Diffusion-DPO: learning from compared images without a reward (Wallace et al. 2023, arXiv 2311.12908).

"Released" is the authors' code, ``train.py`` in SalesforceAIResearch/DiffusionDPO. Shapes: ``B`` pairs.
"""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lit_align.backbones import REFERENCE, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import PairBatch
from lit_align.errors import ConfigError, check_positive
from lit_align.methods.pairs import Metrics, Noised, PairModule
from lit_align.rewards import RewardBank


class DPOModule(PairModule[tuple[Noised, Noised]]):
    """Diffusion-DPO: gain more on the winner of a pair than on its loser, as against the pretrained model."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        beta: float = 5000.0,
        shared_noise: bool = True,
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
            optimizer: Of the trained weights. Released: AdamW, lr 1e-8 times the effective batch, 2048, with
                500 steps of warm-up, for all weights.
            lr_scheduler: Stepped once per update.
            beta: Strength in the released convention: errors are means over latent elements, and a half
                stands before it (see :func:`~lit_align.objectives.error_margin`). Released: 5000.
            shared_noise: Winner and loser get the same noise, as in the released code; otherwise each its
                own. They always share the timestep.
            guidance: Scale of classifier-free guidance in sampling; training uses none.
            clip_norm: Largest norm of the gradient.
            micro_batch: Pairs in one backward pass. Bounds memory and changes no result.
            rollout_batch: Images sampled at once in validation, test and predict.
            seed: Seed of timesteps and noise; that of ``seed_everything`` if not given.

        Raises:
            ConfigError: ``beta`` is not positive.
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
        check_positive({"beta": beta})
        self.beta = beta
        self.shared_noise = shared_noise

    def prepare(self, batch: PairBatch) -> tuple[Noised, Noised]:
        """Winners and losers at one timestep a pair.

        Raises:
            ConfigError: The data hands out winners only.
        """
        if batch.losers is None:
            raise ConfigError(
                "data.view: Diffusion-DPO compares images, and this view has winners only; set it to pairs"
            )
        return self.noised_pairs(batch, self.losers(batch), self.shared_noise)

    def loss(self, prepared: tuple[Noised, Noised], rows: Tensor, metrics: Metrics) -> Tensor:
        return self.preference(prepared, rows, REFERENCE, self.beta, metrics)
