"""The quality report as a Markdown table and an image."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

COLUMNS = ("background", "colours", "shapes", "count", "sizes", "relation", "score", "whole")
KINDS = ("whole, one group", "whole, two groups", "whole, relations")


def write_table(path: Path, report: dict[str, Any]) -> None:
    """One row per way of sampling, then what was measured without sampling."""
    names = ("steps", "eta", "guidance", *COLUMNS, *KINDS, "framed", "CPU-seconds of 64")
    lines: list[str] = []
    for part in (part for part, rows in report.items() if isinstance(rows, list)):
        lines += ["", f"{part}:", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        for cell in report[part]:
            values = [f"{cell[name]:g}" for name in names[:3]] + [
                f"{cell.get(name, float('nan')):.2f}" for name in names[3:-1]
            ]
            lines.append("| " + " | ".join([*values, f"{cell[names[-1]]:.1f}"]) + " |")
    for part in (name for name, value in report.items() if isinstance(value, dict)):
        lines += ["", f"| {part} | |", "|---|---|"]
        lines += [f"| {name} | {value:.3f} |" for name, value in report[part].items()]
    lines += ["", f"Red among the objects of open prompts: {report['red in open prompts']:.2f}"]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def write_grid(
    path: Path, images: Tensor, captions: Sequence[str], columns: int = 8, rows: int = 5, scale: int = 2
) -> None:
    """The first images, enlarged, with their prompts below.

    Args:
        path: PNG file.
        images: ``(N, 3, 64, 64)`` in [0, 1].
        captions: N prompts.
        columns: Images in a row.
        rows: Rows.
        scale: Enlargement.
    """
    side, text = 64 * scale, 40
    canvas = Image.new("RGB", (columns * (side + 8), rows * (side + text)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(9)
    for number, (image, caption) in enumerate(zip(images[: columns * rows], captions, strict=False)):
        pixels = (image.permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8)
        x, y = number % columns * (side + 8), number // columns * (side + text)
        canvas.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y + side + 1), "\n".join(textwrap.wrap(caption, 28)), fill="black", font=font, spacing=0)
    canvas.save(path, optimize=True)
