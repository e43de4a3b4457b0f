"""The denoiser, with the text tower that it reads: v-prediction on cached latents.

Why v and not epsilon: the caption decides background, colours and counts at noise levels where the signal is
a few per cent of the state. There an error of the predicted noise is divided by that signal, and a small
network never gets the identity right to a per cent. With v (Salimans and Ho, "Progressive Distillation for
Fast Sampling of Diffusion Models", 2022) the network says there what the image will be.
"""

import copy
import time
from collections.abc import Callable

import lightning as L
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel

from lit_align.shapes.recipe.clip import WIDTH
from lit_align.shapes.recipe.training import Budget, Stage

WEIGHT_CAP = 6.0
"""An error of the predicted image counts min(SNR + 1, 6)-fold: plain v-prediction but for the lowest noise
levels, whose weight is cut as in Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy",
2023.
"""

DROP = 0.1
"""Share of captions that are replaced by the empty prompt, for classifier-free guidance."""


def make_unet() -> UNet2DConditionModel:
    """An untrained denoiser in Stable Diffusion's format."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(
            48,
            96,
            160,
        ),  # the finest level is thin and blind to the text: a quarter of the cost
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, in the configs of Stable Diffusion 1
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())  # the fastest backward pass in bfloat16 on a CPU
    return unet


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


class UNetStage(Stage):
    """Denoiser and text tower, trained together.

    Args:
        text: CLIP's text tower; a copy is trained on, so the CLIP that judges stays as it was.
        unet: The denoiser.
        latents: ``(N, 4, 16, 16)`` float16.
        tokens: ``(N, POSITIONS)`` token ids of the captions.
        empty: ``(POSITIONS,)`` token ids of the empty prompt.
    """

    def __init__(
        self,
        text: CLIPTextModel,
        unet: UNet2DConditionModel,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        budget: Budget,
    ) -> None:
        model = nn.ModuleDict({"unet": unet, "text": copy.deepcopy(text).requires_grad_(True).train()})
        super().__init__(model, peak=1.2e-3, budget=budget, decay=0.998, warmup=100)
        self.latents, self.tokens, self.empty = latents, tokens, empty
        self.scheduler = make_scheduler()

    def parameter_groups(self) -> list[dict[str, object]]:
        """The text tower has been trained before: it moves at a third of the rate."""
        unet, text = self.model["unet"], self.model["text"]
        return [
            {"params": list(unet.parameters()), "scale": 1.0},
            {"params": list(text.parameters()), "scale": 0.3},
        ]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        latents, tokens = self.latents[batch].float(), self.tokens[batch]
        tokens = torch.where(torch.rand(len(batch), 1) < DROP, self.empty, tokens)
        num_levels = self.scheduler.config.num_train_timesteps
        # One timestep from each of B equal ranges: the loss of a batch varies less than with independent
        # draws.
        steps = ((torch.randperm(len(batch)) + torch.rand(len(batch))) * num_levels / len(batch)).long()
        noise = torch.randn_like(latents)
        noisy = self.scheduler.add_noise(latents, noise, steps)
        states = self.model["text"](input_ids=tokens).last_hidden_state
        prediction = self.model["unet"](noisy, steps, states).sample.float()
        errors = (prediction - self.scheduler.get_velocity(latents, noise, steps)).square().mean((1, 2, 3))
        # v is the image's error times SNR + 1 = 1 / (1 - alpha_bar).
        weights = (WEIGHT_CAP * (1 - self.scheduler.alphas_cumprod[steps])).clamp(max=1.0)
        loss: Tensor = (errors * weights).mean()
        self.log_dict({"loss": loss, "mse": errors.detach().mean()}, prog_bar=True)
        return loss


class Export(L.Callback):
    """Write the averaged weights every so many minutes, so that a run can be looked at while it goes on.

    Args:
        minutes: Between two exports.
        write: Called with the averaged denoiser and text tower.
    """

    def __init__(self, minutes: float, write: Callable[[nn.ModuleDict], None]) -> None:
        self.minutes, self.write = minutes, write
        self.last = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, stage: L.LightningModule, *_: object) -> None:
        """Export when it is time."""
        assert isinstance(stage, UNetStage)
        if stage.global_rank == 0 and time.monotonic() - self.last > 60 * self.minutes:
            self.last = time.monotonic()
            self.write(stage.average)
