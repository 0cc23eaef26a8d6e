"""From low-res logits to masks in the original image: whole, or only where they can be.

Segment Anything enlarges logits twice, bilinearly: to the model's input, which is cut to the part
that holds the image, and from there to the image. Both are linear along each axis, so together
they are one matrix an axis, in which each pixel sees at most four logits: a block of rows costs a
product with a few rows of logits. An interpolated value never exceeds its neighbours, so where no
low-res logit near by exceeds a threshold, no pixel does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tinyvit.image_spec import Placement
from tinyvit.images.mask_ops import Found, runs_and_box

Floats = NDArray[np.float32]

LOGIT_STRIDE = 4.0
"""Input pixels per low-res logit: the encoder's stride of 16 by 4."""

BLOCK = 64  # rows enlarged at once: they stay in a core's cache until they are compared


def upscale(
    low_res_logits: Floats,
    placement: Placement,
    logit_stride: float = LOGIT_STRIDE,
    threshold: float | None = None,
) -> Floats | NDArray[np.bool_]:
    """Logits [..., h4, w4] in the original image, as by segment-anything's ``postprocess_masks``.

    Gives [..., H, W]: float32, or with a ``threshold`` bool, true where logits are above it.
    """
    if low_res_logits.ndim < 2:
        raise ValueError(f"wanted logits [..., h4, w4]; came {list(low_res_logits.shape)}")
    size = low_res_logits.shape[-2:]
    rows, columns = axes(size, placement, logit_stride)
    height, width = placement.original_size
    shape = *low_res_logits.shape[:-2], height, width
    enlarged = np.empty(shape, np.float32 if threshold is None else np.bool_)
    sources = low_res_logits.reshape(-1, *size)
    for source, target in zip(sources, enlarged.reshape(-1, height, width), strict=True):
        wide = np.empty((size[0], width), np.float32)
        for start in range(0, width, BLOCK):
            pixels = slice(start, start + BLOCK)
            seen = columns.seen_by(pixels)
            wide[:, pixels] = source[:, seen] @ columns.matrix[pixels, seen].T
        for start in range(0, height, BLOCK):
            pixels = slice(start, start + BLOCK)
            seen = rows.seen_by(pixels)
            logits = rows.matrix[pixels, seen] @ wide[seen]
            target[pixels] = logits if threshold is None else logits > threshold
    return enlarged


@dataclass(frozen=True)
class Region:
    """The part of an image that a mask can lie in; outside of it the mask is empty."""

    mask: NDArray[np.bool_]  # [hh, ww], without pixels where nothing is
    top: int  # where the part begins in the image
    left: int
    inner: int  # pixels whose logit exceeds threshold + offset
    outer: int  # pixels whose logit exceeds threshold - offset

    @property
    def stability(self) -> float:
        """IoU of the masks at both thresholds, in float32 as segment-anything; nan for none."""
        return float(np.float32(self.inner / self.outer)) if self.outer else float("nan")


def upscale_region(
    low_res_logits: Floats,
    placement: Placement,
    logit_stride: float = LOGIT_STRIDE,
    threshold: float = 0.0,
    offset: float = 1.0,
) -> Region:
    """Logits [h4, w4] -> the mask where it can be; ``offset`` is that of ``stability``."""
    rows, columns = axes(low_res_logits.shape, placement, logit_stride)
    can_be = low_res_logits > threshold - offset
    ys, xs = np.flatnonzero(can_be.any(1)), np.flatnonzero(can_be.any(0))
    if not len(ys):
        return Region(np.zeros((0, 0), np.bool_), 0, 0, 0, 0)
    down, from_rows = rows.reach(ys[0], ys[-1])
    across, from_columns = columns.reach(xs[0], xs[-1])
    tall = rows.matrix[down, from_rows] @ low_res_logits[from_rows, from_columns]
    logits = tall @ columns.matrix[across, from_columns].T
    inner, outer = (int(np.count_nonzero(logits > threshold + x)) for x in (offset, -offset))
    return Region(logits > threshold, down.start, across.start, inner, outer)


def find_regions(
    masks: Floats,
    scores: Floats,
    min_iou: float,
    placement: Placement,
    logit_stride: float,
    *,
    threshold: float,
    offset: float,
    min_stability: float,
    frame: tuple[int, int],
    corner: tuple[int, int],
) -> Iterator[Found]:
    """What ``TorchDecoder.find`` gives of logits [M, h4, w4] of all scores above ``min_iou``."""
    for logits, (number, token) in zip(masks, np.argwhere(scores > min_iou), strict=True):
        region = upscale_region(logits, placement, logit_stride, threshold, offset)
        counts, box = runs_and_box(
            region.mask, region.top + corner[0], region.left + corner[1], frame, corner
        )
        is_stable = min_stability <= 0 or region.stability >= min_stability
        kept = counts if is_stable else None
        score = float(scores[number, token])
        yield Found(int(number), int(token), score, region.stability, box, kept)


def axes(size: tuple[int, ...], placement: Placement, logit_stride: float) -> tuple[_Axis, _Axis]:
    """How rows and columns of logits of this size are enlarged."""
    height, width = size
    covered = round(height * logit_stride), round(width * logit_stride)
    resized, original = placement.resized_size, placement.original_size
    if covered[0] < resized[0] or covered[1] < resized[1]:
        raise ValueError(
            f"logits {[height, width]} at {logit_stride:g} pixels each cover "
            f"{covered[0]}x{covered[1]} pixels, but the image has {resized[0]}x{resized[1]} in the "
            f"model's input; do they belong to this image?"
        )
    rows = _axis(height, covered[0], resized[0], original[0])
    return rows, _axis(width, covered[1], resized[1], original[1])


class _Axis:
    """Both enlargements along one axis: logits -> ``covered`` pixels -> ``original`` pixels."""

    def __init__(self, logits: int, covered: int, resized: int, original: int) -> None:
        middle, shares = _bilinear(np.arange(original), resized, original)
        seen, parts = _bilinear(middle, logits, covered)  # [2, 2, original]
        weights = shares * parts
        self.matrix = np.zeros((original, logits), np.float32)  # [pixels, logits]
        pixels = np.broadcast_to(np.arange(original), seen.shape)
        np.add.at(self.matrix, (pixels.ravel(), seen.ravel()), weights.ravel())
        counts = weights != 0
        self.first = np.where(counts, seen, logits).min((0, 1))  # logit that a pixel sees; rises
        self.last = np.where(counts, seen, -1).max((0, 1))

    def seen_by(self, pixels: slice) -> slice:
        """The logits that some pixels see."""
        stop = min(pixels.stop, len(self.last))
        return slice(int(self.first[pixels.start]), int(self.last[stop - 1]) + 1)

    def reach(self, first: int, last: int) -> tuple[slice, slice]:
        """Pixels that see logits ``first`` to ``last``, and all the logits that those see."""
        start = int(np.searchsorted(self.last, first, "left"))
        stop = max(int(np.searchsorted(self.first, last, "right")), start)
        pixels = slice(start, stop)
        return pixels, slice(0, 0) if start == stop else self.seen_by(pixels)


_axis = lru_cache(maxsize=16)(_Axis)  # 2 MB each for a large photograph


def _bilinear(
    pixels: NDArray[np.int64], source: int, target: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The two source pixels [2, ...] of target pixels and their weights, at half-pixel centres."""
    at = np.maximum((pixels + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), source - 1)
    high = np.minimum(low + 1, source - 1)
    part = np.clip(at - low, 0, 1)
    return np.stack([low, high]), np.stack([1 - part, part])
