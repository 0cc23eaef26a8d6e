"""Baselines without a network: the masks that a model must beat to be worth its weights.

A disc around the click, the ellipse inscribed in the box, and GrabCut (Rother et al., 2004) where
OpenCV happens to be installed. Points are (x, y) and boxes xyxy, in pixels, continuous.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .metrics import Mask, Point

RGB = NDArray[np.uint8]
Box = tuple[float, float, float, float]

DISC_RADIUS = 0.2
"""Of the disc around a click, as a share of the image's longer side."""

_GRABCUT_ROUNDS = 5
_SURE_RADIUS = 0.02  # around a click, as a share of the longer side: certainly the object
_OPENCV_SEED = 0


def click_baselines() -> dict[str, Callable[[RGB, Point], Mask]]:
    """The baselines for a click, by name: those that can run here."""
    found: dict[str, Callable[[RGB, Point], Mask]] = {
        "disc": lambda image, point: disc((image.shape[0], image.shape[1]), point)
    }
    if find_spec("cv2") is not None:
        found["grabcut"] = lambda image, point: grabcut(image, point=point)
    return found


def box_baselines() -> dict[str, Callable[[RGB, Box], Mask]]:
    """The baselines for a box, by name: those that can run here."""
    found: dict[str, Callable[[RGB, Box], Mask]] = {
        "ellipse": lambda image, box: ellipse((image.shape[0], image.shape[1]), box)
    }
    if find_spec("cv2") is not None:
        found["grabcut"] = lambda image, box: grabcut(image, box=box)
    return found


def disc(size: tuple[int, int], point: Point, radius: float = DISC_RADIUS) -> Mask:
    """A disc around a point in an image (H, W); the radius is a share of the longer side."""
    reach = radius * max(size)
    return _inside_ellipse(size, point, (reach, reach))


def ellipse(size: tuple[int, int], box: Box) -> Mask:
    """The ellipse inscribed in a box, in an image (H, W)."""
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


def _inside_ellipse(size: tuple[int, int], centre: Point, radii: tuple[float, float]) -> Mask:
    """Pixels whose centres lie inside; nothing where a radius is 0."""
    y, x = np.ogrid[0.5 : size[0] : 1, 0.5 : size[1] : 1]
    if min(radii) <= 0:
        return np.zeros(size, np.bool_)
    inside: Mask = ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 <= 1
    return inside
