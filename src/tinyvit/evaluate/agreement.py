"""How far two models, or one model on two backends, agree on a folder of images.

Embeddings are compared by the cosine of each grid cell, masks by the IoU of the predictions for a
grid of clicks, each side's own best mask; and each side's time is taken. There is no ground truth
here: two models may agree and both be wrong.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tinyvit.errors import ImageError
from tinyvit.images.decode import ImageSource, decode
from tinyvit.sam.predictor import SamPredictor

from .metrics import as_json, iou
from .segment import Timed


@dataclass(frozen=True)
class ImageAgreement:
    """One image."""

    image: str  # what it is called
    # (mean, least) cosine over the embedding's cells that show the image; None where the two
    # embeddings have different shapes
    cosines: tuple[float, float] | None
    ious: tuple[float, ...]  # IoU of the two masks for each click


@dataclass(frozen=True)
class Agreement:
    """How far two models agree."""

    names: tuple[str, str]  # what was compared
    images: tuple[ImageAgreement, ...]  # each image
    skipped: tuple[str, ...]  # images that could not be read, and why
    mean_cosine: float | None  # mean over the images; None where embeddings have different shapes
    least_cosine: float | None  # the least of all cells of all images
    mean_iou: float  # mean over all clicks
    least_iou: float  # the least of all clicks
    encode_seconds: tuple[float, float]  # median time of each to encode an image
    prompt_seconds: tuple[float, float]  # median time of each to predict for a click

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(as_json(self), indent=2, ensure_ascii=False)

    def rows(self) -> list[tuple[str, str, str]]:
        """Lines of a table: the metric and its two numbers."""
        rows = [("", "mean", "least")]
        if self.mean_cosine is not None and self.least_cosine is not None:
            rows.append(("cosine", f"{self.mean_cosine:.6f}", f"{self.least_cosine:.6f}"))
        rows.append(("mask IoU", f"{self.mean_iou:.4f}", f"{self.least_iou:.4f}"))
        clicks = sum(len(image.ious) for image in self.images)
        rows.append(("clicks, each side's best mask", str(clicks), ""))
        rows.append(("", *self.names))
        steps = {"encode an image": self.encode_seconds, "predict for a click": self.prompt_seconds}
        for words, (first, second) in steps.items():
            rows.append((words, f"{1000 * first:.1f} ms", f"{1000 * second:.1f} ms"))
        return rows


def compare(
    first: SamPredictor,
    second: SamPredictor,
    images: Iterable[ImageSource],
    *,
    names: tuple[str, str] = ("first", "second"),
    grid: int = 4,
) -> Agreement:
    """Compare two models on the same images, by ``grid`` clicks along each side of an image.

    Unreadable images are skipped and named; ``names`` is what to call the two.
    """
    if grid < 1:
        raise ValueError(f"grid must be at least 1 click along a side, but is {grid}")
    sides = Timed(first), Timed(second)
    found: list[ImageAgreement] = []
    skipped: list[str] = []
    for number, source in enumerate(images):
        is_path = isinstance(source, (str, bytes)) or hasattr(source, "__fspath__")
        name = str(source) if is_path else f"image {number}"
        try:
            image = decode(source)
        except ImageError as err:
            skipped.append(str(err))
            continue
        for side in sides:
            side.encode(image)
        height, width = image.shape[:2]
        clicks = [
            ((column + 0.5) * width / grid, (row + 0.5) * height / grid)
            for row in range(grid)
            for column in range(grid)
        ]
        ious = tuple(iou(*(side.predict([click], [1]).mask for side in sides)) for click in clicks)
        found.append(ImageAgreement(name, _cosines(first, second), ious))
    if not found:
        reasons = f": {'; '.join(skipped[:5])}" if skipped else ""
        raise ValueError(f"no image could be compared{reasons}")
    cosines = [one.cosines for one in found if one.cosines is not None]
    every = [value for one in found for value in one.ious]
    encode_seconds, prompt_seconds = zip(*(side.medians() for side in sides), strict=True)
    return Agreement(
        names=names,
        images=tuple(found),
        skipped=tuple(skipped),
        mean_cosine=statistics.fmean(mean for mean, _ in cosines) if cosines else None,
        least_cosine=min(least for _, least in cosines) if cosines else None,
        mean_iou=statistics.fmean(every),
        least_iou=min(every),
        encode_seconds=encode_seconds,
        prompt_seconds=prompt_seconds,
    )


def _cosines(first: SamPredictor, second: SamPredictor) -> tuple[float, float] | None:
    """(mean, least) over the cells that show the image."""
    features = [side.get_image_embedding()[0].float().cpu() for side in (first, second)]
    if features[0].shape != features[1].shape:
        return None
    _, *grid = features[0].shape
    shown = first.embedding.placement.cells((grid[0], grid[1]))
    parts = [one[:, : shown[0], : shown[1]].flatten(1).to(torch.float64) for one in features]
    cosine = F.cosine_similarity(parts[0], parts[1], dim=0)
    return float(cosine.mean()), float(cosine.min())
