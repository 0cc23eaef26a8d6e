"""``tinyvit encode`` without its command line: features of images as files.

``STEM.safetensors`` has the tensor ``features`` [C, h, w] float32 and, in its header, how it came
about. ``STEM.png`` shows the map of each stage and the features beside the photograph.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from tinyvit.checkpoints.files import write_bytes
from tinyvit.images import draw
from tinyvit.images.decode import MAX_PIXELS, decode
from tinyvit.images.preprocess import to_input
from tinyvit.inference.backend import StageBackend

from .images import Item
from .runner import FolderWork, Job, facts_of_image, find_existing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tinyvit.inference import Encoded, Engine

COLUMNS = 3  # of panels in an image of features


class EncodeFolder(FolderWork["Encoded"]):
    """How images are encoded and where to; ``facts`` are of ``facts_of_engine``.

    Facts of an outcome: features, drawing, shape.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        facts: Mapping[str, object],
        with_drawings: bool = True,
        overwrite: bool = False,
        max_pixels: int | None = MAX_PIXELS,
    ) -> None:
        super().__init__(engine, folder, overwrite, max_pixels)
        self.facts, self.with_drawings = facts, with_drawings

    def _plan(self, item: Item) -> Job:
        target = self.folder / f"{item.stem}.safetensors"
        drawing = target.with_suffix(".png")
        facts = {**self.facts, **facts_of_image(item)}
        beside = [drawing] if self.with_drawings else []
        found = find_existing(target, beside, facts, "without an image of the features")
        has_drawing = self.with_drawings or drawing in found.own
        told = {"features": str(target), "drawing": str(drawing) if has_drawing else None}
        return Job(item, facts, found, told, (target, *beside))

    def _read(self, job: Job) -> None:
        rgb = decode(job.item.path, max_pixels=self.max_pixels)
        job.image = draw.panel(rgb) if self.with_drawings else None
        job.prepared = to_input(rgb, self.engine.image_spec)

    def _compute(self, jobs: Iterator[Job]) -> Generator[Encoded | Job, None, None]:
        has_stages = isinstance(self.engine.backend, StageBackend)
        encode = partial(self.engine.encode, stages=self.with_drawings and has_stages)
        yield from (encoded for _, encoded in self._encoded(jobs, encode))

    def _write(self, job: Job, encoded: Encoded) -> dict[str, object]:
        target = self.folder / f"{job.item.stem}.safetensors"
        drawing = target.with_suffix(".png")
        name = drawing.name if job.image is not None else None
        # first, since it names the drawing: a PNG of the user's own is never taken for one of ours
        facts = {**job.facts, **asdict(encoded.placement), "drawing": name}
        write_features(target, encoded.features, facts)
        if job.image is not None:
            draw.save_png(drawing, draw_features(job.image, encoded))
        elif drawing in job.existing.own:
            drawing.unlink(missing_ok=True)
        drawn = None if name is None else str(drawing)
        return {"drawing": drawn, "shape": list(encoded.features.shape)}


def write_features(target: Path, features: Any, facts: Mapping[str, object]) -> None:
    """Write features [C, h, w] float32 with facts as JSON in the header, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    header = {key: json.dumps(value) for key, value in facts.items()}
    arrays = {"features": np.ascontiguousarray(features)}
    write_bytes(target, safetensors.numpy.save(arrays, metadata=header))


def draw_features(image: NDArray[np.uint8], encoded: Encoded) -> NDArray[np.uint8]:
    """The photograph [H, W, 3] uint8, the map of each stage, and the features, in rows of three.

    A backend without stages has the features alone. Features that are the last map are drawn once.
    """
    maps = [np.asarray(stage) for stage in encoded.stages or ()]
    features = np.asarray(encoded.features)
    captions = ["photograph", *(f"stage {n}: {_shape(stage)}" for n, stage in enumerate(maps, 1))]
    if not maps or not np.array_equal(features, maps[-1]):
        maps.append(features)
        captions.append(f"features: {_shape(features)}")
    placement = replace(encoded.placement, original_size=image.shape[:2])
    return draw.stage_grid(image, maps, placement, captions, COLUMNS)


def _shape(features: NDArray[np.generic]) -> str:
    return " x ".join(map(str, features.shape))
