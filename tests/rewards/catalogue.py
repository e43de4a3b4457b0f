"""The table of published scorers on the rewards' page: ``python -m tests.rewards.catalogue`` writes it.

What the classes declare is read from them; sizes are checked against the architectures.
"""

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lit_align.rewards

PAGE = Path(lit_align.rewards.__file__).with_name("README.md")

HEADER = ["reward", "source", "format", "gradient", "scale", "memory", "licence"]

BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Scorer:
    """A published scorer.

    Attributes:
        source: Who published it.
        form: What is downloaded.
        scale: What its numbers are.
        millions: Parameters of the default models.
        licence: Of the weights, as their page says.
    """

    source: str
    form: str
    scale: str
    millions: float
    licence: str


CLIP_L, CLIP_H, BLIP, QWEN, YOLOS_TINY, YOLOS_BASE, OWL = 427.6, 986.1, 446.1, 8291.4, 6.5, 127.8, 155.0
"""Millions of parameters: CLIP ViT-L/14 and ViT-H/14, BLIP large, Qwen2-VL 7B, detectors."""

CATALOGUE = {
    "CLIPScore": Scorer("Hessel et al. 2021", "CLIPModel", "cosine, about .1 to .35", CLIP_L, "MIT (code)"),
    "PickScore": Scorer(
        "Kirstain et al. 2023", "CLIPModel", "100 times cosine, about 17 to 24", CLIP_H, "MIT (code)"
    ),
    "HPSv2": Scorer(
        "Wu et al. 2023", "open_clip `.pt`, or CLIPModel", "cosine, about .2 to .35", CLIP_H, "Apache-2.0"
    ),
    "ImageReward": Scorer(
        "Xu et al. 2023", "BLIP and head `.pt`", "mean 0, about -2 to 2", BLIP, "Apache-2.0"
    ),
    "AestheticScore": Scorer(
        "Schuhmann et al. 2022", "CLIPModel and head `.pth`", "1 to 10", CLIP_L, "MIT (code), Apache-2.0"
    ),
    "HPSv3": Scorer("Ma et al. 2025", "`.safetensors` on Qwen2-VL", "about 0 to 15", QWEN - 544.6, "MIT"),
    "VQAScore": Scorer(
        "Lin et al. 2024", "any image-text-to-text model", "probability, 0 to 1", QWEN, "Apache-2.0"
    ),
    "UnifiedReward": Scorer("Wang et al. 2025", "any image-text-to-text model", "1 to 5", QWEN, "MIT"),
    "GenEval": Scorer(
        "Ghosh et al. 2023, Liu et al. 2025",
        "any detector, and CLIPModel",
        "1 is all, can be negative",
        YOLOS_BASE + CLIP_L,
        "Apache-2.0, MIT (code)",
    ),
    "ObjectPresence": Scorer("Zhang et al. 2024", "any detector", "confidence, 0 to 1", OWL, "Apache-2.0"),
    "ObjectCount": Scorer("ours", "YOLOS or DETR", "minus a number", YOLOS_TINY, "Apache-2.0"),
    "OCR": Scorer("Liu et al. 2025", "in the package rapidocr", "0 to 1", 8.0, "Apache-2.0"),
}


def default(kind: type, name: str, otherwise: Any) -> Any:
    """The default of an argument of a constructor."""
    parameter = inspect.signature(kind).parameters.get(name)
    return otherwise if parameter is None else parameter.default


def memory(kind: type, millions: float) -> str:
    """What the weights take in their default precision."""
    taken = millions * BYTES[default(kind, "dtype", "float32")] / 1000
    return f"{taken:.1f} GB" if taken >= 0.1 else f"{1000 * taken:.0f} MB"


def table() -> str:
    """The table, as Markdown."""
    lines = [" | ".join(HEADER), "|".join(["---"] * len(HEADER))]
    for name, scorer in CATALOGUE.items():
        kind = getattr(lit_align.rewards, name)
        gradient = "yes" if kind.differentiable else "no"
        cells = [f"`{name}`", scorer.source, scorer.form, gradient, scorer.scale]
        lines.append(" | ".join([*cells, memory(kind, scorer.millions), scorer.licence]))
    return "".join(f"| {line} |\n" if "---" not in line else f"|{line}|\n" for line in lines)


def found(page: str) -> str:
    """The table on a page."""
    there = re.search(rf"\| {' [|] '.join(HEADER)} \|\n(?:\|.*\n)+", page)
    assert there is not None, f"no table with the columns {', '.join(HEADER)}"
    return there[0]


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(found(text), table()))
