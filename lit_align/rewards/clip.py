"""Rewards that compare the CLIP embeddings of an image and its prompt, with a gradient to the pixels."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype, has_words, load_part, load_whole, misfit, processor_config, shared
from lit_align.rewards.base import Reward, domain_of
from lit_align.shapes import CLIP as SHAPES_CLIP
from lit_align.shapes import PREFERENCE as SHAPES_PREFERENCE
from lit_align.tokens import Counts, count_tokens, warn_of_cut

CLIP_MODEL = "openai/clip-vit-large-patch14"
"""The CLIP of LAION's aesthetic predictors and of most reports of a CLIP score (Radford et al. 2021)."""

PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The model of Kirstain et al. 2023 on the hub, and where its card takes the tokenizer from."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of CLIP's training images (Radford et al. 2021, their released code)."""


class CLIPCosine(nn.Module):
    """Cosine between images and prompts in a CLIP model's space.

    Args:
        pretrained: ``"shapes"``, a folder with a transformers ``CLIPModel``, or a hub id. Safetensors only.
        processor: The same for the tokenizer and the pixel statistics; the model's own by default.
        shapes: The shipped folder that ``"shapes"`` stands for.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The model or the tokenizer cannot be loaded whole.
    """

    CACHED_PROMPTS = 4096
    IMAGES_AT_ONCE = 64
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        pretrained: str,
        processor: str | None = None,
        shapes: Path = SHAPES_CLIP,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        processor = pretrained if processor is None else processor
        self.model = self.load(pretrained, shapes, dtype)
        self.tokenizer = load_tokenizer(processor, shapes, self.model.text_model)
        config: Any = self.model.config
        self.side: int = config.vision_config.image_size
        self.positions: int = config.text_config.max_position_embeddings
        pixels = processor_config(processor, shapes)
        mean, std = pixels.get("image_mean", MEAN), pixels.get("image_std", STD)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self._reader, self._told = f"the reward model {pretrained!r}", False

    def load(self, pretrained: str, shapes: Path, dtype: Dtype) -> CLIPModel:
        """The model."""
        model: CLIPModel = load_whole(CLIPModel.from_pretrained, pretrained, shapes, "CLIP model", dtype)
        return model

    @property
    def logit_scale(self) -> float:
        """What the model learnt to multiply cosines by (about 100 for trained CLIPs)."""
        return float(self.model.logit_scale.detach().double().exp())

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosines ``(B,)`` in [-1, 1] of ``(B, 3, H, W)`` images in [0, 1] with their prompts."""
        return (self.embed_images(images) * self.embed(prompts)).sum(dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings ``(B, D)`` of ``(B, 3, H, W)`` images in [0, 1]."""
        chunks = [self.preprocess(chunk) for chunk in images.split(self.IMAGES_AT_ONCE)]
        features = [
            self.model.get_image_features(pixel_values=chunk.to(self.model.dtype)).pooler_output
            for chunk in chunks
        ]
        return _unit(torch.cat(features))

    def preprocess(self, images: Tensor) -> Tensor:
        """Antialiased bicubic resize of the shorter side, centre crop, normalise: CLIP's, unrounded."""
        side, (height, width) = self.side, images.shape[-2:]
        size = [side * length // min(height, width) for length in (height, width)]
        pixels = resized(images.to(self.mean.dtype), size)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        return (pixels[..., top : top + side, left : left + side] - self.mean) / self.std

    def embed(self, prompts: list[str]) -> Tensor:
        """Unit text embeddings ``(B, D)``; the last ``CACHED_PROMPTS`` prompts are remembered."""
        if not self._told:  # the end of a long prompt is not rewarded
            new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
            self._told = warn_of_cut(self._reader, self.prompt_tokens, new)
        for prompt in prompts:
            if prompt not in self._texts:
                # One by one: a row is rounded differently in another batch, and a resumed run remembers none.
                self._texts[prompt] = self._encode(prompt)
            self._texts.move_to_end(prompt)
        # Stacking copies: a row remembered from inference mode (Lightning's validation) could not enter a
        # graph itself.
        texts = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > self.CACHED_PROMPTS:
            self._texts.popitem(last=False)
        return texts

    def prompt_tokens(self, prompt: str) -> Counts:
        """How many tokens a prompt has, and how many are read."""
        return [(count_tokens(self.tokenizer, prompt), self.positions)]

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            truncation=True,
            max_length=self.positions,
            return_tensors="pt",
        ).to(self.mean.device)
        features = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        return _unit(features.pooler_output)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Forget the prompts' embeddings when the module moves to another device or precision."""
        self._texts.clear()
        return super()._apply(fn, recurse)


