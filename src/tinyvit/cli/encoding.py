"""The work behind ``tinyvit encode``: pictures -> engine -> files, one outcome for each picture.

A picture that cannot be read, or whose features cannot be had, is an outcome with a reason; a disk
that takes no more stops the work. Knows no command line.
"""

from __future__ import annotations

import errno
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from tinyvit.cli import feature_files
from tinyvit.cli.feature_files import Found
from tinyvit.cli.picture_files import PictureFile
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor
from tinyvit.inference import Encoded, Engine
from tinyvit.inference.read_ahead import read_ahead

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from tinyvit.image_spec import Placement
    from tinyvit.modules import TinyViT

__all__ = ["Job", "Outcome", "recipe"]

Input: TypeAlias = "tuple[Tensor, Placement]"
"""A picture [3, H, W] float32 as the model wants it, and where it lies in it."""


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
    """A picture that is to be encoded; once read, with a small photograph if one is to be drawn."""

    picture: PictureFile
    target: Path
    facts: Mapping[str, object]
    found: Found
    photograph: NDArray[np.uint8] | None = None


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
        """Encode the pictures: first those named with which nothing is to be done, then the rest.

        Reading, the model and writing go on at the same time, for pictures that follow each other.

        Args:
            pictures: From ``list_pictures``.

        Yields:
            One outcome for each picture.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """
        wanted: list[PictureFile] = []
        for picture in pictures:
            outcome = self._look(picture)
            if isinstance(outcome, Outcome):
                yield outcome
            else:
                wanted.append(picture)
        workers = self.engine.workers
        with closing(self._writings(wanted)) as writings:
            yield from read_ahead(writings, workers=workers, ahead=workers + 1)

    def _look(self, picture: PictureFile) -> _Task | Outcome:
        """What is to be done for a picture, or why nothing is."""
        target = self.folder / f"{picture.stem}.safetensors"
        try:
            facts = {**self.recipe, **feature_files.facts_of_picture(picture.path, picture.name)}
            found = feature_files.look(target, facts, self.with_drawings)
        except OSError as err:
            return Outcome(picture, "failed", f"{picture.path}: {err.strerror or err}")
        if not self.overwrite and found.state == "current":
            drawing = None if found.drawing is None else target.with_name(found.drawing)
            return Outcome(picture, "skipped", "", target, drawing)
        if not self.overwrite and found.state == "foreign":
            reason = f"{found.reason}; choose another folder, or --overwrite to replace it"
            return Outcome(picture, "failed", reason)
        return _Task(picture, target, facts, found)

    def _read(self, picture: PictureFile) -> tuple[_Task, Input] | Outcome:
        """A picture ready for the model, or why it is not; done in a thread of its own.

        Its facts are asked for again: it may have changed while others were encoded.
        """
        task = self._look(picture)
        if isinstance(task, Outcome):
            return task
        try:
            image = decode(picture.path)
        except ImageError as err:
            return Outcome(picture, "failed", str(err))
        photograph = draw.panel(image) if self.with_drawings else None
        return replace(task, photograph=photograph), to_tensor(image, self.engine.image_spec)

    def _writings(
        self, pictures: Sequence[PictureFile]
    ) -> Generator[Callable[[], Outcome], None, None]:
        """What is left to do for each picture once the model has seen it, in order."""
        read: deque[_Task | Outcome] = deque()

        def inputs() -> Generator[Input, None, None]:
            jobs = (partial(self._read, picture) for picture in pictures)
            readings = read_ahead(jobs, workers=self.engine.workers, ahead=self.engine.ahead)
            with closing(readings):
                for reading in readings:
                    if isinstance(reading, Outcome):
                        read.append(reading)
                    else:
                        task, prepared = reading
                        read.append(task)
                        yield prepared

        with closing(inputs()) as prepared:
            for encoded in self.engine.stream_prepared(prepared, stages=self.with_drawings):
                while isinstance(item := read.popleft(), Outcome):
                    yield partial(_same, item)
                yield partial(self._write, item, encoded)
        for item in read:
            if isinstance(item, Outcome):
                yield partial(_same, item)

    def _write(self, task: _Task, encoded: Encoded) -> Outcome:
        features = encoded.features
        if not features.isfinite().all():
            reason = "its features are not all finite numbers; try --precision fp32"
            reason = f"{task.picture.path}: {reason}"
            return Outcome(task.picture, "failed", reason)
        drawing = None
        if task.photograph is not None and encoded.stages is not None:
            drawing = feature_files.draw_features(
                task.photograph, encoded.stages, features, encoded.placement
            )
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
        "precision": getattr(backend, "precision", "fp32"),
        "device": backend.device,
        "tinyvit_version": version("tinyvit"),
    }
    plain: dict[str, object] = json.loads(json.dumps(facts))
    return plain


def _same(outcome: Outcome) -> Outcome:
    return outcome


def _errno(err: BaseException) -> int | None:
    """The operating system's number behind an error."""
    source = err.__cause__ if isinstance(err, CheckpointError) else err
    return source.errno if isinstance(source, OSError) else None
