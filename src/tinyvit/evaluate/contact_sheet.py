"""The best and the worst answers to one click, as one picture to look at.

Each cell shows a picture with what the model found (filled), the truth (white line) and the click,
and below it the IoU. Only the cells that can still be shown are held, in the size of a cell.

Shapes: H W a picture.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tinyvit.images.draw import save_png
from tinyvit.images.segments import draw_masks, draw_points

from .mask_metrics import Mask
from .segment import Shown

__all__ = ["ContactSheet"]

RGB = NDArray[np.uint8]
Colour = tuple[int, int, int]

CELL_WIDTH, CELL_HEIGHT, GAP, MARGIN = 400, 300, 20, 36  # pixels
CAPTION, HEADING, TITLE = 46, 52, 64  # pixels high
PAPER, GROUND, INK, FAINT = (255, 255, 255), (240, 241, 244), (28, 32, 40), (118, 124, 136)
FOUND: Colour = (38, 110, 255)
TRUTH: Colour = (255, 255, 255)
STRENGTH = 0.5
COLUMNS = 4


@dataclass(frozen=True)
class _Cell:
    iou: float
    order: int
    picture: RGB
    words: str


class ContactSheet:
    """Collects answers; pass it to ``evaluate_segment`` as ``watch``.

    Args:
        count: How many of the best and how many of the worst are shown.

    Raises:
        ValueError: ``count`` is below 1.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, but is {count}")
        self.count = count
        self._seen = 0
        self._best: list[_Cell] = []
        self._worst: list[_Cell] = []

    def __call__(self, shown: Shown) -> None:
        """Look at one answer, and keep it if it is among the best or the worst so far."""
        iou = shown.case.click_ious[0]
        is_good = len(self._best) < self.count or iou > self._best[-1].iou
        is_bad = len(self._worst) < self.count or iou < self._worst[-1].iou
        self._seen += 1
        if not (is_good or is_bad):
            return
        words = shown.case.label or shown.case.picture
        cell = _Cell(iou, self._seen, _draw(shown), words)
        if is_good:
            self._best.append(cell)
            self._best.sort(key=lambda one: (-one.iou, one.order))
            del self._best[self.count :]
        if is_bad:
            self._worst.append(cell)
            self._worst.sort(key=lambda one: (one.iou, one.order))
            del self._worst[self.count :]

    def draw(self, title: str = "One click") -> RGB:
        """The sheet; an answer is never shown twice.

        Args:
            title: The line at its top.

        Returns:
            RGB [H, W, 3] uint8.

        Raises:
            ValueError: Nothing was collected.
        """
        if not self._best:
            raise ValueError("there is nothing to show: no answer was collected")
        half = max(1, min(self.count, (self._seen + 1) // 2))
        best = self._best[:half]
        shown = {cell.order for cell in best}
        worst = [cell for cell in self._worst if cell.order not in shown]
        parts = [(name, cells) for name, cells in (("Best", best), ("Worst", worst)) if cells]
        columns = min(COLUMNS, max(len(cells) for _, cells in parts))
        width = 2 * MARGIN + columns * CELL_WIDTH + (columns - 1) * GAP
        row = CELL_HEIGHT + CAPTION + GAP
        rows = sum(-(-len(cells) // columns) for _, cells in parts)
        height = MARGIN + TITLE + len(parts) * HEADING + rows * row + MARGIN - GAP
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        _write(pen, (MARGIN, MARGIN), title, 30, INK)
        legend = "filled: found     white line: truth     dot: the click"
        right = width - MARGIN - pen.textlength(legend, font=ImageFont.load_default(size=16))
        if right > MARGIN + pen.textlength(title, font=ImageFont.load_default(size=30)) + GAP:
            _write(pen, (right, MARGIN + 13), legend, 16, FAINT)
        top = MARGIN + TITLE
        for name, cells in parts:
            pen.line((MARGIN, top, width - MARGIN, top), fill=GROUND, width=2)
            _write(pen, (MARGIN, top + 14), name, 22, INK)
            top += HEADING
            for place, cell in enumerate(cells):
                line, column = divmod(place, columns)
                _place(sheet, pen, cell, MARGIN + column * (CELL_WIDTH + GAP), top + line * row)
            top += -(-len(cells) // columns) * row
        return np.array(sheet)

    def save(self, path: str | os.PathLike[str], title: str = "One click") -> None:
        """Write the sheet as a PNG, whole or not at all.

        Raises:
            ValueError: Nothing was collected.
            OSError: The file cannot be written.
        """
        save_png(path, self.draw(title))


def _draw(shown: Shown) -> RGB:
    """One answer, in the size of a cell or smaller."""
    height, width = shown.image.shape[:2]
    scale = min(CELL_WIDTH / width, CELL_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.array(Image.fromarray(shown.image).resize(size, Image.Resampling.LANCZOS))
    drawn = draw_masks(small, [_shrunk(shown.predicted, size)], [FOUND], STRENGTH, outlines=False)
    target = _shrunk(shown.target, size)
    grown = np.asarray(Image.fromarray(target).convert("L").filter(ImageFilter.MaxFilter(3))) > 127
    drawn = draw_masks(drawn, [grown], [INK], 0.0)  # or the line would vanish on white
    drawn = draw_masks(drawn, [target], [TRUTH], 0.0)
    return draw_points(drawn, [[shown.point[0] * scale, shown.point[1] * scale]], [1])


def _shrunk(mask: Mask, size: tuple[int, int]) -> Mask:
    grey = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    return np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) > 127


def _place(sheet: Image.Image, pen: ImageDraw.ImageDraw, cell: _Cell, left: int, top: int) -> None:
    """A cell on its ground, its caption below."""
    pen.rectangle((left, top, left + CELL_WIDTH - 1, top + CELL_HEIGHT - 1), fill=GROUND)
    height, width = cell.picture.shape[:2]
    corner = left + (CELL_WIDTH - width) // 2, top + (CELL_HEIGHT - height) // 2
    sheet.paste(Image.fromarray(cell.picture), corner)
    number = f"{cell.iou:.2f}"
    _write(pen, (left, top + CELL_HEIGHT + 8), number, 20, INK)
    after = left + pen.textlength(number, font=ImageFont.load_default(size=20)) + 12
    words, font = cell.words, ImageFont.load_default(size=16)
    while words and after + pen.textlength(words, font=font) > left + CELL_WIDTH:
        words = words[:-2].rstrip("…") + "…" if len(words) > 2 else ""
    _write(pen, (after, top + CELL_HEIGHT + 11), words, 16, FAINT)


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, colour: Colour
) -> None:
    pen.text(place, text, fill=colour, font=ImageFont.load_default(size=size))
