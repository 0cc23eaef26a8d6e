"""Lanes: a bounded queue before one thread, fair between clients.

Encoding and decoding have a lane each, so that a click never waits for other people's images. A
request that would wait too long is refused at once, with the time after which it may come again.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from .problems import Problem

_SMOOTHING = 0.2  # weight of the newest job in the moving average
_LATEST = 60.0  # seconds after which the last one that is refused may come again


@dataclass(eq=False)
class Job:
    """One piece of work of one client.

    Attributes:
        client: Whose it is.
        work: Called in the lane's thread; its result is that of ``done``.
        key: Jobs of an equal key may be run together.
        is_preview: Runs only when nothing else waits.
        since: When it was taken in.
        done: The outcome; cancelling it before the job has begun drops the job.
    """

    client: str
    work: Callable[[], Any]
    key: object = None
    is_preview: bool = False
    since: float = 0.0
    done: Future[Any] = field(default_factory=Future)
    waited: float = 0.0
    ran: float = 0.0


class FairQueue:
    """Jobs in turn between clients; no thread, so that a test can drive it with its own clock.

    Args:
        name: Of the lane, for words and metrics.
        per_client: Jobs of one client that may wait.
        cap: Jobs that may wait in all.
        max_wait: Seconds; a job that is expected to wait longer is refused.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        name: str,
        per_client: int,
        cap: int,
        max_wait: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.per_client, self.cap, self.max_wait = name, per_client, cap, max_wait
        self.clock = clock
        self.service_seconds = 0.0
        self.running = 0
        self.dropped = 0
        self._promised = 0.0  # when the one that was refused last may come again
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._previews: OrderedDict[str, Job] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._previews)

    @property
    def expected_wait(self) -> float:
        """Seconds that a job taken in now is likely to wait."""
        ahead = sum(map(len, self._waiting.values())) + self.running
        return ahead * self.service_seconds

    def check(self, client: str) -> None:
        """Refuse what cannot be taken in.

        Raises:
            Problem: ``too-many-at-once`` or ``busy``.
        """
        if len(self._waiting.get(client, ())) >= self.per_client:
            raise Problem(
                "too-many-at-once",
                f"at most {self.per_client} requests of one client may wait for the lane "
                f"{self.name!r}; wait for an answer before the next request",
                retry_after=max(1, math.ceil(self.service_seconds)),
            )
        wait = self.expected_wait
        if wait > self.max_wait or sum(map(len, self._waiting.values())) >= self.cap:
            raise Problem(
                "busy",
                f"a request would wait about {wait:.0f} s; the limit is {self.max_wait:g} s",
                retry_after=self._after(),
            )

    def add(self, job: Job) -> None:
        """Take a job in; a newer preview of the same client replaces the older.

        Raises:
            Problem: As ``check``.
        """
        job.since = self.clock()
        if job.is_preview:
            older = self._previews.pop(job.client, None)
            if older is not None and older.done.set_running_or_notify_cancel():
                older.done.set_exception(
                    Problem("busy", "a newer preview took its place", retry_after=1)
                )
            self._previews[job.client] = job
            return
        self.check(job.client)
        self._waiting.setdefault(job.client, deque()).append(job)

    def take(self, most: int = 1) -> list[Job]:
        """The next job, with up to ``most - 1`` waiting ones of an equal key; [] for none.

        Jobs whose client has gone are dropped; those that waited too long are refused.
        """
        first = self._next()
        if first is None:
            return []
        batch = [first]
        if first.key is not None:
            for jobs in self._waiting.values():
                for job in [one for one in jobs if one.key == first.key]:
                    if len(batch) < most:
                        jobs.remove(job)
                        if job.done.set_running_or_notify_cancel():
                            batch.append(job)
        self.running = len(batch)
        now = self.clock()
        for job in batch:
            job.waited = now - job.since
        return batch

    def finished(self, seconds: float, jobs: int) -> None:
        """Note how long a batch ran."""
        self.running = 0
        each = seconds / max(jobs, 1)
        old = self.service_seconds
        self.service_seconds = old + _SMOOTHING * (each - old) if old else each

    def _next(self) -> Job | None:
        while self._waiting:
            client, jobs = next(iter(self._waiting.items()))
            del self._waiting[client]
            job = jobs.popleft() if jobs else None
            if jobs:
                self._waiting[client] = jobs  # at the end: the others come first
            if job is None:
                continue
            if not job.done.set_running_or_notify_cancel():
                self.dropped += 1
                continue
            if self.clock() - job.since > self.max_wait:
                problem = Problem("busy", "it waited too long", retry_after=self._after())
                job.done.set_exception(problem)
                continue
            return job
        while self._previews:
            _, job = self._previews.popitem(last=False)
            if job.done.set_running_or_notify_cancel():
                return job
        return None

    def _after(self) -> int:
        """Seconds after which one that is refused may come: each is given a time of its own."""
        now = self.clock()
        free = now + max(self.expected_wait - self.max_wait, 0.0)
        self._promised = min(max(self._promised, free) + self.service_seconds, now + _LATEST)
        return max(1, math.ceil(self._promised - now))

    def refuse_all(self) -> None:
        """Answer everything that waits: the server ends."""
        for job in chain(*self._waiting.values(), self._previews.values()):
            if job.done.set_running_or_notify_cancel():
                job.done.set_exception(draining())
        self._waiting.clear()
        self._previews.clear()


