"""Masks of images as arrays: boxes and suppression, holes and islands, run lengths, outlines.

Suppression gives what torchvision's gives. It compares a block of boxes with all that follow, so
that thousands take milliseconds and memory stays bounded. Run lengths are those of pycocotools:
column by column, beginning with what is not mask; compressed, a count is written in characters of
five bits, from the third on as the difference from the one before the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinyvit.lazy import need

Mask: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"
Integers: TypeAlias = NDArray[np.int64]
Ring: TypeAlias = NDArray[np.float64]
RegionKind: TypeAlias = Literal["holes", "islands"]

BLOCK = 64  # boxes compared with all others at once

FIRST_CHARACTER = 48  # "0" stands for no bits
PAYLOAD, SIGN, MORE = 0b011111, 0b010000, 0b100000  # of a character's 6 bits
MOST_CHARACTERS = 12  # of a number: 60 bits


def box_around(mask: Mask) -> tuple[int, int, int, int]:
    """Outer edges (x0, y0, x1, y1) of a mask's pixels: one pixel is 1 wide; zeros without any."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def non_maximum_suppression(
    boxes: ArrayLike, scores: ArrayLike, threshold: float
) -> NDArray[np.int64]:
    """Indices [K] of the boxes that stay, best score first; of equal scores the first is better.

    ``boxes`` are [N, 4] xyxy (float32 is compared in float32, all else in float64), ``scores``
    [N]. A box goes when its IoU with a better one that stays exceeds ``threshold``.
    """
    given, values = np.asarray(boxes), np.asarray(scores)
    if given.ndim != 2 or given.shape[1] != 4:
        raise ValueError(f"wanted boxes [N, 4] as x0, y0, x1, y1; came {list(given.shape)}")
    rectangles: Floats = given if given.dtype == np.float32 else given.astype(np.float64)
    is_good = np.isfinite(rectangles).all(axis=1)
    if not is_good.all():
        place = int(np.argmin(is_good))
        raise ValueError(f"box {place} is not finite: {rectangles[place].tolist()}")
    if values.shape != (len(rectangles),):
        raise ValueError(
            f"wanted a score for each of {len(rectangles)} boxes; came {list(values.shape)}"
        )
    if np.isnan(values).any():
        raise ValueError(f"score {int(np.argmax(np.isnan(values)))} is not a number")
    left = np.lexsort((np.arange(len(values)), -values.astype(np.float64)))  # the best first
    kept = []
    while len(left):
        block, left = left[:BLOCK], left[BLOCK:]
        stays = np.ones(len(block), np.bool_)
        exceeds = _exceeds(rectangles[block], rectangles[block], threshold)
        for place in range(len(block)):
            if stays[place]:
                stays[place + 1 :] &= ~exceeds[place, place + 1 :]
        kept.append(block[stays])
        if len(left):
            better = rectangles[block[stays]]
            left = left[~_exceeds(better, rectangles[left], threshold).any(axis=0)]
    return np.concatenate(kept).astype(np.int64) if kept else np.zeros(0, np.int64)


def _exceeds(first: Floats, second: Floats, threshold: float) -> NDArray[np.bool_]:
    """Whether the IoU of each box with each other exceeds the threshold, [N, M] bool."""
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
    with np.errstate(divide="ignore", invalid="ignore"):  # two boxes of no area exceed nothing
        return np.asarray(np.divide(common, union, out=common) > threshold, np.bool_)


def components(mask: Mask) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Number the connected parts of a mask [H, W] bool, diagonal neighbours included.

    Returns labels [H, W] int32, 0 outside and 1 to n in the order of first pixels, and the parts'
    areas [n] int64 in pixels.
    """
    need("scipy", "min_mask_region_area (holes and islands of masks)")
    from scipy.ndimage import label

    check_mask(mask)
    labels = np.zeros(mask.shape, np.int32)
    x0, y0, x1, y1 = box_around(mask)  # labelling costs time for each pixel
    window = labels[y0:y1, x0:x1]
    count = int(label(mask[y0:y1, x0:x1], np.ones((3, 3), np.int8), output=window))
    areas = np.bincount(window.ravel(), minlength=count + 1)[1:]
    return labels, areas.astype(np.int64)


def remove_small_regions(mask: Mask, area_threshold: float, mode: RegionKind) -> tuple[Mask, bool]:
    """Fill a mask's holes of fewer pixels, or remove such islands, as segment-anything does.

    What is not mask and touches the image's edge is a hole too. When all islands are small, the
    largest stays. Returns the mask (itself where nothing is small) and whether it was changed: as
    in segment-anything also when its only island is small and stays.
    """
    if mode not in get_args(RegionKind):
        raise ValueError(f"mode must be one of 'holes' and 'islands', came {mode!r}")
    labels, areas = components(~mask if mode == "holes" else mask)
    is_small = areas < area_threshold
    if not is_small.any():
        return mask, False
    if mode == "islands" and is_small.all():
        is_small[np.argmax(areas)] = False
    in_mask = np.append(True, is_small) if mode == "holes" else np.append(False, ~is_small)
    return np.asarray(in_mask[labels], np.bool_), True


class RLE(TypedDict):
    """Run lengths of a mask of ``size`` [H, W], ready for JSON: numbers, or compressed text."""

    size: list[int]
    counts: list[int] | str


def encode(mask: Mask, compressed: bool = True) -> RLE:
    """Run lengths of a mask [H, W] bool; counts are text as in pycocotools, or numbers.

    Examples:
        >>> import numpy as np
        >>> encode(np.array([[False, True], [True, True]]), compressed=False)
        {'size': [2, 2], 'counts': [1, 3]}
    """
    check_mask(mask)
    height, width = mask.shape
    return to_rle((height, width), runs(mask, 0, 0, (height, width)), compressed)


def to_rle(size: tuple[int, int], counts: Integers, compressed: bool) -> RLE:
    """Counts of ``runs`` as COCO has them."""
    return {"size": list(size), "counts": compress(counts) if compressed else counts.tolist()}


def runs(mask: Mask, top: int, left: int, size: tuple[int, int]) -> Integers:
    """Counts of the mask of an image of ``size`` (H, W) from a part [hh, ww] bool of it.

    The mask is empty outside of the part, which begins at row ``top`` and column ``left``. A mask
    of the whole image is never made.
    """
    (hh, ww), (height, width) = mask.shape, size
    if height < 1 or width < 1:
        raise ValueError(f"an image has at least one pixel; came {height} x {width}")
    if not (0 <= top <= height - hh and 0 <= left <= width - ww):
        raise ValueError(
            f"the part of {hh} x {ww} pixels at row {top}, column {left} does not lie within the "
            f"image of {height} x {width}"
        )
    counts = np.diff(_changes(mask, top, left, height), prepend=0, append=height * width)
    return counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts


@dataclass(frozen=True)
class Found:
    """A mask that a decoder found among those of many points."""

    prompt: int  # of which point
    token: int  # which of its masks
    score: float  # predicted IoU
    stability: float  # IoU of the masks at a higher and a lower threshold; nan for no pixels
    box: tuple[int, int, int, int]  # first and last pixels, xyxy; without any the crop's corner
    counts: Integers | None  # run lengths; None where it is not stable enough


def runs_and_box(
    mask: Mask, top: int, left: int, size: tuple[int, int], corner: tuple[int, int]
) -> tuple[Integers, tuple[int, int, int, int]]:
    """``Found``'s ``counts`` and ``box`` of the mask that is this part of an image of ``size``."""
    x0, y0, x1, y1 = box_around(mask)
    counts = runs(mask[y0:y1, x0:x1], top + y0, left + x0, size)
    if not x1:  # without pixels
        return counts, (corner[1], corner[0], corner[1], corner[0])
    return counts, (left + x0, top + y0, left + x1 - 1, top + y1 - 1)


