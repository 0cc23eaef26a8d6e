"""Boxes: around masks, from one notation to another, out of crops, and without duplicates.

A box is xyxy. Around a mask it holds the *indices* of the first and the last pixel, as in
segment-anything: a mask of the single pixel (3, 5) has the box 3, 5, 3, 5, of no area; so has an
empty mask, at 0, 0. All else takes boxes as rectangles in a plane.

Suppression gives what torchvision's gives. It compares a block of boxes with all that follow, so
that thousands take milliseconds and memory stays bounded. No model and no file is known here.

Letters: N boxes, M masks, H W the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypedDict, get_args

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

if TYPE_CHECKING:
    import torch

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
    """Boxes [..., 4] xyxy in pixels of a crop to those of the image.

    Args:
        boxes: In pixels of the crop.
        crop_box: x0, y0, x1, y1 of the crop in the image.

    Raises:
        ValueError: The last dimension is not 4.
    """
    _check_last("boxes", boxes, 4)
    x0, y0 = crop_box[:2]
    return boxes + torch.tensor([x0, y0, x0, y0], device=boxes.device)


def uncrop_points(points: Tensor, crop_box: Sequence[int]) -> Tensor:
    """Points [..., 2] (x, y) in pixels of a crop to those of the image.

    Raises:
        ValueError: The last dimension is not 2.
    """
    _check_last("points", points, 2)
    return points + torch.tensor(list(crop_box[:2]), device=points.device)


def uncrop_masks(masks: Tensor, crop_box: Sequence[int], height: int, width: int) -> Tensor:
    """Masks of a crop to masks of the image, empty outside of the crop.

    Args:
        masks: [..., h, w] of the crop.
        crop_box: x0, y0, x1, y1 of the crop in the image, whole pixels.
        height: H of the image in pixels.
        width: W of the image in pixels.

    Returns:
        [..., H, W] of the same type.

    Raises:
        ValueError: The masks are not of the crop's size, or the crop is not within the image.
    """
    x0, y0, x1, y1 = crop_box
    if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
        raise ValueError(
            f"the crop {list(crop_box)} does not lie within the image of {height} x {width}"
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

    What is not mask and touches the image's edge is a hole too, and is filled when it is small.

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
    """The part of the image that holds the mask: labelling costs time for each pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


Integers = NDArray[np.int64]

FIRST_CHARACTER = 48  # "0" stands for no bits
PAYLOAD, SIGN, MORE = 0b011111, 0b010000, 0b100000  # of a character's 6 bits
MOST_CHARACTERS = 12  # of a number: 60 bits


class RLE(TypedDict):
    """Run lengths of a mask, ready for JSON.

    Attributes:
        size: [H, W].
        counts: Numbers, or their compressed text.
    """

    size: list[int]
    counts: list[int] | str


def encode(mask: Mask, compressed: bool = True) -> RLE:
    """Run lengths of a mask.

    Args:
        mask: [H, W] bool.
        compressed: Whether counts are text, as pycocotools has them, or a list of numbers.

    Raises:
        ValueError: Another shape or type, or no pixels.

    Example:
        >>> import numpy as np
        >>> encode(np.array([[False, True], [True, True]]), compressed=False)
        {'size': [2, 2], 'counts': [1, 3]}
    """
    _check_mask(mask)
    return encode_region(mask, 0, 0, mask.shape[0], mask.shape[1], compressed)


def encode_region(
    mask: Mask, top: int, left: int, height: int, width: int, compressed: bool = True
) -> RLE:
    """Run lengths of an image's mask that is empty outside of a part; the image is not made.

    Args:
        mask: [hh, ww] bool: the part. Either may be 0: an empty mask.
        top: Row of the image that the part's first row is.
        left: Column of the image that the part's first column is.
        height: H of the image in pixels.
        width: W of the image in pixels.
        compressed: As in ``encode``.

    Raises:
        ValueError: The part has another shape or type, or does not lie within the image.
    """
    _check_mask(mask)
    hh, ww = mask.shape
    if height < 1 or width < 1:
        raise ValueError(f"an image has at least one pixel; came {height} x {width}")
    if not (0 <= top <= height - hh and 0 <= left <= width - ww):
        raise ValueError(
            f"the part of {hh} x {ww} pixels at row {top}, column {left} does not lie within the "
            f"image of {height} x {width}"
        )
    counts = np.diff(_changes(mask, top, left, height), prepend=0, append=height * width)
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return {
        "size": [int(height), int(width)],
        "counts": compress(counts) if compressed else counts.tolist(),
    }


def decode(rle: Mapping[str, object]) -> Mask:
    """The mask of run lengths in either form, [H, W] bool.

    Args:
        rle: ``size`` [H, W] and ``counts``: numbers, or text (``str`` or ``bytes``).

    Raises:
        ValueError: A part is missing or of another kind, a count is negative, the text is damaged,
            or the counts do not sum to H * W.
    """
    height, width, counts = _read(rle)
    part, top, left = _part(height, counts)
    mask = np.zeros((height, width), np.bool_)
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask


