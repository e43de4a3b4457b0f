"""The pre-training loss on captioned images, added to a reward so that images stay natural."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_align.backbones import DiffusionBackbone
from lit_align.data import CaptionedImages
from lit_align.data.splits import Permutation
from lit_align.errors import ConfigError, check_positive
from lit_align.methods.objectives import denoising_error
from lit_align.randomness import normal
from lit_align.samplers import Sampler

Order = Literal["before", "after", "every"]

OTHER_SIZE = "give pretraining.source images of that size"
"""What to do about captioned images that are not of the model's size."""


@dataclass
class Pretraining:
    r"""A batch of captioned images mixed into every iteration, for :math:`L_{pre}`.

    Zhang et al. 2024 (arXiv 2401.12244, section 3.1) add :math:`\beta L_{pre}` to the objective and leave
    :math:`\beta` open, in the text and in the released configuration. There it is one optimizer step an
    iteration beside five of the policy gradient: ``before`` the images are sampled in the released code,
    ``after`` all tasks in the paper's listing.

    Args:
        source: The images: 12 M of LAION-5B with an aesthetic score above 6 in the paper. Every batch is
            read when it is needed.
        batch: Images of one step, over all ranks. The paper: 16 on each of 128 GPUs.
        weight: With ``every`` the :math:`\beta` of the loss. In a step of its own, ``before`` or ``after``, a
            factor on its learning rate (one on the loss would be undone by Adam), which does little: Adam's
            momentum carries the gradient on into the tasks' updates at their full rate, and its second
            moment remembers it. On Shapes this gradient is 10 to 300 times as large as the policy's: there
            ``every`` is the better order.
        order: When: one step ``before`` or ``after`` the tasks of an iteration, or in ``every`` update,
            whose loss is then the sum of both.

    Raises:
        ConfigError: A size or a weight is not positive, or the order is none of these.
    """

    source: CaptionedImages
    batch: int = 16
    weight: float = 1.0
    order: Order = "after"

    def __post_init__(self) -> None:
        check_positive({"pretraining.batch": self.batch, "pretraining.weight": self.weight})
        if self.order not in ("before", "after", "every"):
            raise ConfigError(f"pretraining.order: {self.order!r} must be before, after or every")

    def rows(self, seed: int, numbers: Sequence[int]) -> list[int]:
        """Rows of the images with these numbers, counted over the run; every pass has its own order."""
        passes = [divmod(number, len(self.source)) for number in numbers]
        orders = {
            one: Permutation(len(self.source), seed, one, purpose="pretraining order") for one, _ in passes
        }
        return [orders[one][position] for one, position in passes]


def denoising_loss(
    backbone: DiffusionBackbone,
    sampler: Sampler,
    images: Tensor,
    captions: Sequence[str],
    draws: Sequence[torch.Generator],
    guidance: float = 1.0,
) -> Tensor:
    r"""The loss of pre-training, :math:`\|\epsilon - \epsilon_\theta(x_t, c)\|^2`, a mean over elements.

    In the network's own space (v for a v-model), at a uniform timestep. The latents are the modes of their
    distributions.

    Args:
        backbone: The policy is its weight set of that name.
        sampler: Of the same model; only its noise schedule counts.
        images: ``(B, 3, H, W)`` in [0, 1].
        captions: ``B``.
        draws: Where timestep and noise of each image come from.
        guidance: 1, which is none, or the scale that the network gets as an input.

    Returns:
        ``(B,)``.

    Raises:
        ConfigError: The images are not of the model's size.
    """
    clean = backbone.clean_latents(images, OTHER_SIZE)
    schedule = sampler.schedule
    t = schedule.draw_t(draws)
    noise = normal(backbone.latent_shape, draws).to(clean)
    x = schedule.add_noise(clean, noise, t)
    prediction = backbone.predict(x, t.to(x.device), backbone.encode(captions), guidance)
    return denoising_error(prediction, schedule.target(clean, noise, t))
