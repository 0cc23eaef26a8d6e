"""Pictures of what a model sees: masks, boxes and clicks over an image, feature maps, PNG files.

Lines and dots are smooth: a pixel takes as much of a colour as lies within half a pixel of the
edge. Positions are continuous: the pixel in row i and column j covers y from i to i + 1 and x from
j to j + 1. Functions that draw on an image give a new array [H, W, 3] uint8.
"""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tinyvit.image_spec import Placement

from .mask_ops import box_around, check_mask
from .preprocess import check_interpolation, check_rgb

RGB: TypeAlias = NDArray[np.uint8]
Bools: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float32]
Colour: TypeAlias = tuple[int, int, int]
Part: TypeAlias = tuple[slice, slice]
"""Rows and columns of a part of an image."""
Features: TypeAlias = Any
"""A feature map [C, h, w]: an array, or a tensor of torch."""

GREEN, RED, WHITE, BLACK = (46, 190, 84), (230, 50, 54), (255, 255, 255), (0, 0, 0)
PAPER, INK = WHITE, (40, 44, 52)

UNIT, LEAST_UNIT = 500, 0.5  # an image of 500 x 500 is drawn with lines of the widths below
OUTLINE, LINE, ROUND = 2.0, 2.4, 3.0  # pixels: a mask's outline, a box's line and its corners
RADIUS, RING, SHADE = 6.0, 1.8, 1.2  # pixels: a point, its ring, the shade around ring and line
OUTLINE_STRENGTH, SHADE_STRENGTH = 0.95, 0.4  # 0 (unseen) to 1 (opaque)
BLOCK = 1 << 20  # pixels mixed at once
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # radians: any first colours are spread around evenly
FIRST_HUE, CHROMA = 4.45, 0.19  # in OKLCh, where equal steps look equal
LIGHTNESS = (0.68, 0.80, 0.58)  # a round of seven hues each

GREY = 128  # where a map does not vary
DARK, BRIGHT = 20, 240  # the ends of the scale; full 0..255 is glaring
NOISE = 1e-6  # float32 rounding: variation below this part of the values is none
LOW, HIGH = 0.01, 0.99  # the quantiles that become darkest and brightest
MOST_FITTED = 100_000  # positions; a larger map is fitted to every second, third, ... one
PANEL, GAP, CAPTION, FONT = 320, 16, 32, 15  # pixels: a panel's longer side, margins, text
TITLE = 26  # pixels high
FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}


