"""Metrics of masks and their intervals: IoU, boundary F, next click, bootstrap, calibration.

The boundary F-measure is that of Martin et al. (2004) as Perazzi et al. (2016) use it for masks;
the most interior point is the maximum of the Euclidean distance transform, as is usual in
interactive segmentation. Points are (x, y), continuous: the centre of the first pixel is (0.5,
0.5). Baselines without a network are what a model must beat: a disc around the click, the ellipse
inscribed in the box, and GrabCut (Rother et al., 2004) where OpenCV happens to be installed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.images.mask_ops import box_around

Mask = NDArray[np.bool_]
Point = tuple[float, float]
Numbers = Sequence[float] | NDArray[Any]

BOUNDARY_TOLERANCE = 0.0075
"""How far apart two boundaries may lie and still agree, as a share of the image's diagonal."""


def iou(first: Mask, second: Mask) -> float:
    """Intersection over union of two masks [H, W]; 1 where both are empty."""
    _check_pair(first, second)
    union = int(np.count_nonzero(first | second))
    return int(np.count_nonzero(first & second)) / union if union else 1.0


def boundary_f(predicted: Mask, target: Mask, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """How well the boundaries of two masks agree, 0 to 1; 1 where neither has one.

    A mask's boundary is its pixels that have one of their four neighbours outside of it; the edge
    of the image is no boundary. Precision is the share of the predicted boundary that lies
    within the tolerance of the true one, recall the share of the true boundary that lies within
    the tolerance of the predicted one, and the result is their harmonic mean. The tolerance is a
    share of the image's diagonal, at least one pixel.
    """
    from scipy.ndimage import distance_transform_edt

    _check_pair(predicted, target)
    reach = max(1.0, tolerance * float(np.hypot(*target.shape)))
    ours, theirs = _boundary(predicted), _boundary(target)
    if not ours.any() or not theirs.any():
        return float(ours.any() == theirs.any())
    window = _window(ours | theirs)  # distances are only asked for between boundary pixels
    ours, theirs = ours[window], theirs[window]
    precision = float(np.mean(distance_transform_edt(~theirs)[ours] <= reach))
    recall = float(np.mean(distance_transform_edt(~ours)[theirs] <= reach))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def most_interior_point(mask: Mask) -> Point:
    """The point of a mask that is farthest from its outside; the image's edge is outside.

    Gives (x, y), the centre of a pixel; the first one, row by row, of several as far inside.
    """
    if not mask.any():
        raise ValueError("an empty mask has no interior; skip it")
    from scipy.ndimage import distance_transform_edt

    window = _window(mask)
    depth = distance_transform_edt(np.pad(mask[window], 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return float(window[1].start + column + 0.5), float(window[0].start + row + 0.5)


def next_click(predicted: Mask, target: Mask) -> tuple[Point, int] | None:
    """The click that would correct the largest error, at its most interior point.

    Errors are the object's missing pixels and the pixels too many; of the connected regions of
    both kinds the one with the most pixels is corrected. Gives ((x, y), 1 for a missing part or 0
    for a part too many); None where there is no error.
    """
    regions, sizes, missing = error_regions(predicted, target)
    if not len(sizes):
        return None
    largest = int(sizes.argmax())
    return most_interior_point(regions == largest + 1), int(largest < missing)


def error_regions(predicted: Mask, target: Mask) -> tuple[NDArray[Any], NDArray[Any], int]:
    """The connected regions of errors: their numbers from 1 in a map [H, W], and pixels of each.

    Those of the object's missing pixels, as many as the third value, come first.
    """
    from scipy.ndimage import label

    _check_pair(predicted, target)
    missed, count = label(target & ~predicted)
    extra, _ = label(predicted & ~target)
    regions = np.where(extra > 0, extra + count, missed)
    return regions, np.bincount(regions.ravel())[1:], count


def _check_pair(first: Mask, second: Mask) -> None:
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"wanted two masks [H, W] of one image; came {list(first.shape)} and "
            f"{list(second.shape)}"
        )


def _boundary(mask: Mask) -> Mask:
    """Pixels of a mask with a neighbour outside; beyond the image's edge it goes on."""
    padded = np.pad(mask, 1, mode="edge")
    around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    boundary: Mask = mask & ~around
    return boundary


def _window(mask: Mask) -> tuple[slice, slice]:
    """The part of the image that holds a mask, which is not empty."""
    x0, y0, x1, y1 = box_around(mask)
    return slice(y0, y1), slice(x0, x1)


RESAMPLES = 1000


@dataclass(frozen=True)
class Figure:
    """A mean and its 95 % interval."""

    value: float  # the mean; nan without any number
    low: float  # lower end of the interval
    high: float  # upper end
    count: int  # numbers that went into it

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float], groups: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> Figure:
    """The mean of some numbers with its 95 % percentile interval, resampled by group.

    Masks of one image are alike, so whole images are drawn, with replacement; ``groups`` are the
    images of the numbers. The same numbers and seed give the same interval.
    """
    if len(values) != len(groups):
        raise ValueError(f"wanted a group for each of {len(values)} values; came {len(groups)}")
    if not len(values):
        return Figure(float("nan"), float("nan"), float("nan"), 0)
    numbers = np.asarray(values, np.float64)
    _, places = np.unique(np.asarray(groups), return_inverse=True)
    sums, counts = np.bincount(places, numbers), np.bincount(places)
    draws = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1 / len(sums)), size=resamples
    )  # [resamples, images]: how often each was drawn
    means = (draws @ sums) / (draws @ counts)
    low, high = np.percentile(means, [2.5, 97.5])
    return Figure(float(numbers.mean()), float(low), float(high), len(numbers))


