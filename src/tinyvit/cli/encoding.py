"""The work behind ``tinyvit encode``: pictures -> engine -> files, one outcome for each picture.

A picture that cannot be read, or whose features cannot be had, is an outcome with a reason; a disk
that takes no more stops the work. Knows no command line.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tinyvit.cli import feature_files
from tinyvit.cli.feature_files import Found
from tinyvit.cli.picture_files import PictureFile
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.images.decode import decode
from tinyvit.inference import Encoded, Engine, TorchBackend

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvit.modules import TinyViT

__all__ = ["Job", "Outcome", "recipe"]


@dataclass(frozen=True)
class Outcome:
    """What became of one picture.

    Attributes:
        picture: The picture.
        state: ``"written"``, ``"skipped"`` (there already) or ``"failed"``.
        reason: Why it failed, with the file's name; or what the files were that it replaced.
        features: The safetensors file.
        drawing: The picture of the features, or None.
        shape: Shape of the features, (C, h, w); None unless written.
    """

    picture: PictureFile
    state: Literal["written", "skipped", "failed"]
    reason: str = ""
    features: Path | None = None
    drawing: Path | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Task:
    """A picture that has been read and is to be encoded."""

    picture: PictureFile
    target: Path
    image: NDArray[np.uint8]
    facts: Mapping[str, object]
    found: Found


@dataclass(frozen=True)
class Job:
    """How pictures are encoded and where to.

    Attributes:
        engine: Runs the model.
        folder: Where the files go.
        recipe: What their headers say about the model, from ``recipe``.
        with_drawings: Whether to draw the features.
        overwrite: Whether to make everything anew, and to replace files that are not ours.
    """

    engine: Engine
    folder: Path
    recipe: Mapping[str, object]
    with_drawings: bool = True
    overwrite: bool = False

    def run(self, pictures: Sequence[PictureFile]) -> Iterator[Outcome]:
        """Encode the pictures, a batch at a time.

        Args:
            pictures: From ``list_pictures``.

        Yields:
            One outcome for each picture.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """
        batch: list[_Task] = []
        for picture in pictures:
            task = self._read(picture)
            if isinstance(task, Outcome):
                yield task
                continue
            batch.append(task)
            if len(batch) == self.engine.batch_size:
                yield from self._encode(batch)
                batch = []
        yield from self._encode(batch)

    def _read(self, picture: PictureFile) -> _Task | Outcome:
        """What is to be done for a picture, or why nothing is."""
        target = self.folder / f"{picture.stem}.safetensors"
        try:
            facts = {**self.recipe, **feature_files.facts_of_picture(picture.path, picture.name)}
            found = feature_files.look(target, facts, self.with_drawings)
            if not self.overwrite and found.state == "current":
                drawing = None if found.drawing is None else target.with_name(found.drawing)
                return Outcome(picture, "skipped", "", target, drawing)
            if not self.overwrite and found.state == "foreign":
                reason = f"{found.reason}; choose another folder, or --overwrite to replace it"
                return Outcome(picture, "failed", reason)
            return _Task(picture, target, decode(picture.path), facts, found)
        except ImageError as err:
            return Outcome(picture, "failed", str(err))
        except OSError as err:
            return Outcome(picture, "failed", f"{picture.path}: {err.strerror or err}")

    def _encode(self, batch: Sequence[_Task]) -> Iterator[Outcome]:
        if not batch:
            return
        images = [task.image for task in batch]
        for task, encoded in zip(batch, self.engine.stream(images), strict=True):
            yield self._write(task, encoded)

    def _write(self, task: _Task, encoded: Encoded) -> Outcome:
        features = encoded.features
        if not features.isfinite().all():
            reason = "its features are not all finite numbers; try --precision fp32"
            reason = f"{task.picture.path}: {reason}"
            return Outcome(task.picture, "failed", reason)
        drawing = None
        if self.with_drawings:
            stages, placement = self.engine.stages(task.image)
            drawing = feature_files.draw_features(task.image, stages, features, placement)
        facts = {**task.facts, **asdict(encoded.placement)}
        try:
            feature_files.write(task.target, features, facts, drawing)
        except (CheckpointError, OSError) as err:
            if _errno(err) != errno.ENAMETOOLONG:
                raise
            reason = f"{task.picture.path}: its outputs have too long a name: {err}"
            return Outcome(task.picture, "failed", reason)
        if drawing is None:
            feature_files.remove_drawing(task.target, task.found)
        return Outcome(
            task.picture,
            "written",
            task.found.reason if task.found.state == "outdated" else "",
            task.target,
            None if drawing is None else feature_files.drawing_of(task.target),
            tuple(features.shape),
        )


def recipe(
    engine: Engine, model: TinyViT, checkpoint: str, variant: str | None
) -> dict[str, object]:
    """What the headers say about the model; plain data that JSON gives back unchanged."""
    backend = engine.backend
    facts = {
        "checkpoint": checkpoint,
        "variant": variant,
        "strides": model.strides,
        "weights_sha256": engine.weights_sha256(),
        "image_spec": engine.image_spec.to_dict(),
        "precision": backend.precision if isinstance(backend, TorchBackend) else "fp32",
        "device": backend.device,
        "tinyvit_version": version("tinyvit"),
    }
    plain: dict[str, object] = json.loads(json.dumps(facts))
    return plain


def _errno(err: BaseException) -> int | None:
    """The operating system's number behind an error."""
    source = err.__cause__ if isinstance(err, CheckpointError) else err
    return source.errno if isinstance(source, OSError) else None