def draining() -> Problem:
    """What is answered once a server ends."""
    words = "the server is about to end"
    return Problem("draining", words, retry_after=5, headers={"Connection": "close"})


class Lane:
    """A ``FairQueue`` and the one thread that works on it.

    Args:
        queue: Where jobs wait.
        run: Runs the works of a batch, and gives their results in order; an exception instead of a
            result is that job's alone.
        begin: Called in the thread before its first job, for example to set its number of threads.
        watch: Called with (name of the lane, job, outcome) after each job, for metrics.

    Attributes:
        batch_size: Jobs of an equal key that are run together, at most.
    """

    def __init__(
        self,
        queue: FairQueue,
        *,
        run: Callable[[Sequence[Callable[[], Any]]], Sequence[Any]] | None = None,
        begin: Callable[[], None] = lambda: None,
        watch: Callable[[str, Job, str], None] = lambda name, job, outcome: None,
    ) -> None:
        self.queue, self.batch_size = queue, 1
        self._run = run or (lambda works: [work() for work in works])
        self._begin, self._watch = begin, watch
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._loop, name=f"lane-{queue.name}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def check(self, client: str) -> None:
        """Refuse a client whose job could not be taken in.

        Raises:
            Problem: As ``submit``.
        """
        with self._changed:
            try:
                self.queue.check(client)
            except Problem:
                self._watch(self.queue.name, Job(client, lambda: None), "refused")
                raise

    def submit(
        self,
        client: str,
        work: Callable[[], Any],
        *,
        key: object = None,
        is_preview: bool = False,
    ) -> Job:
        """Take a job in.

        Raises:
            Problem: It is refused; ``draining`` when the lane has been closed.
        """
        job = Job(client, work, key, is_preview)
        if not is_preview:
            self.check(client)
        with self._changed:
            if self._is_closed:
                raise draining()
            self.queue.add(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """Take no more jobs in."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait for the jobs that are there, at most so long; those that still wait are refused."""
        self._thread.join(max(seconds, 0.0))
        with self._changed:
            self.queue.refuse_all()

    def _loop(self) -> None:
        is_first = True
        while True:
            with self._changed:
                jobs = self.queue.take(self.batch_size)
                while not jobs:
                    if self._is_closed and not len(self.queue):
                        return
                    self._changed.wait()
                    jobs = self.queue.take(self.batch_size)
            if is_first:
                self._begin()
                is_first = False
            start = time.perf_counter()
            try:
                outcomes = self._run([job.work for job in jobs])
            except BaseException as err:  # any failure belongs to the client, not the lane
                outcomes = [err] * len(jobs)
            seconds = time.perf_counter() - start
            with self._changed:
                self.queue.finished(seconds, len(jobs))
            for job, outcome in zip(jobs, outcomes, strict=True):
                job.ran = seconds
                has_failed = isinstance(outcome, BaseException)
                self._watch(self.queue.name, job, "failed" if has_failed else "done")
                (job.done.set_exception if has_failed else job.done.set_result)(outcome)
