"""A detector of the world's shapes in YOLOS's format (Fang et al., "You Only Look at One Sequence", 2021)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import YolosConfig, YolosForObjectDetection

from lit_align.randomness import generator
from lit_align.shapes.recipe.images import held_out, normalise, numpy_rng
from lit_align.shapes.recipe.matching import NONE, dense_loss, overlaps, set_loss
from lit_align.shapes.recipe.seeing import NUM_IMAGES, images_of, save_seer, soften
from lit_align.shapes.recipe.training import Batches, Budget, Stage, fit
from lit_align.shapes.world import (
    COLOURS,
    IMAGE_SIDE,
    MAX_OBJECTS,
    SHAPES,
    Item,
    Scene,
    observe,
    parse,
    sample_caption,
    sample_scene,
)
from lit_align.shapes.world.drawing import OUTLINES

NUM_TOKENS, WIDTH, PATCH = 8, 128, 8
CONFIDENCE = 0.5
"""Probability of its shape from which a token counts as a detection."""

MIXED = 0.5
"""Share of training scenes in which every object has a shape and a colour of its own.

Captions make groups of equal objects; a sampler does not always, and the detector must look at each object.
"""


def make_yolos() -> YolosForObjectDetection:
    """An untrained detector of 4 layers, width 128, whose positions begin as sinusoids instead of zeros."""
    config = YolosConfig(
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * WIDTH,
        initializer_range=WIDTH**-0.5,  # ViT's 0.02 is made for a width of 768
        image_size=[IMAGE_SIDE, IMAGE_SIDE],
        patch_size=PATCH,
        num_detection_tokens=NUM_TOKENS,
        use_mid_position_embeddings=False,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: number for number, shape in enumerate(SHAPES)},
    )
    config._attn_implementation = "eager"  # the fastest backward pass in bfloat16 on a CPU
    model = YolosForObjectDetection(config)
    rows = IMAGE_SIDE // PATCH
    patches = [((x + 0.5) / rows, (y + 0.5) / rows) for y, x in product(range(rows), repeat=2)]
    tokens = [((number % 4 + 0.5) / 4, (number // 4 + 0.5) / 2) for number in range(NUM_TOKENS)]
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = _sinusoids(torch.tensor(patches + tokens))
        for layer in model.vit.encoder.layer:
            # Equal maps of queries and keys: what lies near begins by being attended to.
            layer.attention.attention.key.weight.copy_(layer.attention.attention.query.weight)
    return model


def _sinusoids(places: Tensor) -> Tensor:
    """Places ``(N, 2)`` in the unit square as ``(N, WIDTH)``: a quarter of a wave to four waves an image."""
    angles = 2 * math.pi * places[:, :, None] * 2 ** torch.linspace(-2, 2, WIDTH // 4)
    return 0.5 * torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1)


def draw_scene(seed: int, number: int) -> Scene:
    """Training scene number ``number``; never of a held-out prompt."""
    rng = numpy_rng(seed, f"detector {number}")
    while held_out(str(caption := sample_caption(rng))):
        pass
    scene = sample_scene(caption, rng)
    if rng.random() >= MIXED:
        return scene
    free = [colour for colour in COLOURS if colour != scene.background]
    objects = [
        replace(item, shape=SHAPES[rng.integers(len(SHAPES))], colour=free[rng.integers(len(free))])
        for item in scene.objects
    ]
    return replace(scene, objects=tuple(objects))


def box(item: Item) -> list[float]:
    """The box of an object: middle, width and height, in images."""
    corners = OUTLINES[item.shape] * item.radius
    low, high = corners.min(0), corners.max(0)
    middle = (low + high) / 2 + np.array([item.x, item.y])
    return [float(value) / IMAGE_SIDE for value in (*middle, *(high - low))]


def targets(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Shapes ``(B, 4)`` long, ``NONE`` where there is no object, and boxes ``(B, 4, 4)``."""
    shapes = torch.full((len(scenes), MAX_OBJECTS), NONE)
    boxes = torch.zeros(len(scenes), MAX_OBJECTS, 4)
    for row, scene in enumerate(scenes):
        for column, item in enumerate(scene.objects):
            shapes[row, column] = SHAPES.index(item.shape)
            boxes[row, column] = torch.tensor(box(item))
    return shapes, boxes


