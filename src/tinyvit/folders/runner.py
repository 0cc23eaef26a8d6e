"""Work on many images: read ahead, compute, write behind, and say what became of each.

``encode`` and ``segment`` are two uses of it. An ``Item`` becomes a ``Job``: what is there already,
what is to be written, and what became of it. Reading, computing and writing go on at the same time,
for images that follow each other. One dictionary of facts says how outputs came about. It is the
header of a safetensors file (each text there is JSON), or ``info`` in a JSON document. It names the
files beside it too, so that a file of the user's own is never taken for one of ours.
"""

from __future__ import annotations

import errno
import json
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import tee
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open

from tinyvit.errors import CheckpointError, ImageError
from tinyvit.inference.read_ahead import read_ahead

from .images import Item

if TYPE_CHECKING:
    from tinyvit.images.preprocess import PreparedImage
    from tinyvit.inference import Engine


Result = TypeVar("Result")
Value = TypeVar("Value")


# -- what is there ---------------------------------------------------------------------------------

_DECIDING = {  # fact -> what another value means
    "weights_sha256": "made by another model",
    "model_sha256": "made by another model",
    "strides": "made with other strides",
    "image_spec": "made with another preparation of images",
    "precision": "made in another precision",
    "picture": "made of another image",
    "picture_bytes": "made of an image that has changed since",
    "picture_mtime_ns": "made of an image that has changed since",
    "task": "made with other prompts or options",
}


class Existing(NamedTuple):
    """What is where outputs are to be."""

    # current: what would be written now; outdated: ours, but made otherwise; foreign: not ours
    state: Literal["nothing", "current", "outdated", "foreign"]
    reason: str = ""  # what makes it outdated or foreign, in words
    own: tuple[Path, ...] = ()  # beside the main file, named by it, whether there or not


NOTHING = Existing("nothing")


def find_existing(
    path: Path,
    beside: Sequence[Path],
    facts: Mapping[str, object],
    incomplete: str = "not all there any more",
) -> Existing:
    """Say what is there of a main file, which holds the facts, and of others ``beside`` it.

    ``facts`` are what it would say now; ``incomplete`` is said where one of ``beside`` is missing.
    """
    found = _read_facts(path, facts.get("made_by")) if path.exists() else {}
    own = tuple(path.with_name(name) for name in found["files"]) if found else ()
    foreign = [other for other in beside if other not in own and other.exists()]
    if found is None:
        foreign.insert(0, path)
    if foreign:
        reason = f"{foreign[0]} is there already and was not made by this command"
        return Existing("foreign", reason, own)
    if not found:
        return NOTHING
    if not found.get("is_complete"):
        return Existing("outdated", "left unfinished", own)
    for fact, meaning in _DECIDING.items():
        if fact in facts and found.get(fact) != facts[fact]:
            return Existing("outdated", meaning, own)
    if not all(other.exists() for other in beside):
        return Existing("outdated", incomplete, own)
    return Existing("current", "", own)


def facts_of_image(image: Item) -> dict[str, object]:
    """What tells whether an image is still the same file; an OSError where it is gone."""
    state = image.path.stat()
    return {
        "picture": image.name,
        "picture_bytes": state.st_size,
        "picture_mtime_ns": state.st_mtime_ns,
    }


def facts_of_engine(engine: Engine, checkpoint: str, **more: object) -> dict[str, object]:
    """How an engine computes, and what else is known of the model, as JSON gives it back."""
    facts = {
        "checkpoint": checkpoint,
        **more,
        "image_spec": engine.image_spec.to_dict(),
        "precision": getattr(engine.backend, "precision", "fp32"),
        "device": engine.backend.device,
        "tinyvit_version": version("tinyvit"),
    }
    plain: dict[str, object] = json.loads(json.dumps(facts))
    return plain