def colour(index: int) -> Colour:
    """The colour of a mask or box by its number, from 0: always the same, its neighbours far off.

    Hues go around by the golden angle, in a space where equal steps look equally far.
    """
    if index < 0:
        raise ValueError(f"a colour's index must be 0 or more, but is {index}")
    hue = FIRST_HUE + index * GOLDEN_ANGLE
    light, a, b = LIGHTNESS[index // 7 % 3], CHROMA * math.cos(hue), CHROMA * math.sin(hue)
    # OKLab to linear sRGB: the numbers of Ottosson (2020)
    long = (light + 0.3963377774 * a + 0.2158037573 * b) ** 3
    middle = (light - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (light - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    values = [min(1.0, max(0.0, part)) for part in linear]  # what is beyond is cut off
    curve = [12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in values]
    red, green, blue = (round(255 * part) for part in curve)  # sRGB's
    return red, green, blue


def draw_masks(
    image: RGB,
    masks: Iterable[Bools],
    colours: Sequence[Colour] | None = None,
    alpha: float = 0.5,
    outlines: bool = True,
) -> RGB:
    """Lay masks, each [H, W] bool, over an image [H, W, 3] uint8, each in a colour of its own.

    Where masks overlap the last one drawn is seen, over the image and not over the others. Of a
    list, tuple or array [N, H, W] the large ones are drawn first, so that a small one within a
    large one stays visible. Of a generator each is drawn as it comes, and one at a time is held:
    let it give the large ones first. Colours, (red, green, blue) of 0 to 255, follow the order in
    which masks are given; None: ``colour(0)``, ... ``alpha`` is their strength, 0 to 1.
    """
    check_rgb("image", image)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, but is {alpha}")
    out: RGB = image.copy()
    for index, mask in _in_order(masks, image.shape[:2]):
        tint = _colour_of(colours, index, "masks")
        x0, y0, x1, y1 = box_around(mask)
        where = slice(y0, y1), slice(x0, x1)
        for channel in range(3):
            seen = image[where][..., channel]
            table = np.rint(np.arange(256) * (1 - alpha) + tint[channel] * alpha).astype(np.uint8)
            np.copyto(out[where][..., channel], table[seen], where=mask[where])
        if outlines and x1:
            _draw_outline(out, mask, where, tint)
    return out


def draw_points(image: RGB, points: ArrayLike, labels: ArrayLike) -> RGB:
    """Draw clicks [N, 2] (x, y) in pixels: green on the object (label 1), red elsewhere (0)."""
    check_rgb("image", image)
    positions = _numbers("points", points, 2)
    marks = np.asarray(labels, np.float64)
    if marks.shape != (len(positions),) and (marks.size or len(positions)):
        raise ValueError(f"wanted {len(positions)} labels, one a point; came {list(marks.shape)}")
    if not np.isin(marks, (0, 1)).all():
        raise ValueError(f"labels must be 1 (object) or 0 (not the object); came {marks.tolist()}")
    out: RGB = image.copy()
    unit = _unit(image)
    radius, ring, shade = RADIUS * unit, RING * unit, SHADE * unit
    for (x, y), mark in zip(positions.tolist(), marks.ravel().tolist(), strict=True):
        reach = radius + ring + shade + 1
        where = window(out, x - reach, y - reach, x + reach, y + reach)
        distance = distance_to_box(where, (x, y, x, y), 0)
        paint(out[where], BLACK, within(distance, radius + ring + shade) * SHADE_STRENGTH)
        paint(out[where], WHITE, within(distance, radius + ring))
        paint(out[where], GREEN if mark else RED, within(distance, radius))
    return out


def draw_boxes(image: RGB, boxes: ArrayLike, colours: Sequence[Colour] | None = None) -> RGB:
    """Draw the outlines of boxes [N, 4] (x0, y0, x1, y1) in pixels, later over earlier ones."""
    check_rgb("image", image)
    edges = _numbers("boxes", boxes, 4)
    if (edges[:, 2:] < edges[:, :2]).any():
        raise ValueError(
            f"boxes must be (x0, y0, x1, y1), x0 <= x1, y0 <= y1; came {edges.tolist()}"
        )
    out: RGB = image.copy()
    unit = _unit(image)
    half, shade = LINE * unit / 2, SHADE * unit
    for index, box in enumerate(edges.tolist()):
        tint = _colour_of(colours, index, "boxes")
        for where in bands(out, box, half + shade + ROUND * unit + 1):
            distance = np.abs(distance_to_box(where, box, ROUND * unit))
            paint(out[where], BLACK, within(distance, half + shade) * SHADE_STRENGTH)
            paint(out[where], tint, within(distance, half))
    return out


def save_mask(path: str | os.PathLike[str], mask: Bools) -> None:
    """Write a mask [H, W] bool as a grey PNG, 0 outside and 255 inside, whole or not at all."""
    check_mask(mask)
    if not mask.size:
        raise ValueError(f"wanted a mask with pixels; came {list(mask.shape)}")
    write_png(path, Image.fromarray(mask.astype(np.uint8) * 255))


def feature_rgb(features: Features, visible: tuple[int, int] | None = None) -> RGB:
    """Colour a feature map [C, h, w] by its first three principal components.

    It is grey where it does not vary, and black where a value is not finite. The same map always
    gives the same colours: each component's largest weight is made positive. ``visible`` (rows,
    columns) at the top left hold the image; components and scale are fitted to these alone, so that
    padding does not spend the colours.
    """
    if hasattr(features, "detach"):
        features = features.detach().cpu().double()
    values = np.asarray(features, np.float64)
    if values.ndim != 3 or not values.size:
        raise ValueError(f"wanted one feature map [C, h, w]; came {list(values.shape)}")
    channels, h, w = values.shape
    rows, columns = (h, w) if visible is None else visible
    if not (1 <= rows <= h and 1 <= columns <= w):
        raise ValueError(f"visible must lie within the {h} x {w} map, but is {visible}")
    tokens = values.reshape(channels, -1).T  # [h*w, C]
    is_good = np.isfinite(tokens).all(axis=1)  # [h*w]
    is_fitted = np.zeros((h, w), np.bool_)
    is_fitted[:rows, :columns] = True
    fitted = tokens[is_fitted.reshape(-1) & is_good]  # [n, C]
    fitted = fitted[:: 1 + len(fitted) // MOST_FITTED]
    colours = np.full((h * w, 3), GREY / 255)
    components = _components(fitted)  # [C, up to 3]
    if components.shape[1]:
        low, high = np.quantile(fitted @ components, [LOW, HIGH], axis=0)
        scaled = (tokens[is_good] @ components - low) / np.maximum(high - low, 1e-300)
        scaled = (DARK + (BRIGHT - DARK) * scaled.clip(0, 1)) / 255
        colours[is_good, : components.shape[1]] = np.where(high > low, scaled, GREY / 255)
    colours[~is_good] = 0
    pixels: RGB = np.rint(colours * 255).astype(np.uint8).reshape(h, w, 3)
    return pixels


def overlay(
    image: RGB,
    colours: RGB,
    placement: Placement,
    alpha: float = 0.6,
    interpolation: Literal["nearest", "bilinear"] = "bilinear",
) -> RGB:
    """Lay a coloured map [h, w, 3] uint8 of the model's whole input over its image [H, W, 3].

    What the model did not see of it (outside a centre crop) is left uncoloured; ``alpha`` is the
    strength of the colours, 0 to 1; ``"nearest"`` shows the map's positions as squares.
    """
    check_rgb("image", image)
    check_rgb("colours", colours)
    if image.shape[:2] != placement.original_size:
        raise ValueError(
            f"the placement is of an image of {placement.original_size} (height, width), but "
            f"image is {image.shape[:2]}; give each image its own placement"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, but is {alpha}")
    check_interpolation(interpolation, FILTERS)
    (x0, y0, x1, y1), box = _seen(placement, colours.shape[0], colours.shape[1])
    size = x1 - x0, y1 - y0
    enlarged: RGB = np.array(Image.fromarray(colours).resize(size, FILTERS[interpolation], box=box))
    out: RGB = image.copy()
    mixed = out[y0:y1, x0:x1] * (1 - alpha) + enlarged * alpha
    out[y0:y1, x0:x1] = np.rint(mixed).astype(np.uint8)
    return out


def stage_grid(
    image: RGB,
    stages: Sequence[Features],
    placement: Placement,
    captions: Sequence[str] | None = None,
    columns: int | None = None,
) -> RGB:
    """Draw an image and maps [C, h, w] of a model's stages side by side, on white paper.

    Each map is coloured for itself; a panel's longer side is 320 pixels. ``captions`` are one for
    the image and one a stage, None for their numbers and shapes; ``columns`` None is one row.
    """
    if captions is None:
        captions = ["photograph"]
        for number, stage in enumerate(stages, 1):
            captions.append(f"stage {number}: {' x '.join(str(n) for n in stage.shape)}")
    if len(captions) != 1 + len(stages):
        raise ValueError(
            f"wanted {1 + len(stages)} captions, the photograph's first; came {len(captions)}"
        )
    small = panel(image)
    if image.shape[:2] != placement.original_size:
        overlay(image, small, placement)  # says what is wrong
    of_small = dataclasses.replace(placement, original_size=small.shape[:2])
    faded: RGB = 255 - (255 - small) // 3  # what lies outside a centre crop
    panels = [small]
    for stage in stages:
        visible = None
        if len(stage.shape) == 3:
            _, box = _seen(placement, stage.shape[1], stage.shape[2])
            visible = math.ceil(box[3] - 1e-6), math.ceil(box[2] - 1e-6)
        colours = feature_rgb(stage, visible)
        panels.append(overlay(faded, colours, of_small, alpha=1.0, interpolation="nearest"))
    return _lay_out(panels, captions, columns or len(panels))


def panel(image: RGB) -> RGB:
    """Give an image [H, W, 3] uint8 the size of a panel: its longer side 320 pixels."""
    check_rgb("image", image)
    scale = PANEL / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def gallery(sections: Sequence[tuple[str, Sequence[tuple[RGB, str]]]], title: str) -> RGB:
    """Draw panels over their captions, four in a row, each section under its heading."""
    parts = [_heading(title, TITLE)]
    for heading, cells in sections:
        parts += [_heading(heading, TITLE * 3 // 4)] if heading else []
        panels = [one for one, _ in cells]
        width = max(one.shape[1] for one in panels)
        captions = [_cut(caption, width) for _, caption in cells]
        parts.append(_lay_out(panels, captions, min(4, len(cells))))
    width = max(part.shape[1] for part in parts)
    margins = [((0, 0), (0, width - part.shape[1]), (0, 0)) for part in parts]
    padded = zip(parts, margins, strict=True)
    return np.concatenate([np.pad(part, by, constant_values=PAPER[0]) for part, by in padded])


def save_png(path: str | os.PathLike[str], pixels: RGB) -> None:
    """Write an image [H, W, 3] uint8 as a PNG file, whole or not at all."""
    check_rgb("pixels", pixels)
    write_png(path, Image.fromarray(pixels))


def to_png(pixels: NDArray[Any]) -> bytes:
    """A PNG file of pixels [H, W] bool (one bit a pixel), or [H, W] or [H, W, 3] uint8."""
    data = BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def write_png(path: str | os.PathLike[str], image: Image.Image) -> None:
    """Write a PNG file as ``save_png`` does, of any of Pillow's images."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        image.save(temporary, format="PNG")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _unit(image: RGB) -> float:
    """The pixels of this image that are one of an image of 500 x 500."""
    return max(LEAST_UNIT, math.sqrt(image.shape[0] * image.shape[1]) / UNIT)


def _in_order(masks: Iterable[Bools], size: tuple[int, ...]) -> Iterable[tuple[int, Bools]]:
    """Masks, checked, with their numbers: large ones first where all are at hand."""

    def checked() -> Iterator[tuple[int, Bools]]:
        for index, mask in enumerate(masks):
            check_mask(mask, f"mask {index}")
            if mask.shape != size:
                raise ValueError(
                    f"wanted masks as large as the image, {list(size)}; mask {index} is "
                    f"{list(mask.shape)} of bool"
                )
            yield index, mask

    if not isinstance(masks, Sequence | np.ndarray):
        return checked()
    return sorted(checked(), key=lambda pair: -int(np.count_nonzero(pair[1])))  # stable


def _colour_of(colours: Sequence[Colour] | None, index: int, what: str) -> Colour:
    if colours is None:
        return colour(index)
    if index >= len(colours):
        raise ValueError(f"wanted a colour for each of the {what}; came only {len(colours)}")
    tint = colours[index]
    if len(tint) != 3 or not all(0 <= part <= 255 for part in tint):
        raise ValueError(f"colours must be (red, green, blue) of 0 to 255; came {tint}")
    return tint


def _numbers(name: str, values: ArrayLike, columns: int) -> NDArray[np.float64]:
    """Positions as [N, columns]; none at all may come in any shape."""
    numbers = np.asarray(values, np.float64)
    if numbers.size == 0:
        return numbers.reshape(0, columns)
    if numbers.ndim != 2 or numbers.shape[1] != columns:
        raise ValueError(f"{name} must be [N, {columns}]; came {list(numbers.shape)}")
    if not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite; came {numbers.tolist()}")
    return numbers


def _draw_outline(out: RGB, mask: Bools, where: tuple[slice, slice], tint: Colour) -> None:
    """Draw a smooth line along a mask's edge, but not along the image's.

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


def _components(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """Up to three principal directions of tokens [n, C], strongest first: [C, <= 3]."""
    none: NDArray[np.float64] = np.zeros((tokens.shape[1], 0))
    if not len(tokens):
        return none
    centred = tokens - tokens.mean(axis=0)
    spread = np.abs(centred).max()
    if spread <= NOISE * np.abs(tokens).max():
        return none
    centred = centred / spread  # squares must not overflow
    variances, directions = np.linalg.eigh(centred.T @ centred)
    variances, directions = variances[::-1][:3], directions[:, ::-1][:, :3]  # strongest first
    directions = directions[:, variances > NOISE**2 * variances[0]]
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=0)[None], axis=0)
    found: NDArray[np.float64] = directions * np.sign(largest)
    return found


def _seen(
    placement: Placement, h: int, w: int
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]:
    """The photograph's part that the model saw (whole pixels) and its box on an h x w map."""
    (old_h, old_w), (model_h, model_w) = placement.original_size, placement.model_size
    frame = placement.boxes_to_image([0.0, 0.0, float(model_w), float(model_h)])
    x0, y0 = max(0, round(frame[0])), max(0, round(frame[1]))
    x1, y1 = min(old_w, max(x0 + 1, round(frame[2]))), min(old_h, max(y0 + 1, round(frame[3])))
    on_model = placement.boxes_to_model([float(x0), float(y0), float(x1), float(y1)])
    scale_x, scale_y = w / model_w, h / model_h
    left, top = max(0.0, on_model[0] * scale_x), max(0.0, on_model[1] * scale_y)
    right, bottom = min(float(w), on_model[2] * scale_x), min(float(h), on_model[3] * scale_y)
    return (x0, y0, x1, y1), (left, top, right, bottom)


def _lay_out(panels: Sequence[RGB], captions: Sequence[str], columns: int) -> RGB:
    """Set panels in rows on paper, each over its caption; all take the room of the largest."""
    height, width = np.max([one.shape[:2] for one in panels], axis=0).tolist()
    font = ImageFont.load_default(size=FONT)
    lines = [line for caption in captions for line in caption.split("\n")]
    column = max(width, *(math.ceil(font.getlength(line)) for line in lines))
    text = CAPTION + (max(caption.count("\n") for caption in captions) * FONT * 5) // 4
    row, rows = GAP + height + text, -(-len(panels) // columns)
    sheet = Image.new("RGB", (GAP + columns * (column + GAP), rows * row), PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (one, caption) in enumerate(zip(panels, captions, strict=True)):
        left, top = GAP + number % columns * (column + GAP), number // columns * row + GAP
        corner = left + (column - one.shape[1]) // 2, top + (height - one.shape[0]) // 2
        sheet.paste(Image.fromarray(one), corner)
        middle = left + column / 2, top + height + text / 2
        pen.text(middle, caption, fill=INK, font=font, anchor="mm", align="center")
    return np.array(sheet)


def _heading(text: str, size: int) -> RGB:
    font = ImageFont.load_default(size=size)
    strip = Image.new("RGB", (2 * GAP + math.ceil(font.getlength(text)), 2 * size), PAPER)
    ImageDraw.Draw(strip).text((GAP, size), text, fill=INK, font=font, anchor="lm")
    return np.array(strip)


def _cut(caption: str, width: int) -> str:
    """A caption whose lines are no longer than some pixels."""
    font, lines = ImageFont.load_default(size=FONT), caption.split("\n")
    for number, line in enumerate(lines):
        while font.getlength(lines[number]) > width and len(line) > 1:
            line = line[:-1]
            lines[number] = f"{line}..."
    return "\n".join(lines)


def window(out: RGB, x0: float, y0: float, x1: float, y1: float) -> Part:
    """The rows and columns of a part of the image; none where it lies outside."""
    height, width = out.shape[:2]
    left, right = (int(min(max(x, 0), width)) for x in (math.floor(x0), math.ceil(x1)))
    top, bottom = (int(min(max(y, 0), height)) for y in (math.floor(y0), math.ceil(y1)))
    return slice(top, bottom), slice(left, right)


def bands(out: RGB, box: Sequence[float], reach: float) -> list[Part]:
    """Four parts of the image, apart from each other, that hold a box's line."""
    x0, y0, x1, y1 = box
    left, top = math.ceil(x0 + reach), math.ceil(y0 + reach)
    right, bottom = max(left, math.floor(x1 - reach)), max(top, math.floor(y1 - reach))
    x0, y0, x1, y1 = x0 - reach, y0 - reach, x1 + reach, y1 + reach
    corners = (x0, y0, x1, top), (x0, bottom, x1, y1), (x0, top, left, bottom)
    return [window(out, *part) for part in (*corners, (right, top, x1, bottom))]


def distance_to_box(where: Part, box: Sequence[float], rounding: float) -> Floats:
    """The distance of pixels to a box's line, negative within; its corners are rounded."""
    x0, y0, x1, y1 = box
    corner = min(rounding, (x1 - x0) / 2, (y1 - y0) / 2)
    down, across = (np.arange(part.start, part.stop) + 0.5 for part in where)
    beside = np.abs(across - (x0 + x1) / 2) - (x1 - x0) / 2 + corner
    above = np.abs(down[:, None] - (y0 + y1) / 2) - (y1 - y0) / 2 + corner
    outside = np.hypot(np.maximum(beside, 0), np.maximum(above, 0))
    return np.asarray(outside + np.minimum(np.maximum(beside, above), 0) - corner, np.float32)


def within(distance: Floats, radius: float) -> Floats:
    """How much of each pixel lies nearer than the radius, 0 to 1."""
    cover: Floats = np.clip(radius + 0.5 - distance, 0, 1).astype(np.float32)
    return cover


def paint(part: RGB, tint: Colour, cover: Floats) -> None:
    """Mix a colour into a part of the image, in place; cover [rows, columns] is 0 to 1."""
    step = max(1, BLOCK // max(1, part.shape[1]))
    for start in range(0, part.shape[0], step):
        block, strength = part[start : start + step], cover[start : start + step]
        touched = strength > 0
        old = block[touched].astype(np.float32)
        mixed = old + (np.asarray(tint, np.float32) - old) * strength[touched][:, None]
        block[touched] = np.rint(mixed).astype(np.uint8)
