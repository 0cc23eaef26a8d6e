"""Masks found in a picture before it is known which of them stay: small, and quick to filter.

A candidate holds its pixels packed, eight to a byte and deflated, within its own box: hundreds of
masks of a large photograph take a few megabytes, where whole ones would take gigabytes. Knows no
model.

Letters: H W the picture, hh ww a mask's box.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .upscale import Region

__all__ = ["Candidate", "PackedMask"]


@dataclass(frozen=True)
class PackedMask:
    """A mask within a picture.

    Attributes:
        size: (H, W) of the picture.
        top: Row of the picture where the mask's box begins.
        left: Column of the picture where it begins.
        shape: (hh, ww) of the box; (0, 0) for an empty mask.
        area: Pixels of the mask.
        data: Its pixels in the box, packed and deflated.
    """

    size: tuple[int, int]
    top: int
    left: int
    shape: tuple[int, int]
    area: int
    data: bytes

    @classmethod
    def of(cls, mask: NDArray[np.bool_], top: int, left: int, size: tuple[int, int]) -> PackedMask:
        """Pack a mask.

        Args:
            mask: [any, any] bool: a part of the picture outside of which the mask is empty.
            top: Row of the picture that the part's first row is.
            left: Column of the picture that the part's first column is.
            size: (H, W) of the picture.
        """
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return cls(size, top, left, (0, 0), 0, b"")
        first_row, first_column = int(rows[0]), int(columns[0])
        tight = mask[first_row : int(rows[-1]) + 1, first_column : int(columns[-1]) + 1]
        data = zlib.compress(np.packbits(tight).tobytes(), 1)
        shape = int(tight.shape[0]), int(tight.shape[1])
        area = int(np.count_nonzero(tight))
        return cls(size, top + first_row, left + first_column, shape, area, data)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """First and last pixels, xyxy, as segment-anything has it; a point for an empty mask."""
        height, width = self.shape
        bottom, right = self.top + max(height - 1, 0), self.left + max(width - 1, 0)
        return self.left, self.top, right, bottom

    def part(self) -> NDArray[np.bool_]:
        """The pixels in the mask's box, [hh, ww] bool."""
        height, width = self.shape
        packed = np.frombuffer(zlib.decompress(self.data) if self.data else b"", np.uint8)
        return np.unpackbits(packed, count=height * width).view(np.bool_).reshape(height, width)

    def whole(self) -> NDArray[np.bool_]:
        """The mask in the whole picture, [H, W] bool."""
        mask = np.zeros(self.size, np.bool_)
        height, width = self.shape
        mask[self.top : self.top + height, self.left : self.left + width] = self.part()
        return mask


@dataclass(frozen=True)
class Candidate:
    """One mask and what is known of it.

    Attributes:
        mask: In the whole picture.
        predicted_iou: The network's own estimate.
        stability: IoU of the masks at a higher and a lower threshold; nan for no pixels.
        point: (x, y) that was prompted, in pixels of the picture.
        crop_box: The crop in which it was found, xyxy in pixels of the picture.
    """

    mask: PackedMask
    predicted_iou: float
    stability: float
    point: tuple[float, float]
    crop_box: tuple[int, int, int, int]

    @classmethod
    def found(
        cls,
        region: Region,
        predicted_iou: float,
        point: Sequence[float],
        crop_box: Sequence[int],
        size: tuple[int, int],
    ) -> Candidate:
        """A mask of a crop, moved into the picture.

        Args:
            region: The mask in the crop.
            predicted_iou: The network's own estimate.
            point: (x, y) in pixels of the crop.
            crop_box: xyxy in pixels of the picture.
            size: (H, W) of the picture.
        """
        x0, y0, x1, y1 = crop_box
        mask = PackedMask.of(region.mask, region.top + y0, region.left + x0, size)
        if not mask.area:
            mask = replace(mask, top=y0, left=x0)
        moved = float(point[0]) + x0, float(point[1]) + y0
        return cls(mask, predicted_iou, stability_of(region), moved, (x0, y0, x1, y1))


def stability_of(region: Region) -> float:
    """Stability in float32, which is what segment-anything compares; nan for no pixels."""
    return float(np.float32(region.stability))
