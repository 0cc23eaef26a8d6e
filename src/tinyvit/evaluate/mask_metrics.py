"""How good a mask is, and where a person would click to better it.

The boundary F-measure is that of Martin et al. (2004) as Perazzi et al. (2016) use it for masks;
the most interior point is the maximum of the Euclidean distance transform, as is usual in
interactive segmentation. Here are arrays only: no model, no files.

Shapes: H W a picture. Points are (x, y), continuous: the centre of the first pixel is (0.5, 0.5).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "BOUNDARY_TOLERANCE",
    "boundary_f",
    "iou",
    "most_interior_point",
    "next_click",
]

Mask = NDArray[np.bool_]
Point = tuple[float, float]

BOUNDARY_TOLERANCE = 0.0075
"""How far apart two boundaries may lie and still agree, as a share of the picture's diagonal."""


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks [H, W]; 1 where both are empty.

    Raises:
        ValueError: The masks have different shapes.

    Example:
        >>> iou(np.array([[True, True, False]]), np.array([[False, True, True]]))
        0.3333333333333333
    """
    _check_pair(first, second)
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else 1.0


def boundary_f(predicted: Mask, target: Mask, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """How well two outlines agree, from 0 to 1.

    A mask's boundary is its pixels that have one of their four neighbours outside of it; the edge
    of the picture is no boundary. Precision is the share of the predicted boundary that lies
    within the tolerance of the true one, recall the share of the true boundary that lies within
    the tolerance of the predicted one, and the result is their harmonic mean.

    Args:
        predicted: [H, W] bool.
        target: [H, W] bool.
        tolerance: As a share of the picture's diagonal; at least one pixel is allowed.

    Returns:
        The F-measure; 1 where neither has a boundary, 0 where only one has.

    Raises:
        ValueError: The masks have different shapes.
    """
    from scipy.ndimage import distance_transform_edt

    _check_pair(predicted, target)
    reach = max(1.0, tolerance * float(np.hypot(*target.shape)))
    ours, theirs = _boundary(predicted), _boundary(target)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    window = _window(ours | theirs)  # distances are only asked for between boundary pixels
    ours, theirs = ours[window], theirs[window]
    precision = float(np.mean(distance_transform_edt(~theirs)[ours] <= reach))
    recall = float(np.mean(distance_transform_edt(~ours)[theirs] <= reach))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def most_interior_point(mask: Mask) -> Point:
    """The point of a mask that is farthest from its outside; the picture's edge is outside.

    Args:
        mask: [H, W] bool with at least one pixel.

    Returns:
        (x, y), the centre of a pixel; the first one, row by row, where several are as far inside.

    Raises:
        ValueError: The mask is empty.

    Example:
        >>> most_interior_point(np.ones((3, 5), bool))
        (1.5, 1.5)
    """
    if not mask.any():
        raise ValueError("an empty mask has no interior; leave it out")
    row, column, _ = _deepest(mask)
    return float(column + 0.5), float(row + 0.5)


def next_click(predicted: Mask, target: Mask) -> tuple[Point, int] | None:
    """The click that would correct the largest error, at its most interior point.

    Errors are the object's missing pixels and the pixels too many; of the connected regions of
    both kinds the one with the most pixels is corrected.

    Args:
        predicted: [H, W] bool.
        target: [H, W] bool.

    Returns:
        ((x, y), 1 for a missing part or 0 for a part too many); None where there is no error.

    Raises:
        ValueError: The masks have different shapes.
    """
    _check_pair(predicted, target)
    regions = [
        (*_largest_region(error), label)
        for error, label in ((target & ~predicted, 1), (predicted & ~target, 0))
        if error.any()
    ]
    if not regions:
        return None
    _, region, label = max(regions, key=lambda found: found[0])
    return most_interior_point(region), label


def _check_pair(first: Mask, second: Mask) -> None:
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"wanted two masks [H, W] of one picture; came {list(first.shape)} and "
            f"{list(second.shape)}"
        )


def _boundary(mask: Mask) -> Mask:
    """Pixels of a mask with a neighbour outside; beyond the picture's edge it goes on."""
    padded = np.pad(mask, 1, mode="edge")
    around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    boundary: Mask = mask & ~around
    return boundary


def _window(mask: Mask) -> tuple[slice, slice]:
    """The part of the picture that holds a mask, which is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _deepest(mask: Mask) -> tuple[int, int, float]:
    """(row, column, depth in pixels) of the most interior pixel."""
    from scipy.ndimage import distance_transform_edt

    window = _window(mask)
    depth = distance_transform_edt(np.pad(mask[window], 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return window[0].start + int(row), window[1].start + int(column), float(depth[row, column])


def _largest_region(error: Mask) -> tuple[int, Mask]:
    """(pixels, mask) of the largest connected region of errors, of which there are some."""
    from scipy.ndimage import label

    regions, _ = label(error)
    sizes = np.bincount(regions.ravel())
    sizes[0] = 0
    largest = int(np.argmax(sizes))
    return int(sizes[largest]), regions == largest
