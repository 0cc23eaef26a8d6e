"""The model of a server with its lanes and its cache: encode an image, segment it, everything.

Nothing but the lanes' threads computes. The event loop waits for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import numpy as np

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.errors import ImageError
from tinyvit.images.decode import decode
from tinyvit.sam.automatic import SamAutomaticMaskGenerator
from tinyvit.sam.embedding import ImageEmbedding
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks, Segmenter

from .answers import jpeg_view
from .cache import Cache
from .lanes import FairQueue, Job, Lane
from .metrics import Metrics
from .problems import Problem
from .schema import EverythingRequest, Model
from .settings import ServeSettings

logger = logging.getLogger("tinyvit.serve")

MEBI = 2**20
BATCH = 8  # waiting images of one size that are encoded together


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
        self.cache = Cache(settings.cache_mb * MEBI, settings.keep, self._check)
        self.metrics = Metrics(self.cache)
        self._flights: dict[str, asyncio.Future[Stored]] = {}
        threads = settings.threads or os.cpu_count() or 1
        wait, watch = settings.max_wait, self.metrics.observe_jobs
        self.encode_lane = Lane(
            FairQueue("encode", 4, 16, wait),
            batch_size=BATCH,
            run_batch=lambda works: [_result(work) for work in works],
            begin=lambda: _set_threads(threads),
            watch=watch,
        )
        few = max(1, threads // 2)
        self.decode_lane = Lane(
            FairQueue("decode", 8, 256, wait), begin=lambda: _set_threads(few), watch=watch
        )
        self.everything_lane = Lane(
            FairQueue("everything", 1, 2, wait), begin=lambda: _set_threads(few), watch=watch
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
            raise Problem("draining", "the server is about to end", retry_after=5)
        if self.state != "ready" or self._segmenter is None:
            raise Problem("loading", "the model is being loaded", retry_after=2)
        return self._segmenter

    def load(self) -> None:
        """Load the model, and answer one click on a grey image, which warms everything up.

        Raises:
            TinyViTError: The checkpoint cannot be had.
            ValueError: A setting does not go with it.
        """
        settings = self.settings
        if self._segmenter is None:
            self._segmenter = Segmenter(
                settings.checkpoint,
                backend=settings.backend,  # type: ignore[arg-type]
                precision=settings.precision,
                device=settings.device,
                pad=None if settings.pad else False,
            )
        grey = np.full((64, 64, 3), 128, np.uint8)
        for masks in self._segmenter.segment([grey], [[Prompt(points=[[32, 32]])]]):
            masks.mask(0)
        model = self.model
        self.metrics.set_model(model.name, model.sha256 or "", model.precision)
        if self.state == "loading":
            self.state = "ready"

    @property
    def model(self) -> Model:
        """What the server says of its model."""
        encoder = self._segmenter.encoder if self._segmenter is not None else None
        name = os.path.basename(self.settings.checkpoint or DEFAULT_CHECKPOINT)
        return Model(
            name=name,
            sha256=encoder.weights_sha256() if encoder is not None else None,
            precision=encoder.engine.precision if encoder is not None else self.settings.precision,
        )

    @property
    def thresholds(self) -> dict[str, float]:
        """Thresholds that belong to the weights."""
        return dict(self.segmenter.model.thresholds)

    def close(self) -> None:
        """Take no more work; wait for what runs."""
        self.state = "draining"
        for lane in self.lanes:
            lane.close(self.settings.drain_seconds)

    def known(self, image_id: str) -> ImageEmbedding:
        """The embedding of an image that was sent.

        Raises:
            Problem: ``unknown-image``.
        """
        found = self.cache.get(image_id)
        if found is None:
            raise Problem(
                "unknown-image", f"no image {image_id[:12]}… is known here; send it again"
            )
        return found

    async def encode(self, data: bytes, client: str, view: int | None = None) -> Stored:
        """Encode an image, or find that it is known; images that are being encoded are waited for.

        Raises:
            Problem: It is no image, has too many pixels, or the lane refuses.
        """
        segmenter = self.segmenter
        image_id = await asyncio.to_thread(sha256, data) if len(data) > MEBI else sha256(data)
        found = self.cache.get(image_id)
        if found is not None and view is None:
            return Stored(image_id, found, is_new=False)
        flight = self._flights.get(image_id)
        if flight is not None and view is None:
            stored = await asyncio.shield(flight)
            return Stored(image_id, stored.embedding, is_new=False, timing=stored.timing)
        work = _Encoding(segmenter, data, image_id, found, view, self.settings.max_pixels)
        job = self.encode_lane.submit(client, work)
        own: asyncio.Future[Stored] = asyncio.ensure_future(self._landed(job, image_id))
        if view is None:
            self._flights[image_id] = own
            own.add_done_callback(lambda _: self._flights.pop(image_id, None))
        return await asyncio.shield(own)  # a client that goes does not stop it: others may wait

    async def _landed(self, job: Job, image_id: str) -> Stored:
        stored: Stored = await asyncio.wrap_future(job.done)
        if stored.is_new:
            self.cache.put(image_id, stored.embedding)
            height, width = stored.embedding.original_size
            self.metrics.pixels.observe(height * width)
        stored.timing["wait_ms"] = _ms(job.waited)
        return stored

    async def segment(
        self,
        image_id: str,
        prompts: Sequence[Prompt],
        multimask: bool | Literal["auto"],
        client: str,
        *,
        is_preview: bool = False,
        then: Callable[[Masks], Any] = lambda masks: masks,
    ) -> tuple[Any, dict[str, float]]:
        """Decode prompts on a known image; ``then`` is applied to the masks in the lane's thread.

        Returns:
            (what ``then`` gave, milliseconds by what was done).

        Raises:
            Problem: The image is unknown, a prompt is wrong, or the lane refuses.
        """
        segmenter, embedding = self.segmenter, self.known(image_id)

        def work() -> Any:
            prepared = self.cache.prepared(image_id, lambda: segmenter.prepare(embedding))
            return then(segmenter.predict(embedding, prompts, multimask, prepared=prepared))

        job = self.decode_lane.submit(client, work, is_preview=is_preview)
        result = await self._outcome(job)
        return result, {"wait_ms": _ms(job.waited), "decode_ms": _ms(job.ran)}

    async def everything(
        self,
        image_id: str,
        request: EverythingRequest,
        client: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[list[Any], dict[str, float]]:
        """Masks of everything on a known image.

        Args:
            image_id: The image.
            request: Its parameters.
            client: Whose request it is.
            progress: Called in the lane's thread; what it raises stops the work.

        Raises:
            Problem: The image is unknown, a parameter is wrong, or the lane refuses.
        """
        segmenter, embedding = self.segmenter, self.known(image_id)
        generator = SamAutomaticMaskGenerator(
            segmenter.model, output_mode="coco_rle", **request.model_dump()
        )
        work = lambda: generator.generate(embedding, progress)  # noqa: E731
        job = self.everything_lane.submit(client, work)
        result = await self._outcome(job)
        return result, {"wait_ms": _ms(job.waited), "run_ms": _ms(job.ran)}

    async def _outcome(self, job: Job) -> Any:
        try:
            return await asyncio.wrap_future(job.done)
        except ValueError as err:
            raise Problem("bad-prompt", str(err)) from err

    def _check(self, embedding: ImageEmbedding) -> None:
        if self._segmenter is not None:
            self._segmenter.encoder.check(embedding)


class _Encoding:
    """Reads and encodes one image in the lane's thread."""

    def __init__(
        self,
        segmenter: Segmenter,
        data: bytes,
        image_id: str,
        known: ImageEmbedding | None,
        view: int | None,
        max_pixels: int,
    ) -> None:
        self.segmenter, self.data, self.image_id = segmenter, data, image_id
        self.known, self.view, self.max_pixels = known, view, max_pixels

    def __call__(self) -> Stored:
        start = perf_counter()
        try:
            rgb = decode(self.data, max_pixels=self.max_pixels)
        except ImageError as err:
            is_large = "limit of" in str(err)
            words = str(err).partition("; if you trust it")[0]
            raise Problem("too-many-pixels" if is_large else "not-an-image", words) from err
        read = perf_counter()
        embedding = self.known or next(iter(self.segmenter.embed([rgb])))
        timing = {"read_ms": _ms(read - start), "encode_ms": _ms(perf_counter() - read)}
        shown = None if self.view is None else jpeg_view(rgb, self.view)
        return Stored(self.image_id, embedding, self.known is None, timing, shown)


def sha256(data: bytes) -> str:
    """The id of an image."""
    return hashlib.sha256(data).hexdigest()


def _result(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as err:  # told to the client of this very job
        return err


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _set_threads(count: int) -> None:
    """How many threads the lane's own thread computes with."""
    import torch

    torch.set_num_threads(count)
