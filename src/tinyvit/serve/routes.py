"""The handlers of API v1: from a request to a call of ``Service``, and its result as an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette.sse import EventSourceResponse

from tinyvit.images.draw import to_png
from tinyvit.sam.segmenter import Masks

from . import answers, bodies, problems, schema
from .problems import Problem
from .service import Service, Stored, sha256
from .settings import ServeSettings

ImageId = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of its bytes")]
View = Annotated[
    int | None, Query(ge=16, le=8192, description="send an upright JPEG of so many pixels a side")
]
_MOST_EXACT_PIXELS = 500_000_000
"""Of all masks of one request together: they are enlarged in one go, while others wait."""


class Routes:
    """The routes.

    Args:
        service: What they call.
        settings: Of the server.
        document: Makes the OpenAPI document.
    """

    def __init__(
        self, service: Service, settings: ServeSettings, document: Callable[[], dict[str, Any]]
    ) -> None:
        self.service, self.settings, self.document = service, settings, document

    def add_to(self, api: FastAPI) -> None:
        """Give the application its routes, with what they take and answer for OpenAPI."""
        image, one, text = _body("image/*"), "/v1/images/{image_id}", ("text/plain",)
        prompts = _body("application/json", schema.SegmentRequest)
        grid = _body("application/json", schema.EverythingRequest)
        about, found, masks = schema.About, schema.Image, schema.Segmented
        raw, events = "application/octet-stream", "text/event-stream"
        # method, path, handler, body, model of the answer, other media types of it
        table: list[tuple[str, str, Any, dict[str, Any] | None, Any, tuple[str, ...]]] = [
            ("GET", "/healthz", self.healthz, None, None, text),
            ("GET", "/readyz", self.readyz, None, None, text),
            ("GET", "/problems/{name}", self.problem, None, None, text),
            ("GET", "/v1", self.about, None, about, ()),
            ("GET", "/v1/openapi.json", self.openapi, None, None, ("application/json",)),
            ("POST", "/v1/images", self.post_image, image, found, ()),
            ("PUT", one, self.put_image, image, found, ()),
            ("GET", one, self.get_image, None, found, ()),
            ("DELETE", one, self.delete_image, None, None, ()),
            ("GET", f"{one}/embedding", self.embedding, None, None, (raw,)),
            ("POST", f"{one}/segment", self.segment, prompts, masks, ("image/png", raw)),
            ("POST", f"{one}/everything", self.everything, grid, schema.Everything, (events,)),
            ("POST", "/v1/segment", self.segment_body, image, masks, ("image/png", raw)),
            ("PUT", "/v1/segment", self.segment_body, image, masks, ("image/png", raw)),
        ]
        if self.settings.metrics:
            table.append(("GET", "/metrics", self.metrics, None, None, text))
        for method, path, handler, body, answer, kinds in table:
            others: dict[int | str, dict[str, Any]] = {}
            if kinds:
                others[200] = {"content": {kind: {} for kind in kinds}}
            if answer is found and body:
                others[201] = {"model": found, "description": "It was not known"}
            api.add_api_route(
                path,
                handler,
                methods=[method],
                summary=handler.__doc__.rstrip("."),
                openapi_extra=body,
                response_model=answer,
                response_class=Response if answer is None else JSONResponse,
                responses=others,
                status_code=204 if method == "DELETE" else 200,
            )
        api.head(one, include_in_schema=False)(self.get_image)

    async def healthz(self) -> Response:
        """Whether the process lives."""
        return Response("ok", media_type="text/plain")

    async def readyz(self) -> Response:
        """Whether images are taken."""
        self.service.segmenter  # noqa: B018  # a problem while it is not ready
        return Response("ready", media_type="text/plain")

    async def metrics(self) -> Response:
        """Numbers for Prometheus."""
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def problem(self, name: str) -> Response:
        """What a problem means."""
        if name not in problems.TITLES:
            raise Problem("no-such-path", "there is no such problem")
        return Response(problems.explain(name), media_type="text/plain")

    async def about(self) -> Response:
        """Version, model, limits."""
        settings, service = self.settings, self.service
        names = ("max_image_mb", "max_pixels", "max_wait")
        limits: dict[str, float] = {name: getattr(settings, name) for name in names}
        limits |= {"prompts": schema.MOST_PROMPTS, "points": schema.MOST_POINTS}
        answer = schema.About(
            version=version("tinyvit"),
            api=1,
            state=service.state,
            model=None if service.state == "loading" else service.model,
            thresholds=service.thresholds,
            limits=limits,
            adapters=list(settings.adapters),
            links={"openapi": "v1/openapi.json", "images": "v1/images"},
        )
        return _json(answer)

    async def openapi(self) -> Response:
        """The OpenAPI document."""
        return Response(json.dumps(self.document()), media_type="application/json")

    async def post_image(self, request: Request, view: View = None) -> Response:
        """Encode an image, or find that it is known."""
        return self._image(await self._stored(request, view))

    async def put_image(self, request: Request, image_id: ImageId) -> Response:
        """Encode the image of this SHA-256."""
        found = await self.service.find(image_id)
        if found is not None:  # its body is not read
            return self._image(Stored(image_id, found, is_new=False))
        return self._image(await self._stored(request, None, image_id))

    async def get_image(self, image_id: ImageId) -> Response:
        """A known image."""
        return self._image(Stored(image_id, await self.service.known(image_id), is_new=False))

    async def delete_image(self, image_id: ImageId) -> Response:
        """Forget an image, here and in the folder."""
        await asyncio.to_thread(self.service.cache.forget, image_id)
        return Response(status_code=204)

    async def embedding(
        self, request: Request, image_id: ImageId, dtype: Literal["fp32", "fp16"] = "fp32"
    ) -> Response:
        """An embedding as a safetensors file."""
        embedding = await self.service.known(image_id)
        tag = f'"{image_id}-{dtype}-{(self.service.model.sha256 or "")[:16]}"'
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers={"ETag": tag})
        data = await asyncio.to_thread(embedding.to_bytes, dtype=dtype)
        name = f'attachment; filename="{image_id[:12]}.safetensors"'
        headers = {"ETag": tag, "Content-Disposition": name}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def segment(self, request: Request, image_id: ImageId) -> Response:
        """Masks of prompts on a known image."""
        self.service.decode_lane.check(_client(request))
        asked = await self._asked(request, schema.SegmentRequest)
        return await self._segmented(request, image_id, asked, {})

    async def segment_body(
        self, request: Request, query: Annotated[schema.SegmentQuery, Query()]
    ) -> Response:
        """Encode and segment in one go; prompts in the query."""
        asked = query.to_request()
        stored = await self._stored(request, None)
        return await self._segmented(request, stored.id, asked, stored.timing)

    async def everything(self, request: Request, image_id: ImageId) -> Response:
        """Masks of everything; with progress as server-sent events."""
        self.service.everything_lane.check(_client(request))
        asked = await self._asked(request, schema.EverythingRequest)
        embedding = await self.service.known(image_id)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
        is_gone = False

        def progress(done: int, total: int) -> None:
            if is_gone:
                raise _GoneError
            told = json.dumps({"done": done, "total": total})
            loop.call_soon_threadsafe(events.put_nowait, {"event": "progress", "data": told})

        async def run() -> schema.Everything:
            found, hint, timing = await self.service.everything(
                image_id, asked, _client(request), progress
            )
            _note(request, image_id, timing)
            return schema.Everything(
                image=_size(image_id, embedding.original_size),
                model=self.service.model,
                masks=[_found(one) for one in found],
                hint=hint,
                timing=timing,
            )

        async def stream() -> AsyncIterator[dict[str, Any]]:
            nonlocal is_gone
            task = asyncio.ensure_future(run())
            task.add_done_callback(lambda _: events.put_nowait(None))
            try:
                while (event := await events.get()) is not None:
                    yield event
                try:
                    yield {"event": "result", "data": task.result().model_dump_json()}
                except Problem as problem:
                    body = problem.body(request.state.request_id).decode()
                    yield {"event": "problem", "data": body}
            finally:
                is_gone = True
                task.cancel()

        if "text/event-stream" in request.headers.get("accept", ""):
            return EventSourceResponse(stream())
        try:
            return _json(await bodies.unless_gone(request, run()))
        finally:
            is_gone = True

    async def _segmented(
        self,
        request: Request,
        image_id: str,
        asked: schema.SegmentRequest,
        timing: dict[str, float],
    ) -> Response:
        size = (await self.service.known(image_id)).original_size
        _check_work(asked, size)
        kind = _wanted_kind(request, len(asked.prompts))

        def then(masks: Masks) -> Any:
            if kind == "image/png":
                best = int(masks.predicted_ious[0].argmax())
                score = float(masks.predicted_ious[0][best])
                return to_png(masks.mask(0, best)), {"X-Tinyvit-Score": f"{score:.6f}"}
            if kind == "application/octet-stream":
                return answers.tensors(masks), {}
            return answers.describe(masks, asked)

        result, spent = await bodies.unless_gone(
            request,
            self.service.segment(
                image_id,
                [partial(one.to_prompt, size) for one in asked.prompts],
                asked.multimask,
                _client(request),
                is_preview=asked.preview,
                then=then,
            ),
        )
        timing = {**timing, **spent, "wait_ms": timing.get("wait_ms", 0) + spent["wait_ms"]}
        _note(request, image_id, timing)
        if kind != "application/json":
            data, headers = result
            return Response(data, media_type=kind, headers=headers)
        model, image = self.service.model, _size(image_id, size)
        return _json(schema.Segmented(image=image, model=model, objects=result, timing=timing))

    async def _asked(self, request: Request, kind: type[schema.Asked]) -> schema.Asked:
        """The request's JSON as a model; large ones are read by a thread."""
        self.service.segmenter  # noqa: B018  # refuse before anything is read
        value = await bodies.read_json(request, self.service.bodies)
        if int(request.headers.get("content-length", bodies.SMALL + 1)) <= bodies.SMALL:
            return schema.validate(kind, value)
        return await asyncio.to_thread(schema.validate, kind, value)

    @asynccontextmanager
    async def _image_body(self, request: Request) -> AsyncIterator[bytes]:
        self.service.segmenter  # noqa: B018  # refuse before anything is read
        bodies.check_image_type(request)
        self.service.encode_lane.check(_client(request))
        most = self.settings.max_image_mb * 2**20
        async with self.service.bodies.body(request, most) as data:
            yield data

    async def _stored(
        self, request: Request, view: int | None, image_id: str | None = None
    ) -> Stored:
        async with self._image_body(request) as data:
            if image_id is not None and await asyncio.to_thread(sha256, data) != image_id:
                raise Problem("other-image", "the SHA-256 of the body is not the one of the path")
            work = self.service.encode(data, _client(request), view)
            stored = await bodies.unless_gone(request, work)
        _note(request, stored.id, stored.timing)
        return stored

    def _image(self, stored: Stored) -> Response:
        height, width = stored.embedding.original_size
        answer = schema.Image(
            id=stored.id,
            width=width,
            height=height,
            cached=not stored.is_new,
            model=self.service.model,
            timing=stored.timing,
            view=stored.view,
        )
        return _json(answer, 201 if stored.is_new else 200)


