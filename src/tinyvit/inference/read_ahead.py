"""Work done ahead of who needs it, in threads: in order, bounded, and ended with its consumer.

Only work that releases Python's lock for most of its time (decoding, resizing, compressing, writing
files) is faster this way.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeAlias, TypeVar, cast

import numpy as np

from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import PreparedImage, prepare, to_input

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Result = TypeVar("Result")

Picture: TypeAlias = "str | Path | bytes | BinaryIO | Image | np.ndarray[Any, Any] | Tensor"
"""One image: a path, encoded bytes, an open file, a PIL image, RGB [H, W, 3], or a tensor
[3, H, W]."""

_NICE = 5


def read_ahead(
    jobs: Iterable[Callable[[], Result]], *, workers: int, ahead: int
) -> Generator[Result, None, None]:
    """Do jobs in threads and give their results in the order of the jobs.

    ``jobs``, perhaps a generator, is asked for the next job in the caller's thread only, and never
    for more than ``ahead`` jobs whose results have not been taken. A job that no thread has begun
    when its result is wanted is done by the caller itself, so a busy machine cannot keep it
    waiting. When the consumer stops, closes the generator or an error comes, jobs that have not
    begun are dropped and the threads have ended. An error of a job or of ``jobs`` comes after the
    results before it. With 0 ``workers`` each job is done when its result is asked for.

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
    return min(cores(), 4)


def cores() -> int:
    """CPUs that this process may use."""
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return every or 1


# -- images, which are read ahead ----------------------------------------------------------------


def each(images: Picture | Iterable[Picture]) -> Iterable[Picture]:
    """One image as a list of one; stacks [N, H, W, 3], [N, 3, H, W] and iterables as they are."""
    if isinstance(images, np.ndarray) or _is_tensor(images):
        many = cast("np.ndarray[Any, Any]", images)
        return many if many.ndim == 4 else [many]
    if isinstance(images, (str, bytes, bytearray, memoryview, Path)) or hasattr(images, "read"):
        return [cast(Picture, images)]
    if isinstance(images, Mapping):
        raise TypeError("wanted an image or an iterable of images; came a mapping; pass .values()")
    return images if isinstance(images, Iterable) else [images]


def _is_tensor(image: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(image, torch.Tensor)


def preparations(
    images: Iterable[Picture], spec: ImageSpec
) -> Iterator[Callable[[], PreparedImage]]:
    """What is left to do for each image, which may be done later and in another thread.

    Files and bytes of files are left as they are. What may change meanwhile (an open file that is
    read on, a buffer that is filled again, the frames of a PIL image) is decoded when it is taken.
    """
    for image in images:
        if isinstance(image, (str, bytes, os.PathLike)):
            yield partial(prepare, image, spec)
            continue
        pixels = decode(image)
        if isinstance(image, np.ndarray) or _is_tensor(image):
            pixels = pixels.copy()  # it may share the memory of one that is used again
        yield partial(to_input, pixels, spec)
