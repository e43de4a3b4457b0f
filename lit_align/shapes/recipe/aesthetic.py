"""An aesthetic head in the format of LAION's improved predictor: linear layers on CLIP's embedding."""

import io
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_align.shapes.recipe.agreement import agreement
from lit_align.shapes.recipe.clip import WIDTH, embed_images, load_clip
from lit_align.shapes.recipe.images import Images, held_out, numpy_rng
from lit_align.shapes.recipe.pipeline import replace_folder
from lit_align.shapes.recipe.preference import read_pairs
from lit_align.shapes.recipe.training import Batches, Budget, Stage, fit
from lit_align.shapes.world import Bytes, aesthetics, render, sample_caption, sample_scene

SIZES = (WIDTH, 128, 64, 32, 16, 1)
DROPOUT = (0.2, 0.2, 0.1)
"""Of the published head, whose sizes are 768, 1024, 128, 64, 16, 1."""

RENDERS, SHOWN = 9000, 6000
"""Training images: degraded renders, and images of the preference pairs, two thirds of them generated."""


def make_head() -> nn.ModuleDict:
    """An untrained head; its state dict has the published keys, ``layers.0.weight`` and so on."""
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(SIZES)):
        layers.append(nn.Linear(inputs, outputs))
        if place < len(DROPOUT):
            layers.append(nn.Dropout(DROPOUT[place]))
    return nn.ModuleDict({"layers": nn.Sequential(*layers)})


def on_laions_scale(image: Bytes | Tensor) -> float:
    """The world's aesthetics from 1 to 10."""
    return 1 + 9 * aesthetics(image)


def degrade(image: Bytes, rng: np.random.Generator) -> Bytes:
    """Blur, bleach, roughen or compress an image ``(64, 64, 3)``, each to a random degree, or leave it."""
    blurred, bleached, rough, compressed = rng.random(4) < (0.4, 0.4, 0.25, 0.2)
    if rng.random() < 0.2:
        return image
    canvas = Image.fromarray(image)
    if blurred:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3)))
    pixels = np.asarray(canvas, np.float32)
    if bleached:
        veil = rng.uniform(128, 255)
        pixels = veil + (pixels - veil) * np.float32(rng.uniform(0.1, 1))
    if rough:
        pixels = pixels + rng.normal(0, rng.uniform(1, 20), pixels.shape).astype(np.float32)
    result = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    if compressed:
        file = io.BytesIO()
        Image.fromarray(result).save(file, "JPEG", quality=int(rng.integers(20, 90)))
        result = np.asarray(Image.open(file))
    return result


@torch.no_grad()
def embed(clip: Path, pixels: Bytes) -> Tensor:
    """Unit embeddings ``(N, WIDTH)`` of images ``(N, 64, 64, 3)`` uint8."""
    model = load_clip(clip)
    chunks = torch.from_numpy(pixels).permute(0, 3, 1, 2).split(128)
    return torch.cat([embed_images(model, chunk.float() / 255) for chunk in chunks])


class AestheticStage(Stage):
    """Regression of the aesthetics on embeddings that never change."""

    def __init__(self, model: nn.ModuleDict, embeddings: Tensor, targets: Tensor, budget: Budget) -> None:
        super().__init__(model, peak=2e-3, budget=budget, decay=0.995)
        self.embeddings, self.targets = embeddings, targets

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of image numbers ``(B,)``."""
        scores = self.model["layers"](self.embeddings[batch]).squeeze(-1)
        loss = F.mse_loss(scores, self.targets[batch])
        self.log("loss", loss, prog_bar=True)
        return loss


def training_images(out: Path, seed: int) -> Bytes:
    """Renders of ``out/images`` and images of ``out/pick``, degraded at random; no held-out prompts."""
    rng, images = numpy_rng(seed, "aesthetic"), Images(out / "images", seed)
    shown = read_pairs(out / "pick", for_training=True).pixels
    renders = images.pixels[np.sort(rng.permutation(images.allowed().numpy())[:RENDERS])]
    chosen = shown[np.sort(rng.permutation(len(shown))[:SHOWN])]
    return np.stack([degrade(image, rng) for image in np.concatenate([renders, chosen])])


def make_aesthetic(out: Path, budget: Budget, precision: str, seed: int) -> None:
    """Train the head on ``out/clip`` and write ``out/aesthetic``.

    Args:
        out: The recipe's folder.
        budget: How long to train; the images take a minute or two before that.
        precision: Lightning's.
        seed: Of the choice of images and what is done to them.
    """
    pixels = training_images(out, seed)
    targets = torch.tensor([on_laions_scale(image) for image in pixels])
    stage = AestheticStage(make_head(), embed(out / "clip", pixels), targets, budget)
    fit(stage, Batches(len(pixels), min(256, len(pixels)), seed), out / "logs" / "aesthetic", precision)
    state = {name: weight.half().contiguous() for name, weight in stage.average.state_dict().items()}

    def write(fresh: Path) -> None:
        fresh.mkdir()
        save_file(state, fresh / "model.safetensors")
        config = {"sizes": SIZES, "dropout": DROPOUT, "reads": "unit image embeddings of the Shapes CLIP"}
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    replace_folder(out / "aesthetic", write)


def fresh_renders(num: int, seed: int) -> Bytes:
    """Renders of held-out captions, degraded at random."""
    rng, images = numpy_rng(seed, "aesthetic quality"), list[Bytes]()
    while len(images) < num:
        if held_out(str(caption := sample_caption(rng))):
            images.append(degrade(render(sample_scene(caption, rng)), rng))
    return np.stack(images)


@torch.no_grad()
def aesthetic_quality(folder: Path, clip: Path, images: Tensor, num: int, seed: int) -> dict[str, float]:
    """How well the head knows the world's aesthetics.

    Args:
        folder: Of the head.
        clip: Of the CLIP that it reads.
        images: Generated images ``(N, 3, 64, 64)`` in [0, 1].
        num: Fresh renders of held-out captions, degraded as in training.
        seed: Of captions, scenes and degradations.
    """
    head = make_head().eval()
    head.load_state_dict(load_file(folder / "model.safetensors"))
    generated = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    metrics: dict[str, float] = {}
    for name, pixels in (("renders", fresh_renders(num, seed)), ("generated", generated)):
        scores = head["layers"](embed(clip, pixels)).squeeze(-1)
        truth = torch.tensor([on_laions_scale(image) for image in pixels])
        metrics |= {**agreement(scores, truth, name), f"{name}, error": float((scores - truth).abs().mean())}
    return metrics
