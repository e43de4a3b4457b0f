"""Stable Diffusion 1.x and 2.x, and every other pipeline folder of that format, such as the bundled one."""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from lit_align.backbones.adapters import Adapters, LoRA
from lit_align.backbones.base import (
    POLICY,
    REFERENCE,
    Conditioning,
    DiffusionBackbone,
    SamplerFactory,
    whole,
)
from lit_align.errors import ConfigError
from lit_align.pretrained import loading, resolve
from lit_align.samplers import Sampler
from lit_align.shapes import PIPELINE


class StableDiffusionBackbone(DiffusionBackbone):
    """A ``StableDiffusionPipeline`` with named weight sets of its UNet.

    With LoRA a set is an adapter over shared frozen weights, or a mixture of several, and the reference is
    the model without one. Without LoRA the policy is the UNet itself and every other set a copy of it.
    """

    def __init__(
        self,
        pretrained: str = "shapes",
        lora: LoRA | None = LoRA(),
        adapters: dict[str, float] | None = None,
        checkpointing: bool = False,
        decode_batch: int = 16,
        prompt_cache: int = 1024,
    ) -> None:
        """Load the pipeline.

        Args:
            pretrained: ``shapes`` for the bundled model, a folder in diffusers' format, or a hub id.
            lora: The adapter that is trained, or null to train all weights of the UNet.
            adapters: Folders of adapters (``adapter/`` of earlier runs) and their weights. The policy is the
                pretrained model plus the weighted sum of their updates, plus what is trained: without a
                checkpoint ``predict`` and ``test`` show the mixture alone, and ``fit`` goes on from it.
            checkpointing: Recompute each prediction, and each decoding, in the backward pass instead of
                keeping its activations. Saves memory where a loss holds several predictions at once; where it
                holds one, as in DDPO, lower the method's ``micro_batch`` instead.
            decode_batch: Images decoded at once; bounds the memory of the autoencoder.
            prompt_cache: Number of prompts whose embeddings are remembered.

        Raises:
            ConfigError: The model or an adapter cannot be loaded, or no layer matches
                ``lora.target_modules``.
        """
        super().__init__()
        with loading(pretrained):
            pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
                resolve(pretrained, PIPELINE),
                dtype=torch.float32,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline
        self.checkpointing = checkpointing
        self.decode_batch = decode_batch
        self.text_encoder: nn.Module = pipeline.text_encoder
        self.vae: nn.Module = pipeline.vae
        self.unets = nn.ModuleDict({POLICY: pipeline.unet})
        self.requires_grad_(False)
        self._lora = lora
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_size = prompt_cache
        self._adapters = Adapters(pipeline.unet)
        self._sets = [POLICY, REFERENCE]
        self._start: dict[str, float] = {}
        if lora is not None:
            self._adapters.mix(REFERENCE, {})
            self._adapters.add(POLICY, lora)
        else:
            self.unets[REFERENCE] = deepcopy(pipeline.unet)
        self._start_from(adapters or {})
        self.train_only([POLICY])
        self.eval()

    @property
    def unet(self) -> nn.Module:
        """The UNet that holds the policy."""
        return self.unets[POLICY]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.pipeline.unet.config.sample_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return self.pipeline.unet.config.in_channels, height, width

    @property
    def weight_sets(self) -> tuple[str, ...]:
        return tuple(self._sets)

    def train(self, mode: bool = True) -> "StableDiffusionBackbone":
        """Stay in evaluation mode: replaying a step must be the same function as sampling it was."""
        del mode
        super().train(False)
        return self

    # ---- weight sets

    def _start_from(self, adapters: Mapping[str, float]) -> None:
        """Let the policy, and what is copied from it, start from a mixture of frozen adapters."""
        if not adapters:
            return
        if self._lora is None:
            raise ConfigError("adapters: they need lora; give its settings, or take adapters out")
        for number, (folder, weight) in enumerate(adapters.items()):
            self._adapters.load(f"_start{number}", Path(folder))
            self._start[f"_start{number}"] = weight
        self._adapters.mix(POLICY, {POLICY: 1.0} | self._start)

    def add_weights(self, name: str) -> None:
        assert name not in self._sets, f"the weight set {name!r} exists already"
        if self._lora is None:
            self.unets[name] = deepcopy(self.unet).requires_grad_(False)
        else:
            self._adapters.add(name, self._lora)
            self._adapters.mix(name, {name: 1.0} | self._start)
        self._sets.append(name)
        self.copy_weights(POLICY, name)

    def copy_weights(self, source: str, target: str) -> None:
        assert target not in (POLICY, REFERENCE), f"{target!r} is not a set to overwrite"
        with torch.no_grad():
            for old, new in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
                old.copy_(new)

    def load_weights(self, name: str, folder: Path) -> None:
        assert name not in self._sets, f"the weight set {name!r} exists already"
        if (folder / "model_index.json").is_file():
            with loading(str(folder)):
                unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
            self.unets[name] = unet.requires_grad_(False).eval()
        elif self._lora is None:
            raise ConfigError(f"{folder} holds an adapter, which needs lora; give its settings")
        else:
            self._adapters.load(name, folder)
        self._sets.append(name)

    def mix_weights(self, name: str, weights: Mapping[str, float]) -> None:
        self._refuse_whole(weights)
        self._adapters.mix(name, weights)
        if name not in self._sets:
            self._sets.append(name)

    def average_factors(self, name: str, weights: Mapping[str, float]) -> None:
        self._refuse_whole(weights)
        self._adapters.average_factors(name, weights)

    def _refuse_whole(self, names: Collection[str]) -> None:
        if whole := [name for name in names if name not in self._adapters]:
            raise ConfigError(
                f"{whole[0]} is a whole model, and mixtures are made of adapters; give adapters"
            )

    def train_only(self, names: Collection[str]) -> None:
        trained = {parameter for name in names for parameter in self.parameters_of(name)}
        for parameter in self.unets.parameters():
            parameter.requires_grad_(parameter in trained)

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        if name in self._adapters:
            return self._adapters.parameters([name])
        return list(self.unets[name].parameters())

    def _choose(self, name: str) -> nn.Module:
        """The UNet with one weight set switched on; only what the next forward computes is changed."""
        assert name in self._sets, f"no weight set {name!r} among {self._sets}"
        if name not in self._adapters:
            return self.unets[name]
        self._adapters.choose(name)
        return self.unet

    # ---- the model's parts

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        device = next(self.text_encoder.parameters()).device
        states: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(["", *prompts]):
            if prompt not in self._cache:
                # One by one: a row of a batch is rounded differently in another batch, and a resumed run has
                # an empty cache.
                with torch.no_grad():
                    state, _ = self.pipeline.encode_prompt(
                        prompt, device, 1, do_classifier_free_guidance=False
                    )
                self._cache[prompt] = state[0].cpu()
            self._cache.move_to_end(prompt)
            states[prompt] = self._cache[prompt].to(device)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return Conditioning(torch.stack([states[prompt] for prompt in prompts]), states[""][None])

    def predict(
        self, x: Tensor, t: int | Tensor, cond: Conditioning, guidance: float = 1.0, weights: str = POLICY
    ) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            # The choice of the weight set is inside what is recomputed: outside, the backward pass would use
            # whichever set is active then.
            prediction: Tensor = checkpoint(
                self._predict, x, t, cond, guidance, weights, use_reentrant=False, preserve_rng_state=False
            )
            return prediction
        return self._predict(x, t, cond, guidance, weights)

    def _predict(
        self, x: Tensor, t: int | Tensor, cond: Conditioning, guidance: float, weights: str
    ) -> Tensor:
        unet = self._choose(weights)
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        if guidance == 1.0:
            return unet(x, t, encoder_hidden_states=cond.embeds, return_dict=False)[0]
        states = torch.cat([cond.null.expand_as(cond.embeds), cond.embeds])
        both = unet(torch.cat([x, x]), torch.cat([t, t]), encoder_hidden_states=states, return_dict=False)[0]
        null, conditional = both.chunk(2)
        return null + guidance * (conditional - null)

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.pipeline.vae.config.scaling_factor
        chunks = [self._decode(z) for z in scaled.split(self.decode_batch)]
        return (torch.cat(chunks).float() / 2 + 0.5).clamp(0, 1)

    def _decode(self, scaled: Tensor) -> Tensor:
        decode = partial(self.pipeline.vae.decode, return_dict=False)
        if self.checkpointing and scaled.requires_grad:
            pixels: Tensor = checkpoint(decode, scaled, use_reentrant=False, preserve_rng_state=False)[0]
            return pixels
        return decode(scaled)[0]

    def latents(self, images: Tensor) -> Tensor:
        chunks = [
            self.pipeline.vae.encode(x).latent_dist.mode() for x in (2 * images - 1).split(self.decode_batch)
        ]
        return torch.cat(chunks) * self.pipeline.vae.config.scaling_factor

    def autoencoder_hash(self) -> str:
        digest = hashlib.sha256(str(self.pipeline.vae.config.scaling_factor).encode())
        for name, parameter in self.vae.named_parameters():
            digest.update(name.encode() + parameter.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def make_sampler(self, factory: SamplerFactory) -> Sampler:
        return factory(dict(self.pipeline.scheduler.config))

    # ---- files and scale

    def save_weights(self, folder: Path | None, weights: str = POLICY) -> None:
        if weights in self._adapters:
            self._adapters.save(folder, weights)
            return
        unet = self.unets[weights]
        if isinstance(unet, FSDPModule):
            parameters = {name: whole(value).cpu() for name, value in unet.state_dict().items()}
            unet = UNet2DConditionModel.from_config(unet.config)
            unet.load_state_dict(parameters)
        if folder is None:
            return
        self.pipeline.unet = unet
        self.pipeline.save_pretrained(folder)
        self.pipeline.unet = self.unet

    def shard(self, mesh: DeviceMesh) -> None:
        for unet in self.unets.values():
            if isinstance(unet, FSDPModule):  # a second fit of the same objects
                continue
            blocks: list[nn.Module] = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]  # type: ignore[misc, list-item]
            for block in blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(unet, mesh=mesh)
