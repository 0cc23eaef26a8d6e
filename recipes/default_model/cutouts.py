"""Make a cut-out of an image with alpha: cropped, small enough, written whole or not at all.

Also here: how much of it is filled, and whether it is one object. Knows no packages and no tables.
Letters: H W the image.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

__all__ = ["LONGEST", "cut_out", "fill_of", "has_hard_edge", "is_one_object", "write_whole"]

LONGEST = 384
_FAINT = 16  # alpha up to which a border is cut away: what is left of shadows and resampling
_OPAQUE = 240
_EVERY_NEIGHBOUR = np.ones((3, 3), bool)


def cut_out(image: Image.Image) -> Image.Image | None:
    """Crop an image to what can be seen of it and make it small enough.

    Args:
        image: Any mode that has or can get an alpha channel.

    Returns:
        RGBA, longest side at most 384 pixels; None if nothing can be seen.
    """
    rgba = image.convert("RGBA")
    seen = _alpha(rgba) > _FAINT
    if not seen.any():
        return None
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    cropped = rgba.crop(box)
    scale = LONGEST / max(cropped.size)
    if scale >= 1:
        return cropped
    size = max(1, round(cropped.width * scale)), max(1, round(cropped.height * scale))
    # Premultiplied, or the colour of what is invisible would come through at the edge.
    return cropped.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def fill_of(cutout: Image.Image) -> float:
    """Share of a cut-out's pixels that belong to the object.

    Args:
        cutout: RGBA.

    Returns:
        Share of alpha above 127, 0..1, to three digits.
    """
    return round(float((_alpha(cutout) > 127).mean()), 3)


def is_one_object(cutout: Image.Image, share: float = 0.9) -> bool:
    """Whether nearly all of what can be seen hangs together.

    Args:
        cutout: RGBA.
        share: How much of all alpha must lie in the largest piece, 0..1.

    Returns:
        False also if there is nothing.
    """
    alpha = _alpha(cutout)
    pieces, count = ndimage.label(alpha > _FAINT, structure=_EVERY_NEIGHBOUR)
    if count == 0:
        return False
    sums = np.asarray(ndimage.sum_labels(alpha, pieces, np.arange(1, count + 1)))
    return bool(sums.max() >= share * sums.sum())


def has_hard_edge(cutout: Image.Image, share: float = 0.12) -> bool:
    """Whether little of a cut-out is half transparent: no glow, no soft shadow, no glass.

    Args:
        cutout: RGBA.
        share: How much of what can be seen may have an alpha below 240, 0..1. Pixels beside
            opaque ones do not count: that is how a smooth border looks.

    Returns:
        False also if there is nothing.
    """
    alpha = _alpha(cutout)
    seen = alpha > _FAINT
    solid = ndimage.binary_dilation(alpha >= _OPAQUE, structure=_EVERY_NEIGHBOUR)
    return bool(seen.any() and (seen & ~solid).sum() <= share * seen.sum())


def write_whole(image: Image.Image, path: Path, **options: int | bool) -> None:
    """Write an image, whole or not at all.

    Args:
        image: What to write.
        path: Where; the suffix says how. Folders are made.
        options: Passed to the format's writer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    image.save(temporary, None, **options)
    os.replace(temporary, path)


def _alpha(image: Image.Image) -> NDArray[np.uint8]:
    """The alpha channel [H, W]."""
    return np.asarray(image.getchannel("A"))
