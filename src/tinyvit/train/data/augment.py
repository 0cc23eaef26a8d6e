"""Random augmentation of images to train on, and of images with masks, by Pillow.

What is drawn does not depend on the size of the input, apart from the noise of erasing, which comes
last: so one seed means the same crop and the same changes for a teacher and a student that want
other sizes. RandAugment is of Cubuk et al., 2020 (arXiv 1909.13719), random erasing of Zhong et
al., 2020 (arXiv 1708.04896), the crop that of Inception (Szegedy et al., 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import FILTERS, normalise
from tinyvit.train.settings import Range, SettingError, Settings, Strength

RGB = NDArray[np.uint8]
Masks: TypeAlias = "NDArray[np.bool_] | NDArray[np.float32]"  # or probabilities in 0..1
Size = tuple[int, int]
_Part = Annotated[float, Range(0, 1)]

_MOST = 10.0  # the end of RandAugment's scale


@dataclass(frozen=True)
class Augmentation(Settings):
    """How much an image is changed at random, as plain data."""

    # least and largest part of the image's area that a crop keeps; (1, 1) keeps the whole image
    # and squashes it
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # least and largest width over height of a crop
    flip: _Part = 0.5  # probability of mirroring left and right; 0 for letters and digits
    operations: Annotated[int, Range(0)] = 2  # changes by RandAugment
    magnitude: Annotated[float, Range(0, _MOST)] = 9.0  # how strong they are
    spread: Annotated[float, Range(0)] = 0.5  # standard deviation of the magnitude
    colours: bool = True  # let RandAugment change colours too (invert, ...), not only geometry
    erase: _Part = 0.25  # probability of erasing a rectangle
    rotate: float = 0.0  # largest turn in degrees of a small move that every image gets
    shift: _Part = 0.0  # its largest shift in parts of a side

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):  # lists, when they come from JSON
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        super().__post_init__()
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise SettingError("scale", "two parts of an area, 0 < a <= b <= 1", self.scale)
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise SettingError("ratio", "two numbers, 0 < a <= b", self.ratio)


def augmentation(strength: Strength, flip: bool = True) -> Augmentation:
    """A ready choice.

    "full" is TinyViT's recipe for ImageNet; "light" is for small data sets and for images in which
    place and colour matter: crops of at least 60 percent, small turns and moves; "none" leaves the
    image as it is. ``flip`` mirrors half of the images unless "none"; not for letters and digits.

    Examples:
        >>> augmentation("light", flip=False).flip
        0.0
    """
    half, calm = 0.5 if flip else 0.0, cast(Any, {"operations": 0, "erase": 0.0})
    if strength == "full":
        return Augmentation(flip=half)
    if strength == "light":
        return Augmentation((0.6, 1.0), (0.9, 1.1), half, rotate=10.0, shift=0.06, **calm)
    if strength == "none":
        return Augmentation((1, 1), (1, 1), 0.0, **calm)
    raise ValueError(f"augmentation must be 'none', 'light' or 'full', got {strength!r}")


@dataclass(frozen=True)
class View:
    """Makes inputs to train on."""

    augmentation: Augmentation  # how much an image is changed
    spec: ImageSpec  # the model's own preparation; gives size, filter, mean and standard deviation

    def __call__(self, image: RGB, rng: np.random.Generator) -> NDArray[np.float32]:
        """RGB, [H, W, 3] uint8 -> one input [3, h, w] float32, normalised; ``rng`` draws it."""
        settings, spec = self.augmentation, self.spec
        height, width = spec.size
        box = _draw_box(image.shape[0], image.shape[1], settings, rng)
        is_mirrored = rng.random() < settings.flip
        resized = Image.fromarray(image).resize(
            (width, height), FILTERS[spec.interpolation], box=box
        )
        if is_mirrored:
            resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if settings.rotate or settings.shift:
            # a small turn and move; what comes in from outside has the colour of the border
            angle, right, down = rng.uniform(-1, 1, 3)
            move = settings.shift * right * width, settings.shift * down * height
            resized = _turned(resized, settings.rotate * angle, move)
        names = tuple(_OPERATIONS if settings.colours else _PLACES)
        for _ in range(settings.operations):
            name = names[int(rng.integers(len(names)))]
            level = float(np.clip(rng.normal(settings.magnitude, settings.spread), 0, _MOST))
            sign = 1.0 if rng.random() < 0.5 else -1.0
            resized = _OPERATIONS[name](resized, level / _MOST, sign)
        pixels = normalise(np.asarray(resized), spec, spec.size)
        if rng.random() < settings.erase:
            _erase(pixels, rng)
        return pixels


def _draw_box(
    height: int, width: int, settings: Augmentation, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A crop (x0, y0, x1, y1) in the image; its centre where ten drawn shapes do not fit."""
    if settings.scale == (1.0, 1.0):
        return 0.0, 0.0, float(width), float(height)
    logs = math.log(settings.ratio[0]), math.log(settings.ratio[1])
    draws = rng.random((10, 2))
    corner = rng.random(2)
    for part, shape in draws:
        area = height * width * (settings.scale[0] + part * (settings.scale[1] - settings.scale[0]))
        ratio = math.exp(logs[0] + shape * (logs[1] - logs[0]))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            x0, y0 = corner[0] * (width - w), corner[1] * (height - h)
            return x0, y0, min(x0 + w, float(width)), min(y0 + h, float(height))
    ratio = min(max(width / height, settings.ratio[0]), settings.ratio[1])
    w, h = min(float(width), height * ratio), min(float(height), width / ratio)
    x0, y0 = (width - w) / 2, (height - h) / 2
    return x0, y0, x0 + w, y0 + h


