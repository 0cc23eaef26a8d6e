"""What a person would prompt, simulated: clicks in an object, boxes around it, corrections.

First prompts follow Segment Anything's training (Kirillov et al., 2023): a click at a random place
of the object, or its box with each edge moved by chance. Half of the clicks go to the most
interior point instead, where people click. A correction goes to the largest connected error.

All chance comes from the generator that is handed in. Shapes: H W the frame. Points are (x, y),
continuous: the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tinyvit.evaluate.mask_metrics import most_interior_point

__all__ = ["correct", "first_click", "noisy_box"]

Mask = NDArray[np.bool_]
Point = tuple[float, float]

BOX_NOISE = 0.1
"""Standard deviation of a box's edges, as a share of its side."""
MOST_BOX_NOISE = 20 / 1024
"""The farthest that an edge moves, as a share of the frame's longer side."""

_INTERIOR_SHARE = 0.5
_LARGEST_SHARE = 0.8  # how often the largest error is corrected; else any, by its size


def first_click(mask: Mask, rng: np.random.Generator) -> Point:
    """A click in an object: at its most interior point, or anywhere in it.

    Args:
        mask: [H, W] bool with at least one pixel.
        rng: The source of chance.

    Returns:
        (x, y), the centre of a pixel of the mask.

    Raises:
        ValueError: The mask is empty.
    """
    if rng.random() < _INTERIOR_SHARE:
        return most_interior_point(mask)
    return _any_point(mask, rng)


def noisy_box(mask: Mask, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """The box around an object as a person would draw it.

    Args:
        mask: [H, W] bool with at least one pixel.
        rng: The source of chance.

    Returns:
        (x0, y0, x1, y1) inside the frame, at least one pixel wide and high.

    Raises:
        ValueError: The mask is empty.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        raise ValueError("an empty mask has no box; leave it out")
    height, width = mask.shape
    edges = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)
    sides = np.tile(edges[2:] - edges[:2], 2)
    most = MOST_BOX_NOISE * max(height, width)
    moved = edges + np.clip(BOX_NOISE * sides * rng.standard_normal(4), -most, most)
    moved = np.clip(moved, 0, [width, height, width, height])
    if (moved[2:] - moved[:2] < 1).any():  # too thin to be moved
        moved = edges
    x0, y0, x1, y1 = moved.tolist()
    return x0, y0, x1, y1


def correct(predicted: Mask, target: Mask, rng: np.random.Generator) -> tuple[Point, int] | None:
    """A click that corrects a mask, somewhere in one connected error, most often the largest.

    Args:
        predicted: [H, W] bool.
        target: [H, W] bool.
        rng: The source of chance.

    Returns:
        ((x, y), 1 where the object was missed or 0 where there was too much); None without errors.
    """
    from scipy.ndimage import label

    errors = predicted != target
    if not errors.any():
        return None
    kinds = np.where(errors, np.where(target, 1, 2), 0)
    missed, count = label(kinds == 1)
    extra, more = label(kinds == 2)
    sizes = np.concatenate(
        (
            np.bincount(missed.ravel(), minlength=count + 1)[1:],
            np.bincount(extra.ravel(), minlength=more + 1)[1:],
        )
    )
    if rng.random() < _LARGEST_SHARE:
        chosen = int(np.argmax(sizes))
    else:
        chosen = int(rng.choice(len(sizes), p=sizes / sizes.sum()))
    is_missed = chosen < count
    region = missed == chosen + 1 if is_missed else extra == chosen + 1 - count
    return first_click(region, rng), int(is_missed)


def _any_point(mask: Mask, rng: np.random.Generator) -> Point:
    places = np.flatnonzero(mask)
    if not len(places):
        raise ValueError("an empty mask has no point; leave it out")
    row, column = divmod(int(places[rng.integers(len(places))]), mask.shape[1])
    return float(column + 0.5), float(row + 0.5)
