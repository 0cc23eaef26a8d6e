"""Polygons -> triangles, and normals for triangles that came without.

Convex polygons become fans, others are clipped ear by ear. Normals are the mean over the triangles
that meet at a corner at less than ``CREASE``, so that round things look round and edges stay sharp.
Knows positions only: no files, no colours.

T: triangles. P: polygons with K corners.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["CREASE", "smooth_normals", "split_polygons"]

CREASE = 50.0  # degrees
MOST_AT_A_CORNER = 64  # triangles; the centre of a fine disc needs no smoothing

Doubles = NDArray[np.float64]
Indices = NDArray[np.int64]


def split_polygons(polygons: Doubles) -> tuple[Indices, Indices]:
    """Cut polygons with one number of corners into triangles.

    Args:
        polygons: Positions, [P, K, 3] float64, K at least 3.

    Returns:
        For each triangle its polygon, [T] int64, and which three of that polygon's corners it has,
        [T, 3] int64. T is P (K - 2).
    """
    count, corner_count = polygons.shape[:2]
    fan = np.array([[0, i, i + 1] for i in range(1, corner_count - 1)])
    pick = np.repeat(fan[None], count, axis=0)  # [P, K - 2, 3]
    if corner_count > 3:
        centred = polygons - polygons[:, :1]
        ahead = np.roll(centred, -1, axis=1)
        normal = np.cross(centred, ahead).sum(axis=1, keepdims=True)  # [P, 1, 3]
        turn = np.cross(ahead - centred, np.roll(centred, -2, axis=1) - ahead)
        bend = (turn * normal).sum(axis=2)  # [P, K]
        tolerance = 1e-6 * (normal**2).sum(axis=2)
        for index in np.flatnonzero((bend < -tolerance).any(axis=1)):
            pick[index] = _clip_ears(polygons[index], normal[index, 0])
    return np.repeat(np.arange(count), corner_count - 2), pick.reshape(-1, 3)


def _clip_ears(polygon: Doubles, normal: Doubles) -> Indices:
    """Triangles [K - 2, 3] of one polygon that is not convex."""
    axes = [axis for axis in range(3) if axis != int(np.abs(normal).argmax())]
    flat = polygon[:, axes]
    x, y = flat[:, 0], flat[:, 1]
    if (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() < 0:
        flat = flat * (-1, 1)  # now counterclockwise
    left = list(range(len(polygon)))
    triangles = []
    while len(left) > 3:
        ear = next((i for i in range(len(left)) if _is_ear(flat, left, i)), 0)
        triangles.append([left[ear - 1], left[ear], left[(ear + 1) % len(left)]])
        del left[ear]
    return np.array([*triangles, left])


def _is_ear(flat: Doubles, left: list[int], i: int) -> bool:
    """Whether the corner bends outwards and the triangle over it is empty."""
    before, here, after = left[i - 1], left[i], left[(i + 1) % len(left)]
    a, b, c = flat[before], flat[here], flat[after]
    if _area(a, b, c) <= 0:
        return False
    others = flat[[k for k in left if k not in (before, here, after)]]
    inside = np.ones(len(others), dtype=bool)
    for start, end in ((a, b), (b, c), (c, a)):
        side = (end[0] - start[0]) * (others[:, 1] - start[1])
        inside &= side - (end[1] - start[1]) * (others[:, 0] - start[0]) > 0
    return not inside.any()


def _area(a: Doubles, b: Doubles, c: Doubles) -> float:
    """Twice the signed area of a flat triangle."""
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def smooth_normals(corners: Doubles, vertex: Indices) -> Doubles:
    """Make normals for each corner of each triangle.

    Args:
        corners: Positions, [T, 3, 3] float64; no triangle without an area.
        vertex: Number of the position at each corner, [T, 3] int64; equal positions with other
            numbers are taken for one.

    Returns:
        Unit normals, [T, 3, 3] float64, on the side from which the corners run counterclockwise.
    """
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1, keepdims=True)
    flat = cross / area
    _, first = np.unique(vertex, return_index=True)
    distinct, merged = np.unique(
        corners.reshape(-1, 3)[first].round(9), axis=0, return_inverse=True
    )
    number = np.zeros(int(vertex.max()) + 1, dtype=np.int64)
    number[vertex.ravel()[first]] = merged.ravel()
    number = number[vertex].ravel()  # [3 T] the merged vertex at each corner
    order = np.argsort(number, kind="stable")
    amount = np.bincount(number, minlength=len(distinct))
    start = np.concatenate([[0], np.cumsum(amount)[:-1]])
    meeting = np.where(amount[number] > MOST_AT_A_CORNER, 0, amount[number])  # [3 T]
    here = np.repeat(np.arange(len(number)), meeting)
    step = np.arange(len(here)) - np.repeat(np.cumsum(meeting) - meeting, meeting)
    other = order[start[number[here]] + step] // 3  # a triangle that meets this corner
    is_smooth = (flat[here // 3] * flat[other]).sum(axis=1) > np.cos(np.radians(CREASE))
    here, other = here[is_smooth], other[is_smooth]
    total = np.stack(
        [np.bincount(here, weights=cross[other, axis], minlength=len(number)) for axis in range(3)],
        axis=1,
    )
    length = np.linalg.norm(total, axis=1, keepdims=True)
    own = np.repeat(flat, 3, axis=0)
    return np.where(length > 0, total / np.where(length > 0, length, 1), own).reshape(-1, 3, 3)
