"""The most confidently wrong pictures of a classifier, as one picture to look at.

Each cell shows a picture and below it what it is and what it was taken for, with the model's
probability. Small pictures are enlarged so that their pixels can be seen.

Shapes: H W a picture.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tinyvit.images.decode import decode

from .classify import ClassifyReport, LabelledPictures, WrongPicture

__all__ = ["draw_wrong"]

RGB = NDArray[np.uint8]

CELL, GAP, MARGIN, CAPTION, TITLE, COLUMNS = 220, 20, 36, 52, 56, 4  # pixels; cells in a row
PAPER, GROUND, INK, FAINT = (255, 255, 255), (240, 241, 244), (28, 32, 40), (118, 124, 136)


def draw_wrong(
    report: ClassifyReport, pictures: LabelledPictures, title: str = "Most confidently wrong"
) -> RGB:
    """Draw the wrong pictures of a report.

    Args:
        report: What was measured.
        pictures: The list it was measured on.
        title: The line at the top.

    Returns:
        RGB [H, W, 3] uint8, for ``tinyvit.images.draw.save_png``.

    Raises:
        ValueError: No picture is wrong.
        ImageError: A picture cannot be read any more.
    """
    cells = report.wrong
    if not cells:
        raise ValueError("there is nothing to show: no picture was taken for another class")
    columns = min(COLUMNS, len(cells))
    row = CELL + CAPTION + GAP
    font = ImageFont.load_default(size=24)
    width = 2 * MARGIN + max(columns * (CELL + GAP) - GAP, round(font.getlength(title)))
    height = MARGIN + TITLE + -(-len(cells) // columns) * row - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, INK, font)
    for place, cell in enumerate(cells):
        line, column = divmod(place, columns)
        left, top = MARGIN + column * (CELL + GAP), MARGIN + TITLE + line * row
        image = _fitted(decode(pictures.source(cell.index)))
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=GROUND)
        sheet.paste(image, (left + (CELL - image.width) // 2, top + (CELL - image.height) // 2))
        _write(pen, left, top + CELL + 6, cell)
    return np.array(sheet)


def _fitted(image: RGB) -> Image.Image:
    """Into a cell: shrunk smoothly, or enlarged pixel by pixel."""
    height, width = image.shape[:2]
    scale = min(CELL / width, CELL / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    way = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(image).resize(size, way)


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, cell: WrongPicture) -> None:
    lines = (
        (f"is {cell.label}", INK),
        (f"taken for {cell.predicted}, {cell.probability:.0%}", FAINT),
    )
    font = ImageFont.load_default(size=16)
    for number, (text, colour) in enumerate(lines):
        while pen.textlength(text, font=font) > CELL and len(text) > 1:
            text = f"{text[:-4]}..." if len(text) > 4 else text[:-1]
        pen.text((left, top + 21 * number), text, colour, font)
