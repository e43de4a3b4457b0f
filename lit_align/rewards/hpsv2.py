"""Human preference as HPS v2 and v2.1: cosine in a CLIP that was tuned on choices between images."""

from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lit_align.errors import ConfigError
from lit_align.pretrained import Dtype, shared
from lit_align.rewards.base import Reward
from lit_align.rewards.checkpoints import count, find, made, read, renamed
from lit_align.rewards.clip import PICKSCORE_PROCESSOR, CLIPCosine, resized

REPOSITORY = "xswu/HPSv2"
"""Where Wu et al. publish both checkpoints."""

FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}

HEAD_WIDTH = {1280: 80}
"""Width of an attention head in a tower of a width, 64 elsewhere (open_clip's configuration of ViT-H-14)."""

NAMES = [
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
]
"""Names of open_clip, in which the checkpoints are saved, and of transformers."""


class HPSCosine(CLIPCosine):
    """A CLIP in HPS's form; arguments as of :class:`CLIPCosine`, but for the file's name.

    Args:
        pretrained: A hub id, a file in open_clip's format, a folder with one, or with a ``CLIPModel``.
        processor: Where the tokenizer is.
        published: The name of the file.
        dtype: Precision of the weights.
    """

    def __init__(self, pretrained: str, processor: str, published: str, dtype: Dtype) -> None:
        self.published = published
        super().__init__(pretrained, processor, dtype=dtype)

    def load(self, pretrained: str, shapes: Path, dtype: Dtype) -> CLIPModel:
        if (Path(pretrained).expanduser() / "config.json").is_file():
            return super().load(pretrained, shapes, dtype)
        whole = ", or the folder of a transformers CLIPModel"
        file = find(pretrained, self.published, "HPSv2", whole)
        return from_open_clip(read(file, "HPSv2"), file, dtype)

    def preprocess(self, images: Tensor) -> Tensor:
        """Antialiased bicubic resize of the longer side, black borders, normalise: HPS's, unrounded."""
        side, (height, width) = self.side, images.shape[-2:]
        size = [round(side * length / max(height, width)) for length in (height, width)]
        pixels = resized(images.to(self.mean.dtype), size)
        top, left = (side - size[0]) // 2, (side - size[1]) // 2
        pixels = F.pad(pixels, (left, side - size[1] - left, top, side - size[0] - top))
        return (pixels - self.mean) / self.std


class HPSv2(Reward):
    """Human preference as HPS v2 or v2.1: the cosine of image and prompt (Wu et al. 2023, arXiv:2306.09341).

    Scores of generated images lie about at .2 to .35. They are the cosine itself, as in the authors' package,
    without the model's logit scale.

    Args:
        pretrained: The id of a repository on the hub, the published ``.pt``, a ``.safetensors`` copy of it, a
            folder with one of these, or a folder with a transformers ``CLIPModel``.
        version: Which of the two files, where there are both.
        processor: Where the tokenizer is: a hub id or a folder. Any CLIP's; by default that of the CLIP which
            HPS was tuned from.
        dtype: Precision of the weights.

    Raises:
        ConfigError: The checkpoint or the tokenizer cannot be loaded.
    """

    differentiable = True
    scope = "sample"
    documented = (0.0, 0.5)  # generated images: about .2 to .35

    def __init__(
        self,
        pretrained: str = REPOSITORY,
        version: Literal["2.1", "2.0"] = "2.1",
        processor: str | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        super().__init__()
        if processor is None:
            own = (Path(pretrained).expanduser() / "tokenizer_config.json").is_file()
            processor = pretrained if own else PICKSCORE_PROCESSOR
        self.clip = shared(HPSCosine, pretrained, processor, FILES[version], dtype)
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        scores: Tensor = self.clip(images, prompts)
        return scores


def from_open_clip(state: dict[str, Tensor], file: Path, dtype: Dtype = "float32") -> CLIPModel:
    """A transformers ``CLIPModel`` from the state dict of an open_clip model with towers like ViT-H-14's.

    Raises:
        ConfigError: It is no such state dict.
    """
    state = {key: value for key, value in state.items() if key != "attn_mask"}  # a constant
    for ours, theirs in (("text_projection", "text_projection"), ("visual_projection", "visual.proj")):
        if theirs in state:
            state[f"{ours}.weight"] = state.pop(theirs).T.contiguous()
    for key in [key for key in state if ".attn.in_proj_" in key]:
        whole, kind = state.pop(key), key.rpartition("_")[2]
        for part, rows in zip("qkv", whole.chunk(3), strict=True):
            state[key.replace(f"in_proj_{kind}", f"{part}_proj.{kind}")] = rows
    state = renamed(state, NAMES)
    model: CLIPModel = made(CLIPModel, _config(state, file), state, file, dtype)
    return model


def _config(state: dict[str, Tensor], file: Path) -> CLIPConfig:
    """The architecture that the shapes of the weights tell."""
    try:
        patches = state["vision_model.embeddings.patch_embedding.weight"]
        words = state["text_model.embeddings.token_embedding.weight"]
        cells = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
        positions = len(state["text_model.embeddings.position_embedding.weight"])
        projection = len(state["visual_projection.weight"])
        hidden = {
            tower: len(state[f"{tower}_model.encoder.layers.0.mlp.fc1.weight"])
            for tower in ("vision", "text")
        }
    except KeyError as error:
        raise ConfigError(
            f"HPSv2: {str(file)!r} is not a checkpoint of HPS v2: it has no {error.args[0]} (in the names of "
            "transformers); give HPS_v2.1_compressed.pt."
        ) from None

    def tower(name: str, width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": hidden[name],
            "num_hidden_layers": count(state, rf"{name}_model\.encoder\.layers\.(\d+)\."),
            "num_attention_heads": max(1, width // HEAD_WIDTH.get(width, 64)),
            "hidden_act": "gelu",
        }

    side = patches.shape[-1]
    vision = tower("vision", len(patches)) | {
        "image_size": side * round(cells**0.5),
        "patch_size": side,
    }
    text = tower("text", words.shape[1]) | {
        "vocab_size": len(words),
        "max_position_embeddings": positions,
        # open_clip reads a text at its highest token, which is the end of the text.
        "eos_token_id": len(words) - 1,
        "bos_token_id": len(words) - 2,
        "pad_token_id": len(words) - 1,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)
