"""Work done ahead of who needs it, in threads: in order, bounded, and ended with its consumer.

And what comes in order put together in batches of one shape.
Only work that releases Python's lock for most of its time (decoding, resizing, compressing, writing
files) is faster this way.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float32]
Label = TypeVar("Label")
Result = TypeVar("Result")

_NICE = 5


def read_ahead(
    jobs: Iterable[Callable[[], Result]], *, workers: int, ahead: int
) -> Generator[Result, None, None]:
    """Do jobs in threads and give their results in the order of the jobs.

    ``jobs`` is asked for the next job in the caller's thread only, and never for more than
    ``ahead`` jobs whose results have not been taken. A job that no thread has begun when its result
    is wanted is done by the caller itself, so a busy machine cannot keep it waiting. When the
    consumer stops, closes the generator or an error comes, jobs that have not begun are dropped and
    the threads have ended.

    Args:
        jobs: What is to be done; may be a generator.
        workers: Number of threads. 0: each job is done in the caller's thread when its result is
            asked for, and nothing is read ahead.
        ahead: Most jobs that are under way or done and not taken, at least 1.

    Yields:
        The result of each job.

    Raises:
        ValueError: ``workers`` or ``ahead`` is out of its range.
        Exception: What a job or ``jobs`` raises, after the results before it.

    Examples:
        >>> list(read_ahead([lambda: 1, lambda: 2], workers=1, ahead=2))
        [1, 2]
    """
    if workers < 0 or ahead < 1:
        raise ValueError(
            f"workers must be at least 0 and ahead at least 1, got {workers} and {ahead}"
        )
    if workers == 0:
        for job in jobs:
            yield job()
        return
    waiting: deque[tuple[_Job[Result], Future[Result]]] = deque()
    failed: list[int] = []
    numbered = enumerate(jobs)
    error: Exception | None = None
    is_over = False
    threads = ThreadPoolExecutor(workers, "tinyvit-read-ahead", initializer=_give_way)
    try:
        while True:
            while not is_over and len(waiting) < ahead:
                try:
                    job = _Job(*next(numbered), failed)
                except StopIteration:
                    is_over = True
                except Exception as err:  # of the caller's iterable: it waits for its turn
                    is_over, error = True, err
                else:
                    waiting.append((job, threads.submit(job)))
            if not waiting:
                break
            yield _take_first(waiting)
        if error is not None:
            raise error
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
        del error  # it refers to this frame, and this frame to it


class _Job(Generic[Result]):
    """A job that is done once, unless one before it has failed: nobody will ask for its result."""

    def __init__(self, number: int, work: Callable[[], Result], failed: list[int]) -> None:
        self.number, self.failed = number, failed
        self.work = [work]

    def __call__(self) -> Result:
        if any(earlier < self.number for earlier in self.failed):
            raise CancelledError
        try:
            return self.work.pop()()  # popped, so that its image lives no longer than needed
        except BaseException:
            self.failed.append(self.number)
            raise


def _give_way() -> None:
    """A little below the threads that compute: reading fills their gaps (Linux only).

    At the lowest priority these threads starved behind the work of other programs.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _take_first(waiting: deque[tuple[_Job[Result], Future[Result]]]) -> Result:
    """The result of the first job, which is done here if no thread has begun it."""
    job, future = waiting.popleft()
    return job() if future.cancel() else future.result()


def choose_workers() -> int:
    """Threads that read ahead: as many as there are cores, at most 4; for a GPU more may pay."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


def run_in_batches(
    inputs: Iterable[tuple[Array, Label]],
    run: Callable[[Array], Sequence[Result]],
    most: Callable[[Array], int],
    window: int,
) -> Iterator[tuple[Result, Label]]:
    """Run inputs, grouped by shape within a window.

    A batch is run as soon as it is full, or when its oldest image holds up a full window. So
    images of one shape wait for no more than their own batch.

    Args:
        inputs: (image [3, H, W], what goes with it); may be a generator. An error of it comes
            after the results before it.
        run: [N, 3, H, W] -> N results.
        most: Most images of a shape in one batch, from one of them [3, H, W].
        window: Most images held: read and not yet yielded.

    Yields:
        (result, what goes with it) for each input, in order.
    """
    order: deque[tuple[int, tuple[int, ...], Label]] = deque()  # number of the image, its shape
    groups: dict[tuple[int, ...], dict[int, Array]] = {}  # images by number, not computed yet
    results: dict[int, Result] = {}

    def compute(shape: tuple[int, ...]) -> None:
        group = groups.pop(shape)
        numbers, images = [*group], [*group.values()]
        del group
        batch = images[0][None] if len(images) == 1 else np.stack(images)
        del images  # the batch is a copy, and memory is bounded
        results.update(zip(numbers, run(batch), strict=True))

    def taken() -> tuple[Result, Label]:
        number, _, label = order.popleft()
        return results.pop(number), label

    source, count = iter(inputs), 0
    error: Exception | None = None
    try:
        while True:
            try:
                image, label = next(source)
            except StopIteration:
                break
            except Exception as err:  # after the good ones before it
                error = err
                break
            shape = image.shape
            order.append((count, shape, label))
            groups.setdefault(shape, {})[count] = image
            count += 1
            if len(groups[shape]) >= most(image):
                compute(shape)
            del image, label
            if len(order) >= window and order[0][0] not in results:
                compute(order[0][1])
            while order and order[0][0] in results:
                yield taken()
        while order:
            if order[0][0] not in results:
                compute(order[0][1])
            yield taken()
        if error is not None:
            raise error
    finally:
        del error  # it refers to this frame, and this frame to it
