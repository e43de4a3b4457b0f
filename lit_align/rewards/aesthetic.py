"""LAION's aesthetic predictors: a linear head on the CLIP embedding of an image, whatever its prompt."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_align.errors import ConfigError, user_path
from lit_align.pretrained import SHAPES, shared
from lit_align.rewards.base import Reward, domain_of
from lit_align.rewards.checkpoints import ENDINGS, linear, read
from lit_align.rewards.clip import CLIP_MODEL, CLIPCosine
from lit_align.shapes import AESTHETIC as SHAPES_AESTHETIC

DOWNLOAD = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac+logos+ava1-l14-linearMSE.pth"
"""The head of the improved predictor; it is on no hub."""

MLP = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")
"""The linear layers of the improved predictor; 1, 3 and 5 are dropout (Schuhmann 2022, released code)."""


class AestheticScore(Reward):
    """Aesthetic quality, about 1 to 10, by one of LAION's heads (Schuhmann et al. 2022).

    Both published heads read unit embeddings of ``openai/clip-vit-large-patch14`` and are files to download:
    ``sac+logos+ava1-l14-linearMSE.pth`` of github.com/christophschuhmann/improved-aesthetic-predictor, five
    linear layers with nothing between them (the reward of DDPO, arXiv:2305.13301, and of AlignProp,
    arXiv:2310.03739), and ``sa_0_4_vit_l_14_linear.pth`` of github.com/LAION-AI/aesthetic-predictor, a
    single layer. The keys of a file tell which of the two it holds.

    Args:
        head: A ``.safetensors``, ``.pth`` or ``.pt`` file with a head's state dict. It may be left out with
            ``pretrained="shapes"``, which has its own.
        pretrained: The CLIP that the head was trained on: a hub id, a folder with a transformers
            ``CLIPModel``, or ``"shapes"`` for the bundled one.

    Raises:
        ConfigError: There is no head, the head or the model cannot be loaded, or their widths differ.
    """

    differentiable = True
    scope = "sample"

    def __init__(self, head: str | None = None, pretrained: str = CLIP_MODEL) -> None:
        super().__init__()
        self.domain = domain_of(pretrained)
        self.documented = (0.0, 12.0) if self.domain is None else None  # LAION's heads: ratings from 1 to 10
        self.head = _load_head(head or (SHAPES if pretrained == SHAPES else None))
        self.clip = shared(CLIPCosine, pretrained)
        width, reads = self.clip.model.config.projection_dim, self.head[0].in_features
        if reads != width:
            raise ConfigError(
                f"AestheticScore: the head {head!r} reads embeddings of {reads} numbers, but the CLIP model "
                f"{pretrained!r} makes {width}; give under 'pretrained' the model that the head was trained "
                "on (openai/clip-vit-large-patch14 for LAION's heads of width 768)."
            )
        self.freeze()

    def forward(
        self,
        images: Tensor,
        prompts: list[str],
        groups: Tensor | None = None,
        columns: dict[str, list[Any]] | None = None,
    ) -> Tensor:
        embeddings = self.clip.embed_images(images)
        scores: Tensor = self.head(embeddings.to(next(self.head.parameters()).dtype))
        return scores.squeeze(-1).to(embeddings.dtype)


def _load_head(head: str | None) -> nn.Sequential:
    """The linear layers of a head in float32; the dropout between them does nothing in a frozen model."""
    if head is None:
        raise ConfigError(
            f"AestheticScore: head is missing; download {DOWNLOAD} and give its path under 'head', or give "
            "'pretrained: shapes' for the bundled predictor of Shapes."
        )
    file = SHAPES_AESTHETIC if head == SHAPES else user_path(head)
    if file.suffix not in ENDINGS or not file.is_file():
        raise ConfigError(
            f"AestheticScore: head: {head!r} is not a file; give a .safetensors, .pth or .pt file that "
            f"exists (the working directory is {Path.cwd()}), such as {DOWNLOAD}, or 'shapes' for the "
            "bundled head."
        )
    state = read(file, "AestheticScore: head")
    names = ("",) if set(state) == {"weight", "bias"} else tuple(f"{layer}." for layer in MLP)
    if set(state) != {f"{name}{part}" for name in names for part in ("weight", "bias")}:
        held = ", ".join(sorted(map(str, state))[:4])
        raise ConfigError(
            f"AestheticScore: {head!r} is not an aesthetic head: it holds {held} ...; it must hold the "
            f"weight and bias of {', '.join(MLP)} (LAION's improved predictor), or of a single layer (its "
            "first). Variants with ReLU have other layers and are not supported."
        )
    _check_tensors(state, names, head)
    return nn.Sequential(*(linear(state, name) for name in names))


def _check_tensors(state: dict[str, Tensor], names: tuple[str, ...], head: str) -> None:
    """Refuse what is no chain of linear layers, from an embedding to one score."""
    fault, shapes = None, [(state[f"{n}weight"].shape, state[f"{n}bias"].shape) for n in names]
    if any(len(weight) != 2 or bias != weight[:1] for weight, bias in shapes):
        fault = "its weights and biases are not linear layers"
    elif [weight[0] for weight, _ in shapes] != [*(weight[1] for weight, _ in shapes[1:]), 1]:
        fault = "its layers do not fit each other"
    if fault:
        raise ConfigError(f"AestheticScore: head: {head!r} cannot be used: {fault}; download it again.")
