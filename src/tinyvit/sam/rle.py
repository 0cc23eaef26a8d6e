"""Run lengths of masks as COCO has them: numbers or text, of a whole picture or of a part of it.

A picture is read column by column. ``counts`` are the lengths of its runs, of pixels that are not
mask and of pixels that are in turn, beginning with those that are not. Compressed, each count after
the third is written as its difference from the one before the last, in characters of 6 bits. Both
forms equal those of pycocotools, bit for bit.

A part of a picture is encoded, and decoded, without making the picture. This file knows arrays only
and loads no torch. Source of the format: the COCO data set's own tools.

Letters: H W the picture, hh ww a part of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

__all__ = [
    "RLE",
    "area",
    "coco_encode_rle",
    "compress",
    "decode",
    "decode_region",
    "decompress",
    "encode",
    "encode_region",
    "iou",
    "mask_to_rle_pytorch",
    "rle_to_mask",
    "to_box",
]

Mask = NDArray[np.bool_]
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
    """Run lengths of a picture's mask that is empty outside of a part; the picture is not made.

    Args:
        mask: [hh, ww] bool: the part. Either may be 0: an empty mask.
        top: Row of the picture that the part's first row is.
        left: Column of the picture that the part's first column is.
        height: H of the picture in pixels.
        width: W of the picture in pixels.
        compressed: As in ``encode``.

    Raises:
        ValueError: The part has another shape or type, or does not lie within the picture.
    """
    _check_mask(mask)
    hh, ww = mask.shape
    if height < 1 or width < 1:
        raise ValueError(f"a picture has at least one pixel; came {height} x {width}")
    if not (0 <= top <= height - hh and 0 <= left <= width - ww):
        raise ValueError(
            f"the part of {hh} x {ww} pixels at row {top}, column {left} does not lie within the "
            f"picture of {height} x {width}"
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
    """The part of the picture that holds the mask; the picture is not made.

    Args:
        rle: As in ``decode``.

    Returns:
        The part [hh, ww] bool, no larger than needed (0 x 0 for an empty mask), and the row and
        column of the picture where it begins.

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
    """Intersection over union of two masks of one picture; 0 where both are empty.

    Raises:
        ValueError: The pictures have different sizes; else as in ``decode``.
    """
    height, width, ours = _read(first)
    other_height, other_width, theirs = _read(second)
    if (height, width) != (other_height, other_width):
        raise ValueError(
            f"the masks are of pictures of different sizes: {height} x {width} and "
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
    """Where, column by column in a picture of this height, mask begins and ends in turn."""
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
        raise ValueError(f"a picture has at least one pixel; came size {[height, width]}")
    numbers = _numbers_of(counts) if isinstance(counts, (str, bytes)) else _whole_numbers(counts)
    most = int(numbers.max(initial=0))  # checked first: a sum of numbers this large may overflow
    total = int(numbers.sum()) if most <= height * width else most
    if total != height * width:
        raise ValueError(
            f"counts must sum to height x width = {height} x {width} = {height * width}, but "
            f"{'sum to' if most <= height * width else 'hold'} {total}; are they of another "
            "picture, or cut off?"
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
