"""A model of preferences in PickScore's format: CLIP, fine-tuned on pairs of images of one caption."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from lit_align.errors import ConfigError
from lit_align.shapes.recipe.agreement import agreement
from lit_align.shapes.recipe.clip import Contrast, embed_images, embed_texts, load_clip
from lit_align.shapes.recipe.images import Images, as_images, held_out
from lit_align.shapes.recipe.pipeline import save_clip
from lit_align.shapes.recipe.preferences import counted_rng, prefer
from lit_align.shapes.recipe.training import Batches, Budget, Stage, fit
from lit_align.shapes.world import Bytes, judge, utility

PEAK = 6e-4
SCALE, SCALE_RATE = 10.0, 1e-2
"""Where the scale of the scores begins, and its highest learning rate."""

ANNOTATORS = 16
"""Of a training pair."""

CONTRAST, DRAWN = 0.05, 48
"""Weight of the contrastive loss, and its images in a batch."""

PROMPTS_AT_ONCE = 24
"""Prompts of a batch: with four images each, as in Shapes-Pick, 96 images and 144 pairs."""


COLUMNS = ["caption", "image_0_uid", "image_1_uid", "jpg_0", "jpg_1", "label_0", "label_1"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of images with the preferences between them.

    Attributes:
        captions: Of each of the P pairs.
        pixels: ``(N, 64, 64, 3)`` uint8, every image once.
        places: ``(P, 2)`` long, the places of each pair's images in ``pixels``.
        labels: ``(P, 2)`` float32: (1, 0), (0, 1), or (.5, .5) for a tie; shares of a panel's votes.
    """

    captions: list[str]
    pixels: Bytes
    places: Tensor
    labels: Tensor

    def images(self, places: Tensor) -> Tensor:
        """Images ``(B, 3, 64, 64)`` float32 in [0, 1]."""
        return as_images(self.pixels[places.numpy()])

    def asked(self) -> list[str]:
        """Of each of the N images the caption that it was made for."""
        pairs = zip(self.places.tolist(), self.captions, strict=True)
        captions = {place: caption for places, caption in pairs for place in places}
        return [captions[place] for place in range(len(self.pixels))]


def read_pairs(place: Path, for_training: bool) -> Pairs:
    """Read pairs in Pick-a-Pic's schema.

    Args:
        place: A Parquet file, or a folder of them.
        for_training: Leave out prompts that are held out from reward models.

    Raises:
        ConfigError: There are no pairs.
    """
    files = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    rows = [row for file in files for row in parquet.read_table(file, columns=COLUMNS).to_pylist()]
    rows = [row for row in rows if not (for_training and held_out(row["caption"]))]
    if not rows:
        raise ConfigError(f"There are no preference pairs to be used in {place}.")
    coded = {row[f"image_{side}_uid"]: row[f"jpg_{side}"] for row in rows for side in (0, 1)}
    places = {uid: place for place, uid in enumerate(coded)}
    return Pairs(
        [row["caption"] for row in rows],
        np.stack([np.asarray(Image.open(io.BytesIO(jpg)).convert("RGB")) for jpg in coded.values()]),
        torch.tensor([[places[row["image_0_uid"]], places[row["image_1_uid"]]] for row in rows]),
        torch.tensor([[row["label_0"], row["label_1"]] for row in rows], dtype=torch.float32),
    )


def ask_panel(pairs: Pairs, seed: int) -> Pairs:
    """The same pairs, each judged by ``ANNOTATORS`` more people of the same taste; labels are their mean.

    One label of a pair is mostly chance where the images are nearly alike, and a small model learns the
    chance: with 36,000 pairs the first edition's named 68 % of fresh labels after panels, 63 % after single
    labels.
    """
    worth = [utility(*shown) for shown in zip(pairs.pixels, pairs.asked(), strict=True)]
    rng = counted_rng(seed, "panel")
    first = [
        np.mean([prefer(worth[i], worth[j], rng) for _ in range(ANNOTATORS)])
        for i, j in pairs.places.tolist()
    ]
    labels = torch.tensor(np.stack([first, 1 - np.array(first)], axis=1), dtype=torch.float32)
    return replace(pairs, labels=labels)


def preference_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """KL divergence of the softmax over two scores from the labels (Kirstain et al. 2023, section 4).

    Args:
        scores: ``(P, 2)``.
        labels: ``(P, 2)`` shares that sum to 1.

    Returns:
        ``(P,)``; 0 where the scores say what the labels say.
    """
    return F.kl_div(scores.log_softmax(-1), labels, reduction="none").sum(-1)


