"""Segmentations over photographs: masks, clicks, boxes, a caption; masks as PNG files.

Everything is drawn in the picture's own size, and lines, circles and letters grow with it, so that
a drawing of 500 or of 8000 pixels looks alike on a screen. Edges are smooth: circles and boxes by
their distance to each pixel, outlines of masks by a blurred mask. Nothing is known of models, and
the only file ever written is the PNG of ``save_mask``.

Letters: H, W photograph; N masks, points or boxes. Positions are continuous: the pixel in row i
and column j covers y from i to i + 1 and x from j to j + 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tinyvit.images.draw import check_rgb, write_png
from tinyvit.images.strokes import bands, centres, distance_to_box, paint, window, within

__all__ = ["colour", "draw_boxes", "draw_caption", "draw_masks", "draw_points", "save_mask"]

RGB = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]
Colour = tuple[int, int, int]

UNIT, LEAST_UNIT = 500, 0.5  # a picture of 500 x 500 is drawn with lines of the widths below
OUTLINE, LINE, ROUND = 2.0, 2.4, 3.0  # pixels: a mask's outline, a box's line and its corners
RADIUS, RING, SHADE = 6.0, 1.8, 1.2  # pixels: a point, its ring, the shade around ring and line
LETTERS, LEAST_LETTERS = 15, 9  # pixels: the size of a caption's font
OUTLINE_STRENGTH, SHADE_STRENGTH, BOX_STRENGTH = 0.95, 0.4, 0.72  # 0 (unseen) to 1 (opaque)
GREEN, RED = (46, 190, 84), (230, 50, 54)
WHITE, BLACK, PAPER = (255, 255, 255), (0, 0, 0), (22, 24, 28)
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # radians: any first colours are spread around evenly
FIRST_HUE, CHROMA = 4.45, 0.19  # in OKLCh, where equal steps look equal
LIGHTNESS = (0.68, 0.80, 0.58)  # a round of seven hues each


def colour(index: int) -> Colour:
    """Give the colour of the mask or box of this number: always the same, its neighbours far off.

    Hues go around by the golden angle, in a space where equal steps look equally far.

    Args:
        index: From 0.

    Returns:
        (red, green, blue), each 0 to 255.

    Raises:
        ValueError: ``index`` is negative.
    """
    if index < 0:
        raise ValueError(f"a colour's index must be 0 or more, but is {index}")
    hue = FIRST_HUE + index * GOLDEN_ANGLE
    light, a, b = LIGHTNESS[index // 7 % 3], CHROMA * math.cos(hue), CHROMA * math.sin(hue)
    # OKLab to linear sRGB: the numbers of Ottosson (2020)
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        _gamma(4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short),
        _gamma(-1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short),
        _gamma(-0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short),
    )


def draw_masks(
    picture: RGB,
    masks: Iterable[Bools],
    colours: Sequence[Colour] | None = None,
    alpha: float = 0.5,
    outlines: bool = True,
) -> RGB:
    """Lay masks over a photograph, each in a colour of its own.

    Where masks overlap the last one drawn is seen, over the photograph and not over the others. Of
    a list, tuple or array [N, H, W] the large ones are drawn first, so that a small one within a
    large one stays visible. Of a generator each is drawn as it comes, and one at a time is held:
    let it give the large ones first. Colours follow the order in which masks are given.

    Args:
        picture: The photograph, [H, W, 3] uint8; it is not changed.
        masks: Each [H, W] bool; empty masks and none at all are fine.
        colours: (red, green, blue) of 0 to 255, at least one a mask. None: ``colour(0)``, ...
        alpha: Strength of the colours, 0 (photograph only) to 1 (colours only).
        outlines: Whether each mask gets a line along its edge, whatever ``alpha`` is.

    Returns:
        [H, W, 3] uint8, a new array.

    Raises:
        ValueError: A shape, type or ``alpha`` is wrong, or colours are too few or none at all.
    """
    check_rgb("picture", picture)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, but is {alpha}")
    _check_colours(colours)
    out: RGB = picture.copy()
    for index, mask in _in_order(masks, picture.shape[:2]):
        tint = _colour_of(colours, index, "masks")
        where = _bounds(mask)
        if where is None:
            continue
        for channel in range(3):
            seen = picture[where][..., channel]
            table = np.rint(np.arange(256) * (1 - alpha) + tint[channel] * alpha).astype(np.uint8)
            np.copyto(out[where][..., channel], table[seen], where=mask[where])
        if outlines:
            _draw_outline(out, mask, where, tint)
    return out


def draw_points(picture: RGB, points: ArrayLike, labels: ArrayLike) -> RGB:
    """Draw clicks: a green dot where the object is, a red one where it is not, ringed in white.

    Args:
        picture: The photograph, [H, W, 3] uint8; it is not changed.
        points: [N, 2] (x, y) in pixels of the picture; what lies outside is not seen.
        labels: [N]: 1 (object) or 0 (not the object).

    Returns:
        [H, W, 3] uint8, a new array.

    Raises:
        ValueError: A shape or type is wrong, a point is not finite, or a label is neither 0 nor 1.
    """
    check_rgb("picture", picture)
    positions = _numbers("points", points, 2)
    marks = np.asarray(labels, np.float64)
    if marks.shape != (len(positions),) and (marks.size or len(positions)):
        raise ValueError(f"wanted {len(positions)} labels, one a point; came {list(marks.shape)}")
    if not np.isin(marks, (0, 1)).all():
        raise ValueError(f"labels must be 1 (object) or 0 (not the object); came {marks.tolist()}")
    out: RGB = picture.copy()
    unit = _unit(picture)
    radius, ring, shade = RADIUS * unit, RING * unit, SHADE * unit
    for (x, y), mark in zip(positions.tolist(), marks.ravel().tolist(), strict=True):
        reach = radius + ring + shade + 1
        where = window(out, x - reach, y - reach, x + reach, y + reach)
        across, down = centres(where)
        distance = np.hypot(across - x, down - y).astype(np.float32)
        paint(out[where], BLACK, within(distance, radius + ring + shade) * SHADE_STRENGTH)
        paint(out[where], WHITE, within(distance, radius + ring))
        paint(out[where], GREEN if mark else RED, within(distance, radius))
    return out


def draw_boxes(picture: RGB, boxes: ArrayLike, colours: Sequence[Colour] | None = None) -> RGB:
    """Draw the outlines of boxes, later ones over earlier ones.

    Args:
        picture: The photograph, [H, W, 3] uint8; it is not changed.
        boxes: [N, 4] (x0, y0, x1, y1) in pixels of the picture; what lies outside is not seen.
        colours: (red, green, blue) of 0 to 255, at least one a box. None: ``colour(0)``, ...

    Returns:
        [H, W, 3] uint8, a new array.

    Raises:
        ValueError: A shape or type is wrong, a box is not finite or ends before it begins, or
            colours are too few or none at all.
    """
    check_rgb("picture", picture)
    edges = _numbers("boxes", boxes, 4)
    if (edges[:, 2:] < edges[:, :2]).any():
        raise ValueError(
            f"boxes must be (x0, y0, x1, y1), x0 <= x1, y0 <= y1; came {edges.tolist()}"
        )
    _check_colours(colours)
    out: RGB = picture.copy()
    unit = _unit(picture)
    half, shade = LINE * unit / 2, SHADE * unit
    for index, box in enumerate(edges.tolist()):
        tint = _colour_of(colours, index, "boxes")
        for where in bands(out, box, half + shade + ROUND * unit + 1):
            distance = np.abs(distance_to_box(where, box, ROUND * unit))
            paint(out[where], BLACK, within(distance, half + shade) * SHADE_STRENGTH)
            paint(out[where], tint, within(distance, half))
    return out


def draw_caption(picture: RGB, text: str) -> RGB:
    """Write text on a dark box in the upper left corner.

    Letters become smaller, down to 9 pixels, where the text is wider than the picture; what does
    not fit even then is cut off.

    Args:
        picture: The photograph, [H, W, 3] uint8; it is not changed.
        text: Of one or several lines, in Latin letters; an empty one draws nothing.

    Returns:
        [H, W, 3] uint8, a new array.

    Raises:
        ValueError: ``picture`` has another shape or type.
    """
    check_rgb("picture", picture)
    out: RGB = picture.copy()
    if not text.strip():
        return out
    size = max(LEAST_LETTERS, LETTERS * _unit(picture))
    pen = ImageDraw.Draw(Image.new("L", (1, 1)))
    while True:
        font = ImageFont.load_default(size=size)
        left, top, right, bottom = pen.multiline_textbbox((0, 0), text, font=font, spacing=size / 4)
        margin, border = size * 0.5, size * 0.5  # outside and inside the box
        if right - left + 2 * (margin + border) <= picture.shape[1] or size <= LEAST_LETTERS:
            break
        size = max(LEAST_LETTERS, size * 0.92)
    width, height = right - left + 2 * border, bottom - top + 2 * border
    where = window(out, 0, 0, margin + width + 1, margin + height + 1)
    box = [margin, margin, margin + width, margin + height]
    paint(out[where], PAPER, within(distance_to_box(where, box, size / 3), 0.0) * BOX_STRENGTH)
    letters = Image.new("L", (out[where].shape[1], out[where].shape[0]))
    corner = margin + border - left, margin + border - top
    ImageDraw.Draw(letters).multiline_text(corner, text, 255, font, spacing=size / 4)
    cover: Floats = np.asarray(letters, np.float32) / np.float32(255)
    paint(out[where], WHITE, cover)
    return out


def save_mask(path: str | os.PathLike[str], mask: Bools) -> None:
    """Write a mask as a grey PNG file, 0 outside and 255 inside, whole or not at all.

    Args:
        path: The file; one that exists is replaced.
        mask: [H, W] bool.

    Raises:
        ValueError: ``mask`` has another shape or type.
        OSError: The folder is missing or cannot be written to.
    """
    if (
        not isinstance(mask, np.ndarray)
        or mask.ndim != 2
        or mask.dtype != np.bool_
        or not mask.size
    ):
        raise ValueError(f"wanted a mask [H, W] of bool; came {_described(mask)}")
    write_png(path, Image.fromarray(mask.astype(np.uint8) * 255))


def _gamma(linear: float) -> int:
    """Give a linear value of sRGB, 0 to 1, as 0 to 255; what is beyond is cut off."""
    value = min(1.0, max(0.0, linear))
    curved = 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055
    return round(255 * curved)


def _unit(picture: RGB) -> float:
    """Give the pixels of this picture that are one of a picture of 500 x 500."""
    return max(LEAST_UNIT, math.sqrt(picture.shape[0] * picture.shape[1]) / UNIT)


def _in_order(masks: Iterable[Bools], size: tuple[int, ...]) -> Iterable[tuple[int, Bools]]:
    """Give masks, checked, with their numbers: large ones first where all are at hand."""
    if not isinstance(masks, Sequence | np.ndarray):
        return ((index, _checked(mask, index, size)) for index, mask in enumerate(masks))
    checked = [(index, _checked(mask, index, size)) for index, mask in enumerate(masks)]
    return sorted(checked, key=lambda pair: -int(np.count_nonzero(pair[1])))  # stable


def _checked(mask: Bools, index: int, size: tuple[int, ...]) -> Bools:
    if not isinstance(mask, np.ndarray) or mask.shape != size or mask.dtype != np.bool_:
        raise ValueError(
            f"wanted masks of bool, as large as the picture, {list(size)}; mask {index} is "
            f"{_described(mask)}"
        )
    return mask


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{list(value.shape)} of {value.dtype}"
    return f"a {type(value).__name__}"


def _check_colours(colours: Sequence[Colour] | None) -> None:
    for tint in () if colours is None else colours:
        if len(tint) != 3 or not all(0 <= part <= 255 for part in tint):
            raise ValueError(f"colours must be (red, green, blue) of 0 to 255; came {tint}")


def _colour_of(colours: Sequence[Colour] | None, index: int, what: str) -> Colour:
    if colours is None:
        return colour(index)
    if index >= len(colours):
        raise ValueError(f"wanted a colour for each of the {what}; came only {len(colours)}")
    return colours[index]


def _numbers(name: str, values: ArrayLike, columns: int) -> NDArray[np.float64]:
    """Give positions as [N, columns]; none at all may come in any shape."""
    numbers = np.asarray(values, np.float64)
    if numbers.size == 0:
        return numbers.reshape(0, columns)
    if numbers.ndim != 2 or numbers.shape[1] != columns:
        raise ValueError(f"{name} must be [N, {columns}]; came {list(numbers.shape)}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite; came {numbers.tolist()}")
    return numbers


def _bounds(mask: Bools) -> tuple[slice, slice] | None:
    """Give the rows and columns that a mask lies in; None where it is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    columns = np.flatnonzero(mask[rows[0] : rows[-1] + 1].any(axis=0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _draw_outline(out: RGB, mask: Bools, where: tuple[slice, slice], tint: Colour) -> None:
    """Draw a smooth line along a mask's edge, but not along the picture's.

    A blurred straight edge tells by its grey how far each pixel is from it.
    """
    half = OUTLINE * _unit(out) / 2
    sigma = max(0.8, half)
    reach = math.ceil(3 * sigma + half) + 1
    rows, columns = where
    near = window(
        out, columns.start - reach, rows.start - reach, columns.stop + reach, rows.stop + reach
    )
    grey = Image.fromarray(mask[near].astype(np.uint8) * 255)
    blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(sigma)))
    normal = NormalDist(0, sigma)
    distances = [abs(normal.inv_cdf((level + 0.5) / 256)) for level in range(256)]
    table = within(np.array(distances, np.float32), half) * OUTLINE_STRENGTH
    table[[0, 255]] = 0  # far away, however small the blur
    paint(out[near], tint, table[blurred])