def decode_region(rle: Mapping[str, object]) -> tuple[Mask, int, int]:
    """The part of the image that holds the mask; the image is not made.

    Args:
        rle: As in ``decode``.

    Returns:
        The part [hh, ww] bool, no larger than needed (0 x 0 for an empty mask), and the row and
        column of the image where it begins.

    Raises:
        ValueError: As in ``decode``.
    """
    height, _, counts = _read(rle)
    return _part(height, counts)


def area(rle: Mapping[str, object]) -> int:
    """Pixels of the mask.

    Raises:
        ValueError: As in ``decode``.
    """
    return int(_read(rle)[2][1::2].sum())


def to_box(rle: Mapping[str, object]) -> tuple[int, int, int, int]:
    """The smallest box around the mask: (x, y, width, height) in pixels; zeros for an empty mask.

    Raises:
        ValueError: As in ``decode``.
    """
    height, _, counts = _read(rle)
    return _box(height, counts)


def iou(first: Mapping[str, object], second: Mapping[str, object]) -> float:
    """Intersection over union of two masks of one image; 0 where both are empty.

    Raises:
        ValueError: The images have different sizes; else as in ``decode``.
    """
    height, width, ours = _read(first)
    other_height, other_width, theirs = _read(second)
    if (height, width) != (other_height, other_width):
        raise ValueError(
            f"the masks are of images of different sizes: {height} x {width} and "
            f"{other_height} x {other_width}"
        )
    ends = np.cumsum(theirs)
    before = _pixels_before(ours, ends)  # of the first mask, up to each end of a run of the second
    common = int(np.diff(before, prepend=0)[1::2].sum())
    union = int(ours[1::2].sum()) + int(theirs[1::2].sum()) - common
    return common / union if union else 0.0


def compress(counts: Sequence[int] | Integers) -> str:
    """Write counts as text.

    Args:
        counts: Lengths of runs, none negative.

    Raises:
        ValueError: They are no whole numbers, or one is negative.

    Example:
        >>> compress([6, 1, 40, 4, 1])
        '61X13iN'
    """
    numbers = _whole_numbers(counts)
    left = numbers.copy()
    left[3:] -= numbers[1:-2]
    columns = []  # the first characters of all numbers, the second ones, ...
    is_open = np.ones(len(left), np.bool_)
    while is_open.any():
        payload = left & PAYLOAD
        left >>= 5
        goes_on = is_open & (left != np.where(payload & SIGN, -1, 0))
        characters = payload + MORE * goes_on + FIRST_CHARACTER
        columns.append(np.where(is_open, characters, 0).astype(np.uint8))
        is_open = goes_on
    if not columns:
        return ""
    table = np.stack(columns, axis=1)
    return table[table > 0].tobytes().decode("ascii")


def decompress(text: str | bytes) -> list[int]:
    """Read counts from their text.

    Raises:
        ValueError: A character that the format does not have, a text that ends within a number, or
            a number that is too long or negative.
    """
    counts: list[int] = _numbers_of(text).tolist()
    return counts


def mask_to_rle_pytorch(tensor: torch.Tensor) -> list[RLE]:
    """Uncompressed run lengths of masks [B, H, W] bool, by segment-anything's name.

    Raises:
        ValueError: Another shape or type.
    """
    masks = tensor.detach().cpu().numpy()
    if masks.ndim != 3:
        raise ValueError(f"wanted masks [B, H, W]; came {list(masks.shape)}")
    return [encode(mask, compressed=False) for mask in masks]


def rle_to_mask(rle: Mapping[str, object]) -> Mask:
    """``decode`` by segment-anything's name.

    Raises:
        ValueError: As in ``decode``.
    """
    return decode(rle)


def coco_encode_rle(uncompressed_rle: Mapping[str, object]) -> RLE:
    """The same run lengths with counts as text, by segment-anything's name.

    Raises:
        ValueError: As in ``decode``.
    """
    height, width, counts = _read(uncompressed_rle)
    return {"size": [height, width], "counts": compress(counts)}


def _check_mask(mask: Mask) -> None:
    is_array = isinstance(mask, np.ndarray)
    if not is_array or mask.ndim != 2 or mask.dtype != np.bool_:
        came = f"{list(mask.shape)} {mask.dtype}" if is_array else type(mask).__name__
        raise ValueError(f"wanted a mask [H, W] bool; came {came}; for logits give logits > 0")


def _changes(mask: Mask, top: int, left: int, height: int) -> Integers:
    """Where, column by column in an image of this height, mask begins and ends in turn."""
    hh, ww = mask.shape
    if not mask.size:
        return np.zeros(0, np.int64)
    differs = np.empty((hh + 1, ww), np.bool_)  # from the row above; above and below is no mask
    differs[0], differs[hh] = mask[0], mask[-1]
    np.not_equal(mask[1:], mask[:-1], out=differs[1:hh])
    rows, columns = np.divmod(np.flatnonzero(differs), ww)
    places: Integers = (columns + left) * height + rows + top
    places.sort()
    if hh < height:
        return places
    # a run that leaves a column at the bottom and one that enters the next at the top are one run
    meets = places[1:] == places[:-1]
    is_kept = np.ones(len(places), np.bool_)
    is_kept[1:] &= ~meets
    is_kept[:-1] &= ~meets
    return places[is_kept]


