"""Boxes: around masks, from one notation to another, out of crops, and without duplicates.

A box is xyxy. Around a mask it holds the *indices* of the first and the last pixel, as in
segment-anything: a mask of the single pixel (3, 5) has the box 3, 5, 3, 5, of no area; so has an
empty mask, at 0, 0. All else takes boxes as rectangles in a plane.

Suppression gives what torchvision's gives. It compares a block of boxes with all that follow, so
that thousands take milliseconds and memory stays bounded. No model and no file is known here.

Letters: N boxes, M masks, H W the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

__all__ = [
    "batched_mask_to_box",
    "batched_nms",
    "box_iou",
    "box_of",
    "box_xywh_to_xyxy",
    "box_xyxy_to_xywh",
    "nms",
    "non_maximum_suppression",
    "uncrop_boxes",
    "uncrop_masks",
    "uncrop_points",
]

Floats = NDArray[np.float32] | NDArray[np.float64]

BLOCK = 64  # boxes compared with all others at once


def box_of(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Indices of the first and last column and row of a mask: x0, y0, x1, y1.

    Args:
        mask: [H, W] bool.

    Returns:
        The last column x1 and row y1 still belong to the mask; zeros for an empty mask.

    Raises:
        ValueError: Another shape or type.

    Example:
        >>> import numpy as np
        >>> box_of(np.array([[False, False, False], [False, True, True]]))
        (1, 1, 2, 1)
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"wanted a mask [H, W] of bool; came {list(mask.shape)} of {mask.dtype}")
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1])


def batched_mask_to_box(masks: Tensor) -> Tensor:
    """``box_of`` for many masks, by segment-anything's name.

    Args:
        masks: [..., H, W] bool.

    Returns:
        [..., 4] int64 on the masks' device; zeros for empty masks.

    Raises:
        ValueError: Fewer than two dimensions, or another type.
    """
    if masks.ndim < 2 or masks.dtype != torch.bool:
        raise ValueError(
            f"wanted masks [..., H, W] of bool; came {list(masks.shape)} {masks.dtype}"
        )
    if not masks.numel():
        return torch.zeros(*masks.shape[:-2], 4, dtype=torch.int64, device=masks.device)
    sides = []
    for is_hit in (masks.any(dim=-2), masks.any(dim=-1)):  # [..., W] and [..., H]
        hits = is_hit.to(torch.uint8)
        first = hits.argmax(dim=-1)
        last = is_hit.shape[-1] - 1 - hits.flip(-1).argmax(dim=-1)
        sides.append((first, last * is_hit.any(dim=-1)))  # nothing hit: first is 0 already
    (x0, x1), (y0, y1) = sides
    return torch.stack([x0, y0, x1, y1], dim=-1)


def box_xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Corners [..., 4] to x, y, width, height; the boxes given stay as they are.

    Raises:
        ValueError: The last dimension is not 4.
    """
    _check_last("boxes", boxes, 4)
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def box_xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """x, y, width, height [..., 4] to corners; the boxes given stay as they are.

    Raises:
        ValueError: The last dimension is not 4.
    """
    _check_last("boxes", boxes, 4)
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def box_iou(first: ArrayLike, second: ArrayLike) -> Floats:
    """Intersection over union of each box with each other.

    Args:
        first: [N, 4] xyxy.
        second: [M, 4] xyxy.

    Returns:
        [N, M] in 0..1, float32 if both are, else float64; 0 where neither box has an area.

    Raises:
        ValueError: Another shape, or a number that is not finite.
    """
    ours, theirs = _boxes(first), _boxes(second)
    if ours.dtype != theirs.dtype:
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    common, union = _overlap(ours, theirs)
    shares: Floats = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return shares


def non_maximum_suppression(
    boxes: ArrayLike,
    scores: ArrayLike,
    threshold: float,
    categories: ArrayLike | None = None,
) -> NDArray[np.int64]:
    """Leave out every box that overlaps a better one too much.

    Args:
        boxes: [N, 4] xyxy; float32 is compared in float32, all else in float64.
        scores: [N], of any order.
        threshold: A box goes when its IoU with a better one that stays exceeds this.
        categories: [N] whole numbers; boxes of different categories leave each other alone.
            None: all are of one.

    Returns:
        [K] int64: indices of the boxes that stay, best score first. Of equal scores, the one that
        came first is the better.

    Raises:
        ValueError: Another shape, a box that is not finite, or a score that is no number.
    """
    rectangles, values = _boxes(boxes), np.asarray(scores)
    kinds = np.zeros(len(rectangles), np.int64) if categories is None else np.asarray(categories)
    for name, array in (("score", values), ("category", kinds)):
        if array.shape != (len(rectangles),):
            raise ValueError(
                f"wanted a {name} for each of {len(rectangles)} boxes; came {list(array.shape)}"
            )
    if np.isnan(values).any():
        raise ValueError(f"score {int(np.argmax(np.isnan(values)))} is not a number")
    left = np.lexsort((np.arange(len(values)), -values.astype(np.float64)))  # the best first
    kept = []
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        stays = np.ones(len(block), np.bool_)
        exceeds = _exceeds(rectangles, kinds, block, block, threshold)
        for place in range(len(block)):
            if stays[place]:
                stays[place + 1 :] &= ~exceeds[place, place + 1 :]
        kept.append(block[stays])
        if len(left):
            left = left[~_exceeds(rectangles, kinds, block[stays], left, threshold).any(axis=0)]
    return np.concatenate(kept).astype(np.int64) if kept else np.zeros(0, np.int64)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """``non_maximum_suppression`` on tensors, by torchvision's name.

    Args:
        boxes: [N, 4] xyxy, on any device.
        scores: [N].
        iou_threshold: As ``threshold``.

    Returns:
        [K] int64 on the boxes' device, best score first.

    Raises:
        ValueError: As in ``non_maximum_suppression``.
    """
    return batched_nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """``nms`` within each category, by torchvision's name.

    Args:
        boxes: [N, 4] xyxy, on any device.
        scores: [N].
        idxs: [N] whole numbers: the categories. None: all are of one.
        iou_threshold: As ``threshold``.

    Returns:
        [K] int64 on the boxes' device, best score first.

    Raises:
        ValueError: As in ``non_maximum_suppression``.
    """
    rectangles, values = _array(boxes), _array(scores)
    kinds = None if idxs is None else _array(idxs)
    kept = non_maximum_suppression(rectangles, values, iou_threshold, kinds)
    return torch.from_numpy(kept).to(boxes.device)