def _read_facts(path: Path, made_by: object) -> dict[str, Any] | None:
    """What one of our files says of itself, with ``files`` and ``is_complete``; else None."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                texts = file.metadata() or {}
            facts = {key: json.loads(text) for key, text in texts.items() if key != "format"}
            is_ours = "tinyvit_version" in facts
            facts |= {"files": [facts.get("drawing")], "is_complete": True}
        else:
            facts = json.loads(path.read_text(encoding="utf-8"))["info"]
            is_ours = isinstance(facts, dict) and facts.get("made_by") == made_by
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not is_ours:
        return None
    files = facts.get("files")
    names = [name for name in files if isinstance(name, str)] if isinstance(files, list) else []
    return {**facts, "files": [name for name in names if Path(name).name == name]}


# -- the work --------------------------------------------------------------------------------------


@dataclass
class Job:
    """An image on its way, and what became of it: planned, then read, then written."""

    item: Item
    facts: Mapping[str, object] = field(default_factory=dict)  # how its outputs came about
    existing: Existing = NOTHING
    told: Mapping[str, Any] = field(default_factory=dict)  # names of files, sizes, seconds
    outputs: Sequence[Path] = ()
    image: Any = None  # [H, W, 3] uint8, once read, if it is needed after that
    prepared: PreparedImage | None = None  # the model's input, once read, if one is wanted
    seconds: dict[str, float] = field(default_factory=dict)  # for each step so far
    state: Literal["planned", "written", "skipped", "failed"] = "planned"  # skipped: there already
    reason: str = ""  # why it failed, with the file's name; or what files it replaced

    def failed(self, reason: str) -> Job:
        """The job as one that failed, for a reason that does not name the image."""
        self.state, self.reason = "failed", f"{self.item.path}: {reason}"
        return self


class _Timed(Iterator[Value]):
    """An iterator that adds up the seconds that its values take to come."""

    def __init__(self, values: Iterable[Value]) -> None:
        self._values, self.seconds = iter(values), 0.0

    def __next__(self) -> Value:
        start = perf_counter()
        try:
            return next(self._values)
        finally:
            self.seconds += perf_counter() - start


class FolderWork(ABC, Generic[Result]):
    """Work on images: what is there already, read ahead, compute, write behind.

    With ``overwrite`` what is current is made again, and files that are not ours are replaced.
    """

    def __init__(
        self, engine: Engine, folder: Path, overwrite: bool, max_pixels: int | None
    ) -> None:
        self.engine, self.folder = engine, folder
        self.overwrite, self.max_pixels = overwrite, max_pixels
        self.workers, self.ahead = engine.workers, engine.ahead
        self._inputs: set[str] = set()

    @abstractmethod
    def _plan(self, item: Item) -> Job:
        """What is to be done and is there already; asked again just before an image is read."""

    @abstractmethod
    def _read(self, job: Job) -> None:
        """Fill in ``image`` and ``prepared``, in a thread."""

    @abstractmethod
    def _compute(self, jobs: Iterator[Job]) -> Generator[Result | Job, None, None]:
        """One result for each job, in order, or the job as failed where there is none."""

    @abstractmethod
    def _write(self, job: Job, result: Result) -> Mapping[str, object]:
        """Write the files, in a thread; more to be told of the job."""

    def run(self, items: Sequence[Item], tell: Callable[[Job], object] = bool) -> Iterator[Job]:
        """Do the work: first the items with which nothing is to be done, then the others, in order.

        ``tell`` is called with each job as soon as it is done, in whatever thread that is: after an
        interruption it has been told all that is done.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """

        def finish(job: Job, result: Any = None) -> Job:
            if job.state == "planned":
                self._finish(job, result)
            job.facts, job.image, job.prepared = {}, None, None  # callers keep the jobs
            tell(job)
            return job

        self._inputs = {os.path.realpath(item.path) for item in items}
        wanted: list[Item] = []
        for item in items:
            job = self._planned(item)
            if job.state == "planned":
                wanted.append(item)
            else:
                yield finish(job)
        readings = (partial(self._taken, item) for item in wanted)
        with (
            closing(read_ahead(readings, workers=self.workers, ahead=self.ahead)) as jobs,
            closing(self._writings(jobs, finish)) as writings,
        ):
            yield from read_ahead(writings, workers=self.workers, ahead=self.workers + 1)

    def _encoded(
        self, jobs: Iterator[Job], encode: Callable[[Iterator[PreparedImage]], Iterable[Any]]
    ) -> Iterator[tuple[Job, Any]]:
        """Jobs with what ``encode`` makes of their inputs, or the job where that is of no use.

        Images of one shape are encoded together.
        """
        jobs, ahead = tee(jobs)
        inputs = _Timed(_taken_from(ahead))
        values, before = _Timed(encode(inputs)), 0.0
        # in this order: images of one shape are read ahead for a batch
        for value, job in zip(values, jobs, strict=False):
            spent = values.seconds - inputs.seconds
            job.seconds["encode"], before = spent - before, spent
            if np.isfinite(np.asarray(value.features)).all():
                yield job, value
            else:
                reason = "its features are not all finite numbers; try --precision fp32"
                yield job, job.failed(reason)

    def _planned(self, item: Item) -> Job:
        """The job for an item, perhaps with nothing to do."""
        try:
            job = self._plan(item)
        except OSError as err:
            return Job(item).failed(err.strerror or str(err))
        for path in job.outputs:
            if os.path.realpath(path) in self._inputs:
                reason = f"its output {path} would replace one of the images; write to another"
                return job.failed(f"{reason} folder with -o")
        if self.overwrite:
            return job
        if job.existing.state == "current":
            job.state = "skipped"
        if job.existing.state == "foreign":
            reason = f"{job.existing.reason}; choose another folder, or --overwrite to replace it"
            return job.failed(reason)
        return job

    def _taken(self, item: Item) -> Job:
        job = self._planned(item)
        if job.state == "planned":
            try:
                self._read(job)
            except ImageError as err:
                job.state, job.reason = "failed", str(err)
        return job

    def _writings(
        self, jobs: Generator[Job, None, None], finish: Callable[..., Job]
    ) -> Generator[Callable[[], Job], None, None]:
        """What is left to do for each image once it has been computed, in order."""
        order: deque[Job] = deque()

        def good() -> Generator[Job, None, None]:
            for job in jobs:
                order.append(job)
                if job.state == "planned":
                    yield job

        with closing(good()) as readable, closing(self._compute(readable)) as results:
            for result in results:
                while (job := order.popleft()).state != "planned" and job is not result:
                    yield partial(finish, job)
                yield partial(finish, job, result)
                del job, result  # or an image would live on until the next one
        for job in order:
            if job.state != "planned":
                yield partial(finish, job)

    def _finish(self, job: Job, result: Result) -> None:
        try:
            job.told = {**job.told, **self._write(job, result)}
        except (CheckpointError, OSError) as err:
            source = err.__cause__ if isinstance(err, CheckpointError) else err
            if not isinstance(source, OSError) or source.errno != errno.ENAMETOOLONG:
                raise
            job.failed(f"its outputs have too long a name: {err}")
        else:
            job.state = "written"
            job.reason = job.existing.reason if job.existing.state == "outdated" else ""


def _taken_from(jobs: Iterator[Job]) -> Iterator[PreparedImage]:
    """The model's inputs of jobs, which do not keep them."""
    for job in jobs:
        prepared, job.prepared = job.prepared, None
        if prepared is not None:
            yield prepared
