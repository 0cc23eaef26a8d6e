"""Objects as data sets write them (polygons, run lengths, files of pixels), made masks when asked.

So a data set of a million objects fits into memory. A pixel belongs to a polygon if its centre lies
inside (even-odd rule); the polygons of one object are joined, as in COCO.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tinyvit.errors import ImageError
from tinyvit.images.decode import UPRIGHT, orientation_of, read_size
from tinyvit.images.mask_ops import decode as decode_rle

Mask = NDArray[np.bool_]
Size = tuple[int, int]

_VOID = 255  # of a palette image: the uncertain edge in Pascal VOC's masks
_PLAINLY_LARGE = 8.0  # pixels: a polygon of such a width and area has pixels for certain
_SOFT_LEVELS = 8  # fewer levels are numbers of objects
_LOSSY = ("JPEG", "MPO")


@dataclass(frozen=True)
class Polygons:
    """An object as polygons, and perhaps as small images of parts of it."""

    # each at least three points, [P, 2] (x, y) in pixels of the image
    rings: tuple[NDArray[np.float64], ...]
    # (x, y, PNG): the upper left pixel of a part, and where it is not 0
    patches: tuple[tuple[int, int, bytes], ...] = ()

    @classmethod
    def read(cls, rings: object) -> tuple[Polygons, list[str]]:
        """Polygons from JSON, numbers (x, y, x, y, ...) or pairs, and what is wrong with some.

        As detectron2 does it, a ring without three points costs itself only.
        """
        if not isinstance(rings, (list, tuple)) or not rings:
            raise ValueError("wanted a list of polygons; came none")
        if all(isinstance(number, (int, float)) for number in rings):
            rings = [rings]  # one polygon that is not in a list
        good, faults = [], []
        for number, ring in enumerate(rings):
            try:
                good.append(as_ring(ring))
            except ValueError as err:
                faults.append(f"polygon {number} of {len(rings)}: {err}")
        if not good:
            raise ValueError("; ".join(faults))
        return cls(tuple(good)), faults

    def mask(self, size: Size) -> Mask:
        """What lies outside of the image is cut off."""
        joined = np.zeros(size, np.bool_)
        for ring in self.rings:
            joined |= fill_polygon(ring, size)
        for x, y, png in self.patches:
            with Image.open(io.BytesIO(png)) as image:
                patch = np.asarray(image.convert("L")) > 0
            top, left = max(-y, 0), max(-x, 0)  # of the patch that lies in the image
            part = joined[max(y, 0) :, max(x, 0) :]
            patch = patch[top : top + part.shape[0], left : left + part.shape[1]]
            part[: patch.shape[0], : patch.shape[1]] |= patch
        return joined

    def check(self, size: Size) -> None:
        """Polygons that are plainly large are not drawn."""
        corners = np.array([0.0, 0.0]), np.array([size[1], size[0]], np.float64)
        for ring in self.rings:
            low, high = (np.clip(end, *corners) for end in (ring.min(0), ring.max(0)))
            x, y = ring.T
            area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
            if (high - low).min() >= _PLAINLY_LARGE and area >= 2 * _PLAINLY_LARGE**2:
                return
        _check_not_empty(self.mask(size))


def as_ring(points: object) -> NDArray[np.float64]:
    """Points [P, 2] of a polygon from JSON."""
    try:
        ring = np.asarray(points, np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as err:
        raise ValueError("a polygon must be numbers x, y, x, y, ...") from err
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError(
            f"a polygon wants at least three points of finite numbers; came {len(ring)}"
        )
    return ring


@dataclass(frozen=True)
class RunLengths:
    """An object as COCO's run lengths, compressed or not."""

    counts: str | tuple[int, ...]  # as COCO has them: text, or numbers
    size: Size  # (H, W) they are for

    @classmethod
    def read(cls, record: Mapping[str, object]) -> RunLengths:
        """Run lengths from JSON."""
        counts, size = record.get("counts"), record.get("size")
        with suppress(TypeError, ValueError, OverflowError):
            if isinstance(counts, (str, list)) and isinstance(size, list) and len(size) == 2:
                numbers = counts if isinstance(counts, str) else tuple(map(int, counts))
                return cls(numbers, (int(size[0]), int(size[1])))
        raise ValueError('run lengths want {"size": [height, width], "counts": ...} of numbers')

    def mask(self, size: Size) -> Mask:
        """The mask, if its size is right."""
        if self.size != size:
            raise ValueError(_wrong_size("the run lengths are", self.size, size))
        counts = self.counts if isinstance(self.counts, str) else list(self.counts)
        return np.asarray(decode_rle({"size": list(self.size), "counts": counts}), np.bool_)

    def check(self, size: Size) -> None:
        """As in ``Annotation``."""
        _check_not_empty(self.mask(size))