def uncrop_boxes(boxes: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Boxes [..., 4] xyxy in pixels of a crop to those of the picture.

    Args:
        boxes: In pixels of the crop.
        crop_box: x0, y0, x1, y1 of the crop in the picture.

    Raises:
        ValueError: The last dimension is not 4.
    """
    _check_last("boxes", boxes, 4)
    x0, y0 = crop_box[:2]
    return boxes + torch.tensor([x0, y0, x0, y0], device=boxes.device)


def uncrop_points(points: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Points [..., 2] (x, y) in pixels of a crop to those of the picture.

    Raises:
        ValueError: The last dimension is not 2.
    """
    _check_last("points", points, 2)
    return points + torch.tensor(list(crop_box[:2]), device=points.device)


def uncrop_masks(masks: Tensor, crop_box: Sequence[int], height: int, width: int) -> Tensor:
    """Masks of a crop to masks of the picture, empty outside of the crop.

    Args:
        masks: [..., h, w] of the crop.
        crop_box: x0, y0, x1, y1 of the crop in the picture, whole pixels.
        height: H of the picture in pixels.
        width: W of the picture in pixels.

    Returns:
        [..., H, W] of the same type.

    Raises:
        ValueError: The masks are not of the crop's size, or the crop is not within the picture.
    """
    x0, y0, x1, y1 = crop_box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError(
            f"the crop {list(crop_box)} does not lie within the picture of {height} x {width}"
        )
    if tuple(masks.shape[-2:]) != (y1 - y0, x1 - x0):
        raise ValueError(
            f"wanted masks [..., {y1 - y0}, {x1 - x0}], of the size of the crop "
            f"{list(crop_box)}; came {list(masks.shape)}"
        )
    return F.pad(masks, (x0, width - x1, y0, height - y1))


def _exceeds(
    boxes: Floats,
    kinds: NDArray[np.int64],
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    threshold: float,
) -> NDArray[np.bool_]:
    """Whether the IoU of boxes of one category exceeds the threshold, [rows, columns] bool."""
    common, union = _overlap(boxes[rows], boxes[columns])
    with np.errstate(divide="ignore", invalid="ignore"):  # two boxes of no area exceed nothing
        too_much = np.divide(common, union, out=common) > threshold
    if kinds.any():
        too_much &= kinds[rows, None] == kinds[None, columns]
    return np.asarray(too_much, np.bool_)


def _overlap(first: Floats, second: Floats) -> tuple[Floats, Floats]:
    """Areas of intersections and unions, [N, M] each."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first.T[:, :, None], second.T[:, None, :].copy()
    common: Floats = np.minimum(ax1, bx1)  # in place from here on: memory is what costs time
    common -= np.maximum(ax0, bx0)
    np.maximum(common, 0, out=common)
    sides = np.minimum(ay1, by1)
    sides -= np.maximum(ay0, by0)
    np.maximum(sides, 0, out=sides)
    common *= sides
    union: Floats = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0)
    union -= common
    return common, union


def _boxes(boxes: ArrayLike) -> Floats:
    given = np.asarray(boxes)
    if given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"wanted boxes [N, 4] as x0, y0, x1, y1; came {list(given.shape)}")
    array: Floats = given if given.dtype == np.float32 else given.astype(np.float64)
    is_good = np.isfinite(array).all(axis=1)
    if not is_good.all():
        place = int(np.argmin(is_good))
        raise ValueError(f"box {place} is not finite: {array[place].tolist()}")
    return array


def _array(tensor: Tensor) -> Floats | NDArray[np.int64]:
    """A tensor as an array; numpy has no bfloat16, and float16 is as good in float32."""
    here = tensor.detach().cpu()
    exact = here.float() if here.dtype in (torch.bfloat16, torch.float16) else here
    array: Floats | NDArray[np.int64] = exact.numpy()
    return array


def _check_last(name: str, tensor: Tensor, length: int) -> None:
    if not tensor.ndim or tensor.shape[-1] != length:
        raise ValueError(f"wanted {name} [..., {length}]; came {list(tensor.shape)}")