class PreferenceStage(Stage):
    """All pairs of some prompts at a time, so that no image of a batch is looked at twice.

    Each prompt counts alike, however many pairs it has, as in the published training. Two departures from it,
    because this CLIP is small and still learns. Fine-tuned on pairs alone the first edition's forgot facts
    faster than it learnt taste (78 % of the pairs that differ in a fact before, 68 % after), so the
    contrastive loss goes on beside. And the scale of the scores is learnt by itself, from 10: CLIP's own
    scale of 100 is made to single out one caption of many, and on pairs it is far too sure.
    """

    def __init__(self, model: CLIPModel, pairs: Pairs, contrast: Contrast, seed: int, budget: Budget) -> None:
        super().__init__(model, peak=PEAK, budget=budget, decay=0.99, warmup=20)
        self.pairs, self.contrast = pairs, contrast
        self.log_scale = nn.Parameter(torch.tensor(SCALE).log())
        self.draws = torch.Generator().manual_seed(seed)
        rows: dict[str, list[int]] = {}
        for row, caption in enumerate(pairs.captions):
            rows.setdefault(caption, []).append(row)
        self.prompts, self.rows = list(rows), list(rows.values())

    def parameter_groups(self) -> list[dict[str, object]]:
        """The scale moves faster than the weights: it is one number, far from where it belongs."""
        return [*super().parameter_groups(), {"params": [self.log_scale], "scale": SCALE_RATE / PEAK}]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """One batch of prompt numbers ``(B,)``, and drawn images beside."""
        scores, labels, shares = self.compare(batch.tolist())
        loss = (shares * preference_loss(scores, labels)).sum()
        drawn = torch.randint(len(self.contrast.allowed), (DRAWN,), generator=self.draws)
        contrast = self.contrast(self.model, drawn)
        said = labels[:, 0] != 0.5
        right = ((scores[:, 0] > scores[:, 1]) == (labels[:, 0] > 0.5))[said]
        self.log_dict({"loss": loss, "right": right.float().mean(), "R@1": contrast["R@1"]}, prog_bar=True)
        return loss + CONTRAST * contrast["loss"]

    def compare(self, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and labels ``(P, 2)`` of the pairs of some prompts; their shares in the loss ``(P,)``."""
        rows = torch.tensor([row for number in numbers for row in self.rows[number]])
        owners = torch.tensor([i for i, number in enumerate(numbers) for _ in self.rows[number]])
        shares = torch.tensor([1 / len(self.rows[number]) for number in numbers])[owners] / len(numbers)
        places, own = self.pairs.places[rows].unique(return_inverse=True)
        captions = [self.prompts[number] for number in numbers]
        ids: Tensor = self.contrast.tokenizer(captions, padding=True, return_tensors="pt").input_ids
        texts = embed_texts(self.model, ids)[owners]
        seen = embed_images(self.model, self.pairs.images(places))[own]
        return self.log_scale.exp() * (seen * texts[:, None]).sum(-1), self.pairs.labels[rows], shares


def make_preference(out: Path, budget: Budget, precision: str, seed: int) -> None:
    """Fine-tune ``out/clip`` on the pairs in ``out/pick`` and write ``out/preference``.

    Args:
        out: The recipe's folder.
        budget: How long to train.
        precision: Lightning's.
        seed: Of the order of the prompts.
    """
    tokenizer = CLIPTokenizer.from_pretrained(out / "clip")
    pairs = ask_panel(read_pairs(out / "pick", for_training=True), seed)
    contrast = Contrast(Images(out / "images", seed + 1), tokenizer)  # other wrong captions than CLIP's
    stage = PreferenceStage(load_clip(out / "clip"), pairs, contrast, seed, budget)
    batches = Batches(len(stage.prompts), min(PROMPTS_AT_ONCE, len(stage.prompts)), seed)
    fit(stage, batches, out / "logs" / "preference", precision)
    with torch.no_grad():
        stage.average.logit_scale.copy_(stage.log_scale)
    save_clip(out / "preference", tokenizer, stage.average)


@torch.no_grad()
def preference_scores(folder: Path, images: Tensor, captions: Sequence[str]) -> Tensor:
    """Scale times cosine, ``(N,)``, of images ``(N, 3, 64, 64)`` in [0, 1] with their captions."""
    model, tokenizer = load_clip(folder), CLIPTokenizer.from_pretrained(folder)
    scores = []
    for start in range(0, len(images), 128):
        part = slice(start, start + 128)
        ids: Tensor = tokenizer(list(captions[part]), padding=True, return_tensors="pt").input_ids
        scores.append((embed_images(model, images[part]) * embed_texts(model, ids)).sum(-1))
    return model.logit_scale.exp() * torch.cat(scores)


def preference_quality(
    folder: Path, fresh: Path, images: Tensor, captions: Sequence[str]
) -> dict[str, float]:
    """How often the model prefers as the annotator does, and how its scores go with what the world knows.

    Args:
        folder: Of the model; that of the CLIP that it comes from shows what the fine-tuning brought.
        fresh: Pairs of another seed than the training's.
        images: Generated images ``(N, 3, 64, 64)`` in [0, 1].
        captions: Their N prompts.
    """
    pairs = read_pairs(fresh, for_training=False)
    said = pairs.asked()
    scores = preference_scores(folder, as_images(pairs.pixels), said)[pairs.places]
    worth = torch.tensor([utility(*shown) for shown in zip(pairs.pixels, said, strict=True)])[pairs.places]
    ahead = scores[:, 0] > scores[:, 1]
    labelled, unequal = pairs.labels[:, 0] != 0.5, worth[:, 0] != worth[:, 1]
    generated = preference_scores(folder, images, captions)
    shown = list(zip(images, captions, strict=True))
    return {
        "pairs, loss": float(preference_loss(scores, pairs.labels).mean()),
        "pairs, as labelled": float((ahead == (pairs.labels[:, 0] > 0.5))[labelled].float().mean()),
        "pairs, by utility": float((ahead == (worth[:, 0] > worth[:, 1]))[unequal].float().mean()),
        **agreement(generated, [judge(*each).score for each in shown], "judge, generated"),
        **agreement(generated, [utility(*each) for each in shown], "utility, generated"),
    }
