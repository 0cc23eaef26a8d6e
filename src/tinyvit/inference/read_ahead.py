"""Work done ahead of who needs it, in threads: in order, bounded, and ended with its consumer.

Knows threads; it knows no images and no models. Only work that releases Python's lock for most
of its time (decoding, resizing, compressing, writing files) is faster this way.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")

_LEAST_PRIORITY = 19


def read_ahead(
    jobs: Iterable[Callable[[], Result]], *, workers: int, ahead: int
) -> Generator[Result, None, None]:
    """Do jobs in threads and give their results in the order of the jobs.

    ``jobs`` is asked for the next job in the caller's thread only, and never for more than
    ``ahead`` jobs whose results have not been taken. When the consumer stops, closes the generator
    or an error comes, jobs that have not begun are dropped and the threads have ended.

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

    Example:
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
    waiting: deque[Future[Result]] = deque()
    failed: list[int] = []
    numbered = enumerate(jobs)
    error: Exception | None = None
    is_over = False
    with_threads = ThreadPoolExecutor(workers, "tinyvit-read-ahead", _give_way)
    try:
        while True:
            while not is_over and len(waiting) < ahead:
                try:
                    number, job = next(numbered)
                except StopIteration:
                    is_over = True
                except Exception as err:  # of the caller's iterable: it waits for its turn
                    is_over, error = True, err
                else:
                    waiting.append(with_threads.submit(_do, job, number, failed))
                    del job  # or its image would live on until the next one
            if not waiting:
                break
            yield waiting.popleft().result()
        if error is not None:
            raise error
    finally:
        with_threads.shutdown(wait=True, cancel_futures=True)
        del error  # it refers to this frame, and this frame to it


def choose_workers() -> int:
    """Threads that read ahead: as many as there are cores, at most 4; see ``_give_way``.

    Where the backend is a GPU, more may pay.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 4)


def _give_way() -> None:
    """Let the threads of a backend go first on this one's core, where the system has a word for it.

    A backend splits each layer evenly among all cores: a core that decodes holds up all others. At
    a lower priority the decoding falls into the gaps in which the backend waits for an image.
    """
    if sys.platform == "linux":  # elsewhere a thread's number is no process's
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)


def _do(job: Callable[[], Result], number: int, failed: list[int]) -> Result:
    """Do a job, unless one before it has failed: nobody will ask for its result."""
    if any(earlier < number for earlier in failed):
        raise CancelledError
    try:
        return job()
    except BaseException:
        failed.append(number)
        raise
