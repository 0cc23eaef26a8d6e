"""The model of a server with its lanes and its cache: encode an image, segment it, everything.

Nothing but the lanes' threads computes. The event loop waits for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.images.decode import decode
from tinyvit.inference.bundle import engine_for
from tinyvit.inference.engine import CPU_PIXELS
from tinyvit.sam.automatic import SamAutomaticMaskGenerator
from tinyvit.sam.embedding import ImageEmbedding
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks, Segmenter

from .answers import jpeg_view
from .bodies import Budget
from .cache import Cache
from .lanes import FairQueue, Job, Lane, draining
from .metrics import Metrics
from .problems import Problem
from .schema import EverythingRequest, Model
from .settings import ServeSettings

if TYPE_CHECKING:
    from tinyvit.embed import EmbeddingStore

logger = logging.getLogger("tinyvit.serve")

MEBI = 2**20
BODIES = 16  # of the largest size that may be held at once
_BATCH = 8  # waiting images of one size that are encoded together, at most
_WRONG_PROMPT = re.compile(r"prompt (\d+) of image 0: (.*)", re.DOTALL)


@dataclass(frozen=True)
class Stored:
    """An image that the server knows.

    Attributes:
        id: SHA-256 of its bytes.
        embedding: Its embedding.
        is_new: It was encoded just now.
        timing: Milliseconds by what was done.
        view: Base64 of an upright JPEG, where one was asked for.
    """

    id: str
    embedding: ImageEmbedding
    is_new: bool
    timing: dict[str, float] = field(default_factory=dict)
    view: str | None = None


@dataclass(eq=False)
class _Flight:
    """An image that is being encoded, and how many wait for it."""

    job: Job
    waiting: int = 0


class Service:
    """Everything that API and adapters call.

    Args:
        settings: Of the server.
        segmenter: The model, ready; None loads ``settings.checkpoint`` by ``load``.
    """

    def __init__(self, settings: ServeSettings, segmenter: Segmenter | None = None) -> None:
        self.settings = settings
        self._segmenter = segmenter
        self.state: Literal["loading", "ready", "draining"] = "loading"
        self.failure: Exception | None = None
        self.on_loaded: Callable[[], None] = lambda: None
        self.cache = Cache(settings.cache_mb * MEBI, settings.keep, self._check)
        self.bodies = Budget(BODIES * settings.max_image_mb * MEBI)
        self.metrics = Metrics(self.cache)
        self._flights: dict[str, _Flight] = {}
        self._model: Model | None = None
        self._ends: float | None = None
        threads = settings.threads or os.cpu_count() or 1
        few, wait, watch = max(1, threads // 2), settings.max_wait, self.metrics.observe_job
        self.encode_lane = Lane(
            FairQueue("encode", 4, 16, wait),
            run=self._encode_all,
            begin=lambda: _set_threads(threads),
            watch=watch,
        )
        self.decode_lane, self.everything_lane = (
            Lane(FairQueue(name, each, cap, wait), begin=lambda: _set_threads(few), watch=watch)
            for name, each, cap in (("decode", 8, 256), ("everything", 1, 2))
        )
        for lane in self.lanes:
            self.metrics.watch_lane(lane)

    @property
    def lanes(self) -> tuple[Lane, Lane, Lane]:
        """Encode, decode, everything."""
        return self.encode_lane, self.decode_lane, self.everything_lane

    @property
    def segmenter(self) -> Segmenter:
        """The model.

        Raises:
            Problem: It is not loaded yet, or the server is about to end.
        """
        if self.state == "draining":
            raise draining()
        if self.state != "ready" or self._segmenter is None:
            raise _loading()
        return self._segmenter

    @property
    def model(self) -> Model:
        """What the server says of its model.

        Raises:
            Problem: It is not loaded yet.
        """
        if self._model is None:
            raise _loading()
        return self._model

    def load(self) -> None:
        """Load the model, and answer one click on a grey image, which warms everything up.

        Raises:
            TinyViTError: The checkpoint cannot be had, or the store does not go with it.
            ValueError: A setting does not go with it.
        """
        settings = self.settings
        own = self._segmenter = self._segmenter or _open(settings)
        if settings.store is not None:
            self.cache.store = _open_store(settings.store, own)
        for masks in own.segment([np.full((64, 64, 3), 128, np.uint8)], [[{"points": [[32, 32]]}]]):
            masks.mask(0)
        encoder = own.encoder
        height, width = encoder.image_spec.size
        fits = _BATCH if encoder.engine.backend.device != "cpu" else CPU_PIXELS // (height * width)
        self.encode_lane.batch_size = min(_BATCH, max(1, fits))
        self._model = Model(
            name=os.path.basename(settings.checkpoint or DEFAULT_CHECKPOINT),
            sha256=encoder.weights_sha256(),
            input_size=[height, width],
            precision=encoder.engine.precision,
        )
        self.metrics.set_model(self._model)
        if self.state == "loading":
            self.state = "ready"

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds that belong to the weights."""
        return {} if self._segmenter is None else dict(self._segmenter.source.thresholds)

    def close(self) -> None:
        """Take no more work; wait for what runs, within ``drain_seconds`` of the first call."""
        self.state = "draining"
        if self._ends is None:
            self._ends = monotonic() + self.settings.drain_seconds
        for lane in self.lanes:
            lane.close()
        for lane in self.lanes:
            lane.join(self._ends - monotonic())

    async def find(self, image_id: str) -> ImageEmbedding | None:
        """The embedding of an image, from memory, folder or store; None for an unknown one."""
        found = self.cache.get(image_id)
        if found is None and self.cache.has_more:
            found = await asyncio.to_thread(self.cache.load, image_id)
        return found

    async def known(self, image_id: str) -> ImageEmbedding:
        """The embedding of an image that was sent.

        Raises:
            Problem: ``unknown-image``.
        """
        found = await self.find(image_id)
        if found is None:
            raise Problem(
                "unknown-image", f"no image {image_id[:12]}… is known here; send it again"
            )
        return found

    async def encode(self, data: bytes, client: str, view: int | None = None) -> Stored:
        """Encode an image, or find that it is known; images that are being encoded are waited for.

        Args:
            data: The file.
            client: Whose request it is.
            view: Pixels a side of an upright JPEG, if one is wanted.

        Raises:
            Problem: It is no image, has too many pixels, or the lane refuses.
        """
        segmenter = self.segmenter
        image_id = await asyncio.to_thread(sha256, data) if len(data) > MEBI else sha256(data)
        found = await self.find(image_id)
        if found is not None and view is None:
            return Stored(image_id, found, is_new=False)
        name = f"{image_id}:{view}"
        flight = self._flights.get(name)
        if flight is None:
            work = _Encoding(segmenter, data, image_id, found, view, self.settings.max_pixels)
            flight = _Flight(self.encode_lane.submit(client, work, key=segmenter))
            self._flights[name] = flight
        is_first = flight.waiting == 0
        flight.waiting += 1
        try:
            stored: Stored = await asyncio.shield(asyncio.wrap_future(flight.job.done))
        finally:
            flight.waiting -= 1
            if not flight.waiting:
                self._flights.pop(name, None)
                flight.job.done.cancel()  # has begun: it is finished and kept all the same
        stored.timing["wait_ms"] = _ms(flight.job.waited)
        return stored if is_first else Stored(image_id, stored.embedding, False, view=stored.view)

    def _encode_all(self, works: Sequence[Callable[[], Any]]) -> Sequence[Any]:
        """Read images one at a time, encode them together, keep them; in the lane's thread."""
        tasks = [cast(_Encoding, work) for work in works]
        outcomes: list[Stored | Exception | None] = [_read_or_problem(task) for task in tasks]
        wanted = [task for task in tasks if task.embedding is None and task.prepared is not None]
        start = perf_counter()
        if wanted:
            inputs = (task.prepared for task in wanted if task.prepared is not None)
            for task, made in zip(
                wanted, wanted[0].segmenter.encoder.encode_prepared(inputs), strict=True
            ):
                task.embedding, task.is_new = made, True
                height, width = made.original_size
                self.metrics.pixels.observe(height * width)
                self.cache.put(task.image_id, made)
        seconds = perf_counter() - start
        return [
            outcome or task.stored(seconds) for outcome, task in zip(outcomes, tasks, strict=True)
        ]

    async def segment(
        self,
        image_id: str,
        prompts: Sequence[Prompt | Callable[[], Prompt]],
        multimask: bool | Literal["auto"],
        client: str,
        *,
        is_preview: bool = False,
        then: Callable[[Masks], Any] = lambda masks: masks,
    ) -> tuple[Any, dict[str, float]]:
        """Decode prompts on a known image; ``then`` is applied to the masks in the lane's thread.

        Args:
            image_id: The image.
            prompts: Or functions that make them, since a mask in one takes time to read.
            multimask: As for ``Segmenter``.
            client: Whose request it is.
            is_preview: It may be dropped.
            then: What the answer is made by.

        Returns:
            (what ``then`` gave, milliseconds by what was done).

        Raises:
            Problem: The image is unknown, a prompt is wrong, or the lane refuses.
        """
        segmenter, embedding = self.segmenter, await self.known(image_id)

        def work() -> Any:
            made = [_made(number, prompt) for number, prompt in enumerate(prompts)]
            prepared = self.cache.prepared(image_id, lambda: segmenter.prepare(embedding))
            return then(segmenter.predict(embedding, made, multimask, prepared=prepared))

        job = self.decode_lane.submit(client, work, is_preview=is_preview)
        try:
            result = await asyncio.wrap_future(job.done)
        except ValueError as err:
            raise _bad_prompt(err) from err
        return result, {"wait_ms": _ms(job.waited), "decode_ms": _ms(job.ran)}

    async def everything(
        self,
        image_id: str,
        request: EverythingRequest,
        client: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[list[Any], str | None, dict[str, float]]:
        """Masks of everything on a known image.

        Args:
            image_id: The image.
            request: Its parameters.
            client: Whose request it is.
            progress: Called in the lane's thread; what it raises stops the work.

        Returns:
            (records of the masks, a hint where no mask passed, milliseconds by what was done).

        Raises:
            Problem: The image is unknown, a parameter is wrong, or the lane refuses.
        """
        segmenter, embedding = self.segmenter, await self.known(image_id)

        def work() -> Any:
            generator = SamAutomaticMaskGenerator(
                segmenter.source,
                output_mode="coco_rle",
                engine=segmenter.encoder.engine,
                device=self.settings.device,
                **request.model_dump(),
            )
            with warnings.catch_warnings(record=True) as hints:  # only this lane does so
                warnings.simplefilter("always")
                found = generator.generate(embedding, progress)
            return found, str(hints[0].message) if hints else None

        job = self.everything_lane.submit(client, work)
        try:
            found, hint = await asyncio.wrap_future(job.done)
        except ValueError as err:
            raise Problem("bad-parameters", str(err)) from err
        return found, hint, {"wait_ms": _ms(job.waited), "run_ms": _ms(job.ran)}

    def _check(self, embedding: ImageEmbedding) -> None:
        if self._segmenter is not None:
            self._segmenter.encoder.check(embedding)


@dataclass(eq=False)
class _Encoding:
    """One image that is to be encoded; ``embedding`` is there where it is known."""

    segmenter: Segmenter
    data: bytes
    image_id: str
    embedding: ImageEmbedding | None
    view: int | None
    max_pixels: int
    is_new: bool = False
    shown: str | None = None
    read_seconds: float = 0.0
    prepared: tuple[NDArray[np.float32], Any] | None = None

    def __call__(self) -> None:
        """Read the image and make it the model's input: its pixels are let go here."""
        start = perf_counter()
        try:
            rgb = decode(self.data, max_pixels=self.max_pixels)
        except ImageError as err:
            is_large = "limit of" in str(err)
            words = str(err).partition("; if you trust it")[0]
            raise Problem("too-many-pixels" if is_large else "not-an-image", words) from err
        if self.view is not None:
            self.shown = jpeg_view(rgb, self.view)
        if self.embedding is None:
            self.prepared = self.segmenter.encoder.engine.prepare(rgb)
        self.read_seconds = perf_counter() - start

    def stored(self, seconds: float) -> Stored:
        """The outcome; ``seconds`` are those of encoding."""
        timing = {"read_ms": _ms(self.read_seconds), "encode_ms": _ms(seconds)}
        embedding = cast(ImageEmbedding, self.embedding)
        return Stored(self.image_id, embedding, self.is_new, timing, self.shown)


def _read_or_problem(task: _Encoding) -> Exception | None:
    try:
        task()
    except Exception as err:  # told to the client of this very image
        return err
    return None


def _loading() -> Problem:
    return Problem("loading", "the model is being loaded", retry_after=2)


def _open(settings: ServeSettings) -> Segmenter:
    """The model; torch's threads are those of the lanes, other engines have their own."""
    engine = engine_for(settings.checkpoint, settings.backend, settings.device)
    return Segmenter(
        settings.checkpoint,
        backend=settings.backend,  # type: ignore[arg-type]
        precision=settings.precision,
        device=settings.device,
        pad=None if settings.pad else False,
        threads=None if engine == "torch" else settings.threads,
    )


def _open_store(url: str, segmenter: Segmenter) -> EmbeddingStore:
    """A store whose embeddings are those that the model would make.

    Raises:
        CheckpointError: There is none, or it was made in another way; each differing fact is named.
        MissingExtraError: pylance is not installed.
    """
    from tinyvit.embed import EmbeddingStore
    from tinyvit.embed.recipe import check_exact

    store, encoder = EmbeddingStore.open(url), segmenter.encoder
    check_exact(encoder.engine.backend)
    own = replace(
        store.recipe,
        weights_sha256=encoder.weights_sha256() or "",
        image_spec=encoder.image_spec,
        precision=encoder.engine.precision,
        keep="all",
        early=store.recipe.early or encoder.wants_early,
    )
    differing = store.recipe.differences(own)
    if differing:
        raise CheckpointError(
            f"{url} does not go with the model that is served: {'; '.join(differing)}. Serve what "
            "the store was made with (--checkpoint, --precision), or leave --store out"
        )
    return store


def sha256(data: bytes) -> str:
    """The id of an image."""
    return hashlib.sha256(data).hexdigest()


def _made(number: int, prompt: Prompt | Callable[[], Prompt]) -> Prompt:
    try:
        return prompt if isinstance(prompt, Prompt) else prompt()
    except ValueError as err:
        raise ValueError(f"prompt {number} of image 0: {err}") from err


def _bad_prompt(err: ValueError) -> Problem:
    found = _WRONG_PROMPT.match(str(err))
    if found is None:
        return Problem("bad-prompt", str(err))
    return Problem("bad-prompt", found[2], where=f"/prompts/{found[1]}")


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _set_threads(count: int) -> None:
    """How many threads the lane's own thread computes with; other engines have their own."""
    torch = sys.modules.get("torch")  # the model is loaded by now: is it torch that computes?
    if torch is not None:
        torch.get_num_threads()  # at the first call a thread takes the number that was set last
        torch.set_num_threads(count)
