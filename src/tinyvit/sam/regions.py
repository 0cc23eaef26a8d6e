"""Connected parts of a mask: count them, fill small holes, remove small islands; stability.

Pixels that touch at a side or at a corner are connected (8 neighbours), in masks and in holes
alike, as in segment-anything. No model is known here; scipy is loaded on first use.

Letters: H W the picture, N masks, n parts.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "RegionKind",
    "components",
    "largest_component",
    "remove_small_regions",
    "stability_score",
]

Mask = NDArray[np.bool_]
RegionKind = Literal["holes", "islands"]


def components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the connected parts of a mask.

    Args:
        mask: [H, W] bool.

    Returns:
        Labels [H, W] int32, 0 outside the mask and 1 to n in its parts, in the order of their first
        pixels, row by row; and the parts' areas [n] int64 in pixels.

    Raises:
        ValueError: Another shape or type.
    """
    from scipy.ndimage import label

    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"wanted a mask [H, W] of bool; came {list(mask.shape)} of {mask.dtype}")
    labels = np.zeros(mask.shape, np.int32)
    window = _window(mask)
    count = int(label(mask[window], np.ones((3, 3), np.int8), output=labels[window]))
    areas = np.bincount(labels[window].ravel(), minlength=count + 1)[1:]
    return labels, areas.astype(np.int64)


def largest_component(mask: Mask) -> Mask:
    """The largest connected part of a mask, the first of equal ones; empty of an empty mask.

    Args:
        mask: [H, W] bool.

    Raises:
        ValueError: Another shape or type.
    """
    labels, areas = components(mask)
    largest: Mask = labels == 1 + np.argmax(areas) if len(areas) else np.zeros_like(mask)
    return largest


def remove_small_regions(mask: Mask, area_threshold: float, mode: RegionKind) -> tuple[Mask, bool]:
    """Fill small holes of a mask, or remove its small islands, as segment-anything does.

    What is not mask and touches the picture's edge is a hole too, and is filled when it is small.

    Args:
        mask: [H, W] bool; it stays as it is.
        area_threshold: In pixels; a part with fewer is small.
        mode: ``"holes"`` or ``"islands"``. When all islands are small, the largest stays.

    Returns:
        The mask, and whether it was changed: for segment-anything it also counts as changed when
        its only island is small and stays. The mask given itself where nothing is small.

    Raises:
        ValueError: The mask has another shape or type, or the mode is another one.
    """
    if mode not in get_args(RegionKind):
        raise ValueError(f"mode must be one of 'holes' and 'islands', came {mode!r}")
    labels, areas = components(~mask if mode == "holes" else mask)
    is_small = areas < area_threshold
    if not is_small.any():
        return mask, False
    in_mask = np.zeros(len(areas) + 1, np.bool_)  # by label
    if mode == "holes":
        in_mask[0] = True
        in_mask[1:] = is_small
    elif is_small.all():
        in_mask[1 + np.argmax(areas)] = True
    else:
        in_mask[1:] = ~is_small
    cleaned: Mask = in_mask[labels]
    return cleaned, True


def stability_score(masks: Tensor, mask_threshold: float, threshold_offset: float) -> Tensor:
    """How little masks change with their threshold: IoU at a higher and at a lower one.

    Args:
        masks: [..., H, W] logits.
        mask_threshold: The threshold that makes masks of them.
        threshold_offset: How far the higher and the lower one lie from it.

    Returns:
        [...] float32 in 0..1; nan where no pixel exceeds the lower threshold, as in
        segment-anything, so that such a mask fails every bound.

    Raises:
        ValueError: Fewer than two dimensions.
    """
    if masks.ndim < 2:
        raise ValueError(f"wanted logits [..., H, W]; came {list(masks.shape)}")
    inner = (masks > mask_threshold + threshold_offset).sum(dim=(-2, -1), dtype=torch.int32)
    outer = (masks > mask_threshold - threshold_offset).sum(dim=(-2, -1), dtype=torch.int32)
    scores: Tensor = inner / outer
    return scores


def _window(mask: Mask) -> tuple[slice, slice]:
    """The part of the picture that holds the mask: labelling costs time for each pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
