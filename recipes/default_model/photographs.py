"""Background photographs: opened, and as they are with regions of them as masks (``regions.py``).

A person who clicks into a photograph means a thing, but the things of composites are all pasted.
Regions follow the edges that real light made. Letters: N regions, H W the image.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from changes import as_a_camera, crop, recoloured

__all__ = ["draw_regions", "open_photograph"]

RGB = NDArray[np.uint8]

_LONGEST = 640
_LEAST, _LARGEST = 0.004, 0.6  # shares of the image
_FILL = 0.25  # share of its box that a region fills: what is thinner is no shape but an outline
_MOST = 12


def draw_regions(
    photograph: Path, regions: Path, size: tuple[int, int], rng: np.random.Generator
) -> tuple[RGB, NDArray[np.bool_]] | None:
    """A part of a photograph and the regions of one stage in it.

    Args:
        photograph: The background.
        regions: Its regions.
        size: (width, height) of the result in pixels.
        rng: The only source of chance.

    Returns:
        (RGB [H, W, 3] uint8, masks [N, H, W] bool with N >= 1); None if no region there is
        neither too small, too large nor too thin.
    """
    image = open_photograph(photograph)
    stages = _stages(regions, image.size)
    stage = stages[int(rng.integers(len(stages)))]
    seed = int(rng.integers(2**62))  # the same part of both
    part = crop(image, size, np.random.default_rng(seed))
    labels = np.asarray(crop(stage, size, np.random.default_rng(seed), Image.Resampling.NEAREST))
    masks = [mask for number in np.unique(labels) if number and _is_shape(mask := labels == number)]
    if not masks:
        return None
    order = rng.permutation(len(masks))[:_MOST]
    return as_a_camera(recoloured(part, 0.25, rng), rng), np.stack([masks[i] for i in order])


def _is_shape(mask: NDArray[np.bool_]) -> bool:
    if not _LEAST * mask.size <= mask.sum() <= _LARGEST * mask.size:
        return False
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return bool(mask.sum() >= _FILL * box)


@lru_cache(maxsize=256)
def open_photograph(path: Path) -> Image.Image:
    """A background, RGB, longest side at most 640 pixels; kept in memory, not to be changed."""
    with Image.open(path) as file:
        file.draft("RGB", (_LONGEST, _LONGEST))
        image: Image.Image = file.convert("RGB")
    image.thumbnail((_LONGEST, _LONGEST), Image.Resampling.BILINEAR)
    return image


@lru_cache(maxsize=256)
def _stages(path: Path, size: tuple[int, int]) -> tuple[Image.Image, ...]:
    """Each stage of a photograph's regions, at the photograph's size."""
    with Image.open(path) as image:
        scaled = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    stages: tuple[Image.Image, ...] = scaled.split()
    return stages