@dataclass(frozen=True)
class CalibrationBin:
    """Masks whose predicted IoU lies in one range."""

    low: float  # start of the range; the first one holds everything below, too
    high: float  # end of the range; the last one holds everything above, too
    count: int  # masks in it
    predicted: float  # their mean predicted IoU; nan without any
    true: float  # their mean true IoU; nan without any


@dataclass(frozen=True)
class Calibration:
    """How a model's own estimate of its masks' IoU agrees with the true IoU."""

    correlation: float  # Pearson's; nan where one of the two does not vary
    mean_error: float  # mean of predicted minus true: above 0 the model is overconfident
    mean_absolute_error: float  # mean of their distance
    bins: tuple[CalibrationBin, ...]  # by predicted IoU


def calibrate(predicted: Numbers, true: Numbers, bins: int = 10) -> Calibration:
    """Compare predicted with true IoU, in bins of equal width from 0 to 1; nan without any mask."""
    if len(predicted) != len(true):
        raise ValueError(f"wanted as many predicted as true; came {len(predicted)} and {len(true)}")
    ours, truth = np.asarray(predicted, np.float64), np.asarray(true, np.float64)
    places = np.clip((ours * bins).astype(np.int64), 0, bins - 1)
    rows = []
    for place in range(bins):
        inside = places == place
        means = _mean(ours[inside]), _mean(truth[inside])
        rows.append(CalibrationBin(place / bins, (place + 1) / bins, int(inside.sum()), *means))
    varies = len(ours) > 1 and float(ours.std()) > 0 and float(truth.std()) > 0
    correlation = float(np.corrcoef(ours, truth)[0, 1]) if varies else float("nan")
    return Calibration(correlation, _mean(ours - truth), _mean(np.abs(ours - truth)), tuple(rows))


def _mean(numbers: NDArray[np.float64]) -> float:
    return float(numbers.mean()) if len(numbers) else float("nan")


_JSON_KEYS = {
    "image": "picture",
    "images": "pictures",
    "baselines": "floors",
    "skipped": "left_out",
}
"""Keys of reports are a format: they keep the spelling they were published with."""


