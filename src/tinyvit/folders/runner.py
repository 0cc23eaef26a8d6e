"""Work on many images: read ahead, compute, write behind, and say what became of each.

``encode`` and ``segment`` are two uses of it. An ``Item`` becomes a ``Job`` (what is there already,
what is to be written), and ends as an ``Outcome``. Reading, computing and writing go on at the same
time, for images that follow each other.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import tee
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import numpy as np

from tinyvit.errors import CheckpointError, ImageError
from tinyvit.inference.read_ahead import read_ahead

from .images import ImageFile
from .outputs import Existing

if TYPE_CHECKING:
    from typing_extensions import Self

    from tinyvit.images.preprocess import PreparedImage
    from tinyvit.inference import Engine
    from tinyvit.sam import Prompt

Result = TypeVar("Result")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Item:
    """An image, and its prompts, one for each object; none where none are needed."""

    image: ImageFile
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of an item."""

    item: Item
    state: Literal["written", "skipped", "failed"]  # skipped: there already
    reason: str = ""  # why it failed, with the file's name; or what files it replaced
    facts: Mapping[str, Any] = field(default_factory=dict)  # names of files, sizes, seconds


@dataclass
class Job:
    """An item on its way: planned, then read, then written."""

    item: Item
    facts: Mapping[str, object]  # what its outputs say of how they came about
    existing: Existing
    told: Mapping[str, object]  # for ``Outcome.facts``: where its outputs are
    outputs: Sequence[Path] = ()
    image: Any = None  # [H, W, 3] uint8, once read, if it is needed after that
    prepared: PreparedImage | None = None  # the model's input, once read, if one is wanted
    seconds: dict[str, float] = field(default_factory=dict)  # for each step so far

    def failed(self, reason: str) -> Outcome:
        """The outcome for a reason that does not name the image."""
        return Outcome(self.item, "failed", f"{self.item.image.path}: {reason}")


class _Timed(Generic[Value]):
    """An iterator that adds up the seconds that its values take to come."""

    def __init__(self, values: Iterable[Value]) -> None:
        self._values, self.seconds = iter(values), 0.0

    def __iter__(self) -> Self:
        return self

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
    def _compute(self, jobs: Iterator[Job]) -> Generator[Result | Outcome, None, None]:
        """One result for each job, in order, or an outcome where there is none."""

    @abstractmethod
    def _write(self, job: Job, result: Result) -> Mapping[str, object]:
        """Write the files, in a thread; facts for the outcome."""

    def run(
        self, items: Sequence[Item], tell: Callable[[Outcome], object] = bool
    ) -> Iterator[Outcome]:
        """Do the work: first the items with which nothing is to be done, then the others, in order.

        ``tell`` is called with each outcome as soon as it is there, in whatever thread that is:
        after an interruption it has been told all that is done.

        Raises:
            CheckpointError: The disk cannot be written to; what is written so far is whole.
            OSError: Likewise.
        """

        def finish(job: Job | Outcome, result: Any = None) -> Outcome:
            outcome = job if isinstance(job, Outcome) else self._written(job, result)
            tell(outcome)
            return outcome

        self._inputs = {os.path.realpath(item.image.path) for item in items}
        wanted: list[Item] = []
        for item in items:
            found = self._planned(item)
            if isinstance(found, Outcome):
                yield finish(found)
            else:
                wanted.append(item)
        readings = (partial(self._taken, item) for item in wanted)
        with (
            closing(read_ahead(readings, workers=self.workers, ahead=self.ahead)) as jobs,
            closing(self._writings(jobs, finish)) as writings,
        ):
            yield from read_ahead(writings, workers=self.workers, ahead=self.workers + 1)

    def _encoded(
        self, jobs: Iterator[Job], encode: Callable[[Iterator[PreparedImage]], Iterable[Any]]
    ) -> Iterator[tuple[Job, Any]]:
        """Jobs with what ``encode`` makes of their inputs, or the outcome where that is of no use.

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

    def _planned(self, item: Item) -> Job | Outcome:
        """The job for an item, or why there is nothing to do."""
        try:
            job = self._plan(item)
        except OSError as err:
            return Outcome(item, "failed", f"{item.image.path}: {err.strerror or err}")
        for path in job.outputs:
            if os.path.realpath(path) in self._inputs:
                reason = f"its output {path} would replace one of the images; write to another"
                return job.failed(f"{reason} folder with -o")
        if self.overwrite:
            return job
        if job.existing.state == "current":
            return Outcome(item, "skipped", facts=job.told)
        if job.existing.state == "foreign":
            reason = f"{job.existing.reason}; choose another folder, or --overwrite to replace it"
            return job.failed(reason)
        return job

    def _taken(self, item: Item) -> Job | Outcome:
        job = self._planned(item)
        if isinstance(job, Job):
            try:
                self._read(job)
            except ImageError as err:
                return Outcome(item, "failed", str(err))
        return job

    def _writings(
        self, jobs: Generator[Job | Outcome, None, None], finish: Callable[..., Outcome]
    ) -> Generator[Callable[[], Outcome], None, None]:
        """What is left to do for each image once it has been computed, in order."""
        order: deque[Job | Outcome] = deque()

        def good() -> Generator[Job, None, None]:
            for job in jobs:
                order.append(job)
                if isinstance(job, Job):
                    yield job

        with closing(good()) as readable, closing(self._compute(readable)) as results:
            for result in results:
                while isinstance(job := order.popleft(), Outcome):
                    yield partial(finish, job)
                yield partial(finish, *([result] if isinstance(result, Outcome) else [job, result]))
                del job, result  # or an image would live on until the next one
        for outcome in order:
            if isinstance(outcome, Outcome):
                yield partial(finish, outcome)

    def _written(self, job: Job, result: Result) -> Outcome:
        try:
            facts = self._write(job, result)
        except (CheckpointError, OSError) as err:
            source = err.__cause__ if isinstance(err, CheckpointError) else err
            if not isinstance(source, OSError) or source.errno != errno.ENAMETOOLONG:
                raise
            return job.failed(f"its outputs have too long a name: {err}")
        reason = job.existing.reason if job.existing.state == "outdated" else ""
        return Outcome(job.item, "written", reason, {**job.told, **facts})


def _taken_from(jobs: Iterator[Job]) -> Iterator[PreparedImage]:
    """The model's inputs of jobs, which do not keep them."""
    for job in jobs:
        prepared, job.prepared = job.prepared, None
        if prepared is not None:
            yield prepared
