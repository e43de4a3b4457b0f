"""The denoiser, with the text tower that it reads: v-prediction on cached latents.

It is trained twice: on clean captions, text tower and all, and then on captions that are wrong (see
:mod:`~lit_align.shapes.recipe.lies`), with the text tower as it is, so that the lies live in the denoiser.

Why v and not epsilon: the caption decides background, colours and counts at noise levels where the signal is
a few per cent of the state. There an error of the predicted noise is divided by that signal, and a small
network never gets the identity right to a per cent. With v (Salimans and Ho, "Progressive Distillation for
Fast Sampling of Diffusion Models", 2022) the network says there what the image will be.
"""

import copy

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_align.shapes.recipe.clip import WIDTH
from lit_align.shapes.recipe.training import Budget, Stage
from lit_align.shapes.recipe.vae import CHANNELS

WEIGHT_CAP = 6.0
"""An error of the predicted image counts min(SNR + 1, 6)-fold: plain v-prediction but for the lowest noise
levels, whose weight is cut as in Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy",
2023.
"""

LAYOUT = (650.0, 130.0, 0.7)
"""Mean and standard deviation of the timesteps that are drawn most, and their share; the others are uniform.

Between timesteps 500 and 800 places, counts and shapes are decided: there a caption with another shape costs
.3 of v, below 400 half of that. Logit-normal draws have the same purpose (Esser et al., "Scaling Rectified
Flow Transformers", 2024). What it gains was not measured alone.
"""

COOLING = 0.3
"""Share of the budget, at its end, in which the learning rate falls to 0."""

DROP = 0.1
"""Share of captions that are replaced by the empty prompt, for classifier-free guidance."""


def make_unet() -> UNet2DConditionModel:
    """An untrained denoiser in Stable Diffusion's format, on 64 positions."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4),  # the numbers of heads, in the configs of Stable Diffusion 1
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """The noise schedule; through Stable Diffusion's final beta, 0.012, flat backgrounds shine."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def levels(num_levels: int) -> Tensor:
    """The probability ``(num_levels,)`` that a timestep of the training is at most each one."""
    mean, deviation, share = LAYOUT
    normal = torch.exp(-0.5 * ((torch.arange(num_levels) - mean) / deviation) ** 2)
    return (share * normal / normal.sum() + (1 - share) / num_levels).cumsum(0)


class UNetStage(Stage):
    """Denoiser and text tower, trained together.

    Args:
        text: The text tower to begin with; a copy is trained on.
        unet: The denoiser.
        latents: ``(N, C, 8, 8)`` float16.
        tokens: ``(N, POSITIONS)`` token ids of the captions.
        empty: ``(POSITIONS,)`` token ids of the empty prompt.
        budget: How long to train.
        lies: The captions are wrong: train the denoiser alone, at a lower rate.
    """

    def __init__(
        self,
        text: CLIPTextModel,
        unet: UNet2DConditionModel,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        budget: Budget,
        lies: bool = False,
    ) -> None:
        unet.set_attn_processor(AttnProcessor())  # the fastest backward pass in bfloat16 on a CPU
        model = nn.ModuleDict({"unet": unet, "text": copy.deepcopy(text).requires_grad_(not lies).train()})
        peak, decay = (8e-4, 0.998) if lies else (1.2e-3, 0.999)
        super().__init__(model, peak=peak, budget=budget, decay=decay, warmup=100, cooling=COOLING)
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.scheduler = make_scheduler()
        self.levels = levels(self.scheduler.config.num_train_timesteps)

    def parameter_groups(self) -> list[dict[str, object]]:
        """The text tower has been trained before: it moves at a third of the rate."""
        scales = {"unet": 1.0, "text": 0.3}
        return [
            {"params": list(self.model[part].parameters()), "scale": scale} for part, scale in scales.items()
        ]

    def errors(self, batch: Tensor) -> Tensor:
        """Weighted errors ``(B,)`` of the predictions for the images with these numbers ``(B,)``."""
        latents, tokens = self.latents[batch].float(), self.tokens[batch]
        tokens = torch.where(torch.rand(len(batch), 1) < DROP, self.empty, tokens)
        # One timestep from each of B equally probable ranges: the loss of a batch varies less than with
        # independent draws.
        ranks = (torch.randperm(len(batch)) + torch.rand(len(batch))) / len(batch)
        steps = torch.searchsorted(self.levels, ranks).clamp(max=len(self.levels) - 1)
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        states = self.model["text"](input_ids=tokens).last_hidden_state
        prediction = self.model["unet"](noisy, steps, states).sample.float()
        errors = (prediction - self.scheduler.get_velocity(latents, noise, steps)).square().mean((1, 2, 3))
        # v is the image's error times SNR + 1 = 1 / (1 - alpha_bar).
        weights = (WEIGHT_CAP * (1 - self.scheduler.alphas_cumprod[steps])).clamp(max=1.0)
        return errors * weights

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        loss = self.errors(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss
