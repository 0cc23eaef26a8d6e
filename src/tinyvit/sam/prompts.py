"""Prompts: what a caller asks for, checked, and many of one kind as arrays of the model's input.

``Prompt`` is one object's points, box and mask in pixels of the image; a decoder takes a
``PromptBatch``, stacked, in pixels of the model's input. Prompts are never padded to the same
number of points, since a padding point is a token that others attend to, but grouped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from tinyvit.image_spec import Placement

Size: TypeAlias = "tuple[int, int]"

Kind: TypeAlias = "tuple[int, bool, bool]"


@dataclass(frozen=True, init=False, eq=False)
class Prompt:
    """What to segment: points, a box, a mask, or any of them together, about one object.

    Args:
        points: [P, 2] as (x, y) in pixels of the original image; None for none.
        labels: [P]: 1 the object, 0 not the object; None means all 1.
        box: (x0, y0, x1, y1) in pixels of the original image; None for none.
        mask: Low-res logits of an earlier prediction, [h4, w4] or [1, h4, w4], floating point; or
            a mask of the image, [H, W] bool. None for none.
        name: Any text by which the caller recognises it.

    Attributes:
        points: [P, 2] float64, or None.
        labels: [P] int64, or None without points.
        box: [4] float64, or None.
        mask: [h4, w4] float32 logits, [H, W] bool, or None.
        name: As given.

    Raises:
        ValueError: Nothing is prompted; an array is empty, of another shape or not finite; a label
            is neither 0 nor 1; the numbers of points and labels differ; a box's x1 <= x0 or
            y1 <= y0.

    Examples:
        >>> Prompt(points=[[320, 240]]).labels.tolist()
        [1]
    """

    points: NDArray[np.float64] | None
    labels: NDArray[np.int64] | None
    box: NDArray[np.float64] | None
    mask: NDArray[np.float32] | NDArray[np.bool_] | None
    name: str | None

    def __init__(
        self,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        box: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        name: str | None = None,
    ) -> None:
        if points is None and labels is not None:
            raise ValueError("labels came without points; give points [[x, y], ...] with them")
        if points is None and box is None and mask is None:
            raise ValueError("nothing is prompted; give points, a box or a mask")
        coords = None if points is None else _points(points)
        values = {
            "points": coords,
            "labels": None if coords is None else _labels(labels, len(coords)),
            "box": None if box is None else _box(box),
            "mask": None if mask is None else _mask(mask),
            "name": name,
        }
        for key, value in values.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, key, value)

    @property
    def kind(self) -> Kind:
        """(number of points, whether there is a box, whether there is a mask)."""
        count = 0 if self.points is None else len(self.points)
        return count, self.box is not None, self.mask is not None

    def check_in(self, image_size: Size, low_res_size: Size) -> None:
        """Check that the prompt lies in an image, or less than a pixel outside.

        Detectors produce boxes that end there; what is outside is clipped when it is decoded.

        Args:
            image_size: (H, W) in pixels.
            low_res_size: (h4, w4) of low-res logits of that image.

        Raises:
            ValueError: A coordinate is outside, or the mask has another size.
        """
        for number, (x, y) in enumerate(() if self.points is None else self.points):
            _check_inside(f"point {number} at", (x, y), image_size)
        if self.box is not None:
            _check_inside("the box's corner", self.box[:2], image_size)
            _check_inside("the box's corner", self.box[2:], image_size)
        if self.mask is None:
            return
        wanted = image_size if self.mask.dtype == bool else low_res_size
        if self.mask.shape != wanted:
            raise ValueError(
                f"a mask prompt must be a bool mask of the image, {list(image_size)}, or "
                f"low-res logits of an earlier prediction on it, {list(low_res_size)} of floats; "
                f"came {list(self.mask.shape)} of {self.mask.dtype}"
            )

    def describe(self) -> dict[str, object]:
        """What is prompted as lists and numbers, ready for JSON; of a mask only that there is one.

        Returns:
            Keys among ``points``, ``labels``, ``box``, ``mask`` and ``name``.
        """
        arrays = {"points": self.points, "labels": self.labels, "box": self.box}
        found: dict[str, object] = {k: v.tolist() for k, v in arrays.items() if v is not None}
        if self.mask is not None:
            found["mask"] = True
        return found if self.name is None else {**found, "name": self.name}


PromptLike: TypeAlias = "Prompt | Mapping[str, Any]"
"""A ``Prompt``, or a dictionary of its arguments."""


def to_prompt(value: PromptLike) -> Prompt:
    """A ``Prompt`` from itself or from a dictionary of its arguments."""
    if isinstance(value, Prompt):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(
            f"wanted a Prompt or a dictionary of its arguments, came {type(value).__name__}; "
            "for example Prompt(points=[[x, y]])"
        )
    names = [field.name for field in fields(Prompt)]
    if unknown := sorted(set(value) - set(names), key=str):
        raise ValueError(f"a prompt has the keys {', '.join(names)}; came {unknown}")
    return Prompt(**value)


def _numbers(name: str, wanted: str, values: ArrayLike) -> NDArray[np.float64]:
    """A copy in float64, or an error that says what was wanted."""
    try:
        array = np.array(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError) as err:
        raise ValueError(f"{name} must be {wanted} of numbers; came {values!r}") from err
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers; came {array.tolist()}")
    return array


def _points(values: ArrayLike) -> NDArray[np.float64]:
    wanted = "[[x, y], ...], one pair for each point,"
    array = _numbers("points", wanted, values)
    if array.size == 0:
        raise ValueError(f"points must be {wanted} but are empty; leave them out (None) for none")
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"points must be {wanted} in the shape [P, 2]; came {list(array.shape)}")
    return array


def _labels(values: ArrayLike | None, count: int) -> NDArray[np.int64]:
    if values is None:
        return np.ones(count, np.int64)
    array = _numbers("labels", "one 0 or 1 for each point, a list", values)
    if array.shape != (count,):
        raise ValueError(
            f"labels must be one for each point: {count} points, so [{count}]; "
            f"came {list(array.shape)}"
        )
    if unknown := sorted(set(array.tolist()) - {0, 1}):
        raise ValueError(
            f"labels of points must be 1 (the object) or 0 (not the object); came {unknown}"
        )
    return array.astype(np.int64)


def _box(values: ArrayLike) -> NDArray[np.float64]:
    array = _numbers("box", "(x0, y0, x1, y1)", values)
    if array.shape == (1, 4):
        array = array[0]
    if array.shape != (4,):
        raise ValueError(f"box must be one box (x0, y0, x1, y1), [4]; came {list(array.shape)}")
    x0, y0, x1, y1 = array.tolist()
    for letter, low, high in (("x", x0, x1), ("y", y0, y1)):
        if high <= low:
            relation = "<" if high < low else "="
            raise ValueError(
                f"box must be (x0, y0, x1, y1) with x1 > x0 and y1 > y0; came {array.tolist()} "
                f"with {letter}1 {relation} {letter}0; a box (x, y, width, height) is "
                "(x, y, x + width, y + height)"
            )
    return array


def _mask(values: ArrayLike) -> NDArray[np.float32] | NDArray[np.bool_]:
    array = np.array(np.asarray(values))
    is_logits = array.dtype.kind == "f"
    if is_logits and array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.size == 0 or not (is_logits or array.dtype == bool):
        raise ValueError(
            "mask must be low-res logits of an earlier prediction, [h4, w4] or [1, h4, w4] of "
            "floats, or a mask of the image, [H, W] of bool; came "
            f"{list(array.shape)} of {array.dtype}"
            + ("; mask.astype(bool) makes a mask of whole numbers one" if array.ndim == 2 else "")
        )
    if not is_logits:
        return array
    logits = array.astype(np.float32)
    if not np.isfinite(logits).all():
        raise ValueError("mask must be finite logits; came some that are NaN or infinite")
    return logits


def _check_inside(what: str, point: Sequence[float] | NDArray[np.float64], size: Size) -> None:
    (x, y), (height, width) = point, size
    if -1 < x < width + 1 and -1 < y < height + 1:
        return
    swapped = 0 <= y <= width and 0 <= x <= height
    raise ValueError(
        f"{what} (x, y) = ({x:g}, {y:g}) lies outside the image of width {width} and height "
        f"{height}; wanted pixels of the original image, 0 <= x <= {width} and 0 <= y <= {height}"
        + ("; are x and y swapped?" if swapped else "")
    )


SURE = 6.0
"""Logit of a pixel that a bool mask names; its negative for all others and for the padding. Sure
pixels of the decoder's own masks have it (sigmoid(6) = 0.998); much larger values would be unlike
anything that the prompt encoder saw in training."""


class PromptBatch:
    """Prompts of one kind as a decoder takes them, in pixels of the model's input.

    ``points`` are (coordinates [N, P, 2] float32 as (x, y), labels [N, P]: 1, 0, or -1 for no point
    at all), ``boxes`` [N, 4] float32 xyxy, ``masks`` [N, 1, h4, w4] float32 logits; each or None.
    """

    def __init__(
        self,
        points: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None,
        boxes: NDArray[np.float32] | None = None,
        masks: NDArray[np.float32] | None = None,
    ) -> None:
        self.points, self.boxes, self.masks = points, boxes, masks
        given = {"point_coords": points and points[0], "boxes": boxes, "mask_input": masks}
        counts = {name: len(array) for name, array in given.items() if array is not None}
        if not counts:
            raise ValueError("nothing is prompted; give points, boxes or masks")
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{count} in {name}" for name, count in counts.items())
            raise ValueError(f"every kind of prompt must be about the same objects; came {shown}")
        self._count = next(iter(counts.values()))

    def __len__(self) -> int:
        return self._count

    def check_masks(self, size: tuple[int, ...]) -> None:
        """Refuse masks that are no low-res logits [h4, w4] of an image's size."""
        if self.masks is not None and self.masks.shape[2:] != size:
            raise ValueError(
                f"mask_input must be low-res logits of this image, [B, 1, {size[0]}, {size[1]}]; "
                f"came {list(self.masks.shape)}"
            )

    def part(self, start: int, stop: int) -> PromptBatch:
        """The prompts from ``start`` up to ``stop``."""
        some = slice(start, stop)
        points = self.points and (self.points[0][some], self.points[1][some])
        boxes, masks = (a if a is None else a[some] for a in (self.boxes, self.masks))
        return PromptBatch(points, boxes, masks)


def stack_prompts(
    prompts: Sequence[Prompt], placement: Placement, low_res_size: Size, logit_stride: float
) -> PromptBatch:
    """Prompts of one kind, clipped to the image, mapped to the model's input and stacked."""
    points = boxes = masks = None
    some: Sequence[Any] = prompts  # of one kind: what the first has they all have
    height, width = placement.original_size
    count, has_box, has_mask = prompts[0].kind
    if count:
        coords = np.clip([prompt.points for prompt in some], 0, (width, height))
        labels = np.stack([prompt.labels for prompt in some])
        points = placement.points_to_model(coords).astype(np.float32), labels
    if has_box:
        corners = np.clip([prompt.box for prompt in some], 0, (width, height, width, height))
        boxes = placement.boxes_to_model(corners).astype(np.float32)
    if has_mask:
        sizes = placement, low_res_size, logit_stride
        masks = np.stack([mask_to_logits(prompt.mask, *sizes)[None] for prompt in some])
    return PromptBatch(points, boxes, masks)


def mask_to_logits(
    mask: NDArray[np.float32] | NDArray[np.bool_],
    placement: Placement,
    low_res_size: Size,
    logit_stride: float,
) -> NDArray[np.float32]:
    """A mask prompt as [h4, w4] logits: logits as they are, a bool mask [H, W] by its coverage.

    A low-res pixel that the mask covers gets +6, one outside gets -6, one covered in part lies
    between in proportion: 0 where half is covered, and the outline stays where it was.
    """
    if mask.dtype != bool:
        return mask.astype(np.float32)
    height, width = placement.resized_size
    # Pillow's filter averages where it shrinks: covered area, not a sample of it.
    pixels = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    small = np.array(pixels.resize((width, height), Image.Resampling.BILINEAR), np.float32) / 255
    rows, columns = (
        _averages(side, low_res, round(low_res * logit_stride))
        for side, low_res in zip((height, width), low_res_size, strict=True)
    )
    return np.asarray((2 * (rows @ small @ columns.T) - 1) * np.float32(SURE), np.float32)


def _averages(pixels: int, low_res: int, covered: int) -> NDArray[np.float32]:
    """[low_res, pixels]: averages over equal parts of ``covered`` pixels, zeros after the first."""
    matrix = np.zeros((low_res, covered), np.float32)
    for i in range(low_res):  # rounded outwards, as torch's adaptive pooling
        part = slice(i * covered // low_res, -(-(i + 1) * covered // low_res))
        matrix[i, part] = 1 / (part.stop - part.start)
    return matrix[:, :pixels]
