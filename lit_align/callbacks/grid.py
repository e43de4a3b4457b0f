"""Images in rows, with captions that are never cut."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, GAP, LINE, FONT_SIZE = 6, 3, 15, 12
"""Pixels: around a cell, between its images, from line to line of a caption, and of its letters."""


def uint8(images: Tensor) -> Tensor:
    """Images ``(..., 3, H, W)`` in [0, 1] as whole numbers on the CPU; what is not finite is black."""
    return (images.float().nan_to_num(0.0) * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def pixels(image: Tensor) -> np.ndarray:
    """One image ``(3, H, W)``, uint8, as ``(H, W, 3)`` for Pillow and TensorBoard."""
    return image.permute(1, 2, 0).numpy()


def shrink(image: Tensor, side: int) -> Tensor:
    """An image ``(3, H, W)``, uint8, whose longer side has at most ``side`` pixels."""
    picture = Image.fromarray(pixels(image))
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text at most ``width`` pixels wide; only a single word may be wider, and is broken."""
    font, lines = ImageFont.load_default(FONT_SIZE), []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            while font.getlength(word) > width:
                fits = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width or n == 1)
                lines += [line] if line else []
                line, lines, word = "", [*lines, word[:fits]], word[fits:]
            longer = f"{line} {word}".strip()
            if font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def image_grid(
    cells: Sequence[Sequence[Tensor]], captions: Sequence[str], columns: int, side: int = 160
) -> Image.Image:
    """Cells in rows, each with some images beside each other and a caption below.

    Args:
        cells: The images of each cell, ``(3, H, W)`` uint8; as many in every cell, all of one size.
        captions: A text for each cell, with line breaks where wanted.
        columns: Cells in a row.
        side: Longer side of an image in the grid, in pixels.
    """
    height, width = cells[0][0].shape[1:]
    scale = side / max(height, width)
    width, height = round(width * scale), round(height * scale)
    cell_width = len(cells[0]) * (width + GAP) - GAP
    texts = [wrap(caption, cell_width) for caption in captions]
    rows = [range(start, min(start + columns, len(cells))) for start in range(0, len(cells), columns)]
    heights = [height + LINE * max(len(texts[i]) for i in row) + 2 * MARGIN for row in rows]
    columns = min(columns, len(cells))
    grid = Image.new("RGB", (columns * (cell_width + 2 * MARGIN), sum(heights)), "white")
    draw, font, top = ImageDraw.Draw(grid), ImageFont.load_default(FONT_SIZE), MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for place, i in enumerate(row):
            left = place * (cell_width + 2 * MARGIN) + MARGIN
            for number, image in enumerate(cells[i]):
                picture = Image.fromarray(pixels(image)).resize((width, height), Image.Resampling.BICUBIC)
                grid.paste(picture, (left + number * (width + GAP), top))
            for number, line in enumerate(texts[i]):
                draw.text((left, top + height + LINE * number), line, fill="black", font=font)
        top += row_height
    return grid
