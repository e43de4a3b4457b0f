"""The flow model: a small transformer in Stable Diffusion 3's format.

It sees the same latents and captions as the denoiser of :mod:`~lit_align.shapes.recipe.unet`, and is trained
in the same two stages, on clean captions and then on wrong ones.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor, nn
from torch.compiler import set_stance
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lit_align.shapes.recipe.clip import WIDTH
from lit_align.shapes.recipe.training import Budget, Stage
from lit_align.shapes.recipe.unet import COOLING, DROP
from lit_align.shapes.recipe.vae import CHANNELS

PATCH = 1
"""Side of a patch, in latent positions. Objects stand on any of them, so with patches of 2 x 2 a transformer
must learn each shape at four places in a patch: after 4,000 steps its images showed a quarter of the facts.
"""

LAYERS, HEADS, HEAD = 4, 4, 32
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
    """A text tower with CLIP's projection of the whole text, in the class that Stable Diffusion 3 takes."""
    config = CLIPTextConfig(**tower.config.to_dict())
    config._attn_implementation = "eager"  # the fastest backward pass in bfloat16 on a CPU
    text = CLIPTextModelWithProjection(config)
    text.text_model.load_state_dict(tower.state_dict())
    text.text_projection.load_state_dict(projection.state_dict())
    return text


def embed(text: CLIPTextModelWithProjection, tokens: Tensor) -> dict[str, Tensor]:
    """What ``StableDiffusion3Pipeline`` gives its transformer where both of its CLIPs are this tower.

    Args:
        text: The tower.
        tokens: ``(B, POSITIONS)`` token ids.
    """
    output = text(input_ids=tokens, output_hidden_states=True)
    states, pooled = output.hidden_states[-2], output.text_embeds
    return {
        "encoder_hidden_states": torch.cat([states, states], dim=-1),
        "pooled_projections": torch.cat([pooled, pooled], dim=-1),
    }


class FlowStage(Stage):
    """The flow model, trained on the error of the velocity at logit-normal noise levels.

    Args:
        text: The text tower, which stays as it is; the transformer has layers for text.
        transformer: The flow model.
        latents: ``(N, C, 8, 8)`` float16.
        tokens: ``(N, POSITIONS)`` token ids of the captions.
        empty: ``(POSITIONS,)`` token ids of the empty prompt.
        budget: How long to train.
        lies: The captions are wrong: train at a lower rate.
    """

    def __init__(
        self,
        text: CLIPTextModelWithProjection,
        transformer: SD3Transformer2DModel,
        latents: Tensor,
        tokens: Tensor,
        empty: Tensor,
        budget: Budget,
        lies: bool = False,
    ) -> None:
        model = nn.ModuleDict({"transformer": transformer, "text": text.requires_grad_(False)})
        peak, decay = (4e-4, 0.99) if lies else (2e-3, 0.999)
        super().__init__(model, peak=peak, budget=budget, decay=decay, warmup=100, cooling=COOLING)
        self.latents, self.tokens, self.empty = latents, tokens, empty

    def parameter_groups(self) -> list[dict[str, object]]:
        """The flow model's."""
        return [{"params": list(self.model["transformer"].parameters()), "scale": 1.0}]

    def errors(self, batch: Tensor) -> Tensor:
        """Squared errors ``(B,)`` of the velocities of the images with these numbers ``(B,)``."""
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
                given = embed(self.model["text"], tokens)
            if zeros:
                given["encoder_hidden_states"] = pad(given["encoder_hidden_states"], (0, 0, 0, ZEROS))
            prediction = self.model["transformer"](noisy, timestep=1000 * sigmas, **given).sample
        return (prediction.float() - (noise - latents)).square().mean((1, 2, 3))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        loss = self.errors(batch).mean()
        self.log("loss", loss, prog_bar=True)
        return loss
