"""A run whose work is done by actors of Ray, on this machine or on a cluster.

An actor reads, encodes and writes fragments, which nobody sees; the driver gives it pieces of the
plan, sized by how fast it is, and commits what it returns. Embeddings never pass through Ray. Only
whole pieces are committed: a piece whose actor died is done again, at first by Ray.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.inference.bundle import ExportedEncoder, engine_for, is_exported

from .attempts import DEADLY, REASON
from .commits import FragmentWriter
from .plan import KnownContent
from .sources import Source
from .store import EmbeddingStore, first_line, is_remote
from .work import EmbedOutcome, EmbedWorker, write_piece

if TYPE_CHECKING:
    from .recipe import Recipe
    from .run import Committer

PIECE_SECONDS = 20.0
FIRST_PIECE = 4
MOST_IN_A_PIECE = 4096

PATIENCE = {
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Set where the environment does not: a busy machine starts Ray slowly."""

_OBJECTS = 100 << 20  # bytes of Ray's object store, which has next to nothing to hold


@dataclass(frozen=True)
class RayWorkers:
    """Actors of Ray that embed.

    Attributes:
        address: "local" starts Ray on this machine; "auto" or an address joins a cluster.
        count: Actors; None: as many as the GPUs or CPUs that Ray has now are enough for.
        cpus: Of each actor; as many threads compute.
        gpus: Of each actor.
    """

    address: str = "local"
    count: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus <= 0 or self.gpus < 0 or (self.count is not None and self.count < 1):
            raise ValueError(
                "an actor needs more than 0 CPUs and at least 0 GPUs, and there must be one at "
                f"least; came {self}"
            )


class EmbedActor:
    """What runs in a process of Ray's, on any node.

    Args:
        task: Address of the store, its recipe as the driver has it, engine arguments, limits.
    """

    def __init__(self, task: Mapping[str, Any]) -> None:
        self._task = task
        self._worker: EmbedWorker | None = None

    def begin(self) -> dict[str, str]:
        """Make ready, and say what this node computes with.

        Raises:
            CheckpointError: A path is not seen here, or weights or versions are other ones.
        """
        task, node = self._task, f"the worker on {os.uname().nodename}"
        own = versions()
        if own != task["versions"]:
            raise CheckpointError(
                f"{node} has {own}, but the driver has {task['versions']}; install the same there"
            )
        for place in task["places"]:
            if not is_remote(place) and not os.path.exists(place):
                raise CheckpointError(
                    f"{node} does not see {place!r}; every node must see sources and store under "
                    "the same path, or name them by an address such as s3://bucket/photos"
                )
        store = EmbeddingStore.open(task["url"], task["storage_options"])
        recipe: Recipe = task["recipe"]
        store.recipe.check(recipe, f"{store.url}, as {node} sees it,")
        threads = max(1, int(task["cpus"]))
        arguments = {**task["engine"], "workers": threads}
        with store.fetch_encoder() as folder:
            if is_exported(folder) != task["is_exported"]:  # the driver has another form of it
                arguments["backend"] = "auto"
            if engine_for(folder, arguments["backend"]) == "torch":
                import torch

                torch.set_num_threads(threads)
            else:
                arguments["threads"] = threads
            engine = store.engine_of(folder, **arguments)
        self._worker = EmbedWorker(
            recipe, engine, store, KnownContent(store), None, task["max_pixels"], defers=False
        )
        return {"backend": engine.backend.name, "device": engine.backend.device}

    def work(self, sources: Sequence[Source]) -> tuple[list[str], list[EmbedOutcome], int, float]:
        """A piece: (fragments, outcomes, bytes, seconds). After a death the actor begins again."""
        if self._worker is None:
            self.begin()
        worker = self._worker
        if worker is None or worker.store is None:
            raise CheckpointError("this actor has no store")
        start = time.monotonic()
        return *write_piece(worker, worker.store, sources), time.monotonic() - start


def versions() -> dict[str, str]:
    """Of what must be the same everywhere."""
    return {name: version(name) for name in ("tinyvit", "pylance")}


class RayRun:
    """The driver: gives pieces to actors, and commits what they return.

    Args:
        workers: How many actors, of what.
        committer: Of the store.
        worker: Of this process, for rows of images that end an actor.
        roots: Folders of the sources, which every node must see.
        progress: As for ``embed_images``.
        total: Sources in all.
    """

    def __init__(
        self,
        workers: RayWorkers,
        committer: Committer,
        worker: EmbedWorker,
        roots: Sequence[str],
        progress: Callable[[int, int, int], object] | None,
        total: int,
    ) -> None:
        self._workers, self._committer, self._worker = workers, committer, worker
        self._roots, self._progress, self._total = roots, progress, total
        self._fragments: list[str] = []
        self._outcomes: list[EmbedOutcome] = []
        self._todo: deque[Source] = deque()
        self._alone: deque[Source] = deque()  # of pieces whose actors died
        self._size = FIRST_PIECE
        self._running: dict[Any, tuple[Any, list[Source]]] = {}
        report = committer.report
        self._done, self._failed = report.kept + len(report.failed), len(report.failed)

    def run(self, todo: Sequence[Source], max_pixels: int | None) -> None:
        """Embed these, and commit every minute.

        Raises:
            CheckpointError: Ray or a node of it does not do, or the store cannot be written.
            MissingExtraError: Ray is not installed.
            ValueError: This machine has too few CPUs or GPUs.
        """
        ray = load_ray()
        self._todo.extend(replace(one, place=_absolute(one.place)) for one in todo)
        with _connected(ray, self._workers) as count:
            count = min(count, len(todo))
            actor = ray.remote(EmbedActor).options(
                num_cpus=self._workers.cpus,
                num_gpus=self._workers.gpus,
                max_restarts=-1,
                max_task_retries=DEADLY - 1,
            )
            task = self._task(max_pixels)
            actors = [actor.remote(task) for _ in range(count)]
            self._running = {one.begin.remote(): (one, []) for one in actors}
            try:
                self._lead(ray, count)
            finally:  # interrupted or not: what is written is kept
                self._commit()

    def _task(self, max_pixels: int | None) -> dict[str, Any]:
        store, engine = self._committer.store, self._worker.engine
        url = _absolute(store.url)
        return {
            "url": url,
            "storage_options": store.storage_options,
            "recipe": store.recipe,
            "versions": versions(),
            "places": [url, self._todo[0].place, *self._roots],
            "cpus": self._workers.cpus,
            "max_pixels": max_pixels,
            "is_exported": isinstance(engine.backend, ExportedEncoder),
            "engine": {
                "backend": "torch" if self._workers.gpus else engine.backend.name,
                "batch_size": engine.batch_size,
            },
        }

    def _lead(self, ray: Any, count: int) -> None:
        from .run import COMMIT_BYTES, COMMIT_SECONDS

        since, nbytes = time.monotonic(), 0
        while self._running:
            left = max(0.0, since + COMMIT_SECONDS - time.monotonic())
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=left)
            for one in ready:
                actor, piece = self._running.pop(one)
                nbytes += self._take(ray, one, piece)
                rest = self._next(count)
                if rest:
                    self._running[actor.work.remote(rest)] = actor, rest
            if time.monotonic() - since >= COMMIT_SECONDS or nbytes >= COMMIT_BYTES:
                self._commit()
                since, nbytes = time.monotonic(), 0

    def _next(self, count: int) -> list[Source]:
        """The next piece: smaller ones at the end, so that all actors end together."""
        if self._todo:
            size = max(1, min(self._size, -(-len(self._todo) // count)))
            return [self._todo.popleft() for _ in range(min(size, len(self._todo)))]
        return [self._alone.popleft()] if self._alone else []

    def _take(self, ray: Any, one: Any, piece: list[Source]) -> int:
        """Take what an actor returned; give the bytes of its rows."""
        errors = ray.exceptions
        try:
            found = ray.get(one)
        except (errors.RayActorError, errors.OutOfMemoryError, errors.WorkerCrashedError) as err:
            if not piece:
                raise CheckpointError(
                    f"a worker of Ray could not start: {first_line(err)}; is tinyvit installed "
                    "on every node?"
                ) from err
            self._died(piece)
            return 0
        except errors.RayTaskError as err:
            cause = getattr(err, "cause", err)
            if isinstance(cause, OSError) and not isinstance(cause, CheckpointError):
                raise self._committer.broken(cause) from err
            raise cause from err
        if not piece:
            self._committer.facts |= found
            return 0
        fragments, outcomes, nbytes, seconds = found
        self._fragments += fragments
        self._size = int(len(piece) * min(4.0, PIECE_SECONDS / max(seconds, 1e-3)))
        self._size = max(1, min(MOST_IN_A_PIECE, self._size))
        self._count(outcomes)
        self._committer.report.nbytes += nbytes
        return int(nbytes)

    def _died(self, piece: list[Source]) -> None:
        """What ended its actor as often as Ray tries: each image alone, and then no more."""
        if len(piece) > 1:
            self._alone.extend(piece)
            return
        writer = FragmentWriter(self._committer.store)
        outcome, row = self._worker.fail(piece[0], f"{piece[0].place!r}: {REASON}")
        writer.add(row)
        self._fragments += writer.finish()
        self._count([outcome])

    def _count(self, outcomes: Sequence[EmbedOutcome]) -> None:
        self._outcomes += outcomes
        self._done += len(outcomes)
        self._failed += sum(outcome.state == "failed" for outcome in outcomes)
        if self._progress is not None:
            self._progress(self._done, self._total, self._failed)

    def _commit(self) -> None:
        fragments, outcomes = self._fragments, self._outcomes
        self._fragments, self._outcomes = [], []
        self._committer.commit(fragments, outcomes)


def load_ray() -> Any:
    """The package ray, with patience for a busy machine and without statistics of its use.

    Raises:
        MissingExtraError: It is not installed.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
    except ImportError as err:
        raise MissingExtraError(
            f"work on a cluster needs the package ray, which cannot be imported ({err}); "
            "pip install 'tinyvit[ray]'"
        ) from err
    return ray


@contextmanager
def _connected(ray: Any, workers: RayWorkers) -> Iterator[int]:
    """Ray, running; gives how many actors there are to be. What is started here ends here."""
    is_ours, is_local = not ray.is_initialized(), workers.address == "local"
    if is_ours:
        more = {"include_dashboard": False, "object_store_memory": _OBJECTS} if is_local else {}
        quiet = {"log_to_driver": False, "logging_level": "WARNING"}
        try:
            with warnings.catch_warnings():  # Ray's forks become other programs at once
                warnings.filterwarnings("ignore", "lance is not fork-safe")
                ray.init(address=workers.address, **more, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as err:
            raise CheckpointError(
                f"Ray does not answer at {workers.address!r}: {first_line(err)}; start it with "
                "'ray start --head', or give --ray local"
            ) from err
    try:
        there = ray.cluster_resources()
        fits = int(there.get("CPU", 0) / workers.cpus)
        if workers.gpus:
            fits = min(fits, int(there.get("GPU", 0) / workers.gpus))
        count = workers.count or max(1, fits)
        if is_local and count > fits:
            raise ValueError(
                f"{count} workers of {workers.cpus:g} CPUs and {workers.gpus:g} GPUs do not fit on "
                f"this machine, where Ray has {there.get('CPU', 0):g} CPUs and "
                f"{there.get('GPU', 0):g} GPUs; ask for less of each, or fewer"
            )
        yield count
    finally:
        if is_ours:
            ray.shutdown()


def _absolute(place: str) -> str:
    return place if is_remote(place) else os.path.abspath(place)
