"""Smooth lines and dots on a picture: where they lie, how far each pixel is, how colours mix.

A pixel takes as much of a colour as lies within half a pixel of the edge, so that no staircase is
seen and positions need not be whole numbers. What is drawn, and in which colours, is not known
here.

Letters: H, W picture. Positions are continuous: the pixel in row i and column j covers y from i to
i + 1 and x from j to j + 1. A part of a picture is its (rows, columns), two slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["bands", "centres", "distance_to_box", "paint", "window", "within"]

RGB = NDArray[np.uint8]
Floats = NDArray[np.float32]
Colour = tuple[int, int, int]
Part = tuple[slice, slice]

BLOCK = 1 << 20  # pixels mixed at once


def window(out: RGB, x0: float, y0: float, x1: float, y1: float) -> Part:
    """Give the rows and columns of a part of the picture; none where it lies outside."""
    height, width = out.shape[:2]
    left, right = (int(min(max(x, 0), width)) for x in (math.floor(x0), math.ceil(x1)))
    top, bottom = (int(min(max(y, 0), height)) for y in (math.floor(y0), math.ceil(y1)))
    return slice(top, bottom), slice(left, right)


def bands(out: RGB, box: Sequence[float], reach: float) -> list[Part]:
    """Give four parts of the picture, apart from each other, that hold a box's line."""
    x0, y0, x1, y1 = box
    rows, columns = window(out, x0 - reach, y0 - reach, x1 + reach, y1 + reach)
    inner_rows, inner_columns = window(out, x0 + reach, y0 + reach, x1 - reach, y1 - reach)
    top = min(max(inner_rows.start, rows.start), rows.stop)
    bottom = max(top, inner_rows.stop)
    left = min(max(inner_columns.start, columns.start), columns.stop)
    right = max(left, inner_columns.stop)
    return [
        (slice(rows.start, top), columns),
        (slice(bottom, rows.stop), columns),
        (slice(top, bottom), slice(columns.start, left)),
        (slice(top, bottom), slice(right, columns.stop)),
    ]


def centres(where: Part) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give the positions of pixels: x [1, columns], y [rows, 1]."""
    rows, columns = where
    across: NDArray[np.float64] = np.arange(columns.start, columns.stop, dtype=np.float64) + 0.5
    down: NDArray[np.float64] = np.arange(rows.start, rows.stop, dtype=np.float64) + 0.5
    return across[None, :], down[:, None]


def distance_to_box(where: Part, box: Sequence[float], rounding: float) -> Floats:
    """Give the distance of pixels to a box's line, negative within; its corners are rounded."""
    x0, y0, x1, y1 = box
    corner = min(rounding, (x1 - x0) / 2, (y1 - y0) / 2)
    across, down = centres(where)
    beside = np.abs(across - (x0 + x1) / 2) - (x1 - x0) / 2 + corner
    above = np.abs(down - (y0 + y1) / 2) - (y1 - y0) / 2 + corner
    outside = np.hypot(np.maximum(beside, 0), np.maximum(above, 0))
    return np.asarray(outside + np.minimum(np.maximum(beside, above), 0) - corner, np.float32)


def within(distance: Floats, radius: float) -> Floats:
    """Give how much of each pixel lies nearer than the radius, 0 to 1."""
    cover: Floats = np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)
    return cover


def paint(part: RGB, tint: Colour, cover: Floats) -> None:
    """Mix a colour into a part of the picture, in place; cover [rows, columns] is 0 to 1."""
    step = max(1, BLOCK // max(1, part.shape[1]))
    for start in range(0, part.shape[0], step):
        block, strength = part[start : start + step], cover[start : start + step]
        touched = strength > 0
        old = block[touched].astype(np.float32)
        mixed = old + (np.asarray(tint, np.float32) - old) * strength[touched][:, None]
        block[touched] = np.rint(mixed).astype(np.uint8)
