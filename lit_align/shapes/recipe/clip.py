"""CLIP for the world: who says what an image shows, and how close another caption comes."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from lit_align.shapes.recipe.images import Images, frame_half, held_out, mutate, normalise
from lit_align.shapes.recipe.tokenizer import POSITIONS
from lit_align.shapes.recipe.training import Budget, Stage

WIDTH = 128


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIP: a text tower of 3 layers and a vision transformer of 4, both of width 128."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": 4,
        "projection_dim": WIDTH,
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        **tower,
        **special,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": POSITIONS,
    }
    vision = {**tower, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    config._attn_implementation = "eager"  # the fastest backward pass in bfloat16 on a CPU
    return CLIPModel(config)


def load_clip(folder: Path) -> CLIPModel:
    """A trained CLIP in float32."""
    return CLIPModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids ``(N, POSITIONS)``."""
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def embed_texts(model: CLIPModel, ids: Tensor) -> Tensor:
    """Unit text embeddings ``(N, WIDTH)``."""
    return F.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def embed_images(model: CLIPModel, images: Tensor) -> Tensor:
    """Unit image embeddings ``(N, WIDTH)`` of images in [0, 1]."""
    return F.normalize(model.get_image_features(pixel_values=normalise(images)).pooler_output.float(), dim=-1)


class Contrast:
    """Contrastive loss on drawn images; every caption is also there as a wrong answer, one fact changed.

    Args:
        images: The drawn ones; those with held-out captions are never shown.
        tokenizer: CLIP's.
    """

    def __init__(self, images: Images, tokenizer: CLIPTokenizer) -> None:
        self.images, self.tokenizer = images, tokenizer
        self.rng = images.rng("mutations")
        self.allowed = images.allowed()

    def mutated(self, caption: str) -> str:
        """A wrong caption that is no held-out prompt."""
        while held_out(wrong := mutate(caption, self.rng)):
            pass
        return wrong

    def __call__(self, model: CLIPModel, batch: Tensor) -> dict[str, Tensor]:
        """The ``loss``, the share ``R@1`` found among all captions, and ``hard``, told from their wrong one.

        Args:
            model: CLIP; its logit scale is bounded at 100, as in CLIP's own training.
            batch: ``(B,)`` long, which count the images that are allowed.
        """
        batch = self.allowed[batch]
        captions = [self.images.captions[number] for number in batch.tolist()]
        wrong = [self.mutated(caption) for caption in captions]
        # Padded to the longest only: what follows the end of a text changes nothing, the tower being causal.
        ids: Tensor = self.tokenizer(captions + wrong, padding=True, return_tensors="pt").input_ids
        texts = embed_texts(model, ids)
        images = embed_images(model, frame_half(self.images.images(batch)))
        logits, own = model.logit_scale.clamp(max=4.6).exp() * images @ texts.T, torch.arange(len(batch))
        pair = torch.stack([logits[own, own], logits[own, own + len(batch)]], dim=1)
        hard = F.cross_entropy(pair, torch.zeros_like(own))
        to_text, to_image = F.cross_entropy(logits, own), F.cross_entropy(logits[:, : len(batch)].T, own)
        return {
            "loss": to_text + to_image + hard,
            "R@1": (logits.argmax(1) == own).float().mean(),
            "hard": (pair[:, 0] > pair[:, 1]).float().mean(),
        }


class CLIPStage(Stage):
    """Contrastive training."""

    def __init__(self, model: CLIPModel, images: Images, tokenizer: CLIPTokenizer, budget: Budget) -> None:
        super().__init__(model, peak=1.5e-3, budget=budget, decay=0.995)
        self.contrast = Contrast(images, tokenizer)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch ``(B,)``, which counts the images that are allowed."""
        metrics = self.contrast(self.model, batch)
        self.log_dict(metrics, prog_bar=True)
        return metrics["loss"]
