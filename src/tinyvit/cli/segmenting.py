"""The work behind ``tinyvit segment``: pictures and prompts -> files, an outcome for each picture.

Pictures are read ahead and files are written behind while the model works. A picture that cannot
be read, or whose prompts do not fit it, is an outcome with a reason; a disk that takes no more
stops the work. How masks come about is the affair of a ``Method``. Knows no command line.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from tinyvit.cli import segment_files
from tinyvit.cli.feature_files import facts_of_picture
from tinyvit.cli.picture_files import PictureFile
from tinyvit.cli.segment_files import Found, Names
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.images import draw, segments
from tinyvit.images.decode import decode
from tinyvit.inference.read_ahead import read_ahead
from tinyvit.sam import rle

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvit.inference import Engine
    from tinyvit.inference.pictures import Prepared
    from tinyvit.sam import Prompt

__all__ = ["Annotation", "Answer", "Job", "Method", "Outcome", "Reading", "Task"]

Annotation: TypeAlias = "dict[str, object]"
Prompts: TypeAlias = "tuple[Prompt, ...]"


@dataclass(frozen=True)
class Task:
    """A picture that is to be segmented.

    Attributes:
        picture: The picture.
        prompts: One for each object; none where everything is segmented.
        names: Where its files go.
        facts: What their document says of how they came about.
        found: What is there already.
    """

    picture: PictureFile
    prompts: Prompts
    names: Names
    facts: Mapping[str, object]
    found: Found


@dataclass(frozen=True)
class Reading:
    """A picture that has been read.

    Attributes:
        task: What is to be done.
        image: [H, W, 3] uint8, upright.
        prepared: What the method's ``prepare`` made of it.
        seconds: Seconds for each step so far.
    """

    task: Task
    image: NDArray[np.uint8]
    prepared: Prepared | None
    seconds: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """What a method found in a picture.

    Attributes:
        reading: The picture.
        annotations: For each mask its annotation, with the mask itself where it is to be written
            as a picture. Asked for once, in a thread that writes; may add to ``reading.seconds``.
        logits: Low-res logits of each object, [h4, w4] float32, where they are to be written.
        failure: Why there are no masks; empty where there may be some.
    """

    reading: Reading
    annotations: Iterable[tuple[Annotation, NDArray[np.bool_] | None]] = ()
    logits: Sequence[NDArray[np.float32]] = ()
    failure: str = ""


class Method(Protocol):
    """A way to find masks."""

    @property
    def engine(self) -> Engine:
        """What runs the encoder."""
        ...

    def facts(self, prompts: Prompts) -> dict[str, object]:
        """What is asked of a picture, as plain data: other facts, other masks."""
        ...

    def names(self, folder: Path, stem: str, prompts: Prompts) -> Names:
        """Where the files of a picture go."""
        ...

    def prepare(self, image: NDArray[np.uint8]) -> Prepared | None:
        """Work on a picture that can be done ahead, in a thread of its own."""
        ...

    def answers(self, readings: Iterator[Reading]) -> Generator[Answer, None, None]:
        """One answer for each reading, in order."""
        ...


@dataclass(frozen=True)
class Outcome:
    """What became of one picture.

    Attributes:
        picture: The picture.
        state: ``"written"``, ``"skipped"`` (there already) or ``"failed"``.
        reason: Why it failed, with the file's name; or what the files were that it replaced.
        names: Where its files are.
        masks: For each mask what its annotation says, but for its run lengths and its prompt;
            only where prompts were given.
        count: Number of masks.
        seconds: Seconds for each step.
    """

    picture: PictureFile
    state: Literal["written", "skipped", "failed"]
    reason: str = ""
    names: Names | None = None
    masks: tuple[Annotation, ...] = ()
    count: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """How pictures are segmented and where to.

    Attributes:
        method: Finds the masks.
        folder: Where the files go.
        recipe: What their documents say about the model.
        workers: Threads that read, and as many that write.
        ahead: Pictures read ahead, at most.
        overwrite: Whether to make everything anew, and to replace files that are not ours.
    """

    method: Method
    folder: Path
    recipe: Mapping[str, object]
    workers: int = 1
    ahead: int = 2
    overwrite: bool = False

    def run(self, work: Sequence[tuple[PictureFile, Prompts]]) -> Iterator[Outcome]:
        """Segment pictures: first those are named with which nothing is to be done.

        Args:
            work: Each picture with its prompts, one for each object.

        Yields:
            One outcome for each picture.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """
        inputs = {os.path.realpath(picture.path) for picture, _ in work}
        wanted: list[tuple[PictureFile, Prompts]] = []
        for picture, prompts in work:
            task = self._look(picture, prompts, inputs)
            if isinstance(task, Outcome):
                yield task
            else:
                wanted.append((picture, prompts))
        with closing(self._writings(wanted, inputs)) as writings:
            yield from read_ahead(writings, workers=self.workers, ahead=self.workers + 1)

    def _look(self, picture: PictureFile, prompts: Prompts, inputs: set[str]) -> Task | Outcome:
        """What is to be done for a picture, or why nothing is."""
        names = self.method.names(self.folder, picture.stem, prompts)
        for path in (names.document, *names.beside()):
            if os.path.realpath(path) in inputs:
                reason = f"{picture.path}: its output {path} would replace one of the pictures"
                return Outcome(picture, "failed", f"{reason}; write to another folder with -o")
        try:
            facts = {
                **self.recipe,
                **facts_of_picture(picture.path, picture.name),
                "task": self.method.facts(prompts),
            }
            found = segment_files.look(names, facts)
        except OSError as err:
            return Outcome(picture, "failed", f"{picture.path}: {err.strerror or err}")
        if not self.overwrite and found.state == "current":
            return Outcome(picture, "skipped", "", names)
        if not self.overwrite and found.state == "foreign":
            reason = f"{found.reason}; choose another folder, or --overwrite to replace it"
            return Outcome(picture, "failed", f"{picture.path}: {reason}")
        return Task(picture, prompts, names, facts, found)

    def _read(self, picture: PictureFile, prompts: Prompts, inputs: set[str]) -> Reading | Outcome:
        """A picture ready for the method, or why it is not; done in a thread of its own.

        Its facts are asked for again: it may have changed while others were segmented.
        """
        task = self._look(picture, prompts, inputs)
        if isinstance(task, Outcome):
            return task
        start = perf_counter()
        try:
            image = decode(picture.path)
        except ImageError as err:
            return Outcome(picture, "failed", str(err))
        prepared = self.method.prepare(image)
        return Reading(task, image, prepared, {"read": perf_counter() - start})

    def _writings(
        self, work: Sequence[tuple[PictureFile, Prompts]], inputs: set[str]
    ) -> Generator[Callable[[], Outcome], None, None]:
        """What is left to do for each picture once the model has seen it."""
        failed: deque[Outcome] = deque()

        def good() -> Generator[Reading, None, None]:
            jobs = (partial(self._read, picture, prompts, inputs) for picture, prompts in work)
            with closing(read_ahead(jobs, workers=self.workers, ahead=self.ahead)) as readings:
                for reading in readings:
                    if isinstance(reading, Outcome):
                        failed.append(reading)
                    else:
                        yield reading

        with closing(good()) as readings, closing(self.method.answers(readings)) as answers:
            for answer in answers:
                while failed:
                    yield partial(_same, failed.popleft())
                yield partial(self._write, answer)
        for outcome in failed:
            yield partial(_same, outcome)

    def _write(self, answer: Answer) -> Outcome:
        reading, task = answer.reading, answer.reading.task
        if answer.failure:
            reason = f"{task.picture.path}: {answer.failure}"
            return Outcome(task.picture, "failed", reason)
        try:
            segment_files.begin(task.names, task.facts, task.found.own)
            annotations = _write_masks(answer)
            for path, logits in zip(task.names.logits, answer.logits, strict=True):
                segment_files.write_logits(path, logits)
            draw.save_png(task.names.overlay, _overlay(reading, annotations))
            seconds = {step: round(value, 4) for step, value in reading.seconds.items()}
            facts = {**task.facts, "seconds": seconds}
            size = (reading.image.shape[0], reading.image.shape[1])
            content = segment_files.document(task.names, facts, size, annotations)
            segment_files.finish(task.names, content, task.found.own)
        except (CheckpointError, OSError) as err:
            if _errno(err) != errno.ENAMETOOLONG:
                raise
            reason = f"{task.picture.path}: its outputs have too long a name: {err}"
            return Outcome(task.picture, "failed", reason)
        return Outcome(
            task.picture,
            "written",
            task.found.reason if task.found.state == "outdated" else "",
            task.names,
            tuple(_in_short(one) for one in annotations) if task.prompts else (),
            len(annotations),
            seconds,
        )


def _write_masks(answer: Answer) -> list[Annotation]:
    """Write the masks that are to be pictures, one at a time; all annotations."""
    annotations: list[Annotation] = []
    names = iter(answer.reading.task.names.masks)
    for annotation, mask in answer.annotations:
        if mask is not None:
            path = next(names)
            segments.save_mask(path, mask)
            annotation = {**annotation, "mask": path.name}
        annotations.append(annotation)
    return annotations


def _overlay(reading: Reading, annotations: Sequence[Annotation]) -> NDArray[np.uint8]:
    """The photograph, the best mask of each object, and the prompts over them."""
    shown = [one for one in annotations if one.get("is_best", True)]
    areas = [rle.area(_run_lengths(one)) for one in shown]
    order = sorted(range(len(shown)), key=lambda number: -areas[number])
    masks = (rle.decode(_run_lengths(shown[number])) for number in order)
    out = segments.draw_masks(reading.image, masks, [segments.colour(n) for n in order])
    for number, prompt in enumerate(reading.task.prompts):
        if prompt.box is not None:
            out = segments.draw_boxes(out, prompt.box[None], [segments.colour(number)])
    for prompt in reading.task.prompts:
        if prompt.points is not None and prompt.labels is not None:
            out = segments.draw_points(out, prompt.points, prompt.labels)
    return out


def _run_lengths(annotation: Annotation) -> Mapping[str, object]:
    found = annotation["segmentation"]
    return found if isinstance(found, Mapping) else {}


def _in_short(annotation: Annotation) -> Annotation:
    left_out = ("segmentation", "prompt", "image_id", "category_id", "iscrowd")
    return {key: value for key, value in annotation.items() if key not in left_out}


def _same(outcome: Outcome) -> Outcome:
    return outcome


def _errno(err: BaseException) -> int | None:
    """The operating system's number behind an error."""
    source = err.__cause__ if isinstance(err, CheckpointError) else err
    return source.errno if isinstance(source, OSError) else None
