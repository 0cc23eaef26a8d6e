"""An image on which cut-outs are laid, and what can be seen of each of them.

Letters: N objects, H W the image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from changes import towards

__all__ = ["Canvas"]

Plane = NDArray[np.float32]


class Canvas:
    """The image so far and what can be seen of each object."""

    def __init__(self, image: Image.Image) -> None:
        self.image = image
        self.alphas: list[Plane] = []
        self.areas: list[float] = []
        self.labelled: list[bool] = []

    def paste(self, cutout: Image.Image, rng: np.random.Generator, *, is_labelled: bool) -> None:
        """Lay a cut-out over everything, at a random place, sometimes with a shadow."""
        x, y = (_place(*sides, rng) for sides in zip(cutout.size, self.image.size, strict=True))
        cutout = towards(cutout, self.image, (x, y), rng)
        alpha = cutout.getchannel("A")
        if rng.random() < 0.6:  # the softness of a real edge
            alpha = alpha.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 1.0)))
        if rng.random() < 0.4:
            self._shade(alpha, (x, y), rng)
        layer = Image.new("L", self.image.size)
        layer.paste(alpha, (x, y))
        self.image.paste(cutout.convert("RGB"), (x, y), alpha)
        seen = np.asarray(layer, np.float32) / np.float32(255)
        for below in self.alphas:
            below *= 1 - seen
        self.alphas.append(seen.copy())
        self.areas.append(float(np.asarray(alpha, np.float32).sum()) / 255)
        self.labelled.append(is_labelled)

    def _shade(self, alpha: Image.Image, place: tuple[int, int], rng: np.random.Generator) -> None:
        side = max(alpha.size)
        softness, far = side * rng.uniform(0.02, 0.1), side * rng.uniform(0.02, 0.15)
        margin = int(3 * softness) + 1
        wide = Image.new("L", (alpha.width + 2 * margin, alpha.height + 2 * margin))
        wide.paste(alpha, (margin, margin))
        strength = rng.uniform(0.15, 0.6)
        shadow = wide.filter(ImageFilter.BoxBlur(softness)).point(lambda v: int(v * strength))
        angle = rng.uniform(0, 2 * np.pi)
        x = place[0] - margin + int(far * np.cos(angle))
        y = place[1] - margin + int(far * abs(np.sin(angle)))
        self.image.paste((0, 0, 0), (x, y, x + wide.width, y + wide.height), shadow)

    def masks(self, least_visible: float, least_pixels: int) -> tuple[NDArray[np.bool_], list[int]]:
        """(masks [N, H, W], which of the labelled objects they are)."""
        found, kept, number = [], [], -1
        for seen, area, is_labelled in zip(self.alphas, self.areas, self.labelled, strict=True):
            if not is_labelled:
                continue
            number += 1
            mask = seen > 0.5
            if mask.sum() >= least_pixels and seen.sum() >= least_visible * area:
                found.append(mask)
                kept.append(number)
        size = self.image.height, self.image.width
        return (np.stack(found) if found else np.zeros((0, *size), np.bool_)), kept


def _place(own: int, whole: int, rng: np.random.Generator) -> int:
    """Where something of one length begins on another, so that most of it lies there."""
    low, high = sorted((-0.2 * own, whole - 0.8 * own))
    return int(rng.uniform(low, high))