def _box(height: int, counts: Integers) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the mask."""
    ends = np.cumsum(counts)
    runs = np.flatnonzero(counts[1::2]) * 2 + 1  # runs of no pixels are nowhere
    if not len(runs):
        return 0, 0, 0, 0
    first, last = ends[runs] - counts[runs], ends[runs] - 1
    left, right = int(first[0]) // height, int(last[-1]) // height
    columns = right - left + 1
    if (first // height != last // height).any():  # goes on at the top of the next column
        return left, 0, columns, height
    top, bottom = int((first % height).min()), int((last % height).max())
    return left, top, columns, bottom - top + 1


def _part(height: int, counts: Integers) -> tuple[Mask, int, int]:
    """The part that holds the mask, and its first row and column."""
    left, top, columns, rows = _box(height, counts)
    if not rows:
        return np.zeros((0, 0), np.bool_), 0, 0
    ends = np.clip(np.cumsum(counts), left * height, (left + columns) * height)
    inside = np.diff(ends, prepend=left * height)  # runs cut to the columns of the part
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, inside)
    tall = flat.reshape(columns, height)
    return np.ascontiguousarray(tall[:, top : top + rows].T), top, left


def _pixels_before(counts: Integers, places: Integers) -> Integers:
    """How many pixels of the mask lie before each place, column by column."""
    ends = np.cumsum(counts)
    in_mask = np.where(np.arange(len(counts)) % 2 == 1, counts, 0)
    run = np.minimum(np.searchsorted(ends, places, side="left"), len(counts) - 1)
    before: Integers = np.cumsum(in_mask)[run] - np.where(run % 2 == 1, ends[run] - places, 0)
    return before


def _read(rle: Mapping[str, object]) -> tuple[int, int, Integers]:
    """Height, width and counts, checked."""
    size, counts = rle.get("size"), rle.get("counts")
    is_pair = isinstance(size, (list, tuple, np.ndarray)) and len(size) == 2
    if not is_pair or counts is None:
        raise ValueError(
            'run lengths want {"size": [height, width], "counts": ...}; came '
            f"{sorted(str(key) for key in rle)} with size {size!r}"
        )
    height, width = (int(side) for side in _whole_numbers(size, "size"))
    if height < 1 or width < 1:
        raise ValueError(f"an image has at least one pixel; came size {[height, width]}")
    numbers = _numbers_of(counts) if isinstance(counts, (str, bytes)) else _whole_numbers(counts)
    most = int(numbers.max(initial=0))  # checked first: a sum of numbers this large may overflow
    total = int(numbers.sum()) if most <= height * width else most
    if total != height * width:
        raise ValueError(
            f"counts must sum to height x width = {height} x {width} = {height * width}, but "
            f"{'sum to' if most <= height * width else 'hold'} {total}; are they of another "
            "image, or cut off?"
        )
    return height, width, numbers


def _whole_numbers(numbers: object, name: str = "counts") -> Integers:
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(
            f"{name} must be whole numbers; came {type(numbers).__name__} of {array.dtype} "
            f"{list(array.shape)}"
        )
    whole = array.astype(np.int64)
    if (whole < 0).any():
        place = int(np.argmax(whole < 0))
        raise ValueError(f"{name} must not be negative, but number {place} is {array[place]}")
    return whole


def _numbers_of(text: str | bytes) -> Integers:
    """Counts from their text, checked."""
    raw = text.encode("utf-8") if isinstance(text, str) else text
    bits = np.frombuffer(raw, np.uint8).astype(np.int64) - FIRST_CHARACTER
    if not len(bits):
        return bits
    is_wrong = (bits < 0) | (bits > PAYLOAD + MORE)
    if is_wrong.any():
        place = int(np.argmax(is_wrong))
        raise ValueError(
            f"compressed counts have characters from '0' to 'o' only, but byte {place} is "
            f"{raw[place : place + 1]!r}"
        )
    is_last = (bits & MORE) == 0
    if not is_last[-1]:
        raise ValueError("the compressed counts end within a number; are they cut off?")
    lasts = np.flatnonzero(is_last)
    firsts = np.concatenate([[0], lasts[:-1] + 1])
    lengths = lasts - firsts + 1
    if lengths.max() > MOST_CHARACTERS:
        raise ValueError(
            f"a number of the compressed counts has {lengths.max()} characters, more than "
            f"{MOST_CHARACTERS}"
        )
    places = np.arange(len(bits)) - np.repeat(firsts, lengths)
    numbers: Integers = np.add.reduceat((bits & PAYLOAD) << (5 * places), firsts)
    numbers -= np.where(bits[lasts] & SIGN, np.int64(1) << (5 * lengths), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])  # differences from the one before the last, but not
    numbers[2::2] = np.cumsum(numbers[2::2])  # for the first three
    return _whole_numbers(numbers)
