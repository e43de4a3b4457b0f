"""Supervised finetuning on preferred images: the plainest baseline. Shapes: ``B`` images."""

from torch import Tensor

from lit_align.data import PairBatch
from lit_align.methods.metrics import Metrics
from lit_align.methods.pairs import Noised, PairModule


class SFTModule(PairModule[Noised]):
    """Supervised finetuning: ordinary diffusion training on the winners of pairs."""

    @property
    def images_per_pair(self) -> int:
        return 1

    def prepare(self, batch: PairBatch) -> Noised:
        draws = self.draws(batch.index)
        t, noise = self.sampler.schedule.draw_t(draws), self.noise(draws)
        return Noised(self.winners(batch), noise, t, self.backbone.encode(batch.prompts))

    def loss(self, prepared: Noised, rows: Tensor) -> tuple[Tensor, Metrics]:
        return self.errors(prepared[rows]), {}
