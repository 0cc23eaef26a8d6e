"""Grids of points, overlapping crops of an image, and which masks a crop cuts off.

Names, arguments and results are segment-anything's: layer 0 is the whole image, layer i has 2^i
crops a side.
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
    """Points in the middles of equal squares: [n_per_side ** 2, 2] float64 in 0..1, row by row.

    Examples:
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
    """A grid [P, 2] in 0..1 a layer; layer i has points / ``scale_per_layer`` ** i a side."""
    for name, value, least in (
        ("points_per_side", n_per_side, 1),
        ("crop_n_layers", n_layers, 0),
        ("crop_n_points_downscale_factor", scale_per_layer, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, came {value}")
    counts = [int(n_per_side / scale_per_layer**layer) for layer in range(n_layers + 1)]
    if counts[-1] < 1:
        raise ValueError(
            f"points_per_side={n_per_side} divided by {scale_per_layer} for each of {n_layers} "
            f"layers of crops leaves layer {counts.index(0)} without points; use more points, "
            "fewer layers or a smaller crop_n_points_downscale_factor"
        )
    return [build_point_grid(count) for count in counts]


def check_point_grids(point_grids: Sequence[ArrayLike], n_layers: int) -> list[NDArray[np.float64]]:
    """A caller's grids, for each layer points [P, 2] in 0..1, as checked arrays of float64."""
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
    """Crops of an image of (height, width), layer by layer, column by column; the layer of each.

    Crops of layer 1 overlap by ``overlap_ratio`` of the shorter side; later layers by as much less
    as their crops are smaller. An image of few pixels has fewer crops: empty ones are left out.

    Examples:
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
    """Which masks a crop may have cut off, [N] bool: their box ends at its edge, not the image's.

    ``boxes`` [N, 4] are in pixels of the crop, ``orig_box`` is the image, [0, 0, width, height].
    """
    x0, y0 = crop_box[:2]
    placed = np.asarray(boxes, np.float64).reshape(-1, 4) + np.array([x0, y0, x0, y0])
    near_crop = np.abs(placed - np.asarray(crop_box)) <= atol
    near_image = np.abs(placed - np.asarray(orig_box)) <= atol
    return np.asarray((near_crop & ~near_image).any(axis=1), np.bool_)
