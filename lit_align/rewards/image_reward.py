"""Human preference as ImageReward: a BLIP that reads the prompt with the image, and a head."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype
from lit_align.rewards.base import Reward
from lit_align.rewards.checkpoints import count, find, linear, made, read, renamed
from lit_align.rewards.clip import MEAN, STD, load_tokenizer, resized
from lit_align.tokens import Counts, count_tokens, warn_of_cut

REPOSITORY, FILE = "zai-org/ImageReward", "ImageReward.pt"
"""Where Xu et al. publish their checkpoint (once THUDM/ImageReward)."""

TOKENIZER = "google-bert/bert-base-uncased"
"""The tokenizer of BLIP's text encoder; the two words that BLIP adds are not used."""

LENGTH = 35
"""Tokens of a prompt: padded and cut to this (the authors' released code)."""

SHIFT, SPREAD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the head's output (the authors' released code)."""

HEAD_WIDTH = 64
"""Width of an attention head, in BLIP's large vision tower (16 heads) and in BERT base (12)."""

HEAD = ("0", "2", "4", "6", "7")
"""The linear layers of the head; 1, 3 and 5 are dropout. There is nothing else between them."""

VISION = [
    (r"^blip\.visual_encoder\.", ""),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"^norm\.", "post_layernorm."),
]
"""Names of BLIP's vision tower in the checkpoint, and in transformers. The text encoder's are the same."""


class ImageReward(Reward):
    """Human preference as ImageReward (Xu et al. 2023, arXiv:2304.05977): about -2 to 2, mean 0.

    Images are resized and cropped as by the authors' package, but not rounded to 8 bits in between.

    Args:
        pretrained: The id of a repository on the hub, the published ``ImageReward.pt``, a ``.safetensors``
            copy of it, or a folder with one of these.
        processor: Where the tokenizer is: a hub id or a folder; by default that of BERT base, uncased.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The checkpoint or the tokenizer cannot be loaded.
    """

    IMAGES_AT_ONCE = 64
    differentiable = True
    scope = "sample"
    documented = (-4.0, 4.0)  # mean 0, about -2 to 2
    mean: Tensor
    std: Tensor

    def __init__(
        self, pretrained: str = REPOSITORY, processor: str | None = None, dtype: Dtype = "float32"
    ) -> None:
        super().__init__()
        file = find(pretrained, FILE, "ImageReward")
        state = read(file, "ImageReward")
        if processor is None:
            own = (Path(pretrained).expanduser() / "tokenizer_config.json").is_file()
            processor = pretrained if own else TOKENIZER
        self.vision, self.text, self.head = _models(state, file, dtype)
        self.tokenizer = load_tokenizer(processor, Path(pretrained), self.text)
        self._reader, self._told = f"the reward model {pretrained!r}", False
        self.side: int = self.vision.config.image_size
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        # The end of a long prompt is not rewarded.
        self._told = self._told or warn_of_cut(self._reader, self.prompt_tokens, [*dict.fromkeys(prompts)])
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(self.mean.device)
        parts = torch.arange(len(images)).split(self.IMAGES_AT_ONCE)
        return torch.cat(
            [self._score(images[p], tokens.input_ids[p], tokens.attention_mask[p]) for p in parts]
        )

    def prompt_tokens(self, prompt: str) -> Counts:
        """How many tokens a prompt has, and how many are read."""
        return [(count_tokens(self.tokenizer, prompt), LENGTH)]

    def _score(self, images: Tensor, words: Tensor, mask: Tensor) -> Tensor:
        pixels = self.preprocess(images).to(self.vision.dtype)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=words,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,  # the whole prompt is there: nothing is masked that comes later
        ).last_hidden_state[:, 0]
        worth: Tensor = self.head(read.to(self.head[0].weight.dtype)).squeeze(-1)
        return (worth.to(torch.promote_types(worth.dtype, torch.float32)) - SHIFT) / SPREAD

    def preprocess(self, images: Tensor) -> Tensor:
        """Antialiased bicubic resize of the shorter side, centre crop, CLIP's statistics."""
        side, (height, width) = self.side, images.shape[-2:]
        size = [side * length // min(height, width) for length in (height, width)]
        pixels = resized(images.to(self.mean.dtype), size)
        top, left = round((size[0] - side) / 2), round((size[1] - side) / 2)
        return (pixels[..., top : top + side, left : left + side] - self.mean) / self.std


def _models(
    state: dict[str, Tensor], file: Path, dtype: Dtype
) -> tuple[BlipVisionModel, BlipTextModel, nn.Sequential]:
    """The two towers and the head."""
    seen = {key: value for key, value in state.items() if key.startswith("blip.visual_encoder.")}
    vision_state = renamed(seen, VISION)
    prefix = "blip.text_encoder."
    text_state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
    text_state.pop("embeddings.position_ids", None)  # a constant
    try:
        vision_config, text_config = _vision_config(vision_state), _text_config(text_state)
        head = nn.Sequential(*(linear(state, f"mlp.layers.{layer}.") for layer in HEAD))
    except KeyError as error:
        raise ConfigError(
            f"ImageReward: {str(file)!r} is not a checkpoint of ImageReward: it has no {error.args[0]}; give "
            f"{FILE}."
        ) from None
    vision = made(BlipVisionModel, vision_config, vision_state, file, dtype)
    text = made(BlipTextModel, text_config, text_state, file, dtype, add_pooling_layer=False)
    return vision, text, head


def _vision_config(state: dict[str, Tensor]) -> BlipVisionConfig:
    patches = state["embeddings.patch_embedding.weight"]
    width, side = len(patches), patches.shape[-1]
    cells = state["embeddings.position_embedding"].shape[1] - 1
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(state["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=count(state, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=side * round(cells**0.5),
        patch_size=side,
        layer_norm_eps=1e-6,  # transformers' default is 1e-5; BLIP was trained with timm's
    )


def _text_config(state: dict[str, Tensor]) -> BlipTextConfig:
    words = state["embeddings.word_embeddings.weight"]
    return BlipTextConfig(
        vocab_size=len(words),
        hidden_size=words.shape[1],
        encoder_hidden_size=state["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(state["encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=count(state, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=max(1, words.shape[1] // HEAD_WIDTH),
        max_position_embeddings=len(state["embeddings.position_embeddings.weight"]),
        is_decoder=True,  # transformers makes cross-attention only for decoders
    )
