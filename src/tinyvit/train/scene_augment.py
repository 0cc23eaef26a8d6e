"""Change a picture by chance, and the masks of its objects along with it.

A crop around one of the objects, another scale, a mirror image, other colours. The result lies in
the upper left of the model's frame, as pictures do when the model is used.

Knows no files and no model. Shapes: N objects, H W the picture, F G the model's frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["FramedScene", "SceneAugment", "frame_scene"]

RGB = NDArray[np.uint8]
Masks = NDArray[np.bool_]
Size = tuple[int, int]

_GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class FramedScene:
    """A picture in the model's frame.

    Attributes:
        pixels: RGB [h, w, 3] uint8, at most as large as the frame.
        masks: [N, h, w] bool; some may be empty now.
    """

    pixels: RGB
    masks: Masks


def frame_scene(image: RGB, masks: Masks, size: Size) -> FramedScene:
    """Fit the whole picture into the frame and change nothing else.

    Args:
        image: RGB [H, W, 3] uint8.
        masks: [N, H, W] bool.
        size: (F, G).
    """
    return _resized(image, masks, size, 1.0)


@dataclass(frozen=True)
class SceneAugment:
    """What may be changed, and how much.

    Args:
        smallest_crop: The least side of a crop, as a share of the picture's; 1 never crops.
        smallest_scale: The least size in the frame, as a share of the largest that fits.
        flip: How often the picture is mirrored, 0 to 1.
        colour: How far brightness, contrast and saturation go, as a share; 0 leaves them.
        grey: How often the picture loses its colours, 0 to 1.

    Raises:
        ValueError: A number is out of its range.
    """

    smallest_crop: float = 0.5
    smallest_scale: float = 0.7
    flip: float = 0.5
    colour: float = 0.3
    grey: float = 0.05

    def __post_init__(self) -> None:
        for name in ("smallest_crop", "smallest_scale"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, not {getattr(self, name)}")
        for name in ("flip", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0 to 1, but is {getattr(self, name)}")
        if not 0 <= self.colour < 1:
            raise ValueError(f"colour must be at least 0 and below 1, but is {self.colour}")

    def __call__(
        self, image: RGB, masks: Masks, size: Size, rng: np.random.Generator
    ) -> FramedScene:
        """Change a picture and its masks.

        Args:
            image: RGB [H, W, 3] uint8.
            masks: [N, H, W] bool.
            size: (F, G) of the model's frame.
            rng: The source of chance.

        Returns:
            The picture in the frame; at least a part of one object is in it, if there was any.
        """
        rows, columns = self._crop(masks, rng)
        image, masks = image[rows, columns], masks[:, rows, columns]
        if rng.random() < self.flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
        framed = _resized(image, masks, size, rng.uniform(self.smallest_scale, 1.0))
        return FramedScene(self._coloured(framed.pixels, rng), framed.masks)

    def _crop(self, masks: Masks, rng: np.random.Generator) -> tuple[slice, slice]:
        """A window that holds a random pixel of a random object."""
        sides = masks.shape[1:]
        shown = [mask for mask in masks if mask.any()]
        if shown:
            places = np.flatnonzero(shown[rng.integers(len(shown))])
            centre = divmod(int(places[rng.integers(len(places))]), sides[1])
        else:
            centre = sides[0] // 2, sides[1] // 2
        window = []
        for side, inside in zip(sides, centre, strict=True):
            length = max(1, round(side * rng.uniform(self.smallest_crop, 1.0)))
            first = rng.integers(max(0, inside - length + 1), min(inside, side - length) + 1)
            window.append(slice(int(first), int(first) + length))
        return window[0], window[1]

    def _coloured(self, pixels: RGB, rng: np.random.Generator) -> RGB:
        contrast, bright, saturation = rng.uniform(1 - self.colour, 1 + self.colour, 3)
        is_grey = rng.random() < self.grey
        if not self.colour and not is_grey:
            return pixels
        values = pixels.astype(np.float32)
        grey = (values @ _GREY)[:, :, None]
        values = grey + np.float32(0.0 if is_grey else saturation) * (values - grey)
        mean = np.float32(grey.mean())
        values = (mean + np.float32(contrast) * (values - mean)) * np.float32(bright)
        coloured: RGB = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return coloured


def _resized(image: RGB, masks: Masks, size: Size, part: float) -> FramedScene:
    """Fit into ``part`` of the frame, keeping the shape."""
    height, width = image.shape[:2]
    scale = part * min(size[0] / height, size[1] / width)
    new_h, new_w = (
        min(limit, max(1, round(side * scale)))
        for side, limit in ((height, size[0]), (width, size[1]))
    )
    bilinear = Image.Resampling.BILINEAR
    pixels = np.array(Image.fromarray(np.ascontiguousarray(image)).resize((new_w, new_h), bilinear))
    small = np.zeros((len(masks), new_h, new_w), np.bool_)
    for target, mask in zip(small, masks, strict=True):
        whole = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
        target[...] = np.asarray(whole.resize((new_w, new_h), bilinear)) > 127  # half is covered
    return FramedScene(pixels, small)