class DetectorStage(Stage):
    """Set prediction on images that are drawn as they are needed.

    DETRs learn slowly because an object must be found before its token can learn anything about it. So, while
    training, every patch also says in which object's box it lies; that head is thrown away.
    """

    def __init__(self, model: YolosForObjectDetection, budget: Budget, seed: int) -> None:
        super().__init__(model, peak=1.2e-3, budget=budget, decay=0.995)
        self.seed, self.generator = seed, generator(seed, "detector")
        self.patches = nn.Linear(WIDTH, NONE + 1 + 4)

    def parameter_groups(self) -> list[dict[str, object]]:
        """The detector, and the head of the patches."""
        return [*super().parameter_groups(), {"params": list(self.patches.parameters()), "scale": 1.0}]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of scene numbers ``(B,)``."""
        scenes = [draw_scene(self.seed, number) for number in batch.tolist()]
        truth = targets(scenes)
        output = self.model(normalise(soften(images_of(scenes), self.generator)))
        parts = set_loss(output.logits.float(), output.pred_boxes.float(), *truth)
        dense = self.patches(output.last_hidden_state[:, 1:-NUM_TOKENS]).float()
        extra = dense_loss(dense[..., :-4], dense[..., -4:].sigmoid(), *truth)["loss"]
        self.log_dict({**parts, "patches": extra}, prog_bar=True)
        return parts["loss"] + extra


def make_detector(out: Path, budget: Budget, precision: str, seed: int) -> None:
    """Train the detector and write it to ``out / "detector"``.

    If it is there already, a further round begins with its weights and a fresh learning rate; another seed
    shows it other scenes.

    Args:
        out: Working folder of the recipe; nothing else in it is needed.
        budget: How long to train.
        precision: Lightning's.
        seed: Of weights and scenes.
    """
    torch.manual_seed(seed)
    model = make_yolos()
    if (out / "detector").exists():
        last = YolosForObjectDetection.from_pretrained(out / "detector", dtype=torch.float32)
        model.load_state_dict(last.state_dict())
    stage = DetectorStage(model, budget, seed)
    fit(stage, Batches(NUM_IMAGES, 64, seed), out / "logs" / "detector", precision)
    save_seer(out / "detector", stage.average, "YolosImageProcessor")


@torch.no_grad()
def detect(model: YolosForObjectDetection, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every token's confidence ``(N, tokens)``, shape ``(N, tokens)`` and box ``(N, tokens, 4)``.

    Args:
        model: Trained.
        images: ``(N, 3, 64, 64)`` in [0, 1].
    """
    outputs = [model(normalise(part)) for part in images.split(128)]
    likely = torch.cat([output.logits for output in outputs]).softmax(-1)
    confidence, shapes = likely[..., :NONE].max(-1)
    return confidence, shapes, torch.cat([output.pred_boxes for output in outputs])


def render_quality(model: YolosForObjectDetection, num: int, seed: int) -> dict[str, float]:
    """How well the objects of fresh renders are found; an object is found at an IoU of .5 or more."""
    rng = numpy_rng(seed, "detector quality")
    scenes = [sample_scene(sample_caption(rng), rng) for _ in range(num)]
    shapes, boxes = targets(scenes)
    confidence, seen, places = detect(model, images_of(scenes))
    sure, present = confidence >= CONFIDENCE, shapes < NONE
    overlap = overlaps(places[:, :, None], boxes[:, None])[0] * sure[:, :, None]
    best, owner = overlap.max(1)
    found = present & (best >= 0.5)
    return {
        "count right": float((sure.sum(1) == present.sum(1)).float().mean()),
        "found": float(found.sum() / present.sum()),
        "IoU of the found": float(best[found].mean()),
        "shape of the found right": float((seen.gather(1, owner) == shapes)[found].float().mean()),
    }


def sample_quality(
    model: YolosForObjectDetection, images: Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """How well the detector agrees with the world's eyes, :func:`observe`, on generated images.

    Shapes are compared for the objects whose shape is clear, and which lie in the box of a detection.
    """
    confidence, shapes, boxes = detect(model, images)
    sure = confidence >= CONFIDENCE
    asked = [sum(group.count for group in parse(caption).groups) for caption in captions]
    clear, agreed, counts = 0, [], []
    for row, image in enumerate(images):
        objects = observe(image).objects
        counts.append(len(objects))
        for thing in objects:
            if thing.shape:
                clear += 1
                offset = boxes[row, :, :2] - torch.tensor([thing.x, thing.y]) / IMAGE_SIDE
                inside = sure[row] & (offset.abs() < boxes[row, :, 2:] / 2).all(1)
                nearest = offset.norm(dim=1).where(inside, torch.inf).argmin()
                if inside.any():
                    agreed.append(SHAPES[int(shapes[row, nearest])] == thing.shape)
    seen = sure.sum(1).numpy()
    return {
        "count agrees": float(np.mean(seen == np.array(counts))),
        "count as asked": float(np.mean(seen == np.array(asked))),
        "count as asked, observed": float(np.mean(np.array(counts) == np.array(asked))),
        "clear objects found": len(agreed) / max(1, clear),
        "shape agrees": float(np.mean(agreed)) if agreed else math.nan,
    }


def detector_quality(
    folder: Path, images: Tensor, captions: Sequence[str], num: int, seed: int
) -> dict[str, float]:
    """Measure a detector on fresh renders and on generated images.

    Args:
        folder: As :func:`make_detector` writes it.
        images: Generated images ``(N, 3, 64, 64)`` in [0, 1].
        captions: Of the generated images.
        num: How many renders.
        seed: Of the renders.

    Returns:
        Shares, and the mean IoU; the names of those of generated images begin with "samples, ".
    """
    model: Any = YolosForObjectDetection.from_pretrained(folder, attn_implementation="eager")
    samples = sample_quality(model.eval(), images, captions)
    return {
        **render_quality(model, num, seed),
        **{f"samples, {name}": value for name, value in samples.items()},
    }
