"""What every family of diffusers pipelines shares; a family is a subclass with a handful of hooks."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lit_align.backbones.adapters import LoRA
from lit_align.backbones.autoencoder import decode, encode, fingerprint
from lit_align.backbones.base import Conditioning, DiffusionBackbone, SamplerFactory
from lit_align.backbones.checkpointing import by_block, recompute
from lit_align.backbones.compiling import compile_blocks
from lit_align.backbones.loading import load_pipeline
from lit_align.backbones.options import (
    Attention,
    Checkpointing,
    check_choices,
    check_inputs,
    choose_size,
    targeted,
    wants_plain,
    with_entries,
)
from lit_align.backbones.prompt_cache import PromptCache
from lit_align.backbones.sharding import shard_network
from lit_align.backbones.text import TextEncoding
from lit_align.backbones.weight_sets import POLICY, WeightSets
from lit_align.errors import ConfigError, check_positive
from lit_align.pretrained import Dtype
from lit_align.samplers import Sampler
from lit_align.shapes import PIPELINE
from lit_align.tokens import Counts, count_tokens


class DiffusersBackbone(DiffusionBackbone):
    """A diffusers pipeline with named weight sets of its denoiser.

    A family defines these attributes and the methods under "what a family says"; see ``README.md``.

    Attributes:
        pipeline_class: The pipeline's class in diffusers.
        denoiser: The denoiser's name in it, ``unet`` or ``transformer``.
        bundled: Folder of the bundled model.
        without: Components and settings of the pipeline that are passed instead of loaded.
        optional: Components that a folder may lack.
        no_input_for: Entries of the denoiser's configuration that ask for what :meth:`denoise` does not give.
        patch: Side of the patches of latent pixels that the denoiser reads; sizes are multiples of it.
    """

    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser: ClassVar[str]
    bundled: ClassVar[Path] = PIPELINE
    without: ClassVar[dict[str, Any]] = {}
    optional: ClassVar[tuple[str, ...]] = ()
    no_input_for: ClassVar[tuple[str, ...]] = ()
    patch: ClassVar[int] = 1

    vae: nn.Module

    def __init__(
        self,
        pretrained: str = "shapes",
        lora: LoRA | None = LoRA(),
        adapters: dict[str, float] | None = None,
        size: int | tuple[int, int] | None = None,
        dtype: Dtype = "float32",
        checkpointing: Checkpointing = "none",
        compile: bool = False,
        attention: Attention = "auto",
        variant: str | None = None,
        config: str | None = None,
        scheduler: dict[str, Any] | None = None,
        offload_text_encoders: bool = False,
        decode_batch: int = 16,
        prompt_cache: int = 1024,
    ) -> None:
        """Load the pipeline.

        Args:
            pretrained: ``shapes`` for the bundled model, a folder in diffusers' format, a hub id, or a
                .safetensors file with all weights in the original layout.
            lora: The adapter that is trained, or null to train all weights of the denoiser.
            adapters: Adapters (``adapter/`` folders of earlier runs, or .safetensors files) and their
                weights. The policy starts as the pretrained model plus the weighted sum of their updates.
            size: Height and width of the images in pixels, or one number for both; null is the model's own.
            dtype: Of the frozen weights of denoiser and text encoders. What is trained is float32 in any
                case, with ``lora: null`` the whole denoiser; so is the autoencoder.
            checkpointing: What the backward pass computes again: ``prediction`` recomputes each prediction
                whole, for losses that hold several, as AlignProp's; ``blocks`` recomputes block by block,
                which needs least memory within one prediction. Both recompute the decoding.
            compile: Compile the denoiser's blocks with torch.compile: slow at first, then faster.
            attention: ``sdpa`` is torch's fused attention, ``plain`` two products and a softmax; ``auto``
                is ``sdpa``, but ``plain`` in bfloat16 on a CPU, where it trains faster.
            variant: Of the weight files of a folder or hub id, such as ``fp16``.
            config: For a single file: a folder in diffusers' format, or a hub id, with the configuration of
                its family; null lets diffusers find it on the hub.
            scheduler: Entries of its configuration that replace the pipeline's, as ``{timestep_spacing:
                trailing}``, or ``{prediction_type: v_prediction}`` for a single file, which does not say it.
            offload_text_encoders: Keep them on the CPU, except while new prompts are encoded.
            decode_batch: Images decoded at once; bounds the memory of the autoencoder.
            prompt_cache: Number of prompts whose embeddings are remembered.

        Raises:
            ConfigError: The model or an adapter cannot be loaded, or the options do not fit it.
        """
        super().__init__()
        check_positive({"backbone.decode_batch": decode_batch, "backbone.prompt_cache": prompt_cache})
        check_choices(dtype, checkpointing, attention)
        lora = LoRA.of(lora)
        frozen: torch.dtype = getattr(torch, dtype)
        dtypes = {"default": frozen, "vae": torch.float32}
        if lora is None:
            dtypes[self.denoiser] = torch.float32
        self.pipeline = load_pipeline(type(self), pretrained, dtypes, config, variant)
        if scheduler:
            self.pipeline.scheduler = with_entries(self.pipeline.scheduler, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.checkpointing = checkpointing
        self._compile, self.attention = compile, attention
        self.decode_batch = decode_batch
        self.elsewhere = away = {}
        for name, component in self.pipeline.components.items():
            if isinstance(component, nn.Module) and name != self.denoiser:
                component.requires_grad_(False)
                if offload_text_encoders and name.startswith("text_encoder"):
                    away[name] = component
                else:
                    self.add_module(name, component)
        self._prompts = PromptCache(TextEncoding(self, [*away.values()]), prompt_cache)
        if checkpointing == "blocks":
            self.pipeline.vae.enable_gradient_checkpointing(recompute)
        network = getattr(self.pipeline, self.denoiser)
        self.size = choose_size(size, own := network.config, self.pipeline, self.patch)
        check_inputs(pretrained, own, self.no_input_for, self.input_channels, self.asks_more(own))
        lora = targeted(lora, network, self.denoiser, self.adapted(network))
        self.weight_sets = WeightSets(self.pipeline, self.denoiser, lora, adapters or {}, self._prepare)
        self.eval()

    # ---- what a family says

    @abstractmethod
    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The denoiser's inputs about prompts, on :attr:`device`; every tensor has a row for each prompt."""

    @abstractmethod
    def denoise(self, network: Any, x: Tensor, t: Tensor, cond: dict[str, Tensor], guidance: float) -> Tensor:
        """The prediction of ``network``, without classifier-free guidance.

        Args:
            network: The denoiser, or a copy of it.
            x: ``(B, C, H, W)`` in the network's dtype, as all of ``cond`` that is not whole numbers.
            t: ``(B,)``.
            cond: What :meth:`embed` or :meth:`negative` gave, ``B`` rows.
            guidance: For models that take it as an input.
        """

    @abstractmethod
    def blocks(self, network: Any) -> list[nn.Module]:
        """The blocks of the denoiser, which are sharded one by one."""

    @classmethod
    def adapted(cls, network: Any) -> list[str]:
        """Ends of the names of the layers that get an adapter, where the settings do not say."""
        return ["to_q", "to_k", "to_v", "to_out.0"]  # all projections of attention, as in ddpo-pytorch

    def negative(self, empty: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """What guidance leads away from: the embedding of the empty prompt; None for models without it."""
        return empty

    def normalise(self, z: Tensor) -> Tensor:
        """The autoencoder's latents to those of the denoiser, in float32."""
        config: Any = self.vae.config
        return (z - (config.get("shift_factor") or 0)) * config.scaling_factor

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        config: Any = self.vae.config
        return latents / config.scaling_factor + (config.get("shift_factor") or 0)

    def pipeline_options(self, guidance: float) -> dict[str, Any]:
        """Arguments with which the pipeline's call predicts as :meth:`predict` does with this guidance."""
        return {"guidance_scale": guidance}

    def attend(self, network: Any, plain: bool) -> None:
        """Give the network's layers the plain or the fused attention."""
        network.set_attn_processor(AttnProcessor() if plain else AttnProcessor2_0())

    def asks_more(self, config: Mapping[str, Any]) -> list[str]:
        """Inputs that a denoiser with this configuration needs beside those of :meth:`denoise`."""
        return []

    def prompt_tokens(self, prompt: str) -> Counts:
        """For each tokenizer that cuts long prompts: how many tokens this one has, and how many are read."""
        return [(count_tokens(own := self.pipeline.tokenizer, prompt), own.model_max_length)]

    @property
    def input_channels(self) -> int:
        """Channels that the denoiser's configuration must ask for."""
        return self.latent_shape[0]

    # ---- the model as it was loaded

    @property
    def network(self) -> nn.Module:
        """The denoiser that holds the policy."""
        return self.weight_sets.networks[POLICY]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.vae.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config: Any = self.vae.config
        height, width = (side // self.pipeline.vae_scale_factor for side in self.size)
        return config.latent_channels, height, width

    def train(self, mode: bool = True) -> "DiffusersBackbone":
        """Stay in evaluation mode: replaying a step must be the same function as sampling it was."""
        del mode
        return super().train(False)

    def _prepare(self, network: Any, sets: WeightSets) -> None:
        """Set a denoiser up as the options say."""
        if self.checkpointing == "blocks":
            network.enable_gradient_checkpointing(by_block(sets))
        if self._compile:
            compile_blocks(network, self.blocks(network))

    # ---- predictions

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        rows, known = self._prompts.get(["", *prompts])
        known = {name: value.to(self.device) for name, value in known.items()}
        rows = rows.to(self.device)
        negative = self.negative({name: value[rows[:1]] for name, value in known.items()})
        return Conditioning({name: value[rows[1:]] for name, value in known.items()}, negative)

    def predict(
        self, x: Tensor, t: float | Tensor, cond: Conditioning, guidance: float = 1.0, weights: str = POLICY
    ) -> Tensor:
        if self.checkpointing == "prediction" and torch.is_grad_enabled():
            # The choice of the weight set is inside what is recomputed: outside, the backward pass would use
            # whichever set is active then.
            prediction: Tensor = recompute(self._predict, x, t, cond, guidance, weights)
            return prediction
        return self._predict(x, t, cond, guidance, weights)

    def _predict(
        self, x: Tensor, t: float | Tensor, cond: Conditioning, guidance: float, weights: str
    ) -> Tensor:
        network = self.weight_sets.choose(weights)
        dtype = next(network.parameters()).dtype
        plain = wants_plain(self.attention, x.device, dtype)
        if plain != getattr(network, "attends_plainly", False):
            self.attend(network, plain)
            network.attends_plainly = plain
        x, t = x.to(dtype), torch.as_tensor(t, device=x.device).expand(len(x))
        cond = cond.map(lambda value: value.to(dtype) if value.is_floating_point() else value)
        given, negative = cond.prompt, None if guidance == 1.0 else cond.negative
        if negative is not None:
            x, t = torch.cat([x, x]), torch.cat([t, t])
            given = {name: torch.cat([negative[name].expand_as(row), row]) for name, row in given.items()}
        prediction = self.denoise(network, x, t, given, guidance)
        # Guidance in half precision would be rounded.
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        if negative is None:
            return prediction
        away, towards = prediction.chunk(2)
        return away + guidance * (towards - away)

    # ---- images

    def decode(self, latents: Tensor) -> Tensor:
        z = self.denormalise(latents.to(next(self.vae.parameters()).dtype))
        return decode(self.vae, z, self.decode_batch, again=self.checkpointing == "prediction")

    def latents(self, images: Tensor) -> Tensor:
        return self.normalise(encode(self.vae, images, self.decode_batch))

    def autoencoder_hash(self) -> str:
        return fingerprint(self.vae)

    # ---- schedule and scale

    def make_sampler(self, factory: SamplerFactory) -> Sampler:
        return factory(dict(self.pipeline.scheduler.config))

    def shard(self, mesh: DeviceMesh) -> None:
        if self._compile:
            raise ConfigError("backbone.compile: true cannot go with sharding; set it to false, or use DDP")
        for network in self.weight_sets.networks.values():
            shard_network(network, self.blocks(network), mesh)