def decode(rle: Mapping[str, object]) -> Mask:
    """The mask [H, W] bool of run lengths, ``size`` [H, W] and ``counts``; all is checked."""
    height, width, counts = _read(rle)
    return fill((height, width), counts)


def fill(size: tuple[int, int], counts: Integers) -> Mask:
    """The mask of ``size`` (H, W) of counts that fit it; only columns of the mask are unrolled."""
    height = size[0]
    mask = np.zeros(size, np.bool_)
    left, _, columns, rows = _box(height, counts)
    if rows:
        ends = np.clip(np.cumsum(counts), left * height, (left + columns) * height)
        inside = np.diff(ends, prepend=left * height)  # runs cut to the columns of the mask
        flat = np.repeat(np.arange(len(counts)) % 2 == 1, inside)
        mask[:, left : left + columns] = flat.reshape(columns, height).T
    return mask


def area(rle: Mapping[str, object]) -> int:
    """Pixels of the mask; errors as in ``decode``."""
    return int(_read(rle)[2][1::2].sum())


def to_box(rle: Mapping[str, object]) -> tuple[int, int, int, int]:
    """The smallest box around the mask: (x, y, width, height); zeros for an empty mask."""
    height, _, counts = _read(rle)
    return _box(height, counts)


def compress(counts: Sequence[int] | Integers) -> str:
    """Lengths of runs as text.

    Examples:
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


def check_mask(mask: Mask, name: str = "a mask") -> None:
    """Refuse what is no mask [H, W] bool; ``name`` is for the words."""
    is_array = isinstance(mask, np.ndarray)
    if not is_array or mask.ndim != 2 or mask.dtype != np.bool_:
        came = f"{list(mask.shape)} {mask.dtype}" if is_array else type(mask).__name__
        raise ValueError(f"wanted {name} [H, W] bool; came {came}; for logits give logits > 0")


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
    numbers = decompress(counts) if isinstance(counts, (str, bytes)) else _whole_numbers(counts)
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


def decompress(text: str | bytes) -> Integers:
    """Lengths of runs from their text, checked."""
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


def outlines(mask: Mask, tolerance: float = 0.0) -> list[Ring]:
    """The closed outlines of a mask [H, W] bool: corners [P, 2] as (x, y), the last not repeated.

    Coordinates are continuous: the first pixel is from (0, 0) to (1, 1).

    Outer ones run clockwise as seen, holes the other way round. Drawn with the even-odd rule they
    give the mask back bit for bit, or with a ``tolerance`` are simplified to lie at most so many
    pixels beside the exact ones (Douglas and Peucker, 1973).

    Examples:
        >>> outlines(np.ones((1, 2), bool))[0].tolist()
        [[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]]
    """
    check_mask(mask)
    if not 0 <= tolerance < np.inf:
        raise ValueError(f"tolerance must be 0 or more pixels, came {tolerance!r}")
    rings = (_simplified(ring, tolerance) if tolerance else ring for ring in _rings(mask))
    return [ring for ring in rings if len(ring) >= 3]


def is_outer(ring: Ring) -> bool:
    """Whether an outline of ``outlines`` runs around a part of the mask, and not around a hole."""
    after = np.roll(ring, -1, axis=0)
    return bool((ring[:, 0] * after[:, 1] - ring[:, 1] * after[:, 0]).sum() > 0)


def _rings(mask: Mask) -> Iterator[Ring]:
    """Outlines along the edges of pixels.

    Where the border between mask and ground turns there is a corner. Corners pair up in rows from
    left to right, in columns from top to bottom; following the pairs in turn gives every path.
    """
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
