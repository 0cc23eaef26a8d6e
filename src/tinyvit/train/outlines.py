"""One object's mask as a data set writes it down: polygons, run lengths, a file; made a mask.

Each outline knows the size of the picture that it was drawn on, as far as its format says, and
becomes pixels only when asked, so that a data set of a million objects fits into memory. A pixel
belongs to a polygon if its centre lies inside (even-odd rule); the polygons of one object are
joined, as in COCO.

Knows no data set. Shapes: H W the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyvit.errors import ImageError
from tinyvit.images.decode import read_size
from tinyvit.sam.rle import decode as decode_rle

__all__ = [
    "MaskFile",
    "Outline",
    "Polygons",
    "RunLengths",
    "fill_polygon",
    "object_ids",
    "read_mask_file",
]

Mask = NDArray[np.bool_]
Size = tuple[int, int]

_VOID = 255  # of a palette picture: the uncertain edge in Pascal VOC's masks
_PLAINLY_LARGE = 8.0  # pixels: a polygon of such a width and area has pixels for certain


class Outline(Protocol):
    """What can be made a mask."""

    def mask(self, size: Size) -> Mask:
        """The mask [H, W] bool in a picture of this size.

        Raises:
            ValueError: The outline is of a picture of another size, or damaged.
            ImageError: Its file cannot be read.
        """
        ...

    def check(self, size: Size) -> None:
        """Find out, as cheaply as it can be, whether ``mask`` would give some pixels.

        Raises:
            ValueError: It would raise, or the mask would be empty.
            ImageError: As for ``mask``.
        """
        ...


@dataclass(frozen=True)
class Polygons:
    """An object as polygons.

    Attributes:
        rings: Each at least three points, [P, 2] (x, y) in pixels of the picture.
    """

    rings: tuple[NDArray[np.float64], ...]

    @classmethod
    def read(cls, rings: object) -> Polygons:
        """Polygons from JSON: lists of numbers (x, y, x, y, ...) or of pairs.

        Raises:
            ValueError: There are none, or one has fewer than three points or no finite numbers.
        """
        if not isinstance(rings, Sequence) or not len(rings):
            raise ValueError("wanted a list of polygons; came none")
        arrays = []
        for ring in rings:
            try:
                array = np.asarray(ring, np.float64).reshape(-1, 2)
            except (TypeError, ValueError) as err:
                raise ValueError("a polygon must be numbers x, y, x, y, ...") from err
            if len(array) < 3 or not np.isfinite(array).all():
                raise ValueError(
                    f"a polygon wants at least three points of finite numbers; came {len(array)}"
                )
            arrays.append(array)
        return cls(tuple(arrays))

    def mask(self, size: Size) -> Mask:
        """As ``Outline.mask``; what lies outside of the picture is cut off."""
        joined = np.zeros(size, np.bool_)
        for ring in self.rings:
            joined |= fill_polygon(ring, size)
        return joined

    def check(self, size: Size) -> None:
        """As ``Outline.check``; polygons that are plainly large are not drawn."""
        corners = np.array([0.0, 0.0]), np.array([size[1], size[0]], np.float64)
        for ring in self.rings:
            low, high = (np.clip(end, *corners) for end in (ring.min(0), ring.max(0)))
            if (high - low).min() >= _PLAINLY_LARGE and _area(ring) >= 2 * _PLAINLY_LARGE**2:
                return
        _check_not_empty(self.mask(size))


@dataclass(frozen=True)
class RunLengths:
    """An object as COCO's run lengths, compressed or not.

    Attributes:
        counts: As COCO has them: text, or numbers.
        size: (H, W) they are for.
    """

    counts: str | tuple[int, ...]
    size: Size

    @classmethod
    def read(cls, record: Mapping[str, object]) -> RunLengths:
        """Run lengths from JSON.

        Raises:
            ValueError: ``size`` or ``counts`` is missing or of another kind.
        """
        counts, size = record.get("counts"), record.get("size")
        if isinstance(counts, list):
            counts = tuple(int(count) for count in counts)
        if not isinstance(counts, (str, tuple)) or not isinstance(size, list) or len(size) != 2:
            raise ValueError('run lengths want {"size": [height, width], "counts": ...}')
        return cls(counts, (int(size[0]), int(size[1])))

    def mask(self, size: Size) -> Mask:
        """As ``Outline.mask``."""
        if self.size != size:
            raise ValueError(_wrong_size("the run lengths are", self.size, size))
        counts = self.counts if isinstance(self.counts, str) else list(self.counts)
        found: Mask = np.asarray(decode_rle({"size": list(self.size), "counts": counts}), np.bool_)
        return found

    def check(self, size: Size) -> None:
        """As ``Outline.check``."""
        _check_not_empty(self.mask(size))


@dataclass(frozen=True)
class MaskFile:
    """An object in a file of pixels.

    Attributes:
        path: The file.
        value: The object's id in it; None: the file shows one object.
    """

    path: Path
    value: int | None = None

    def mask(self, size: Size) -> Mask:
        """As ``Outline.mask``."""
        ids = read_mask_file(self.path, is_one_object=self.value is None)
        if ids.shape != size:
            raise ValueError(_wrong_size(f"the mask {self.path} is", ids.shape, size))
        found: Mask = ids == (1 if self.value is None else self.value)
        return found

    def check(self, size: Size) -> None:
        """As ``Outline.check``; an id was seen in the file, so that its size is all to look at."""
        if self.value is None:
            _check_not_empty(self.mask(size))
        elif (own := read_size(self.path)) != size:
            raise ValueError(_wrong_size(f"the mask {self.path} is", own, size))


def read_mask_file(path: Path, *, is_one_object: bool) -> NDArray[np.int64]:
    """Read a picture of masks.

    Args:
        path: PNG, or anything that Pillow reads without loss.
        is_one_object: Whether the file shows one object: what is brighter than half of the
            brightest possible value, or, in a picture of 0 and 1 or of a palette, what is not 0.
            Otherwise each pixel holds an object's id, see ``object_ids``: grey, or a palette's
            number (there 255 is nobody's), or a colour of its own for each object, and 0 or black
            for none. An 8-bit grey picture with the value 255 holds one soft or hard mask all the
            same.

    Returns:
        [H, W] int64 ids, 0 for none.

    Raises:
        ImageError: The file is missing, damaged, or of a mode that has no rule.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            values = np.asarray(image.convert("RGB") if mode in ("RGBA", "CMYK") else image)
    except FileNotFoundError as err:
        raise ImageError(f"there is no mask file {path}; check the path") from err
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as err:
        raise ImageError(f"the mask file {path} cannot be read: {err}") from err
    if mode == "P":
        ids = np.where(values == _VOID, 0, values).astype(np.int64)
        return (ids > 0).astype(np.int64) if is_one_object else ids
    if values.ndim == 3 and values.shape[2] == 2:  # grey with transparency
        values = values[:, :, 0]
    if values.ndim == 3:
        parts = values[:, :, :3].astype(np.int64)
        ids = (parts[:, :, 0] << 16) | (parts[:, :, 1] << 8) | parts[:, :, 2]
        return (parts.max(2) > 127).astype(np.int64) if is_one_object else ids
    if values.dtype.kind not in "bui":
        raise ImageError(f"the mask file {path} has pixels of mode {mode}; wanted whole numbers")
    ids = values.astype(np.int64)
    largest = int(ids.max(initial=0))
    if is_one_object or (mode == "L" and largest == 255):
        half = 0 if largest <= 1 else (127 if largest <= 255 else 32767)
        return (ids > half).astype(np.int64)
    return ids


def object_ids(ids: NDArray[np.int64]) -> list[int]:
    """The ids in a picture of ids, without 0."""
    return [int(value) for value in np.unique(ids) if value]


def fill_polygon(ring: NDArray[np.float64], size: Size) -> Mask:
    """The pixels whose centres lie inside a polygon.

    Args:
        ring: [P, 2] (x, y) in pixels, continuous; the last point is joined to the first.
        size: (H, W).

    Returns:
        [H, W] bool.

    Example:
        >>> fill_polygon(np.array([[1.0, 0.0], [3.0, 0.0], [3.0, 1.0], [1.0, 1.0]]), (1, 4))
        array([[False,  True,  True, False]])
    """
    height, width = size
    crossings = np.zeros((height, width + 1), np.bool_)
    for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        low, high = sorted((y0, y1))
        first, last = (min(max(int(np.ceil(y - 0.5)), 0), height) for y in (low, high))
        if first >= last:
            continue
        rows = np.arange(first, last)
        x = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        crossings[rows, columns] ^= True  # the first centre to the right of the edge
    inside: Mask = np.logical_xor.accumulate(crossings, axis=1)[:, :width]
    return inside


def _area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def _check_not_empty(mask: Mask) -> None:
    if not mask.any():
        raise ValueError("the mask is empty: no pixel of the picture belongs to it")


def _wrong_size(what: str, came: Size | tuple[int, ...], wanted: Size) -> str:
    return (
        f"{what} {came[1]} x {came[0]} pixels (width x height), but the picture is "
        f"{wanted[1]} x {wanted[0]}"
    )