@dataclass(frozen=True)
class MaskFile:
    """An object in a file of pixels."""

    path: Path  # the file
    value: int | None = None  # the object's id in it; None: the file shows one object

    def mask(self, size: Size, read: Callable[..., NDArray[np.int64]] | None = None) -> Mask:
        """The mask, if its size is right; ``read`` stands for ``read_mask_file``."""
        ids = (read or read_mask_file)(self.path, is_one_object=self.value is None)
        if ids.shape != size:
            raise ValueError(_wrong_size(f"the mask {self.path} is", ids.shape, size))
        return np.asarray(ids == (1 if self.value is None else self.value))

    def check(self, size: Size) -> None:
        """An id was seen in the file, so that only its size needs a check."""
        if self.value is None:
            _check_not_empty(self.mask(size))
        elif (own := read_size(self.path)) != size:
            raise ValueError(_wrong_size(f"the mask {self.path} is", own, size))


Annotation: TypeAlias = Polygons | RunLengths | MaskFile
"""What can be made a mask: ``mask`` gives [H, W] bool in an image of a size, ``check`` cheaply
refuses one without a pixel. Both raise ``ValueError`` or ``ImageError``."""


def read_mask_file(path: Path, *, is_one_object: bool) -> NDArray[np.int64]:
    """Read an image of masks without loss, upright: [H, W] int64 ids, 0 for none.

    A file of one object shows it where it is not 0, if it has two values or a palette, else where
    it is brighter than half. Otherwise each pixel holds an object's id: grey, or a palette's number
    (there 255 is nobody's), or a colour of its own for each object, and 0 or black for none. One
    soft or hard mask all the same is what has 8 bits and the value 255, what is a JPEG, and what
    has many levels, all of them in thin rims. Colour of equal channels is grey, transparent is 0.
    """
    try:
        with Image.open(path) as image:
            turn = None if image.format == "TIFF" else UPRIGHT.get(orientation_of(image))
            if image.format == "TIFF" and (pages := getattr(image, "n_frames", 1)) > 1:
                warnings.warn(f"{path} has {pages} pages; the first one is taken", stacklevel=2)
            image.load()
            kind, is_lossy = image.mode, image.format in _LOSSY
            if kind not in ("P", "PA", "1", "L", "LA", "RGB", "RGBA", "F") and kind[0] != "I":
                kind = "RGBA" if kind in ("La", "RGBa") else "RGB"
            upright = image if turn is None else image.transpose(turn)
            values = np.asarray(upright if kind == upright.mode else upright.convert(kind))
    except FileNotFoundError as err:
        raise ImageError(f"there is no mask file {path}; check the path") from err
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise ImageError(f"the mask file {path} cannot be read: {err}") from err
    values = values.reshape(*values.shape[:2], -1)  # [H, W, C]
    if kind in ("P", "PA"):
        ids = np.where(values[:, :, 0] == _VOID, 0, values[:, :, 0]).astype(np.int64)
        return np.asarray(ids > 0, np.int64) if is_one_object else ids
    if kind == "F" and not (values == np.rint(values)).all():
        raise ImageError(f"the mask file {path} has pixels of mode F; wanted whole numbers")
    colours = _visible(values.astype(np.int64), kind)
    grey: NDArray[np.int64] = colours.max(2)
    if grey.min(initial=0) < 0:
        raise ImageError(f"the mask file {path} has pixels below 0; wanted numbers of objects")
    is_coloured = bool((colours != grey[:, :, None]).any())
    if is_coloured and not is_one_object and not (_has_one_hue(colours, grey) and _is_soft(grey)):
        if is_lossy:
            raise ImageError(
                f"the mask file {path} is a JPEG, which does not keep the colours of objects; "
                "save it as PNG"
            )
        ids = (colours[:, :, 0] << 16) | (colours[:, :, 1] << 8) | colours[:, :, 2]
        return ids.astype(np.int64, copy=False)
    largest = int(grey.max(initial=0))
    has_255 = largest == 255 and kind[0] != "I" and not is_coloured
    if is_one_object or has_255 or is_lossy or _is_soft(grey):
        half = largest / 2 if largest > 255 or is_coloured else 127
        if is_one_object and not is_lossy and (grey[grey > 0] == largest).all():
            half = 0
        return np.asarray(grey > half, np.int64)
    return grey


