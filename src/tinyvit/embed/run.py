"""``embed_images``: bring a store up to date with its sources; what ``tinyvit embed`` calls.

Sources are compared with the store, what is new is read and encoded, and rows are committed every
minute or half gigabyte. What has been committed stays, whatever happens; the same call goes on from
there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tinyvit.errors import CheckpointError
from tinyvit.images.decode import MAX_PIXELS

from .actors import RayRun, RayWorkers, load_ray
from .attempts import Attempts
from .commits import FragmentWriter, commit, delete, explain, keep_up, remove_twice
from .plan import Check, KnownContent, Plan, make_plan
from .recipe import Dtype, Keep, Recipe
from .rows import StoreRow
from .sources import Source, list_sources
from .store import EmbeddingStore, is_remote
from .work import EmbedOutcome, EmbedWorker, pass_over

if TYPE_CHECKING:
    from tinyvit.inference import Engine

Sources: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"

COMMIT_SECONDS = 60.0
COMMIT_BYTES = 512 << 20
COMMITS_BETWEEN = 100  # times of upkeep
SOURCES = "tinyvit.sources"  # in the dataset's configuration: the folders embedded last

CREATED_BY_OTHERS = 10  # seconds to wait for that
TRIED = 3  # images of a dry run


@dataclass
class EmbedReport:
    """What a run did.

    Attributes:
        stored: Images encoded.
        copied: Images whose content the store had, under this or another name.
        kept: Images that were stored already.
        failed: (path, reason) of images that failed, in this run or before.
        gone: Rows whose file is not among the sources; deleted with ``prune``.
        seconds: How long it took.
        nbytes: Bytes of the rows that were written.
    """

    stored: int = 0
    copied: int = 0
    kept: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    gone: int = 0
    seconds: float = 0.0
    nbytes: int = 0


@dataclass(frozen=True)
class EmbedEstimate:
    """What a run would do.

    Attributes:
        new: Images that the store has no row of.
        changed: Images to be read since their file changed, or since everything is checked.
        kept: Images that are stored already.
        failed: Images that failed before and are left alone.
        gone: Rows whose file is not among the sources.
        nbytes: Bytes to be written, at most, after three images; None where there is nothing to do.
        seconds: How long it takes, at most; None likewise.
    """

    new: int
    changed: int
    kept: int
    failed: int
    gone: int
    nbytes: int | None = None
    seconds: float | None = None


def embed_images(
    sources: Sources,
    store: str | os.PathLike[str] | EmbeddingStore,
    engine: Engine | str | os.PathLike[str] | None = None,
    *,
    dtype: Dtype | None = None,
    keep: Keep | None = None,
    early: bool | None = None,
    check: Check = "state",
    retry_failed: bool = False,
    prune: bool = False,
    part: tuple[int, int] = (0, 1),
    max_pixels: int | None = MAX_PIXELS,
    ray: RayWorkers | None = None,
    tell: Callable[[EmbedOutcome], object] = bool,
    progress: Callable[[int, int, int], object] | None = None,
) -> EmbedReport:
    """Embed images into a store, or only what is new, changed or missing there.

    Args:
        sources: One or many folders, image files, ``@list.txt`` with a path in each line, or
            addresses such as "s3://bucket/photos".
        store: A store, or where it is or shall be, which is not within a source.
        engine: What encodes; or the name of a checkpoint, a file or a folder. None: the encoder in
            the store, and the embedded weights for a new one.
        dtype: As for ``EmbeddingStore.create``; None: the store's, "fp16" for a new one.
        keep: Likewise.
        early: Likewise.
        check: "state" reads files whose size or time differs from their row's; "content" reads all.
        retry_failed: Try again what failed before.
        prune: Delete rows whose file is not among the sources.
        part: (number from 0, parts in all): work on one part of the images, beside others.
        max_pixels: Most pixels of an image; None: no limit.
        ray: Let actors of Ray do the work, each with the encoder in the store; None: this process.
        tell: Is given what became of each image that was read, once that is committed.
        progress: Is given (images done, images in all, images failed) as the work goes on.

    Returns:
        What was done.

    Raises:
        CheckpointError: The store is of another recipe, or cannot be read or written; what is
            committed stays, and the same call goes on from there.
        MissingExtraError: pylance, or Ray where it is asked for, is not installed.
        ValueError: A source is not there, two have one name, or a value is out of its range.
    """
    start = time.monotonic()
    if ray is not None:
        load_ray()  # or an empty store would be made before its absence is told
    given = {"dtype": dtype, "keep": keep, "early": early}
    with _opened(store, engine, given) as (url, found, running, recipe):
        listed, roots = list_sources(sources, url, part)
        opened = found or _created(store, running, recipe)
        plan = make_plan(listed, opened, check=check, retry_failed=retry_failed, part=part)
        if plan.twice:
            remove_twice(opened, plan.twice)
        committer = Committer(opened, running, tell)
        committer.report.kept = plan.kept
        committer.report.failed += plan.failed
        if plan.todo and ray is not None:
            leader = EmbedWorker(recipe, running)
            RayRun(ray, committer, leader, roots, progress, len(listed)).run(plan.todo, max_pixels)
        elif plan.todo:
            with Attempts(None if is_remote(url) else Path(url)) as attempts:
                known = KnownContent(opened)
                worker = EmbedWorker(recipe, running, opened, known, attempts, max_pixels)
                _Run(worker, committer, known, attempts, progress, len(listed)).run(plan.todo)
        committer.report.gone = len(plan.gone)
        if prune and plan.gone:
            delete(opened, plan.gone)
        committer.close(roots if plan.todo or plan.gone else None)
    committer.report.seconds = time.monotonic() - start
    return committer.report


class Committer:
    """Commits what others have written, counts what became of the images, keeps the store up.

    The leader of a run has one, whoever computes.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        engine: Engine | None = None,
        tell: Callable[[EmbedOutcome], object] = bool,
    ) -> None:
        self.store, self.report, self._tell = store, EmbedReport(), tell
        self._commits = 0
        self.facts = {"tinyvit": version("tinyvit"), "pylance": version("pylance")}
        if engine is not None:
            self.facts |= {"backend": engine.backend.name, "device": engine.backend.device}

    def commit(self, fragments: Sequence[str], outcomes: Sequence[EmbedOutcome]) -> None:
        """Commit fragments, then count and tell the outcomes of their images.

        Raises:
            CheckpointError: It could not be committed; nothing of it counts.
        """
        written = [outcome.path for outcome in outcomes if outcome.state != "kept"]
        try:
            commit(self.store, fragments, written, self.facts)
        except (OSError, ValueError) as err:
            raise self.broken(err) from err
        for outcome in outcomes:
            if outcome.state == "failed":
                self.report.failed.append((outcome.path, outcome.reason))
            else:
                count = getattr(self.report, outcome.state) + 1
                setattr(self.report, outcome.state, count)
            self._tell(outcome)
        self._commits += bool(fragments)
        if fragments and self._commits % COMMITS_BETWEEN == 0:
            self._keep_up()

    def close(self, roots: Sequence[str] | None = None) -> None:
        """Leave the store ready for readers; ``roots`` are the folders that were embedded."""
        if roots is not None:
            self._keep_up()
            text = "\n".join(roots)
            if self.store.dataset.config().get(SOURCES) != text:
                self.store.dataset.update_config({SOURCES: text})
                self.store.refresh()

    def broken(self, err: Exception) -> CheckpointError:
        """What to raise where rows could not be written."""
        done = self.report.stored + self.report.copied
        return CheckpointError(
            f"{explain(err, self.store.url)}. {done} images of this run are stored; make room, and "
            "the same command goes on from there"
        )

    def _keep_up(self) -> None:
        try:
            keep_up(self.store)
        except (OSError, ValueError) as err:
            raise self.broken(err) from err


class _Run:
    """One process that reads, encodes, writes and commits."""

    def __init__(
        self,
        worker: EmbedWorker,
        committer: Committer,
        known: KnownContent,
        attempts: Attempts,
        progress: Callable[[int, int, int], object] | None,
        total: int,
    ) -> None:
        self._worker, self._committer, self._known = worker, committer, known
        self._attempts, self._progress, self._total = attempts, progress, total
        self._writer = FragmentWriter(committer.store)
        self._outcomes: list[EmbedOutcome] = []
        self._since = time.monotonic()
        self._is_broken = False
        report = committer.report
        self._done, self._failed = report.kept + len(report.failed), len(report.failed)

    def run(self, todo: Sequence[Source]) -> None:
        try:
            self._work(todo)
            while self._worker.later:  # they have the content of images that are stored by now
                self._commit()
                later, self._worker.later = self._worker.later, []
                self._take(self._worker.work(later))
        finally:  # interrupted or not: what is encoded is kept
            if self._is_broken:
                self._writer.abandon()
            else:
                self._commit()

    def _work(self, todo: Sequence[Source]) -> None:
        rest, suspects, passed_over = pass_over(self._worker, todo, self._attempts)
        self._take(iter(passed_over))
        for suspect in suspects:
            self._take(self._worker.work([suspect], alone=True))
        self._take(self._worker.work(rest))

    def _take(self, results: Iterator[tuple[EmbedOutcome, StoreRow | None]]) -> None:
        for outcome, row in results:
            if row is not None:
                self._add(row)
            self._outcomes.append(outcome)
            self._done += 1
            self._failed += outcome.state == "failed"
            if self._progress is not None:
                self._progress(self._done, self._total, self._failed)
            seconds = time.monotonic() - self._since
            if seconds >= COMMIT_SECONDS or self._writer.nbytes >= COMMIT_BYTES:
                self._commit()

    def _add(self, row: StoreRow) -> None:
        try:
            self._writer.add(row)
        except (OSError, ValueError) as err:
            self._is_broken = True
            raise self._committer.broken(err) from err

    def _commit(self) -> None:
        writer, outcomes = self._writer, self._outcomes
        self._writer, self._outcomes = FragmentWriter(self._committer.store), []
        try:
            fragments = writer.finish()
        except (OSError, ValueError) as err:
            self._is_broken = True
            raise self._committer.broken(err) from err
        self._committer.commit(fragments, outcomes)
        self._committer.report.nbytes += writer.nbytes
        self._known.commit()
        self._attempts.commit()
        self._since = time.monotonic()


# -- before the work -------------------------------------------------------------------------------


def estimate(
    sources: Sources,
    store: str | os.PathLike[str] | EmbeddingStore,
    engine: Engine | str | os.PathLike[str] | None = None,
    *,
    dtype: Dtype | None = None,
    keep: Keep | None = None,
    early: bool | None = None,
    check: Check = "state",
    retry_failed: bool = False,
    part: tuple[int, int] = (0, 1),
    max_pixels: int | None = MAX_PIXELS,
) -> EmbedEstimate:
    """What ``embed_images`` would do, from the time that three images take; nothing is written.

    Arguments and errors are those of ``embed_images``.
    """
    given = {"dtype": dtype, "keep": keep, "early": early}
    with _opened(store, engine, given) as (url, found, running, recipe):
        listed, _ = list_sources(sources, url, part)
        plan = Plan(listed, len(listed), 0)
        if found is not None:
            plan = make_plan(listed, found, check=check, retry_failed=retry_failed, part=part)
        changed = len(plan.todo) - plan.new
        counts = plan.new, changed, plan.kept, len(plan.failed), len(plan.gone)
        if not plan.todo:
            return EmbedEstimate(*counts)
        worker = EmbedWorker(recipe, running, max_pixels=max_pixels)
        step = max(1, len(plan.todo) // (TRIED + 1))
        first, *others = plan.todo[::step][: TRIED + 1]
        list(worker.work([first]))  # it takes longer
        tried = others or [first]
        start = time.monotonic()
        sizes = [0 if row is None else row.nbytes for _, row in worker.work(tried)]
        share = len(plan.todo) / len(tried)
        seconds = (time.monotonic() - start) * share
        return EmbedEstimate(*counts, int(sum(sizes) * share), seconds)


@contextmanager
def _opened(
    store: str | os.PathLike[str] | EmbeddingStore,
    engine: Engine | str | os.PathLike[str] | None,
    given: Mapping[str, Any],
) -> Iterator[tuple[str, EmbeddingStore | None, Engine, Recipe]]:
    """The store's address, the store if it is there, what encodes, and their one recipe."""
    from tinyvit.inference.engine import Engine

    url = store.url if isinstance(store, EmbeddingStore) else os.fspath(store)
    found = store if isinstance(store, EmbeddingStore) else EmbeddingStore.find(url)
    with ExitStack() as stack:
        if isinstance(engine, Engine):
            running = engine
        elif engine is None and found is not None:
            running = stack.enter_context(found.load_engine())
        else:
            running = stack.enter_context(Engine(engine))
        chosen = {name: value for name, value in given.items() if value is not None}
        if found is None:
            yield url, None, running, Recipe.of(running, **chosen)
            return
        own = {name: getattr(found.recipe, name) for name in given}
        found.recipe.check(Recipe.of(running, **{**own, **chosen}), url)
        yield url, found, running, found.recipe


def _created(
    store: str | os.PathLike[str] | EmbeddingStore, engine: Engine, recipe: Recipe
) -> EmbeddingStore:
    if isinstance(store, EmbeddingStore):
        return store
    try:
        return EmbeddingStore.create(
            store, engine, dtype=recipe.dtype, keep=recipe.keep, early=recipe.early
        )
    except CheckpointError:
        for _ in range(CREATED_BY_OTHERS):  # another writer may be making it
            found = EmbeddingStore.find(store)
            if found is not None:
                found.recipe.check(recipe, found.url)
                return found
            time.sleep(1)
        raise
