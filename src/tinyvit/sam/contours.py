"""Outlines of masks: exact along the edges of pixels, or simplified.

Where the border between mask and ground turns there is a corner. Corners pair up in rows from left
to right, in columns from top to bottom; following the pairs in turn gives every closed path.
Coordinates are continuous: the first pixel is from (0, 0) to (1, 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]


def outlines(mask: NDArray[np.bool_], tolerance: float = 0.0) -> list[Ring]:
    """The closed outlines of a mask [H, W] bool: corners [P, 2] as (x, y), the last not repeated.

    Outer ones run clockwise as seen, holes the other way round. Drawn with the even-odd rule they
    give the mask back bit for bit, or with a ``tolerance`` are simplified to lie at most so many
    pixels beside the exact ones (Douglas and Peucker, 1973).

    Example:
        >>> outlines(np.ones((1, 2), bool))[0].tolist()
        [[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]]
    """
    if mask.ndim != 2 or mask.dtype != bool:
        raise ValueError(f"a mask is [H, W] bool, came {list(mask.shape)} of {mask.dtype}")
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be 0 or more pixels, came {tolerance!r}")
    rings = (_simplified(ring, tolerance) if tolerance else ring for ring in _rings(mask))
    return [ring for ring in rings if len(ring) >= 3]


def is_outer(ring: Ring) -> bool:
    """Whether an outline of ``outlines`` runs around a part of the mask, and not around a hole."""
    after = np.roll(ring, -1, axis=0)
    return bool((ring[:, 0] * after[:, 1] - ring[:, 1] * after[:, 0]).sum() > 0)


def _rings(mask: NDArray[np.bool_]) -> Iterator[Ring]:
    padded = np.pad(mask, 1)
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    turns = (a ^ b ^ c ^ d).astype(np.int8)  # one or three of four pixels
    turns[(a == d) & (b == c) & (a != b)] = 2  # two that touch at the corner: it belongs to both
    ys, xs = np.nonzero(turns)
    times = turns[ys, xs]
    ys, xs = np.repeat(ys, times), np.repeat(xs, times)
    count = len(ys)
    by_column = np.lexsort((ys, xs))
    below = np.empty(count, np.int64)
    below[by_column[0::2]], below[by_column[1::2]] = by_column[1::2], by_column[0::2]
    partner, is_free = below.tolist(), [True] * count
    for start in range(count):
        if not is_free[start]:
            continue
        path, at = [], start
        while is_free[at]:
            beside = at ^ 1
            is_free[at] = is_free[beside] = False
            path += [at, beside]
            at = partner[beside]
        ring = np.stack([xs[path], ys[path]], 1).astype(np.float64)
        is_outer = padded[ys[start] + 1, xs[start] + 1]
        yield ring if is_outer else ring[::-1]


def _simplified(ring: Ring, tolerance: float) -> Ring:
    """Fewer corners; begins with the two that lie farthest apart, so that no ring collapses."""
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(1)))
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), bool)
    keep[[0, far, len(ring)]] = True
    parts = [(0, far), (far, len(ring))]
    while parts:
        first, last = parts.pop()
        if last - first < 2:
            continue
        between = closed[first + 1 : last] - closed[first]
        line = closed[last] - closed[first]
        length = float(np.hypot(*line))
        distances = np.hypot(between[:, 0], between[:, 1])
        if length:
            distances = np.abs(between[:, 0] * line[1] - between[:, 1] * line[0]) / length
        worst = int(np.argmax(distances))
        if distances[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            parts += [(first, middle), (middle, last)]
    return closed[:-1][keep[:-1]]