def as_json(report: object) -> dict[str, Any]:
    """The fields of a report (a dataclass) as plain values; None for nan, which JSON lacks."""

    def plain(value: object) -> object:
        if is_dataclass(value) and not isinstance(value, type):
            return {
                _JSON_KEYS.get(f.name, f.name): plain(getattr(value, f.name)) for f in fields(value)
            }
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return cast(dict[str, Any], plain(report))


RGB = NDArray[np.uint8]
Box = tuple[float, float, float, float]

DISC_RADIUS = 0.2
"""Of the disc around a click, as a share of the image's longer side."""

_GRABCUT_ROUNDS = 5
_SURE_RADIUS = 0.02  # around a click, as a share of the longer side: certainly the object
_OPENCV_SEED = 0


def baselines(image: RGB, *, point: Point | None = None, box: Box | None = None) -> dict[str, Mask]:
    """What the baselines that can run here make of a click or of a box: masks by name."""
    found: dict[str, Mask] = {}
    if point is not None:
        found["disc"] = disc(image.shape, point)
    if box is not None:
        found["ellipse"] = ellipse(image.shape, box)
    if find_spec("cv2") is not None:
        found["grabcut"] = grabcut(image, point=point, box=box)
    return found


def disc(size: tuple[int, ...], point: Point, radius: float = DISC_RADIUS) -> Mask:
    """A disc around a point in an image (H, W, ...); the radius is a share of the longer side."""
    reach = radius * max(size[:2])
    return _inside_ellipse(size, point, (reach, reach))


def ellipse(size: tuple[int, ...], box: Box) -> Mask:
    """The ellipse inscribed in a box, in an image (H, W, ...)."""
    x0, y0, x1, y1 = box
    return _inside_ellipse(size, ((x0 + x1) / 2, (y0 + y1) / 2), ((x1 - x0) / 2, (y1 - y0) / 2))


def grabcut(image: RGB, *, point: Point | None = None, box: Box | None = None) -> Mask:
    """GrabCut from a click or from a box, five rounds.

    From a box everything outside is background. From a click a small disc is certainly the object,
    the disc of ``DISC_RADIUS`` probably, and everything else probably not.
    """
    if (point is None) == (box is None):
        raise ValueError("GrabCut starts from either a point or a box; give one of them")
    cv2: Any = importlib.import_module("cv2")
    size = image.shape[0], image.shape[1]
    seeds = np.full(size, cv2.GC_BGD if box is not None else cv2.GC_PR_BGD, np.uint8)
    if box is not None:
        x0, y0, x1, y1 = (int(v) for v in (*np.floor(box[:2]), *np.ceil(box[2:])))
        seeds[max(y0, 0) : y1, max(x0, 0) : x1] = cv2.GC_PR_FGD
    elif point is not None:
        seeds[disc(size, point)] = cv2.GC_PR_FGD
        seeds[disc(size, point, _SURE_RADIUS)] = cv2.GC_FGD
        seeds[min(int(point[1]), size[0] - 1), min(int(point[0]), size[1] - 1)] = cv2.GC_FGD
    is_object: Mask = (seeds == cv2.GC_PR_FGD) | (seeds == cv2.GC_FGD)
    if is_object.all() or not is_object.any():  # its two colour models want a pixel each
        return is_object
    cv2.setRNGSeed(_OPENCV_SEED)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    reversed_channels = np.ascontiguousarray(image[:, :, ::-1])
    cv2.grabCut(reversed_channels, seeds, None, *models, _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    found: Mask = (seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD)
    return found


def _inside_ellipse(size: tuple[int, ...], centre: Point, radii: tuple[float, float]) -> Mask:
    """Pixels whose centres lie inside; nothing where a radius is 0."""
    y, x = np.ogrid[0.5 : size[0] : 1, 0.5 : size[1] : 1]
    if min(radii) <= 0:
        return np.zeros(size[:2], np.bool_)
    inside: Mask = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1
    return inside