class CLIPScore(Reward):
    """``scale`` times the cosine between image and prompt (Hessel et al. 2021, arXiv:2104.08718).

    The paper reports ``2.5 * max(cos, 0)`` with "A photo depicts" before the caption, torchmetrics ``100 *
    max(cos, 0)`` of the caption alone, which is read here too: give 100 to read its numbers. The cut at 0 is
    left out, since an image below it would have no gradient.

    Args:
        pretrained: A hub id, a folder with a transformers ``CLIPModel``, or ``"shapes"`` for the bundled
            one. The paper has ViT-B/32 (``openai/clip-vit-base-patch32``).
        scale: Factor of the cosine; 1 by default, a reward in [-1, 1].

    Raises:
        ConfigError: The model cannot be loaded.
    """

    differentiable = True
    scope = "sample"

    def __init__(self, pretrained: str = CLIP_MODEL, scale: float = 1.0) -> None:
        super().__init__()
        self.domain = domain_of(pretrained)
        self.clip = shared(CLIPCosine, pretrained)
        self.scale = scale
        low, high = (0.0, 0.5) if self.domain is None else (-1.0, 1.0)  # published models: about .1 to .35
        self.documented = (min(low * scale, high * scale), max(low * scale, high * scale))
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        scores: Tensor = self.scale * self.clip(images, prompts)
        return scores


class PickScore(Reward):
    """Human preference as PickScore: learnt scale times cosine (Kirstain et al. 2023, arXiv:2305.01569).

    Args:
        pretrained: A hub id, a folder with a transformers ``CLIPModel``, or ``"shapes"`` for the bundled one,
            fine-tuned on preferences between Shapes images. The published model by default.
        processor: The same for the tokenizer and the pixel statistics. By default those of ``pretrained``,
            and for the published model ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``, as its card says.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The model or the tokenizer cannot be loaded.
    """

    differentiable = True
    scope = "sample"

    def __init__(
        self, pretrained: str = PICKSCORE, processor: str | None = None, dtype: Dtype = "float32"
    ) -> None:
        super().__init__()
        self.domain = domain_of(pretrained)
        if processor is None and pretrained == PICKSCORE:
            processor = PICKSCORE_PROCESSOR
        self.clip = shared(CLIPCosine, pretrained, processor, SHAPES_PREFERENCE, dtype)
        self.scale = self.clip.logit_scale  # read once: in bfloat16 100 would become 98.9
        # The published model: about 17 to 24.
        self.documented = (10.0, 35.0) if self.domain is None else (-self.scale, self.scale)
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        scores: Tensor = self.scale * self.clip(images, prompts)
        return scores


def load_tokenizer(processor: str, shapes: Path, encoder: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a text encoder; one without words, or of another model, is an error here."""
    tokenizer: PreTrainedTokenizerBase = load_part(AutoTokenizer, processor, shapes)
    if not has_words(tokenizer):
        raise ConfigError(
            f"There is no tokenizer in {processor!r}; save one there with save_pretrained, "
            "or name under 'processor' where it is."
        )
    if wrong := misfit(tokenizer, encoder):
        raise ConfigError(
            f"The tokenizer in {processor!r} has {wrong}; name under 'processor' where the model's own is."
        )
    return tokenizer


def resized(images: Tensor, size: list[int]) -> Tensor:
    """Images in [0, 1] of another height and width, by an antialiased bicubic filter.

    It overshoots beside hard edges. As in Pillow each row is resized first, then each column, and what is
    below black or above white is cut both times.
    """
    for part in ([images.shape[-2], size[1]], size):
        if part != [*images.shape[-2:]]:
            images = F.interpolate(images, part, mode="bicubic", antialias=True, align_corners=False)
            images = images.clamp(0, 1)
    return images


def _unit(features: Tensor) -> Tensor:
    """Length 1, at least in float32."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