def _visible(values: NDArray[np.int64], kind: str) -> NDArray[np.int64]:
    """Colours [H, W, 1 or 3] with 0 where nothing is seen; the transparency alone may be a mask."""
    if kind not in ("LA", "RGBA"):
        return values
    alpha: NDArray[np.int64] = values[:, :, -1:]
    colours: NDArray[np.int64] = values[:, :, :-1].copy()
    if not alpha.any() or (alpha == alpha[0, 0]).all():
        return colours
    if (colours == colours[0, 0]).all():
        return alpha
    colours[alpha[:, :, 0] == 0] = 0
    return colours


def _has_one_hue(colours: NDArray[np.int64], grey: NDArray[np.int64]) -> bool:
    """Whether all pixels are shades of one colour, but for rounding."""
    brightest = colours.reshape(-1, 3)[int(grey.argmax())]
    away = np.abs(colours * int(grey.max()) - grey[:, :, None] * brightest)
    return bool((away <= 3 * grey.max()).all())


def _is_soft(grey: NDArray[np.int64]) -> bool:
    """Whether a map has many levels that only occur in thin rims: one mask with soft edges."""
    if grey.max(initial=0) >= 1 << 16 or min(grey.shape) < 3:
        return False
    levels = int(np.count_nonzero(np.bincount(grey.ravel())[1:]))
    if levels < _SOFT_LEVELS:
        return False
    core = grey[1:-1, 1:-1]
    around = np.stack([grey[:-2, 1:-1], grey[2:, 1:-1], grey[1:-1, :-2], grey[1:-1, 2:]])
    is_inner = (around == core).all(0)
    inner_levels = np.unique(core[is_inner & (core > 0)])
    rim = ~is_inner & (core > 0)
    touching = ((around > 0) & (around != core)).any(0)[rim]  # other levels, not only the outside
    return len(inner_levels) <= levels / 4 and bool(touching.size) and touching.mean() >= 0.8


def fill_polygon(ring: NDArray[np.float64], size: Size) -> Mask:
    """The pixels whose centres lie inside a polygon [P, 2] (x, y), which is closed: [H, W] bool.

    Examples:
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
    return np.asarray(np.logical_xor.accumulate(crossings, axis=1)[:, :width])


def _check_not_empty(mask: Mask) -> None:
    if not mask.any():
        raise ValueError("the mask is empty: no pixel of the image belongs to it")


def _wrong_size(what: str, came: Size | tuple[int, ...], wanted: Size) -> str:
    return (
        f"{what} {came[1]} x {came[0]} pixels (width x height), but the image is "
        f"{wanted[1]} x {wanted[0]}"
    )
