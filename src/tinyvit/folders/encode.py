"""The files that ``tinyvit encode`` writes for one image, and whether those there still hold.

``STEM.safetensors`` has the tensor ``features`` [C, h, w] float32 and, in its header, how it came
about; each text there is JSON. ``STEM.png`` shows the features beside the photograph. The first is
written first and names the second, so that a PNG of the user's own is never taken for one of ours.

Knows no model and no folder; C channels, h w of the map.
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

import numpy as np
from safetensors import SafetensorError, safe_open

from tinyvit.checkpoints import write_state_dict
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_tensor
from tinyvit.inference import Encoded, Engine
from tinyvit.inference.read_ahead import read_ahead

from .images import ImageFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from tinyvit.image_spec import Placement
    from tinyvit.modules import TinyViT

COLUMNS = 3  # of panels in an image of features

_DECIDE = {  # fact in the header -> what another value means
    "weights_sha256": "made by another model",
    "strides": "made with other strides",
    "image_spec": "made with another preparation of images",
    "precision": "made in another precision",
    "picture": "made of another image",
    "picture_bytes": "made of an image that has changed since",
    "picture_mtime_ns": "made of an image that has changed since",
}
_MARK = "tinyvit_version"


@dataclass(frozen=True)
class Found:
    """What is where an output is to be.

    Attributes:
        state: ``"nothing"``; ``"current"``: what would be written now; ``"outdated"``: ours, but
            made otherwise; ``"foreign"``: not ours.
        reason: What makes it outdated or foreign, in words.
        drawing: Name of our image of the features beside it, or None.
    """

    state: Literal["nothing", "current", "outdated", "foreign"]
    reason: str = ""
    drawing: str | None = None


def facts_of_image(path: Path, name: str) -> dict[str, object]:
    """What tells whether an image is still the one that was encoded.

    Raises:
        OSError: The file is gone.
    """
    state = path.stat()
    return {"picture": name, "picture_bytes": state.st_size, "picture_mtime_ns": state.st_mtime_ns}


def drawing_of(target: Path) -> Path:
    """Where the drawing for a safetensors file goes."""
    return target.with_suffix(".png")


def look(target: Path, facts: Mapping[str, object], with_drawing: bool) -> Found:
    """Say what is there already.

    Args:
        target: The safetensors file; the drawing is beside it.
        facts: What the header would say now.
        with_drawing: Whether a drawing is wanted.

    Returns:
        The answer.
    """
    drawing = drawing_of(target)
    if not target.exists():
        if with_drawing and drawing.exists():
            return Found("foreign", f"{drawing} is there already and was not made by this command")
        return Found("nothing")
    header = _header(target)
    if header is None:
        return Found("foreign", f"{target} is there already and was not made by this command")
    own = drawing.name if header.get("drawing") == drawing.name else None
    if with_drawing and own is None and drawing.exists():
        return Found("foreign", f"{drawing} is there already and was not made by this command")
    for fact, meaning in _DECIDE.items():
        if header.get(fact) != facts[fact]:
            return Found("outdated", meaning, own)
    if with_drawing and not (own and drawing.exists()):
        return Found("outdated", "without an image of the features", own)
    return Found("current", "", own)


def write(
    target: Path,
    features: Tensor,
    facts: Mapping[str, object],
    drawing: NDArray[np.uint8] | None = None,
) -> None:
    """Write the features, and the drawing if there is one; each whole or not at all.

    Args:
        target: The safetensors file, in a folder that is made if need be.
        features: [C, h, w] float32.
        facts: For the header.
        drawing: [H, W, 3] uint8.

    Raises:
        CheckpointError: The features cannot be written.
        OSError: The folder cannot be made, or the drawing cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    name = None if drawing is None else drawing_of(target).name
    header = {key: json.dumps(value) for key, value in {**facts, "drawing": name}.items()}
    write_state_dict(target, {"features": features}, metadata=header)
    if drawing is not None:
        draw.save_png(drawing_of(target), drawing)


def remove_drawing(target: Path, found: Found) -> None:
    """Remove our drawing of features that are no longer there."""
    if found.drawing is not None:
        target.with_name(found.drawing).unlink(missing_ok=True)


def draw_features(
    image: NDArray[np.uint8], stages: Sequence[Tensor], features: Tensor, placement: Placement
) -> NDArray[np.uint8]:
    """The photograph, the map of each stage, and the features, in rows of three.

    Args:
        image: The photograph, [H, W, 3] uint8, of any size; ``draw.panel`` makes it small.
        stages: The map of each stage, [C, h, w].
        features: [C, h, w]; not drawn again where it is the last stage's map.
        placement: Where the photograph lies in the model's input, for its original size.

    Returns:
        [H, W, 3] uint8.
    """
    placement = replace(placement, original_size=(image.shape[0], image.shape[1]))
    maps, captions = list(stages), ["photograph"]
    is_new = features.shape != maps[-1].shape or not np.array_equal(features, maps[-1])
    captions += [f"stage {number}: {_shape(stage)}" for number, stage in enumerate(maps, 1)]
    if is_new:
        maps.append(features)
        captions.append(f"features: {_shape(features)}")
    strip = draw.stage_grid(image, maps, placement, captions)
    panels = 1 + len(maps)
    pitch = (strip.shape[1] - draw.GAP) // panels  # a panel and the gap before it
    width = COLUMNS * pitch + draw.GAP
    rows = [strip[:, i * pitch : i * pitch + width] for i in range(0, panels, COLUMNS)]
    missing = width - rows[-1].shape[1]
    paper = ((0, 0), (0, missing), (0, 0))
    rows[-1] = np.pad(rows[-1], paper, constant_values=draw.PAPER[0])
    return np.vstack(rows)


