"""Feature maps as pictures: colours for a map, colours over a photograph, a row of stages.

A map covers the model's whole input, padding included; a ``Placement`` says which part of it the
photograph is. Colours are the map's three strongest principal components, so they mean "alike" and
"different" within one map and nothing across maps. No model is known here, and the only file ever
written is the PNG of ``save_png``.

Letters: H, W photograph; h, w map; C channels.
"""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from tinyvit.image_spec import Placement

__all__ = [
    "check_rgb",
    "feature_picture",
    "feature_rgb",
    "overlay",
    "panel",
    "save_png",
    "stage_grid",
    "write_png",
]

RGB = NDArray[np.uint8]

GREY = 128  # where a map does not vary
DARK, BRIGHT = 20, 240  # the ends of the scale; full 0..255 is glaring
NOISE = 1e-6  # float32 rounding: variation below this part of the values is none
LOW, HIGH = 0.01, 0.99  # the quantiles that become darkest and brightest
MOST_FITTED = 100_000  # cells; a larger map is fitted to every second, third, ... cell
PANEL, GAP, CAPTION, FONT = 320, 16, 32, 15  # pixels: a panel's longer side, margins, text
PAPER, INK = (255, 255, 255), (40, 44, 52)
FILTERS = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}


def feature_rgb(features: torch.Tensor, visible: tuple[int, int] | None = None) -> RGB:
    """Colour a feature map by its first three principal components.

    The same map always gives the same colours: each component's largest weight is made positive.

    Args:
        features: [C, h, w] of any real type, on any device. Cells with a value that is not finite
            are left out and drawn black.
        visible: (rows, columns) at the top left that hold the photograph; components and scale are
            fitted to these cells alone, so that padding does not spend the colours. None: all.

    Returns:
        [h, w, 3] uint8; grey where the map does not vary.

    Raises:
        ValueError: The shape is another one, or ``visible`` does not lie within the map.
    """
    if features.ndim != 3 or not features.numel():
        raise ValueError(f"wanted one feature map [C, h, w]; came {list(features.shape)}")
    channels, h, w = features.shape
    rows, columns = (h, w) if visible is None else visible
    if not (1 <= rows <= h and 1 <= columns <= w):
        raise ValueError(f"visible must lie within the {h} x {w} map, but is {visible}")
    cells = features.detach().to("cpu", torch.float64).reshape(channels, -1).T  # [h*w, C]
    is_good = cells.isfinite().all(dim=1)  # [h*w]
    is_fitted = torch.zeros(h, w, dtype=torch.bool)
    is_fitted[:rows, :columns] = True
    fitted = cells[is_fitted.reshape(-1) & is_good]  # [n, C]
    colours = torch.full((h * w, 3), GREY / 255, dtype=torch.float64)
    fitted = fitted[:: 1 + len(fitted) // MOST_FITTED]
    components = _components(fitted)  # [C, up to 3]
    if components.shape[1]:
        ends = torch.tensor([LOW, HIGH], dtype=torch.float64)
        low, high = torch.quantile(fitted @ components, ends, dim=0)
        scaled = ((cells[is_good] @ components - low) / (high - low).clamp_min(1e-300)).clamp(0, 1)
        scaled = (DARK + (BRIGHT - DARK) * scaled) / 255
        colours[is_good, : components.shape[1]] = torch.where(high > low, scaled, GREY / 255)
    colours[~is_good] = 0
    pixels = (colours * 255).round().to(torch.uint8).reshape(h, w, 3)
    return np.asarray(pixels, dtype=np.uint8)


def overlay(
    image: RGB,
    colours: RGB,
    placement: Placement,
    alpha: float = 0.6,
    interpolation: Literal["nearest", "bilinear"] = "bilinear",
) -> RGB:
    """Lay a coloured map over its photograph.

    Args:
        image: The photograph, [H, W, 3] uint8.
        colours: [h, w, 3] uint8, covering the model's whole input.
        placement: Where the photograph lies in that input.
        alpha: Strength of the colours, 0 (photograph only) to 1 (colours only).
        interpolation: How the map is enlarged; ``"nearest"`` shows its cells.

    Returns:
        [H, W, 3] uint8. What the model did not see (outside a centre crop) is left uncoloured.

    Raises:
        ValueError: A shape, type or ``alpha`` is wrong, or the placement is another picture's.
    """
    check_rgb("image", image)
    check_rgb("colours", colours)
    if image.shape[:2] != placement.original_size:
        raise ValueError(
            f"the placement is of a picture of {placement.original_size} (height, width), but "
            f"image is {image.shape[:2]}; give each picture its own placement"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, but is {alpha}")
    if interpolation not in FILTERS:
        raise ValueError(
            f"interpolation must be one of {', '.join(FILTERS)}, but is {interpolation!r}"
        )
    (x0, y0, x1, y1), box = _seen(placement, colours.shape[0], colours.shape[1])
    size = x1 - x0, y1 - y0
    enlarged: RGB = np.array(Image.fromarray(colours).resize(size, FILTERS[interpolation], box=box))
    out: RGB = image.copy()
    mixed = out[y0:y1, x0:x1] * (1 - alpha) + enlarged * alpha
    out[y0:y1, x0:x1] = np.rint(mixed).astype(np.uint8)
    return out


def feature_picture(
    image: RGB, features: torch.Tensor, placement: Placement, alpha: float = 0.6
) -> RGB:
    """Draw a feature map [C, h, w] over its photograph [H, W, 3] uint8.

    Raises:
        ValueError: As ``feature_rgb`` and ``overlay``.
    """
    return overlay(image, _coloured(features, placement), placement, alpha)


def stage_grid(
    image: RGB,
    stages: Sequence[torch.Tensor],
    placement: Placement,
    captions: Sequence[str] | None = None,
) -> RGB:
    """Draw a photograph and the feature maps of a model's stages side by side, with captions.

    Args:
        image: The photograph, [H, W, 3] uint8.
        stages: Feature maps, each [C, h, w]; each is coloured for itself.
        placement: Where the photograph lies in the model's input.
        captions: One for the photograph and one a stage. None: the number and shape of each stage.

    Returns:
        One row of panels, uint8 RGB; a panel's longer side is 320 pixels.

    Raises:
        ValueError: The number of captions is wrong; else as ``feature_rgb`` and ``overlay``.
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
    height, width = small.shape[:2]
    if image.shape[:2] != placement.original_size:
        overlay(image, small, placement)  # says what is wrong
    of_small = dataclasses.replace(placement, original_size=(height, width))
    faded: RGB = 255 - (255 - small) // 3  # what lies outside a centre crop
    panels = [small]
    for stage in stages:
        colours = _coloured(stage, placement)
        panels.append(overlay(faded, colours, of_small, alpha=1.0, interpolation="nearest"))
    return _row(panels, captions)


def panel(image: RGB) -> RGB:
    """Give a photograph [H, W, 3] uint8 the size of a panel: its longer side 320 pixels.

    Raises:
        ValueError: ``image`` has another shape or type.
    """
    check_rgb("image", image)
    scale = PANEL / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def save_png(path: str | os.PathLike[str], pixels: RGB) -> None:
    """Write a PNG file whole or not at all: a temporary file beside it is renamed at the end.

    Args:
        path: The file; one that exists is replaced.
        pixels: [H, W, 3] uint8.

    Raises:
        ValueError: ``pixels`` has another shape or type.
        OSError: The folder is missing or cannot be written to.
    """
    check_rgb("pixels", pixels)
    write_png(path, Image.fromarray(pixels))


def write_png(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a PNG file as ``save_png`` does, of any of Pillow's pictures.

    Raises:
        OSError: The folder is missing or cannot be written to.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        picture.save(temporary, format="PNG")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def check_rgb(name: str, pixels: RGB) -> None:
    """Say what is wrong with pixels that are not a picture [H, W, 3] uint8.

    Raises:
        ValueError: The shape or type is another one, or there are no pixels.
    """
    is_array = isinstance(pixels, np.ndarray)
    good = is_array and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    if not good or pixels.size == 0:
        came = f"{list(pixels.shape)} {pixels.dtype}" if is_array else type(pixels).__name__
        raise ValueError(f"{name} must be a picture [H, W, 3] uint8; came {came}")


def _components(cells: torch.Tensor) -> torch.Tensor:
    """Give up to three principal directions of cells [n, C], strongest first: [C, <= 3]."""
    if not len(cells):
        return cells.T[:, :0]
    centred = cells - cells.mean(dim=0)
    spread = centred.abs().max()
    if spread <= NOISE * cells.abs().max():
        return cells.T[:, :0]
    centred = centred / spread  # squares must not overflow
    solved: tuple[torch.Tensor, torch.Tensor] = torch.linalg.eigh(centred.T @ centred)
    variances, directions = (part.flip(-1)[..., :3] for part in solved)  # strongest first
    directions = directions[:, variances > NOISE**2 * variances[0]]
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * largest.sign()


def _coloured(features: torch.Tensor, placement: Placement) -> RGB:
    """Colour a map, fitted to the cells that hold the photograph."""
    if features.ndim != 3:
        return feature_rgb(features)  # says what is wrong
    _, box = _seen(placement, features.shape[1], features.shape[2])
    return feature_rgb(features, visible=(math.ceil(box[3] - 1e-6), math.ceil(box[2] - 1e-6)))


def _seen(
    placement: Placement, h: int, w: int
) -> tuple[tuple[int, int, int, int], tuple[float, float, float, float]]:
    """Give the photograph's part that the model saw (whole pixels) and its box on an h x w map."""
    (old_h, old_w), (model_h, model_w) = placement.original_size, placement.model_size
    frame = placement.boxes_to_picture([0.0, 0.0, float(model_w), float(model_h)])
    x0, y0 = max(0, round(frame[0])), max(0, round(frame[1]))
    x1, y1 = min(old_w, max(x0 + 1, round(frame[2]))), min(old_h, max(y0 + 1, round(frame[3])))
    on_model = placement.boxes_to_model([float(x0), float(y0), float(x1), float(y1)])
    scale_x, scale_y = w / model_w, h / model_h
    left, top = max(0.0, on_model[0] * scale_x), max(0.0, on_model[1] * scale_y)
    right, bottom = min(float(w), on_model[2] * scale_x), min(float(h), on_model[3] * scale_y)
    return (x0, y0, x1, y1), (left, top, right, bottom)


def _row(panels: Sequence[RGB], captions: Sequence[str]) -> RGB:
    """Set panels of one size side by side on paper, each over its caption."""
    height, width = panels[0].shape[:2]
    font = ImageFont.load_default(size=FONT)
    column = max(width, *(math.ceil(font.getlength(caption)) for caption in captions))
    size = GAP + len(panels) * (column + GAP), GAP + height + CAPTION
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, (panel, caption) in enumerate(zip(panels, captions, strict=True)):
        left = GAP + number * (column + GAP)
        sheet.paste(Image.fromarray(panel), (left + (column - width) // 2, GAP))
        middle = left + column / 2, GAP + height + CAPTION / 2
        pen.text(middle, caption, fill=INK, font=font, anchor="mm")
    return np.array(sheet)
