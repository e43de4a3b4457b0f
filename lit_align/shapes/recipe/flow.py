"""The flow model: a small transformer in Stable Diffusion 3's format.

It learns what the denoiser of :mod:`~lit_align.shapes.recipe.unet` predicts: the clean one's velocities on
clean captions, then the careless one's on wrong captions. A denoiser predicts the mean over all images that a
state can come from, and a training image is one draw of it; so the flow model's target has no such noise.
"""

from dataclasses import dataclass
from typing import cast

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from lit_align.shapes.recipe.clip import WIDTH
from lit_align.shapes.recipe.training import Budget, Stage
from lit_align.shapes.recipe.unet import COOLING, DROP
from lit_align.shapes.recipe.vae import CHANNELS

PATCH = 1
"""Side of a patch, in latent positions. Objects stand on any of them, so with patches of 2 x 2 a transformer
must learn each shape at four places in a patch.
"""

LAYERS, HEADS, HEAD = 4, 4, 32
RATE, FURTHER_RATE, LIES_RATE, ADAMW_SCALE = 0.02, 0.01, 0.005, 0.1
"""Muon's learning rates in the first round, further rounds and on wrong captions; AdamW's as a share of them.
"""

MEAN = 0.5
"""Of the noise levels' logits, whose deviation is 1. High levels decide what an image shows, and where."""

POSITIONS = 16
"""Tokens a caption is padded or cut to: as many as the world's longest has. Each costs as much as a patch."""

ZEROS, ZEROS_SHARE = 256, 0.02
"""``StableDiffusion3Pipeline`` puts so many tokens of zeros in the place of a missing T5. This model does
without them (``max_sequence_length=0``), at a quarter of the cost; some batches have them, at a quarter of
the size, so that images with them are as good.
"""


def make_transformer() -> SD3Transformer2DModel:
    """An untrained flow model in Stable Diffusion 3's format, on 64 positions."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * WIDTH,  # two text towers, side by side
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8 // PATCH,
        qk_norm="rms_norm",  # Stable Diffusion 3.5's: attention stays in range in half precision
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name == "context_embedder":  # the states of the text have a deviation of 5
                nn.init.xavier_uniform_(module.weight, gain=0.2)
            # Blocks begin as the identity, and the velocity as 0: Peebles and Xie, "Scalable Diffusion Models
            # with Transformers" (2023), section 3.2.
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
    return transformer


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The noise schedule, without a shift: latents of 64 positions need none."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def with_projection(tower: CLIPTextModel, projection: nn.Linear) -> CLIPTextModelWithProjection:
    """A text tower with CLIP's projection of the whole text, in the class that Stable Diffusion 3 takes.

    Stable Diffusion 3 reads the states before the last layer. So this tower has one layer more, which adds
    nothing to them.
    """
    config = CLIPTextConfig(**tower.config.to_dict())
    config.num_hidden_layers += 1
    config._attn_implementation = "eager"  # as that of `load_clip`
    text = CLIPTextModelWithProjection(config)
    last = text.text_model.encoder.layers[-1]
    found = text.text_model.load_state_dict(tower.state_dict(), strict=False)
    assert len(found.missing_keys) == len(last.state_dict())
    assert not found.unexpected_keys
    for part in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(part.weight)
        nn.init.zeros_(part.bias)
    text.text_projection.load_state_dict(projection.state_dict())
    return text


def embed(output: CLIPTextModelOutput) -> dict[str, Tensor]:
    """What ``StableDiffusion3Pipeline`` gives its transformer where both of its CLIPs are one tower.

    Args:
        output: The tower's, with hidden states.
    """
    states, pooled = output.hidden_states[-2], output.text_embeds
    return {
        "encoder_hidden_states": torch.cat([states, states], dim=-1),
        "pooled_projections": torch.cat([pooled, pooled], dim=-1),
    }


@dataclass(frozen=True)
class Teacher:
    """A denoiser that says which velocity the flow should have.

    Its states are the flow's but for their scale: a flow's state at level sigma,
    ``(1 - sigma) x0 + sigma noise``, has the signal-to-noise ratio of the denoiser's at one timestep.

    Attributes:
        unet: Predicts v.
        scheduler: Its noise schedule.
    """

    unet: UNet2DConditionModel
    scheduler: DDIMScheduler

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """The denoiser's timesteps ``(B,)``, fractions too, for levels ``(B,)``."""
        alpha_bar = self.scheduler.alphas_cumprod
        ratio = ((1 - alpha_bar) / alpha_bar).log()  # rises with the timestep
        wanted = 2 * (sigmas / (1 - sigmas)).log()
        above = torch.searchsorted(ratio, wanted).clamp(1, len(ratio) - 1)
        share = (wanted - ratio[above - 1]) / (ratio[above] - ratio[above - 1])
        return above - 1 + share.clamp(0, 1)

    def velocities(self, noisy: Tensor, sigmas: Tensor, states: Tensor) -> Tensor:
        """Noise minus image ``(B, C, 8, 8)``, as the denoiser predicts them.

        Args:
            noisy: The flow's states ``(B, C, 8, 8)``.
            sigmas: Their levels ``(B,)``.
            states: Of the captions' tokens ``(B, POSITIONS of the UNet, D)``.
        """
        sigma = sigmas[:, None, None, None]
        scale = ((1 - sigma) ** 2 + sigma**2).sqrt()
        noisy, signal, level = noisy / scale, (1 - sigma) / scale, sigma / scale
        v = self.unet(noisy, self.timesteps(sigmas), states).sample.float()
        return (signal * v + level * noisy) - (signal * noisy - level * v)