def _shape(features: Tensor) -> str:
    return " x ".join(str(side) for side in features.shape)


def _header(target: Path) -> dict[str, object] | None:
    """What the header of one of our files says; None for any other file."""
    try:
        with safe_open(target, framework="numpy") as file:
            texts = file.metadata() or {}
        header = {key: json.loads(text) for key, text in texts.items() if key != "format"}
    except (OSError, SafetensorError, ValueError):
        return None
    return header if _MARK in header else None


pass


Input: TypeAlias = "tuple[Tensor, Placement]"
"""An image [3, H, W] float32 as the model wants it, and where it lies in it."""


@dataclass(frozen=True)
class Outcome:
    """What became of one image.

    Attributes:
        image: The image.
        state: ``"written"``, ``"skipped"`` (there already) or ``"failed"``.
        reason: Why it failed, with the file's name; or what the files were that it replaced.
        features: The safetensors file.
        drawing: The image of the features, or None.
        shape: Shape of the features, (C, h, w); None unless written.
    """

    image: ImageFile
    state: Literal["written", "skipped", "failed"]
    reason: str = ""
    features: Path | None = None
    drawing: Path | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class _Task:
    """An image that is to be encoded; once read, with a small photograph if one is to be drawn."""

    image: ImageFile
    target: Path
    facts: Mapping[str, object]
    found: Found
    photograph: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Job:
    """How images are encoded and where to.

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

    def run(self, images: Sequence[ImageFile]) -> Iterator[Outcome]:
        """Encode the images: first those named with which nothing is to be done, then the rest.

        Reading, the model and writing go on at the same time, for images that follow each other.

        Args:
            images: From ``list_images``.

        Yields:
            One outcome for each image.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """
        wanted: list[ImageFile] = []
        for image in images:
            outcome = self._look(image)
            if isinstance(outcome, Outcome):
                yield outcome
            else:
                wanted.append(image)
        workers = self.engine.workers
        with closing(self._writings(wanted)) as writings:
            yield from read_ahead(writings, workers=workers, ahead=workers + 1)

    def _look(self, image: ImageFile) -> _Task | Outcome:
        """What is to be done for an image, or why nothing is."""
        target = self.folder / f"{image.stem}.safetensors"
        try:
            facts = {**self.recipe, **facts_of_image(image.path, image.name)}
            found = look(target, facts, self.with_drawings)
        except OSError as err:
            return Outcome(image, "failed", f"{image.path}: {err.strerror or err}")
        if not self.overwrite and found.state == "current":
            drawing = None if found.drawing is None else target.with_name(found.drawing)
            return Outcome(image, "skipped", "", target, drawing)
        if not self.overwrite and found.state == "foreign":
            reason = f"{found.reason}; choose another folder, or --overwrite to replace it"
            return Outcome(image, "failed", reason)
        return _Task(image, target, facts, found)

    def _read(self, image: ImageFile) -> tuple[_Task, Input] | Outcome:
        """An image ready for the model, or why it is not; done in a thread of its own.

        Its facts are asked for again: it may have changed while others were encoded.
        """
        task = self._look(image)
        if isinstance(task, Outcome):
            return task
        try:
            rgb = decode(image.path)
        except ImageError as err:
            return Outcome(image, "failed", str(err))
        photograph = draw.panel(rgb) if self.with_drawings else None
        return replace(task, photograph=photograph), to_tensor(rgb, self.engine.image_spec)

    def _writings(
        self, images: Sequence[ImageFile]
    ) -> Generator[Callable[[], Outcome], None, None]:
        """What is left to do for each image once the model has seen it, in order."""
        read: deque[_Task | Outcome] = deque()

        def inputs() -> Generator[Input, None, None]:
            jobs = (partial(self._read, image) for image in images)
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
            reason = f"{task.image.path}: {reason}"
            return Outcome(task.image, "failed", reason)
        drawing = None
        if task.photograph is not None and encoded.stages is not None:
            drawing = draw_features(task.photograph, encoded.stages, features, encoded.placement)
        facts = {**task.facts, **asdict(encoded.placement)}
        try:
            write(task.target, features, facts, drawing)
        except (CheckpointError, OSError) as err:
            if _errno(err) != errno.ENAMETOOLONG:
                raise
            reason = f"{task.image.path}: its outputs have too long a name: {err}"
            return Outcome(task.image, "failed", reason)
        if drawing is None:
            remove_drawing(task.target, task.found)
        return Outcome(
            task.image,
            "written",
            task.found.reason if task.found.state == "outdated" else "",
            task.target,
            None if drawing is None else drawing_of(task.target),
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
