"""Work on many images: read ahead, compute, write behind, and say what became of each.

``encode`` and ``segment`` are two uses of it. An ``Item`` becomes a ``Job`` (what is there already,
what is to be written), and ends as an ``Outcome``. Reading, computing and writing go on at the same
time, for images that follow each other.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from tinyvit.errors import CheckpointError, ImageError
from tinyvit.inference.read_ahead import read_ahead

from .images import ImageFile
from .outputs import Existing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tinyvit.images.preprocess import PreparedImage
    from tinyvit.sam import Prompt

Result = TypeVar("Result")


@dataclass(frozen=True)
class Item:
    """An image, and its prompts, one for each object; none where none are needed."""

    image: ImageFile
    prompts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of an item.

    Attributes:
        item: The item.
        state: ``"written"``, ``"skipped"`` (there already) or ``"failed"``.
        reason: Why it failed, with the file's name; or what the files were that it replaced.
        facts: What is worth telling, as plain data: names of files, sizes, seconds.
    """

    item: Item
    state: Literal["written", "skipped", "failed"]
    reason: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """An item on its way: planned, then read, then written.

    Attributes:
        item: The item.
        facts: What its outputs say of how they came about.
        existing: What is there already.
        told: For ``Outcome.facts``: where its outputs are.
        image: [H, W, 3] uint8, once read, if it is needed after that.
        prepared: The model's input, once read, if the caller's model wants one.
        seconds: Seconds for each step so far.
    """

    item: Item
    facts: Mapping[str, object]
    existing: Existing
    told: Mapping[str, object]
    image: NDArray[np.uint8] | None = None
    prepared: PreparedImage | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def failed(self, reason: str) -> Outcome:
        """The outcome for a reason that does not name the image."""
        return Outcome(self.item, "failed", f"{self.item.image.path}: {reason}")


def run(
    items: Sequence[Item],
    plan: Callable[[Item], Job | Outcome],
    read: Callable[[Job], None],
    compute: Callable[[Iterator[Job]], Generator[Result | Outcome, None, None]],
    write: Callable[[Job, Result], Mapping[str, object]],
    *,
    overwrite: bool,
    workers: int,
    ahead: int,
    tell: Callable[[Outcome], object] = bool,
) -> Iterator[Outcome]:
    """Do the work: first the items are told with which nothing is to be done, then the others.

    ``plan`` says what is to be done and what is there already; it is called again in a thread just
    before an image is read, which may have changed while others were computed. ``read`` fills in
    ``image`` and ``prepared``, in a thread. ``compute`` gives one result for each job, in order, or
    an outcome where there is none. ``write`` writes the files, in a thread, and gives facts for the
    outcome. ``tell`` is called with each outcome as soon as it is there, in whatever thread that
    is: after an interruption it has been told all that is done. Outcomes are yielded in order.

    Raises:
        CheckpointError: The disk cannot be written to; what is written so far is whole.
        OSError: Likewise.
    """

    def look(item: Item) -> Job | Outcome:
        return _planned(item, plan, overwrite)

    def finish(job: Job | Outcome, result: Any = None) -> Outcome:
        outcome = job if isinstance(job, Outcome) else _write(job, result, write)
        tell(outcome)
        return outcome

    wanted: list[Item] = []
    for item in items:
        found = look(item)
        if isinstance(found, Outcome):
            yield finish(found)
        else:
            wanted.append(item)
    readings = (partial(_read, item, look, read) for item in wanted)
    with (
        closing(read_ahead(readings, workers=workers, ahead=ahead)) as jobs,
        closing(_writings(jobs, compute, finish)) as writings,
    ):
        yield from read_ahead(writings, workers=workers, ahead=workers + 1)


def take_prepared(jobs: Iterator[Job]) -> Generator[PreparedImage, None, None]:
    """The model's inputs of jobs, which do not keep them."""
    for job in jobs:
        prepared, job.prepared = job.prepared, None
        if prepared is not None:
            yield prepared


def _planned(item: Item, plan: Callable[[Item], Job | Outcome], overwrite: bool) -> Job | Outcome:
    """The job for an item, or why there is nothing to do."""
    try:
        job = plan(item)
    except OSError as err:
        return Outcome(item, "failed", f"{item.image.path}: {err.strerror or err}")
    if isinstance(job, Outcome) or overwrite:
        return job
    if job.existing.state == "current":
        return Outcome(item, "skipped", facts=job.told)
    if job.existing.state == "foreign":
        reason = f"{job.existing.reason}; choose another folder, or --overwrite to replace it"
        return job.failed(reason)
    return job


def _read(
    item: Item, look: Callable[[Item], Job | Outcome], read: Callable[[Job], None]
) -> Job | Outcome:
    job = look(item)
    if isinstance(job, Job):
        try:
            read(job)
        except ImageError as err:
            return Outcome(item, "failed", str(err))
    return job


def _writings(
    jobs: Generator[Job | Outcome, None, None],
    compute: Callable[[Iterator[Job]], Generator[Result | Outcome, None, None]],
    finish: Callable[..., Outcome],
) -> Generator[Callable[[], Outcome], None, None]:
    """What is left to do for each image once it has been computed, in order."""
    order: deque[Job | Outcome] = deque()

    def good() -> Generator[Job, None, None]:
        for job in jobs:
            order.append(job)
            if isinstance(job, Job):
                yield job

    with closing(good()) as readable, closing(compute(readable)) as results:
        for result in results:
            while isinstance(job := order.popleft(), Outcome):
                yield partial(finish, job)
            yield partial(finish, *([result] if isinstance(result, Outcome) else [job, result]))
            del job, result  # or an image would live on until the next one
    for outcome in order:
        if isinstance(outcome, Outcome):
            yield partial(finish, outcome)


def _write(
    job: Job, result: Result, write: Callable[[Job, Result], Mapping[str, object]]
) -> Outcome:
    try:
        facts = write(job, result)
    except (CheckpointError, OSError) as err:
        source = err.__cause__ if isinstance(err, CheckpointError) else err
        if not isinstance(source, OSError) or source.errno != errno.ENAMETOOLONG:
            raise
        return job.failed(f"its outputs have too long a name: {err}")
    reason = job.existing.reason if job.existing.state == "outdated" else ""
    return Outcome(job.item, "written", reason, {**job.told, **facts})
