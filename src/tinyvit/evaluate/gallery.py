"""Images in a grid with captions, under a title: the gallery of a segmenter and of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RGB = NDArray[np.uint8]

GAP, MARGIN, COLUMNS = 20, 36, 4  # pixels; cells in a row
CAPTION, HEADING, TITLE = 52, 52, 64  # pixels high
PAPER, GROUND, INK, FAINT = (255, 255, 255), (240, 241, 244), (28, 32, 40), (118, 124, 136)


@dataclass(frozen=True)
class Cell:
    """An image [H, W, 3] uint8, at most as large as its cell, and two lines below it."""

    image: RGB
    first: str
    second: str


def fit_into(image: RGB, size: tuple[int, int]) -> RGB:
    """Fit an image into a cell (width, height): shrunk smoothly, or enlarged pixel by pixel."""
    height, width = image.shape[:2]
    scale = min(size[0] / width, size[1] / height)
    fitted = max(1, round(width * scale)), max(1, round(height * scale))
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return np.array(Image.fromarray(image).resize(fitted, way))


def draw_gallery(
    sections: Sequence[tuple[str, Sequence[Cell]]],
    size: tuple[int, int],
    title: str,
    legend: str = "",
) -> RGB:
    """Draw cells of one size (width, height), each section under its heading if it has one."""
    columns = min(COLUMNS, max(len(cells) for _, cells in sections))
    rows = sum(-(-len(cells) // columns) for _, cells in sections)
    row = size[1] + CAPTION + GAP
    large, small = (ImageFont.load_default(size=points) for points in (26, 16))
    width = 2 * MARGIN + max(columns * (size[0] + GAP) - GAP, round(large.getlength(title)))
    headings = sum(HEADING for heading, _ in sections if heading)
    sheet = Image.new("RGB", (width, 2 * MARGIN + TITLE + headings + rows * row - GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, large)
    right = width - MARGIN - small.getlength(legend)
    if right > MARGIN + large.getlength(title) + GAP:
        pen.text((right, MARGIN + 10), legend, FAINT, small)
    top = MARGIN + TITLE
    for heading, cells in sections:
        if heading:
            pen.line((MARGIN, top, width - MARGIN, top), fill=GROUND, width=2)
            pen.text((MARGIN, top + 14), heading, INK, ImageFont.load_default(size=22))
            top += HEADING
        for place, cell in enumerate(cells):
            line, column = divmod(place, columns)
            left, upper = MARGIN + column * (size[0] + GAP), top + line * row
            pen.rectangle((left, upper, left + size[0] - 1, upper + size[1] - 1), fill=GROUND)
            height, wide = cell.image.shape[:2]
            corner = left + (size[0] - wide) // 2, upper + (size[1] - height) // 2
            sheet.paste(Image.fromarray(cell.image), corner)
            for number, (text, ink) in enumerate(((cell.first, INK), (cell.second, FAINT))):
                place_of_text = left, upper + size[1] + 6 + 21 * number
                pen.text(place_of_text, _cut(text, size[0], small), ink, small)
        top += -(-len(cells) // columns) * row
    return np.array(sheet)


def _cut(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """As much of a text as fits into some pixels."""
    while font.getlength(text) > width and len(text) > 1:
        text = f"{text[:-4]}..." if len(text) > 4 else text[:-1]
    return text
