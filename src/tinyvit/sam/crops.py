"""Where to prompt and where to look closer: grids of points, overlapping crops, cut-off masks.

Numbers only: no pixels, no model. Names, arguments and results are segment-anything's: layer 0 is
the whole image, layer i has 2^i crops a side.

Shapes: P points of a grid, N boxes. Points are (x, y), boxes xyxy in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

CropBox: TypeAlias = "list[int]"
"""[x0, y0, x1, y1] in whole pixels of the image."""

EDGE = 20.0
"""A box that ends within so many pixels of a crop's edge may be cut off there."""


def build_point_grid(n_per_side: int) -> NDArray[np.float64]:
    """Points in the middles of equal squares.

    Args:
        n_per_side: Points along each side.

    Returns:
        [n_per_side ** 2, 2] float64 in 0..1, row by row.

    Raises:
        ValueError: Less than one point.

    Example:
        >>> build_point_grid(2).tolist()
        [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
    """
    if n_per_side < 1:
        raise ValueError(f"a grid needs at least 1 point a side, came {n_per_side}")
    middle = 1 / (2 * n_per_side)
    side = np.linspace(middle, 1 - middle, n_per_side)
    x, y = np.meshgrid(side, side)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def build_all_layer_point_grids(
    n_per_side: int, n_layers: int, scale_per_layer: int
) -> list[NDArray[np.float64]]:
    """The grid of each layer of crops.

    Args:
        n_per_side: Points along each side of the whole image.
        n_layers: Layers of crops beyond the whole image.
        scale_per_layer: The points a side of layer i are divided by this to the power i.

    Returns:
        n_layers + 1 grids [P, 2] in 0..1.

    Raises:
        ValueError: A value is below 1 (``n_layers``: below 0), or a layer is left without points.
    """
    if n_per_side < 1:
        raise ValueError(f"points_per_side must be at least 1, came {n_per_side}")
    if n_layers < 0:
        raise ValueError(f"crop_n_layers must be at least 0, came {n_layers}")
    if scale_per_layer < 1:
        raise ValueError(
            f"crop_n_points_downscale_factor must be at least 1, came {scale_per_layer}"
        )
    counts = [int(n_per_side / scale_per_layer**layer) for layer in range(n_layers + 1)]
    if counts[-1] < 1:
        raise ValueError(
            f"points_per_side={n_per_side} divided by {scale_per_layer} for each of {n_layers} "
            f"layers of crops leaves layer {counts.index(0)} without points; use more points, "
            "fewer layers or a smaller crop_n_points_downscale_factor"
        )
    return [build_point_grid(count) for count in counts]


def check_point_grids(point_grids: Sequence[ArrayLike], n_layers: int) -> list[NDArray[np.float64]]:
    """A caller's grids, checked.

    Args:
        point_grids: For each layer points [P, 2] in 0..1.
        n_layers: Layers of crops beyond the whole image.

    Returns:
        The grids as arrays, [P, 2] float64.

    Raises:
        ValueError: Too few grids, or one of another shape or range.
    """
    if len(point_grids) < n_layers + 1:
        raise ValueError(
            f"point_grids must hold a grid for the image and for each of {n_layers} layers of "
            f"crops, {n_layers + 1} in all; came {len(point_grids)}"
        )
    grids = []
    for layer, given in enumerate(point_grids):
        grid = np.asarray(given, np.float64)
        if grid.ndim != 2 or grid.shape[1] != 2:
            raise ValueError(f"point_grids[{layer}] must be [P, 2], came {list(grid.shape)}")
        if not ((grid >= 0) & (grid <= 1)).all():
            raise ValueError(
                f"point_grids[{layer}] must lie in 0..1, shares of the width and the height; came "
                f"{grid.min():g} to {grid.max():g}"
            )
        grids.append(grid)
    return grids


def generate_crop_boxes(
    im_size: tuple[int, int], n_layers: int, overlap_ratio: float
) -> tuple[list[CropBox], list[int]]:
    """Crops of an image: the whole, then layer by layer, column by column.

    Args:
        im_size: (height, width) of the image.
        n_layers: Layers beyond the whole image.
        overlap_ratio: How far crops of layer 1 overlap, as a share of the shorter side; later
            layers overlap by as much less as their crops are smaller.

    Returns:
        (crops, the layer of each). An image of few pixels has fewer crops: empty ones are left
        out.

    Example:
        >>> boxes, layers = generate_crop_boxes((100, 200), 1, 0.2)
        >>> boxes[:3], layers
        ([[0, 0, 200, 100], [0, 0, 110, 60], [0, 40, 110, 100]], [0, 1, 1, 1, 1])
    """
    height, width = im_size
    boxes, layers = [[0, 0, width, height]], [0]
    for layer in range(1, n_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / count))
        crop_w, crop_h = (
            math.ceil((overlap * (count - 1) + side) / count) for side in (width, height)
        )
        for i in range(count):
            for j in range(count):
                x0, y0 = i * (crop_w - overlap), j * (crop_h - overlap)
                box = [x0, y0, min(x0 + crop_w, width), min(y0 + crop_h, height)]
                if box[0] < box[2] and box[1] < box[3]:
                    boxes.append(box)
                    layers.append(layer)
    return boxes, layers


def is_box_near_crop_edge(
    boxes: ArrayLike, crop_box: Sequence[float], orig_box: Sequence[float], atol: float = EDGE
) -> NDArray[np.bool_]:
    """Which masks a crop may have cut off: their box ends at its edge, and not at the image's.

    Args:
        boxes: [N, 4] in pixels of the crop.
        crop_box: The crop in the image.
        orig_box: The image, [0, 0, width, height].
        atol: Distance in pixels that counts as near.

    Returns:
        [N] bool.
    """
    x0, y0 = crop_box[:2]
    placed = np.asarray(boxes, np.float64).reshape(-1, 4) + np.array([x0, y0, x0, y0])
    near_crop = np.abs(placed - np.asarray(crop_box)) <= atol
    near_image = np.abs(placed - np.asarray(orig_box)) <= atol
    near: NDArray[np.bool_] = (near_crop & ~near_image).any(axis=1)
    return near