_Move = tuple[float, float]
_STILL: _Move = (0.0, 0.0)


def _turned(image: Image.Image, degrees: float, move: _Move = _STILL) -> Image.Image:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _affine(image, cos, -sin, sin, cos, move)


def _affine(
    image: Image.Image, a: float, b: float, c: float, d: float, move: _Move = _STILL
) -> Image.Image:
    """Map by [[a, b], [c, d]] about the centre, from output to input; outside: the border."""
    x, y = image.width / 2, image.height / 2
    left, top = (max(image.width // 2, 1), max(image.height // 2, 1))
    pixels = np.pad(np.asarray(image), ((top, top), (left, left), (0, 0)), mode="edge")
    padded = Image.fromarray(pixels)
    across, down = x + left - a * x - b * y + move[0], y + top - c * x - d * y + move[1]
    matrix = (a, b, across, c, d, down)
    return padded.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _erase(pixels: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Put noise in a rectangle of 2 to 33 percent of the area, in place."""
    height, width = pixels.shape[1:]
    part, shape, across, down = rng.random(4)
    area = height * width * (0.02 + part * (1 / 3 - 0.02))
    ratio = math.exp((2 * shape - 1) * math.log(10 / 3))
    h = min(max(round(math.sqrt(area * ratio)), 1), height)
    w = min(max(round(math.sqrt(area / ratio)), 1), width)
    top, left = int(down * (height - h + 1)), int(across * (width - w + 1))
    pixels[:, top : top + h, left : left + w] = rng.standard_normal((3, h, w), dtype=np.float32)


_Operation = Callable[[Image.Image, float, float], Image.Image]


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> _Operation:
    return lambda image, level, sign: kind(image).enhance(1 + sign * 0.9 * level)


_PLACES: dict[str, _Operation] = {
    "identity": lambda image, level, sign: image,
    "rotate": lambda image, level, sign: _turned(image, 30 * level * sign),
    "shear_x": lambda image, level, sign: _affine(image, 1, 0.3 * level * sign, 0, 1),
    "shear_y": lambda image, level, sign: _affine(image, 1, 0, 0.3 * level * sign, 1),
    "move_x": lambda p, level, sign: _affine(p, 1, 0, 0, 1, (0.45 * level * sign * p.width, 0.0)),
    "move_y": lambda p, level, sign: _affine(p, 1, 0, 0, 1, (0.0, 0.45 * level * sign * p.height)),
}
_OPERATIONS: dict[str, _Operation] = {
    **_PLACES,
    "autocontrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "invert": lambda image, level, sign: ImageOps.invert(image),
    "posterize": lambda image, level, sign: ImageOps.posterize(image, 4 + round(4 * (1 - level))),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, round(256 * (1 - level))),
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
}
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class MaskAugment(Settings):
    """What may be changed, and how much."""

    # the least side of a crop, as a share of the image's; 1: no crop
    smallest_crop: Annotated[float, Range(above=0, most=1)] = 0.5
    # the least size in the model input, as a share of the largest that fits
    smallest_scale: Annotated[float, Range(above=0, most=1)] = 0.7
    flip: _Part = 0.5  # how often the image is mirrored
    # how far brightness, contrast and saturation go, as a share; 0 leaves them
    colour: Annotated[float, Range(0, below=1)] = 0.3
    grey: _Part = 0.05  # how often the image loses its colours

    def __call__(
        self, image: RGB, masks: Masks, size: Size, rng: np.random.Generator
    ) -> tuple[RGB, Masks]:
        """Change an image [H, W, 3] uint8 and its masks [N, H, W]; a part of one object stays."""
        rows, columns = self._crop(masks, rng)
        image, masks = image[rows, columns], masks[:, rows, columns]
        if rng.random() < self.flip:
            image, masks = image[:, ::-1], masks[:, :, ::-1]
        pixels, masks = fit_sample(image, masks, size, rng.uniform(self.smallest_scale, 1.0))
        return self._coloured(pixels, rng), masks

    def _crop(self, masks: Masks, rng: np.random.Generator) -> tuple[slice, slice]:
        """A window that holds a random pixel of a random object."""
        sides = masks.shape[1:]
        shown = [mask for mask in masks > 0.5 if mask.any()]
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


def fit_sample(image: RGB, masks: Masks, size: Size, part: float = 1.0) -> tuple[RGB, Masks]:
    """Fit an image and its masks into a part of the model input: [h, w, 3], [N, h, w]."""
    sides = [*zip(image.shape[:2], size, strict=True)]
    scale = part * min(limit / side for side, limit in sides)
    new_h, new_w = (min(limit, max(1, round(side * scale))) for side, limit in sides)
    bilinear = Image.Resampling.BILINEAR
    pixels = np.array(Image.fromarray(np.ascontiguousarray(image)).resize((new_w, new_h), bilinear))
    small = np.zeros((len(masks), new_h, new_w), masks.dtype)
    for target, mask in zip(small, masks, strict=True):
        whole = Image.fromarray(mask if mask.dtype == np.float32 else mask.astype(np.uint8) * 255)
        resized = np.asarray(whole.resize((new_w, new_h), bilinear))
        target[...] = resized if mask.dtype == np.float32 else resized > 127  # half is covered
    return pixels, small
