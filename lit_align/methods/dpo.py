"""Diffusion-DPO: learning from compared images without a reward (Wallace et al. 2023, arXiv 2311.12908).

"Released" is the authors' code, ``train.py`` in SalesforceAIResearch/DiffusionDPO. Shapes: ``B`` pairs.
"""

from torch import Tensor

from lit_align.backbones import REFERENCE, DiffusionBackbone
from lit_align.backbones.base import SamplerFactory
from lit_align.data import PairBatch
from lit_align.errors import ConfigError, check_positive
from lit_align.methods.metrics import Metrics
from lit_align.methods.optimisation import Optimisation
from lit_align.methods.pairs import Noised, PairModule
from lit_align.methods.sampling import Sampling
from lit_align.rewards import RewardBank


class DPOModule(PairModule[tuple[Noised, Noised]]):
    """Diffusion-DPO: gain more on the winner of a pair than on its loser, as against the pretrained model."""

    def __init__(
        self,
        backbone: DiffusionBackbone,
        sampler: SamplerFactory,
        rewards: RewardBank,
        beta: float = 5000.0,
        shared_noise: bool = True,
        optimisation: Optimisation = Optimisation(),
        sampling: Sampling = Sampling(),
    ) -> None:
        """Set up the method.

        Args:
            backbone: The diffusion model.
            sampler: How validation, test and predict sample; training uses its noise schedule alone.
            rewards: What is monitored; the weights make ``val/reward``, and nothing is trained on it.
            beta: Strength in the released convention: errors are means over latent elements, and a half
                stands before it (see :func:`~lit_align.methods.objectives.error_margin`). Released: 5000.
            shared_noise: Winner and loser get the same noise, as in the released code; otherwise each its
                own. They always share the timestep.
            optimisation: How the weights are updated. Released: AdamW, lr 1e-8 times the effective batch,
                2048, with 500 steps of warm-up, for all weights. ``micro_batch`` counts pairs.
            sampling: How images are sampled; training uses no guidance.

        Raises:
            ConfigError: ``beta`` is not positive.
        """
        super().__init__(
            backbone=backbone,
            sampler=sampler,
            rewards=rewards,
            optimisation=optimisation,
            sampling=sampling,
        )
        check_positive({"beta": beta})
        self.beta, self.strengths = beta, [beta]
        self.shared_noise = shared_noise

    def setup(self, stage: str) -> None:
        """Check what depends on the data.

        Raises:
            ConfigError: The data hands out winners only.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.datamodule.view != "pairs":  # type: ignore[attr-defined]
            raise ConfigError(
                "data.view: Diffusion-DPO compares images, and this view has winners only; set it to pairs"
            )

    def prepare(self, batch: PairBatch) -> tuple[Noised, Noised]:
        """Winners and losers at one timestep a pair."""
        return self.noised_pairs(batch, self.losers(batch), self.shared_noise)

    def loss(self, prepared: tuple[Noised, Noised], rows: Tensor) -> tuple[Tensor, Metrics]:
        return self.preference(prepared, rows, REFERENCE, self.beta)