class _GoneError(Exception):
    """Nobody waits for the answer any more."""


def _body(kind: str, model: type[schema.Strict] | None = None) -> dict[str, Any]:
    """The request body of a route, for OpenAPI."""
    if model is None:
        content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}}}
    else:
        content = {kind: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _check_work(asked: schema.SegmentRequest, size: tuple[int, int]) -> None:
    """Refuse what would hold the lane, or memory, for too long."""
    masks = len(asked.prompts) * (3 if asked.which == "all" else 1)
    masks *= bool(answers.EXACT & set(asked.include))
    given = sum(isinstance(one.mask, schema.RunLengths) for one in asked.prompts)
    if (masks + given) * size[0] * size[1] > _MOST_EXACT_PIXELS:
        most = max(1, _MOST_EXACT_PIXELS // (size[0] * size[1]))
        raise Problem(
            "bad-parameters",
            f"at most {most} masks in the pixels of this image are taken or given in one "
            "request; ask in parts, or include low_res alone",
        )


def _wanted_kind(request: Request, prompts: int) -> str:
    accept = request.headers.get("accept", "*/*")
    for kind in ("application/json", "image/png", "application/octet-stream"):
        if kind in accept:
            if kind == "image/png" and prompts != 1:
                raise Problem("not-acceptable", "a PNG holds one mask; send one prompt")
            return kind
    if "*/*" in accept or "application/*" in accept or not accept:
        return "application/json"
    raise Problem("not-acceptable", "JSON, image/png and application/octet-stream are offered")


def _found(record: dict[str, Any]) -> schema.Found:
    rle = record["segmentation"]
    return schema.Found(
        score=float(record["predicted_iou"]),
        stability=float(record["stability_score"]),
        area=int(record["area"]),
        box=[float(value) for value in record["bbox"]],
        point=[float(value) for value in record["point_coords"][0]],
        rle=schema.RunLengths(size=list(rle["size"]), counts=rle["counts"]),
    )


def _size(image_id: str, size: tuple[int, int]) -> schema.ImageSize:
    return schema.ImageSize(id=image_id, width=size[1], height=size[0])


def _client(request: Request) -> str:
    return str(request.state.client)


def _note(request: Request, image_id: str, timing: dict[str, float]) -> None:
    request.scope["state"]["facts"] |= {"image": image_id[:12], **timing}


def _json(value: schema.Strict, status: int = 200) -> Response:
    text = value.model_dump_json(exclude_none=True)
    return Response(text, status, {"Cache-Control": "no-store"}, "application/json")
