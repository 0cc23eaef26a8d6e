"""From low-resolution logits to masks in the original image: whole, or only where they can be.

Segment Anything enlarges logits twice, bilinearly: to the model's frame, which is cut to the part
that holds the image, and from there to the image. Both are linear along each axis, so together
they are one matrix an axis, and a part of the image needs a part of each. A value between others
never exceeds them: where no low-resolution logit near by exceeds a threshold, no pixel does.

It knows numbers only: no model, no prompts.

Shapes: N masks, h4 w4 low-resolution logits, H W the original image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.image_spec import Placement

PITCH = 4.0
"""Pixels of the model's frame for one low-resolution logit: stride 16 of the encoder by 4."""


def upscale(low_res_logits: Tensor, placement: Placement, pitch: float = PITCH) -> Tensor:
    """Enlarge logits to the original image, as segment-anything's ``postprocess_masks``.

    Args:
        low_res_logits: [N, h4, w4].
        placement: Where the image lies in the model's frame.
        pitch: Pixels of the model's frame for one logit.

    Returns:
        [N, H, W]; above 0 is the mask.

    Raises:
        ValueError: Another number of dimensions, or fewer logits than the image covers.
    """
    if low_res_logits.ndim != 3:
        raise ValueError(f"wanted logits [N, h4, w4]; came {list(low_res_logits.shape)}")
    height, width = placement.resized_size
    frame = _frame(tuple(low_res_logits.shape[1:]), placement, pitch)
    if not len(low_res_logits):
        return low_res_logits.new_empty(0, *placement.original_size)
    masks = F.interpolate(low_res_logits[None], frame, mode="bilinear", align_corners=False)
    masks = masks[..., :height, :width]
    size = placement.original_size
    return F.interpolate(masks, size, mode="bilinear", align_corners=False)[0]


@dataclass(frozen=True)
class Region:
    """The part of an image that a mask can lie in.

    Attributes:
        mask: [hh, ww] bool; outside of it the mask is empty. Has no pixels where nothing is.
        top: Row of the image that the first row of ``mask`` is.
        left: Column of the image that the first column of ``mask`` is.
        height: Of the whole image in pixels.
        width: Of the whole image in pixels.
        inner: Pixels whose logit exceeds threshold + offset.
        outer: Pixels whose logit exceeds threshold - offset.
    """

    mask: NDArray[np.bool_]
    top: int
    left: int
    height: int
    width: int
    inner: int
    outer: int

    @property
    def stability(self) -> float:
        """IoU of the masks at the two thresholds, as segment-anything has it; nan for none."""
        return self.inner / self.outer if self.outer else float("nan")

    def whole(self) -> NDArray[np.bool_]:
        """The mask in the whole image, [H, W] bool."""
        mask = np.zeros((self.height, self.width), np.bool_)
        height, width = self.mask.shape
        mask[self.top : self.top + height, self.left : self.left + width] = self.mask
        return mask


class RegionUpscaler:
    """Enlarges masks one by one, each only where it can be; for many masks of one image.

    Args:
        size: (h4, w4) of the logits.
        placement: Where the image lies in the model's frame.
        pitch: Pixels of the model's frame for one logit.

    Raises:
        ValueError: Fewer logits than the image covers.
    """

    def __init__(self, size: tuple[int, int], placement: Placement, pitch: float = PITCH) -> None:
        frame = _frame(size, placement, pitch)
        self.placement = placement
        sizes = zip(size, frame, placement.resized_size, placement.original_size, strict=True)
        self._rows, self._columns = (_Axis(*lengths) for lengths in sizes)

    def __call__(
        self, low_res_logits: Tensor, threshold: float = 0.0, offset: float = 1.0
    ) -> Region:
        """Enlarge one mask.

        Args:
            low_res_logits: [h4, w4] float32 on the CPU.
            threshold: Logits above it are the mask.
            offset: Of the thresholds for ``Region.stability``; at least 0.

        Returns:
            The mask where it can be.
        """
        height, width = self.placement.original_size
        can_be = low_res_logits > threshold - offset
        rows, columns = can_be.any(1).nonzero(), can_be.any(0).nonzero()
        if not len(rows):
            return Region(np.zeros((0, 0), np.bool_), 0, 0, height, width, 0, 0)
        down, from_rows = self._rows.reach(int(rows[0]), int(rows[-1]))
        across, from_columns = self._columns.reach(int(columns[0]), int(columns[-1]))
        part = low_res_logits[from_rows, from_columns]
        tall = self._rows.matrix[down, from_rows] @ part
        logits = tall @ self._columns.matrix[across, from_columns].T
        inner, outer = (int((logits > threshold + x).count_nonzero()) for x in (offset, -offset))
        mask = (logits > threshold).numpy()
        return Region(mask, down.start, across.start, height, width, inner, outer)


class _Axis:
    """Both enlargements along one axis as a matrix [pixels, logits], and which see which.

    Args:
        logits: Their number.
        frame: Pixels they are enlarged to.
        resized: Pixels of those that hold the image.
        original: Pixels of the image.
    """

    def __init__(self, logits: int, frame: int, resized: int, original: int) -> None:
        matrix = _bilinear(resized, original) @ _bilinear(logits, frame)[:resized]
        self.matrix = matrix.to(torch.float32)
        seen = matrix != 0
        places = torch.arange(logits)
        self._first = torch.where(seen, places, logits).amin(1).numpy()  # rises with the pixel
        self._last = torch.where(seen, places, -1).amax(1).numpy()

    def reach(self, first: int, last: int) -> tuple[slice, slice]:
        """Pixels that see logits ``first`` to ``last``, and all the logits that those see."""
        start = int(np.searchsorted(self._last, first, "left"))
        stop = max(int(np.searchsorted(self._first, last, "right")), start)
        if start == stop:
            return slice(start, stop), slice(0, 0)
        return slice(start, stop), slice(int(self._first[start]), int(self._last[stop - 1]) + 1)


def _bilinear(source: int, target: int) -> Tensor:
    """The matrix [target, source] float64 of a bilinear resizing with half-pixel centres."""
    at = ((torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5).clamp_min(0)
    low = at.floor().long().clamp_max(source - 1)
    high = (low + 1).clamp_max(source - 1)
    part = (at - low)[:, None].clamp(0, 1)
    matrix = torch.zeros(target, source, dtype=torch.float64)
    matrix.scatter_add_(1, low[:, None], 1 - part)
    return matrix.scatter_add_(1, high[:, None], part)


def _frame(size: tuple[int, ...], placement: Placement, pitch: float) -> tuple[int, int]:
    """(height, width) that logits of this size cover, in pixels of the model's frame."""
    frame = round(size[0] * pitch), round(size[1] * pitch)
    if frame[0] < placement.resized_size[0] or frame[1] < placement.resized_size[1]:
        raise ValueError(
            f"logits {list(size)} at {pitch:g} pixels each cover {frame[0]}x{frame[1]} pixels, but "
            f"the image has {placement.resized_size[0]}x{placement.resized_size[1]} in the "
            f"model's frame; do they belong to this image?"
        )
    return frame
