"""How an image becomes a model's input, as plain data, and the map of coordinates it implies.

``ImageSpec`` says what to do with any image; ``Placement`` says where one image of a known
size ends up. Only numbers live here: no pixels, no torch, no numpy, no files. Images are changed
by ``tinyvit.images.preprocess``, which asks this file for every size.

Sizes are (height, width); points are (x, y); boxes are (x0, y0, x1, y1). Coordinates are
continuous: 0 is the left (top) edge of the first pixel and the width (height) the right (bottom)
edge of the last. The resize rules are those of segment-anything (longest side), torchvision and
timm (shorter side, then centre crop), Cream and LiteMedSAM.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

Resize = Literal["longest_side", "crop", "squash"]
Interpolation = Literal["bilinear", "bicubic"]
Normalise = Literal["mean_std", "min_max"]
Size = tuple[int, int]
Triple = tuple[float, float, float]
Coords = TypeVar("Coords")

IMAGENET_MEAN: Triple = (123.675, 116.28, 103.53)
IMAGENET_STD: Triple = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Placement:
    """Where one image lies in a model's frame; maps coordinates both ways.

    Coordinates may be nested lists or tuples, numpy arrays or torch tensors with a last dimension
    of 2 (points) or 4 (boxes), else a ValueError is raised. The same kind of container comes back,
    with floating-point numbers.

    Args:
        original_size: (height, width) of the image in pixels.
        resized_size: (height, width) of the whole image after resizing, before crop and padding;
            what segment-anything calls ``input_size``.
        crop_offset: (top, left) corner of the crop in the resized image; (0, 0) without crop.
        model_size: (height, width) of the model's input, padding included.
    """

    original_size: Size
    resized_size: Size
    crop_offset: Size
    model_size: Size

    def points_to_model(self, points: Coords) -> Coords:
        """Map points [..., 2] (x, y) from the original image to the model's frame.

        Raises:
            ValueError: The last dimension is not 2.

        Examples:
            >>> ImageSpec.sam(1024).place(480, 640).points_to_model([[320, 240]])
            [[512.0, 384.0]]
        """
        return self._to_model(points, 2)

    def points_to_image(self, points: Coords) -> Coords:
        """Map points [..., 2] (x, y) from the model's frame to the original image."""
        return self._to_image(points, 2)

    def boxes_to_model(self, boxes: Coords) -> Coords:
        """Map boxes [..., 4] (x0, y0, x1, y1) from the original image to the model's frame."""
        return self._to_model(boxes, 4)

    def boxes_to_image(self, boxes: Coords) -> Coords:
        """Map boxes [..., 4] (x0, y0, x1, y1) from the model's frame to the original image."""
        return self._to_image(boxes, 4)

    def cells(self, grid: Size) -> Size:
        """How many of a grid's (rows, columns) of features cover the image, and not padding alone.

        Examples:
            >>> ImageSpec.sam(1024).place(480, 640).cells((64, 64))
            (48, 64)
        """
        rows, columns = (
            min(cells, max(1, -(-resized * cells // whole)))
            for resized, cells, whole in zip(self.resized_size, grid, self.model_size, strict=True)
        )
        return rows, columns

    def _to_model(self, coords: Coords, last: int) -> Coords:
        (old_h, old_w), (new_h, new_w) = self.original_size, self.resized_size
        top, left = self.crop_offset
        return _affine(coords, last, (0, 0), (new_w / old_w, new_h / old_h), (-left, -top))

    def _to_image(self, coords: Coords, last: int) -> Coords:
        (old_h, old_w), (new_h, new_w) = self.original_size, self.resized_size
        top, left = self.crop_offset
        return _affine(coords, last, (left, top), (old_w / new_w, old_h / new_h), (0, 0))


@dataclass(frozen=True)
class ImageSpec:
    """How any image becomes a model's input of one size.

    Args:
        size: (height, width) of the model's input in pixels.
        resize: ``"longest_side"`` fits the whole image inside ``size`` and keeps its shape;
            ``"crop"`` resizes the shorter side to ``shorter_side`` and cuts out the centre;
            ``"squash"`` resizes to ``size`` and gives up the shape.
        interpolation: How pixels are interpolated, always with antialiasing.
        mean: Three numbers, subtracted from RGB in 0..255.
        std: Three numbers above 0 in the same unit; the difference is divided by them.
        shorter_side: For ``"crop"`` only: the shorter side before the crop, in pixels.
        pad: For ``"longest_side"`` only: pad with zeros at the bottom and the right to ``size``,
            after normalising. False keeps the resized image as it is.
        normalise: ``"mean_std"``, or ``"min_max"``: each image from its own darkest value (0) to
            its own brightest (1) over all three channels; then ``mean`` and ``std`` are not used.

    Raises:
        ValueError: A value is out of its range or does not go with the others.
    """

    size: Size
    resize: Resize
    interpolation: Interpolation = "bilinear"
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    shorter_side: int | None = None
    pad: bool = False
    normalise: Normalise = "mean_std"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _size_of(self.size))
        object.__setattr__(self, "mean", _triple("mean", self.mean))
        object.__setattr__(self, "std", _triple("std", self.std))
        _one_of("resize", self.resize, get_args(Resize))
        _one_of("interpolation", self.interpolation, get_args(Interpolation))
        _one_of("normalise", self.normalise, get_args(Normalise))
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 in every channel, but is {self.std}")
        if not isinstance(self.pad, bool):
            raise ValueError(f"pad must be True or False, but is {self.pad!r}")
        if self.pad and self.resize != "longest_side":
            raise ValueError(f"pad=True goes with resize='longest_side', not {self.resize!r}")
        if self.resize != "crop" and self.shorter_side is not None:
            raise ValueError(f"shorter_side goes with resize='crop', not {self.resize!r}")
        if self.resize == "crop":
            shorter = _pixels("shorter_side", self.shorter_side)
            if shorter < max(self.size):
                raise ValueError(
                    f"shorter_side must be at least {max(self.size)}, the longer side of size "
                    f"{self.size}, or the crop leaves the image; it is {shorter}"
                )

    @classmethod
    def sam(cls, size: int | Size = 1024, pad: bool = True) -> ImageSpec:
        """Segment-anything, MobileSAM: longest side, bilinear, zero padding after normalising."""
        return cls(_size_of(size), "longest_side", pad=pad)

    @classmethod
    def timm(cls, size: int, crop_pct: float | None = None) -> ImageSpec:
        """The evaluation of timm's TinyViT classifiers.

        Args:
            size: Side of the square input in pixels.
            crop_pct: Part of the shorter side that the crop keeps, above 0 and at most 1. None
                follows timm: 0.95 below 384; 1.0 below 512; from 512 on the image is squashed.

        Raises:
            ValueError: ``size`` or ``crop_pct`` is out of its range.
        """
        side = _pixels("size", size)
        if crop_pct is None and side >= 512:
            return cls((side, side), "squash", "bicubic")
        part = (0.95 if side < 384 else 1.0) if crop_pct is None else crop_pct
        if not 0 < part <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1, but is {crop_pct}")
        return cls((side, side), "crop", "bicubic", shorter_side=int(side / part))

    @classmethod
    def cream(cls, size: int) -> ImageSpec:
        """The evaluation of the original (Cream) classifiers: below 384, 256/224 and a crop.

        From 384 on nothing is cut away beyond the square, as in ``timm``.
        """
        side = _pixels("size", size)
        if side >= 384:
            return cls.timm(side)
        return cls((side, side), "crop", "bicubic", shorter_side=int(256 / 224 * side))

    @classmethod
    def litemedsam(cls, size: int = 256) -> ImageSpec:
        """LiteMedSAM: longest side, each image scaled by its own range to 0..1, zero padding.

        LiteMedSAM shrinks with OpenCV's area filter; antialiased bilinear comes nearest to it.
        """
        return cls(_size_of(size), "longest_side", pad=True, normalise="min_max")

    @classmethod
    def sam3(cls, size: int = 1008) -> ImageSpec:
        """SAM 3 and EfficientSAM3: the image squashed to a square, its values from -1 to 1."""
        return cls(_size_of(size), "squash", mean=(127.5,) * 3, std=(127.5,) * 3)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ImageSpec:
        """Make a spec from what ``to_dict`` gave.

        Raises:
            ValueError: Keys are missing or unknown, or a value is out of its range.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        missing, unknown = sorted(names - set(values)), sorted(set(values) - names)
        if missing or unknown:
            raise ValueError(
                f"an ImageSpec has exactly the keys {sorted(names)}; "
                f"missing {missing}, unknown {unknown}"
            )
        return cls(**cast("dict[str, Any]", dict(values)))

    def to_dict(self) -> dict[str, object]:
        """Give the spec as a dictionary of numbers, strings and lists, ready for JSON."""
        values = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}

    def place(self, height: int, width: int) -> Placement:
        """Say where an image of this size ends up; no side ever becomes 0 pixels.

        Raises:
            ValueError: ``height`` or ``width`` is not a whole number of at least 1.
        """
        old = old_h, old_w = _pixels("height", height), _pixels("width", width)
        if self.resize == "squash":
            return Placement(old, self.size, (0, 0), self.size)
        if self.resize == "longest_side":
            scale = min(self.size[0] * 1.0 / old_h, self.size[1] * 1.0 / old_w)
            new = max(1, int(old_h * scale + 0.5)), max(1, int(old_w * scale + 0.5))
            return Placement(old, new, (0, 0), self.size if self.pad else new)
        short = _pixels("shorter_side", self.shorter_side)
        longer = int(short * max(old) / min(old))
        new = (short, longer) if old_h <= old_w else (longer, short)
        top, left = (round((new[i] - self.size[i]) / 2) for i in (0, 1))
        return Placement(old, new, (top, left), self.size)


def _affine(
    coords: Coords, last: int, before: Size, scale: tuple[float, float], after: Size
) -> Coords:
    """Give (coords + before) * scale + after, x and y in turn along the last dimension."""
    if hasattr(coords, "shape"):
        array = cast("Any", coords)
        if not len(array.shape) or array.shape[-1] != last:
            raise ValueError(_wrong_coords(last, f"an array of shape {list(array.shape)}"))
        array = array * 1.0  # a copy in floating point, whatever library it comes from
        for axis in (0, 1):
            part = (array[..., axis::2] + before[axis]) * scale[axis] + after[axis]
            array[..., axis::2] = part
        return cast("Coords", array)
    if not isinstance(coords, (list, tuple)):
        raise ValueError(_wrong_coords(last, f"{type(coords).__name__}"))
    items: list[Any] = list(coords)
    if items and all(isinstance(item, (int, float)) for item in items):
        if len(items) != last:
            raise ValueError(_wrong_coords(last, f"{len(items)} of them"))
        items = [(v + before[i % 2]) * scale[i % 2] + after[i % 2] for i, v in enumerate(items)]
    else:
        items = [_affine(item, last, before, scale, after) for item in items]
    return cast("Coords", items if isinstance(coords, list) else tuple(items))


def _wrong_coords(last: int, came: str) -> str:
    what = "points [..., 2] as (x, y)" if last == 2 else "boxes [..., 4] as (x0, y0, x1, y1)"
    return f"wanted {what} in a list, tuple, array or tensor of numbers; came {came}"


def _pixels(name: str, value: object) -> int:
    try:
        number = operator.index(cast("Any", value))
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be a whole number of pixels, at least 1, but is {value!r}")
    return number


def _size_of(value: object) -> Size:
    pair = value if isinstance(value, (list, tuple)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"size must be (height, width), but is {value!r}")
    return _pixels("size", pair[0]), _pixels("size", pair[1])


def _triple(name: str, value: object) -> Triple:
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        raise ValueError(f"{name} must be three numbers, one a channel, but is {value!r}")
    if not all(isinstance(v, (int, float)) and abs(v) < float("inf") for v in value):
        raise ValueError(f"{name} must be three finite numbers, but is {value!r}")
    return float(value[0]), float(value[1]), float(value[2])


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, but is {value!r}")
