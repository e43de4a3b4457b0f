"""Human preference as HPSv3: a Qwen2-VL that reads image and prompt, and a head on one of its tokens."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, Qwen2VLModel

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype, load_part
from lit_align.rewards.base import Reward, are_whole, to_bytes
from lit_align.rewards.checkpoints import find, linear, made, read, renamed
from lit_align.rewards.templates import HPSV3, REWARD_TOKEN
from lit_align.rewards.vision_language import load_processor, prepare
from lit_align.shapes import CLIP as SHAPES_CLIP

REPOSITORY, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
"""Where Ma et al. publish their checkpoint."""

BASE = "Qwen/Qwen2-VL-7B-Instruct"
"""The model that HPSv3 was tuned from: its configuration, tokenizer and processor."""

NAMES = [
    (r"^model\.(visual|language_model)\.", r"\1."),
    (r"^model\.", "language_model."),
]
"""Names before transformers 4.52, in which the checkpoint is saved, and of the model without its head."""

HEAD = ("0", "3", "5")
"""The linear layers of the head: ReLU after the first two, dropout after the first."""


class HPSv3(Reward):
    """Human preference as HPSv3 (Ma et al. 2025, arXiv:2508.03789): the mean of its estimate, about 0 to 15.

    It has no gradient: the model's processor works on 8-bit images. 8 billion parameters.

    Args:
        pretrained: The id of a repository on the hub, the published ``HPSv3.safetensors``, or its folder.
        base: Where the configuration, the tokenizer and the processor are: a hub id or a folder, whose
            weights are not read.
        dtype: Precision of the weights; the head's is float32.

    Raises:
        ConfigError: The checkpoint or the base cannot be loaded, or they do not fit together.
    """

    IMAGES_AT_ONCE = 8
    TEMPLATE = HPSV3
    PIXELS = 256 * 28 * 28
    """Every image is scaled to about so many (the authors' code)."""

    differentiable = False
    scope = "sample"
    documented = (-10.0, 25.0)  # about 0 to 15

    def __init__(self, pretrained: str = REPOSITORY, base: str = BASE, dtype: Dtype = "bfloat16") -> None:
        super().__init__()
        file = find(pretrained, FILE, "HPSv3")
        state = renamed(read(file, "HPSv3"), NAMES)
        self.processor = load_processor(base)
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        self.token: int = self.processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self.model, self.head = _models(state, base, file, dtype)
        held = self.model.get_input_embeddings().num_embeddings
        if self.token >= held:
            raise ConfigError(
                f"HPSv3: base: the tokenizer of {base!r} has {self.token + 1} tokens with {REWARD_TOKEN}, "
                f"but the checkpoint has {held}; give the model that it was tuned from."
            )
        self.freeze()

    @torch.no_grad()
    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        whole, pixels = are_whole(images), to_bytes(images)
        scores = torch.full((len(images),), torch.nan, device=images.device)
        for rows in whole.nonzero().flatten().split(self.IMAGES_AT_ONCE):
            chosen = [Image.fromarray(pixels[row]) for row in rows.tolist()]
            asked = [self.TEMPLATE.replace("{}", prompts[row]) for row in rows.tolist()]
            size = {"shortest_edge": self.PIXELS, "longest_edge": self.PIXELS}  # the processor's names
            inputs = prepare(self.processor, chosen, asked, size=size).to(self.model.device, self.model.dtype)
            states = self.model(**inputs).last_hidden_state
            # The last one: a prompt may hold the token's name too.
            places = (inputs["input_ids"] == self.token).int().cumsum(dim=1).argmax(dim=1)
            told = self.head(states[torch.arange(len(rows)), places].to(self.head[0].weight.dtype))
            scores[rows] = told[:, 0].to(scores)  # the second is its uncertainty
        return scores


def _models(
    state: dict[str, Tensor], base: str, file: Path, dtype: Dtype
) -> tuple[Qwen2VLModel, nn.Sequential]:
    """The model without its last layer, and the head, with the weights of a checkpoint."""
    config = load_part(AutoConfig, base, SHAPES_CLIP)
    try:
        config.text_config.vocab_size = len(state["language_model.embed_tokens.weight"])
        first, second, last = (linear(state, f"rm_head.{name}.") for name in HEAD)
    except (KeyError, AttributeError) as error:
        lacking = (
            f"it has no {error.args[0]}" if isinstance(error, KeyError) else f"{base!r} is not a Qwen2-VL"
        )
        raise ConfigError(
            f"HPSv3: {str(file)!r} is not a checkpoint of HPSv3: {lacking}; give {FILE}."
        ) from None
    state.pop("lm_head.weight", None)
    head = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    return made(Qwen2VLModel, config, state, file, dtype), head
