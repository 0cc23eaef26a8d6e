"""The curves of a run as one image: loss, rate and the metrics of validation, a panel for each.

Drawn with Pillow alone, at twice the size and then halved, so that lines are smooth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

RGB = NDArray[np.uint8]
Point = tuple[float, float]

SMOOTH = 2  # drawn larger by this, then reduced
WIDTH, HEIGHT, COLUMNS = 420, 260, 3  # pixels of a panel; panels in a row
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 36, 30  # its margins
MOST_PANELS, FONT, TICKS = 12, 12, 4
PAPER, INK, GRID = (255, 255, 255), (40, 44, 52), (224, 226, 230)
COLOURS = {"train": (31, 98, 176), "validate": (196, 78, 28)}
HIDDEN = {"kind", "step", "epoch", "images_per_second"}


def draw_curves(lines: Iterable[Mapping[str, object]]) -> RGB:
    """Draw the metrics of a log's lines that are finite numbers against the step, [H, W, 3].

    Up to twelve panels, training before validation; an empty one where there is nothing to draw.
    """
    curves: dict[tuple[str, str], list[Point]] = {}
    for line in lines:
        for name, value in line.items():
            if name in HIDDEN or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                key = (str(line["kind"]), name)
                curves.setdefault(key, []).append((float(str(line["step"])), float(value)))
    shown = sorted(curves, key=lambda key: key[0])[:MOST_PANELS]  # stable: names in their order
    columns = min(COLUMNS, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    size = columns * WIDTH, rows * HEIGHT
    sheet = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH), PAPER)
    for number, (kind, name) in enumerate(shown):
        corner = number % columns * WIDTH, number // columns * HEIGHT
        _draw_panel(ImageDraw.Draw(sheet), corner, kind, name, curves[kind, name])
    return np.array(sheet.resize(size, Image.Resampling.LANCZOS))


def _draw_panel(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], kind: str, name: str, points: list[Point]
) -> None:
    """One curve with its title, grid and numbers."""
    font = ImageFont.load_default(size=FONT * SMOOTH)
    x0, y0 = corner[0] + LEFT, corner[1] + TOP
    x1, y1 = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
    (first, last), (low, high) = (_range(list(axis)) for axis in zip(*points, strict=True))

    def place(step: float, value: float) -> Point:
        x = x0 + (x1 - x0) * (step - first) / (last - first)
        y = y1 - (y1 - y0) * (value - low) / (high - low)
        return x * SMOOTH, y * SMOOTH

    for i in range(TICKS + 1):
        value = low + (high - low) * i / TICKS
        left, right = place(first, value), place(last, value)
        pen.line([left, right], fill=GRID, width=SMOOTH)
        at = (left[0] - 6 * SMOOTH, left[1])
        pen.text(at, f"{value:.3g}", fill=INK, font=font, anchor="rm")
    for step, anchor in ((first, "la"), (last, "ra")):
        x, y = place(step, low)
        pen.text((x, y + 6 * SMOOTH), f"{step:.0f}", fill=INK, font=font, anchor=anchor)
    title = x0 * SMOOTH, (corner[1] + TOP // 2) * SMOOTH
    pen.text(title, f"{kind}: {name}", fill=INK, font=font, anchor="lm")
    colour = COLOURS.get(kind, INK)
    places = [place(*point) for point in points]
    if len(places) > 1:
        pen.line(places, fill=colour, width=2 * SMOOTH, joint="curve")
    if len(places) <= 40:
        for x, y in places:
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)


def _range(values: list[float]) -> Point:
    """Lowest and highest, apart even where they are alike."""
    low, high = min(values), max(values)
    if high > low:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin
