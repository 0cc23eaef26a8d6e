"""The work on a piece of the plan: read, encode, quantise, in the order of the sources.

It knows the store's recipe and reads from the store what can be copied, but writes nothing to it:
the run takes the rows. ``write_piece`` is a piece from its sources to fragments, as an actor does
it.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from tinyvit.errors import ImageError
from tinyvit.images.decode import MAX_PIXELS
from tinyvit.images.preprocess import prepare
from tinyvit.inference.read_ahead import read_ahead
from tinyvit.sam.embedding import early_map, early_merge

from .attempts import REASON, Attempts
from .commits import FragmentWriter
from .plan import KnownContent
from .recipe import Recipe
from .rows import DamagedRowError, StoreRow, quantise
from .sources import Source, read_source, sha256_of
from .store import EmbeddingStore

if TYPE_CHECKING:
    from tinyvit.images.preprocess import PreparedImage
    from tinyvit.inference import Encoded, Engine
    from tinyvit.modules import TinyViT

State = Literal["stored", "copied", "kept", "failed"]

_MOST_WAITING = 32  # jobs with a row


@dataclass(frozen=True)
class EmbedOutcome:
    """What became of an image.

    Attributes:
        path: Its name in the store.
        state: "stored": encoded; "copied": the store had the content under this or another name;
            "kept": it was read and is as it was; "failed".
        reason: Why it failed, or empty.
    """

    path: str
    state: State
    reason: str = ""


@dataclass
class _Job:
    """A source on its way: read, and then a row, to be encoded, or to be looked at later."""

    source: Source
    sha256: str = ""
    prepared: PreparedImage | None = None
    done: tuple[EmbedOutcome, StoreRow | None] | None = None
    is_later: bool = False


class EmbedWorker:
    """Makes rows of images, of one recipe, with one engine.

    Args:
        recipe: Of the store.
        engine: What encodes.
        store: Where content that is ``known`` is copied from.
        known: The contents that the store has; None copies nothing.
        attempts: Where it is noted which images are worked on.
        max_pixels: Most pixels of an image.
        defers: Leave an image whose content waits for its commit to ``later``, to be copied.

    Raises:
        CheckpointError: The engine's recipe is another one.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        store: EmbeddingStore | None = None,
        known: KnownContent | None = None,
        attempts: Attempts | None = None,
        max_pixels: int | None = MAX_PIXELS,
        defers: bool = True,
    ) -> None:
        own = Recipe.of(engine, recipe.dtype, recipe.keep, recipe.early)
        recipe.check(own, "the store" if store is None else store.url)
        self.recipe, self.engine, self.store, self.known = recipe, engine, store, known
        self.later: list[Source] = []
        self._attempts, self._max_pixels, self._defers = attempts, max_pixels, defers
        model = cast("TinyViT", engine.model)
        self._merge = early_merge(model) if recipe.early else None

    def work(
        self, sources: Iterable[Source], alone: bool = False
    ) -> Iterator[tuple[EmbedOutcome, StoreRow | None]]:
        """Outcomes in the order of the sources, each with its row where there is one to write.

        What goes to ``later`` has no outcome yet. ``alone``: nothing is worked on beside an image.
        """
        workers = 0 if alone else self.engine.workers
        readings = (partial(self._read, source) for source in self._begun(sources, alone))
        with (
            closing(read_ahead(readings, workers=workers, ahead=self.engine.ahead)) as jobs,
            closing(self._endings(jobs)) as endings,
        ):
            for job in read_ahead(endings, workers=workers, ahead=workers + 1):
                if self._attempts is not None:
                    self._attempts.end(job.source.path)
                if job.done is None:
                    self.later.append(job.source)
                else:
                    yield job.done

    def fail(self, source: Source, reason: str) -> tuple[EmbedOutcome, StoreRow]:
        """The outcome and the row of an image that is not worked on."""
        return self._failed(_Job(source), reason)

    def _begun(self, sources: Iterable[Source], alone: bool) -> Iterator[Source]:
        for source in sources:
            if self._attempts is not None:
                self._attempts.begin(source.path, alone)
            yield source

    def _read(self, source: Source) -> _Job:
        """Read a file, and decode it where its content is new."""
        job = _Job(source)
        try:
            data, job.source = read_source(source)
            job.sha256 = sha256_of(data)
            if job.sha256 == job.source.sha256 and job.source == source:
                job.done = EmbedOutcome(source.path, "kept"), None
            elif (row := self._copied(job)) is not None:
                job.done = EmbedOutcome(source.path, "copied"), row
            elif self._waits(job.sha256):
                job.is_later = True
            else:
                file = io.BytesIO(data)
                file.name = source.place
                spec = self.engine.image_spec
                job.prepared = prepare(file, spec, max_pixels=self._max_pixels)
        except ImageError as err:
            job.done = self._failed(job, str(err))
        except MemoryError:
            job.done = self._failed(job, f"{source.place!r} needs more memory than there is")
        return job

    def _copied(self, job: _Job) -> StoreRow | None:
        if self.store is None or self.known is None or not self.known.has(job.sha256):
            return None
        try:
            row = self.store.find_content(job.sha256)
        except DamagedRowError:
            return None
        source = job.source
        return row and replace(
            row, path=source.path, size=source.size, mtime_ns=source.mtime_ns, made=_now()
        )

    def _waits(self, sha256: str) -> bool:
        return self._defers and self.known is not None and self.known.is_recent(sha256)

    def _endings(
        self, jobs: Generator[_Job, None, None]
    ) -> Generator[Callable[[], _Job], None, None]:
        """What is left to do for each job once it has been encoded, in order."""
        order: deque[_Job] = deque()
        is_over = False

        def inputs() -> Generator[PreparedImage, None, None]:
            nonlocal is_over
            for job in jobs:
                order.append(job)
                prepared, job.prepared = job.prepared, None
                if prepared is not None:
                    yield prepared
                elif sum(job.done is not None for job in order) >= _MOST_WAITING:
                    return  # or copies of many images would wait here for one to be encoded
            is_over = True

        while not is_over:
            for encoded in self.engine.encode(inputs(), stages=self.recipe.early, pooled=True):
                while (job := order.popleft()).done is not None or job.is_later:
                    yield partial(_same, job)
                yield partial(self._ended, job, encoded)
            while order:
                yield partial(_same, order.popleft())

    def _ended(self, job: _Job, encoded: Encoded) -> _Job:
        recipe, source = self.recipe, job.source
        features = scales = early = early_scales = None
        try:
            if recipe.keep == "all":
                features, scales = quantise(encoded.features, recipe.dtype, 0)
            if recipe.early and encoded.stages is not None:
                found = early_map(encoded.stages[1], self._merge)
                early, early_scales = quantise(found, recipe.dtype, -1)
            pooled = cast("np.ndarray[tuple[int], np.dtype[np.float32]]", encoded.pooled)
            if not np.isfinite(pooled).all():
                raise ValueError("its features are not all finite numbers; try --precision fp32")
        except ValueError as err:
            job.done = self._failed(job, f"{source.place!r}: {err}")
            return job
        row = StoreRow(
            *(source.path, "ok", job.sha256, source.size, source.mtime_ns, "", _now()),
            *(encoded.placement, features, scales, early, early_scales, pooled),
        )
        job.done = EmbedOutcome(source.path, "stored"), row
        return job

    def _failed(self, job: _Job, reason: str) -> tuple[EmbedOutcome, StoreRow]:
        source = job.source
        state = source.size, source.mtime_ns
        row = StoreRow(source.path, "failed", job.sha256, *state, reason, _now())
        return EmbedOutcome(source.path, "failed", reason), row


def _same(job: _Job) -> _Job:
    return job


def _now() -> datetime:
    return datetime.now(timezone.utc)


def write_piece(
    worker: EmbedWorker, store: EmbeddingStore, sources: Sequence[Source]
) -> tuple[list[str], list[EmbedOutcome], int]:
    """A piece of the plan from its sources to fragments that wait for their commit.

    Args:
        worker: Which defers nothing.
        store: Where the fragments are written; it does not change.
        sources: The piece.

    Returns:
        (fragments, outcomes, bytes of the rows) for ``commits.commit``, as plain data that another
        process takes.

    Raises:
        OSError: The fragments could not be written; nothing of the piece counts.
    """
    writer = FragmentWriter(store)
    outcomes = []
    try:
        for outcome, row in worker.work(sources):
            outcomes.append(outcome)
            if row is not None:
                writer.add(row)
        return writer.finish(), outcomes, writer.nbytes
    except BaseException:
        writer.abandon()
        raise


def pass_over(
    worker: EmbedWorker, sources: Sequence[Source], attempts: Attempts
) -> tuple[list[Source], list[Source], list[tuple[EmbedOutcome, StoreRow]]]:
    """Sort sources by what a process that died was at.

    Returns:
        (sources without suspicion, suspects, outcomes and rows of those that are passed over).
    """
    deadly = set(attempts.deadly)
    failed = [worker.fail(one, f"{one.place!r}: {REASON}") for one in sources if one.path in deadly]
    for outcome, _ in failed:
        attempts.end(outcome.path)
    suspects = [one for one in sources if one.path in attempts.suspects and one.path not in deadly]
    rest = {*deadly, *attempts.suspects}
    return [one for one in sources if one.path not in rest], suspects, failed
