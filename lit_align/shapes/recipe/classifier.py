"""A classifier of the colour of an image's objects, in the format of ``ViTForImageClassification``.

It is there to measure, and to align away, a bias of the data: the colour of objects whose caption names none.
So it is trained on balanced colours: what it has learnt of the world favours none.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from lit_align.randomness import generator
from lit_align.shapes.recipe.images import held_out, normalise, numpy_rng
from lit_align.shapes.recipe.seeing import NUM_IMAGES, images_of, save_seer, soften
from lit_align.shapes.recipe.training import Batches, Budget, Stage, fit
from lit_align.shapes.world import (
    COLOURS,
    COUNTS,
    IMAGE_SIDE,
    RADII,
    SHAPES,
    Caption,
    Group,
    Scene,
    observe,
    parse,
    sample_scene,
)

WIDTH = 64


def make_vit() -> ViTForImageClassification:
    """An untrained vision transformer of 4 layers, width 64, with patches of 8."""
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        initializer_range=WIDTH**-0.5,  # ViT's 0.02 is made for a width of 768
        image_size=IMAGE_SIDE,
        patch_size=8,
        id2label=dict(enumerate(COLOURS)),
        label2id={colour: number for number, colour in enumerate(COLOURS)},
    )
    config._attn_implementation = "eager"  # the fastest backward pass in bfloat16 on a CPU
    return ViTForImageClassification(config)


def balanced_caption(rng: np.random.Generator) -> Caption:
    """One group, everything said, every word uniform; the background is one of the other colours."""
    colour, ground = rng.choice(list(COLOURS), size=2, replace=False).tolist()
    size, shape = list(RADII)[rng.integers(len(RADII))], SHAPES[rng.integers(len(SHAPES))]
    return Caption((Group(int(rng.integers(len(COUNTS))) + 1, size, colour, shape),), None, ground)


def balanced_scene(seed: int, number: int) -> Scene:
    """Training scene number ``number``; never of a held-out prompt."""
    rng = numpy_rng(seed, f"classifier {number}")
    while held_out(str(caption := balanced_caption(rng))):
        pass
    return sample_scene(caption, rng)


def colours_of(scenes: Sequence[Scene]) -> Tensor:
    """Number of the colour of each scene's objects, ``(B,)``."""
    return torch.tensor([list(COLOURS).index(scene.objects[0].colour) for scene in scenes])


class ClassifierStage(Stage):
    """Cross-entropy on images that are drawn as they are needed."""

    def __init__(self, model: ViTForImageClassification, budget: Budget, seed: int) -> None:
        super().__init__(model, peak=1.5e-3, budget=budget, decay=0.99)
        self.seed, self.generator = seed, generator(seed, "classifier")

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of scene numbers ``(B,)``."""
        scenes = [balanced_scene(self.seed, number) for number in batch.tolist()]
        logits = self.model(normalise(soften(images_of(scenes), self.generator))).logits.float()
        colours = colours_of(scenes)
        loss = F.cross_entropy(logits, colours)
        self.log_dict({"loss": loss, "right": (logits.argmax(1) == colours).float().mean()}, prog_bar=True)
        return loss


def make_classifier(out: Path, budget: Budget, precision: str, seed: int) -> None:
    """Train the classifier and write it to ``out / "classifier"``.

    Args:
        out: Working folder of the recipe; nothing in it is needed.
        budget: How long to train.
        precision: Lightning's.
        seed: Of weights and scenes.
    """
    torch.manual_seed(seed)
    stage = ClassifierStage(make_vit(), budget, seed)
    fit(stage, Batches(NUM_IMAGES, 64, seed), out / "logs" / "classifier", precision)
    save_seer(out / "classifier", stage.average, "ViTImageProcessor")


def majority(image: Tensor) -> str | None:
    """The colour that more than half of an image's objects have, as :func:`observe` sees it; else None."""
    objects = observe(image).objects
    colour, votes = Counter(thing.colour for thing in objects).most_common(1)[0] if objects else (None, 0)
    return colour if 2 * votes > len(objects) else None


@torch.no_grad()
def classifier_quality(
    folder: Path, images: Tensor, captions: Sequence[str], num: int, seed: int
) -> dict[str, float]:
    """Measure a classifier on fresh renders and on the generated images of one group.

    Args:
        folder: As :func:`make_classifier` writes it.
        images: Generated images ``(N, 3, 64, 64)`` in [0, 1].
        captions: Of the generated images; those of two groups have no one colour and are left out.
        num: How many renders.
        seed: Of the renders.

    Returns:
        Share right on renders; share of the generated images in which most objects have one clear colour,
        and the share of these in which the classifier says the same (NaN if there is none).
    """
    model: Any = ViTForImageClassification.from_pretrained(folder, attn_implementation="eager")
    rng = numpy_rng(seed, "classifier quality")
    scenes = [sample_scene(balanced_caption(rng), rng) for _ in range(num)]
    right = classify(model, images_of(scenes)) == colours_of(scenes)
    alone = [row for row, caption in enumerate(captions) if len(parse(caption).groups) == 1]
    colours = [majority(images[row]) for row in alone]
    said = classify(model, images[alone]).tolist() if alone else []
    agreed = [list(COLOURS)[label] == colour for label, colour in zip(said, colours, strict=True) if colour]
    return {
        "colour right": float(right.float().mean()),
        "samples, colour clear": len(agreed) / max(1, len(alone)),
        "samples, colour agrees": float(np.mean(agreed)) if agreed else float("nan"),
    }


@torch.no_grad()
def classify(model: ViTForImageClassification, images: Tensor) -> Tensor:
    """Number of the likeliest colour of each image ``(N, 3, 64, 64)`` in [0, 1]: ``(N,)``."""
    return torch.cat([model(normalise(part)).logits.argmax(1) for part in images.split(128)])