class FlowStage(Stage):
    """The flow model, trained on a denoiser's velocities at logit-normal noise levels.

    Hidden matrices are trained with Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks", 2024), the rest with AdamW: after three CPU-minutes the error was .73 of AdamW's.

    Args:
        text: The text tower, which stays as it is; the transformer has layers for text.
        transformer: The flow model.
        teacher: The denoiser.
        latents: ``(N, C, 8, 8)`` float16.
        tokens: ``(N, POSITIONS of the UNet)`` token ids of the captions.
        empty: ``(POSITIONS of the UNet,)`` token ids of the empty prompt.
        budget: How long to train.
        lies: The captions are wrong: weights are averaged over fewer steps.
        rate: Muon's highest learning rate.
    """

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        transformer: SD3Transformer2DModel,
        teacher: Teacher,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        budget: Budget,
        lies: bool = False,
        rate: float = RATE,
    ) -> None:
        model = nn.ModuleDict({"transformer": transformer, "text": text.requires_grad_(False)})
        decay = 0.998 if lies else 0.999
        super().__init__(model, peak=rate, budget=budget, decay=decay, warmup=100, cooling=COOLING)
        self.automatic_optimization = False  # Lightning steps one optimizer by itself
        self.teacher, self.latents, self.tokens, self.empty = teacher, latents, tokens, empty

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, but for those of their modulation; AdamW for the rest."""
        named = dict(self.model["transformer"].named_parameters())
        in_blocks = [name for name in named if name.startswith("transformer_blocks") and "norm" not in name]
        hidden = [name for name in in_blocks if named[name].ndim == 2]
        muon = [{"params": [named[name] for name in hidden], "scale": 1.0}]
        rest = [weight for name, weight in named.items() if name not in hidden]
        adamw = [{"params": rest, "scale": ADAMW_SCALE}]
        return [
            torch.optim.Muon(muon, lr=self.peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(adamw, lr=self.peak, betas=(0.9, 0.98), weight_decay=1e-3),
        ]

    def errors(self, batch: Tensor) -> Tensor:
        """Squared errors ``(B,)`` of the velocities at the images with these numbers ``(B,)``."""
        zeros = bool(torch.rand(()) < ZEROS_SHARE)
        if zeros:
            batch = batch[: max(1, len(batch) // 4)]
        latents, tokens = self.latents[batch].float(), self.tokens[batch]
        tokens = torch.where(torch.rand(len(batch), 1) < DROP, self.empty, tokens)
        # One level from each of B equal ranges: the loss of a batch varies less than with independent draws.
        places = (torch.randperm(len(batch)) + torch.rand(len(batch))) / len(batch)
        sigmas = (torch.special.ndtri(places.clamp(1e-6, 1 - 1e-6)) + MEAN).sigmoid()
        noise, level = torch.randn_like(latents), sigmas[:, None, None, None]
        noisy = (1 - level) * latents + level * noise
        # One size of batch is worth compiling. Plain attention has the faster backward pass in bfloat16 on
        # a CPU.
        with set_stance("force_eager" if zeros else "default"), sdpa_kernel(SDPBackend.MATH):
            with torch.no_grad():
                output = self.model["text"](input_ids=tokens, output_hidden_states=True)
                target = self.teacher.velocities(noisy, sigmas, output.last_hidden_state)
                given = embed(output)
            states = given["encoder_hidden_states"][:, :POSITIONS]  # those before know nothing of the rest
            given["encoder_hidden_states"] = pad(states, (0, 0, 0, ZEROS)) if zeros else states
            prediction = self.model["transformer"](noisy, timestep=1000 * sigmas, **given).sample
        return (prediction.float() - target).square().mean((1, 2, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        muon, adamw = cast(list[LightningOptimizer], self.optimizers())
        loss = self.errors(batch).mean()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.model["transformer"].parameters(), 1.0)
        muon.step()
        adamw.optimizer.step()  # not through Lightning, which would count a second step
        for optimizer in (muon, adamw):
            optimizer.zero_grad()
        self.log("loss", loss, prog_bar=True)
        return loss
