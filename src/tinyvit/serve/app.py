"""``create_app``: the routes of API v1 and the page, around one ``Service``."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tinyvit.errors import TinyViTError
from tinyvit.sam.prompts import Prompt
from tinyvit.sam.segmenter import Masks, Segmenter

from . import answers, bodies, problems, schema
from .access import AccessLog
from .guard import Guard
from .problems import Problem
from .service import Service, Stored, sha256
from .settings import ServeSettings

logger = logging.getLogger("tinyvit.serve")

_ID = re.compile(r"[0-9a-f]{64}\Z")
_PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}


def create_app(
    settings: ServeSettings | None = None, segmenter: Segmenter | None = None
) -> Callable[..., Any]:
    """Make the ASGI application of ``tinyvit serve``.

    Args:
        settings: Of the server; None takes the defaults.
        segmenter: A model that is ready; None loads the one of the settings when the server
            starts.

    Returns:
        The application, for uvicorn, Ray Serve or any other server. ``app.service`` is what it
        calls.
    """
    settings = (settings or ServeSettings()).with_token()
    service = Service(settings, segmenter)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service))
        yield
        service.state = "draining"
        await asyncio.to_thread(service.close)
        await asyncio.gather(loading, return_exceptions=True)

    api = FastAPI(
        title="tinyvit",
        version="1",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
    )
    routes = _Routes(service, settings)
    routes.add_to(api)
    _add_handlers(api)
    if settings.page:
        _add_page(api)
    if settings.adapters:
        from . import adapters

        adapters.add(api, service, settings)
    guard = Guard(api, settings, AccessLog(settings), service.metrics.observe_request)
    guard.service, guard.api = service, api  # type: ignore[attr-defined]
    return guard


async def _load(service: Service) -> None:
    try:
        await asyncio.to_thread(service.load)
    except (TinyViTError, ValueError, OSError, RuntimeError) as err:
        service.failure = err
        logger.error("the model could not be loaded: %s", err)


class _Routes:
    """The handlers of API v1."""

    def __init__(self, service: Service, settings: ServeSettings) -> None:
        self.service, self.settings = service, settings

    def add_to(self, api: FastAPI) -> None:
        """Give the application its routes, with what they take and answer for OpenAPI."""
        self._api = api
        image, one = _body("image/*"), "/v1/images/{image_id}"
        prompts = _body("application/json", schema.SegmentRequest)
        grid = _body("application/json", schema.EverythingRequest)
        known, masks, everything = schema.Image, schema.Segmented, schema.Everything
        table: list[tuple[str, str, Any, str, dict[str, Any] | None, Any]] = [
            ("GET", "/healthz", self.healthz, "Whether the process lives", None, None),
            ("GET", "/readyz", self.readyz, "Whether images are taken", None, None),
            ("GET", "/problems/{name}", self.problem, "What a problem means", None, None),
            ("GET", "/v1", self.about, "Version, model, limits", None, None),
            ("GET", "/v1/openapi.json", self.openapi, "This document", None, None),
            ("POST", "/v1/images", self.post_image, "Encode an image", image, known),
            ("PUT", one, self.put_image, "Encode the image of this SHA-256", image, known),
            ("GET", one, self.get_image, "A known image", None, known),
            ("HEAD", one, self.get_image, "", None, None),
            ("DELETE", one, self.delete_image, "Forget it", None, None),
            ("GET", f"{one}/embedding", self.embedding, "Its embedding, safetensors", None, None),
            ("POST", f"{one}/segment", self.segment, "Masks of prompts", prompts, masks),
            ("POST", f"{one}/everything", self.everything, "Masks of all", grid, everything),
            ("POST", "/v1/segment", self.segment_body, "Encode and segment", image, masks),
            ("PUT", "/v1/segment", self.segment_body, "", None, None),
        ]
        if self.settings.metrics:
            table.append(("GET", "/metrics", self.metrics, "Numbers for Prometheus", None, None))
        for method, path, handler, summary, body, answer in table:
            api.add_api_route(
                path,
                handler,
                methods=[method],
                summary=summary or None,
                include_in_schema=bool(summary),
                openapi_extra=body,
                response_model=answer,
            )

    async def healthz(self) -> Response:
        return Response("ok", media_type="text/plain")

    async def readyz(self) -> Response:
        self.service.segmenter  # noqa: B018  # a problem while it is not ready
        return Response("ready", media_type="text/plain")

    async def metrics(self) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def problem(self, name: str) -> Response:
        if name not in problems.TITLES:
            raise Problem("no-such-path", "there is no such problem")
        return Response(problems.explain(name), media_type="text/plain")

    async def about(self) -> Response:
        settings, ready = self.settings, self.service.state
        return _json(
            {
                "version": version("tinyvit"),
                "api": 1,
                "state": ready,
                "model": self.service.model.model_dump() if ready != "loading" else None,
                "thresholds": self.service.thresholds if ready != "loading" else {},
                "limits": {
                    "max_image_mb": settings.max_image_mb,
                    "max_pixels": settings.max_pixels,
                    "max_wait": settings.max_wait,
                    "prompts": 256,
                    "points": 1000,
                },
                "adapters": list(settings.adapters),
                "links": {"openapi": "v1/openapi.json", "images": "v1/images"},
            }
        )

    async def openapi(self) -> Response:
        return _json(openapi_document(self._api))

    async def post_image(self, request: Request, view: int | None = None) -> Response:
        return self._image(await self._stored(request, view))

    async def put_image(self, request: Request, image_id: str) -> Response:
        _check_id(image_id)
        found = self.service.cache.get(image_id)
        if found is not None:  # its body is not read
            return self._image(Stored(image_id, found, is_new=False))
        data = await self._body(request)
        if sha256(data) != image_id:
            raise Problem("other-image", "the SHA-256 of the body is not the one of the path")
        return self._image(await self.service.encode(data, _client(request)))

    async def get_image(self, image_id: str) -> Response:
        _check_id(image_id)
        return self._image(Stored(image_id, self.service.known(image_id), is_new=False))

    async def delete_image(self, image_id: str) -> Response:
        _check_id(image_id)
        self.service.cache.forget(image_id)
        return Response(status_code=204)

    async def embedding(self, image_id: str, dtype: str = "fp32") -> Response:
        _check_id(image_id)
        if dtype not in ("fp32", "fp16"):
            raise Problem("bad-parameters", "dtype must be fp32 or fp16", where="/dtype")
        data = await asyncio.to_thread(self.service.known(image_id).to_bytes, dtype=dtype)  # type: ignore[arg-type]
        name = f'attachment; filename="{image_id[:12]}.safetensors"'
        headers = {"ETag": f'"{image_id}-{dtype}"', "Content-Disposition": name}
        return Response(data, media_type="application/octet-stream", headers=headers)

    async def segment(self, request: Request, image_id: str) -> Response:
        _check_id(image_id)
        asked = schema.validate(schema.SegmentRequest, await bodies.read_json(request))
        return await self._segmented(request, image_id, asked, {})

    async def segment_body(self, request: Request) -> Response:
        asked = _from_query(request)
        stored = await self._stored(request, None)
        return await self._segmented(request, stored.id, asked, stored.timing)

    async def everything(self, request: Request, image_id: str) -> Response:
        _check_id(image_id)
        asked = schema.validate(schema.EverythingRequest, await bodies.read_json(request))
        embedding = self.service.known(image_id)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any] | None]()
        gone = [False]

        def progress(done: int, total: int) -> None:
            if gone[0]:
                raise _Gone
            told = json.dumps({"done": done, "total": total})
            loop.call_soon_threadsafe(events.put_nowait, {"event": "progress", "data": told})

        async def run() -> schema.Everything:
            found, timing = await self.service.everything(
                image_id, asked, _client(request), progress
            )
            return schema.Everything(
                image=_size(image_id, embedding.original_size),
                model=self.service.model,
                masks=[_found(one) for one in found],
                timing=timing,
            )

        if "text/event-stream" not in request.headers.get("accept", ""):
            return await _while_listening(request, run(), gone)

        async def stream() -> AsyncIterator[dict[str, Any]]:
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
                gone[0] = True

        return EventSourceResponse(stream())

    async def _segmented(
        self,
        request: Request,
        image_id: str,
        asked: schema.SegmentRequest,
        timing: dict[str, float],
    ) -> Response:
        size = self.service.known(image_id).original_size
        prompts = [_prompt(one, number, size) for number, one in enumerate(asked.prompts)]
        kind = _wanted_kind(request, len(prompts))

        def then(masks: Masks) -> Any:
            if kind == "image/png":
                best = int(masks.predicted_ious[0].argmax())
                score = float(masks.predicted_ious[0][best])
                return answers.png(masks.mask(0, best)), {"X-Tinyvit-Score": f"{score:.6f}"}
            if kind == "application/octet-stream":
                return answers.tensors(masks), {}
            return answers.describe(masks, asked)

        result, spent = await self.service.segment(
            image_id,
            prompts,
            asked.multimask,
            _client(request),
            is_preview=asked.preview,
            then=then,
        )
        timing = {**timing, **spent, "wait_ms": timing.get("wait_ms", 0) + spent["wait_ms"]}
        _note(request, image_id, timing)
        if kind != "application/json":
            data, headers = result
            return Response(data, media_type=kind, headers=headers)
        answer = schema.Segmented(
            image=_size(image_id, size), model=self.service.model, objects=result, timing=timing
        )
        return _model(answer)

    async def _body(self, request: Request) -> bytes:
        self.service.segmenter  # noqa: B018  # refuse before anything is read
        bodies.check_image_type(request)
        self.service.encode_lane.queue.check(_client(request))
        return await bodies.read_body(request, self.settings.max_image_mb * 2**20)

    async def _stored(self, request: Request, view: int | None) -> Stored:
        if view is not None and not 16 <= view <= 8192:
            raise Problem("bad-parameters", "view must be from 16 to 8192", where="/view")
        data = await self._body(request)
        stored = await self.service.encode(data, _client(request), view)
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
        return _model(answer, 201 if stored.is_new else 200)


class _Gone(Exception):
    """Nobody waits for the answer any more."""


async def _while_listening(request: Request, work: Any, gone: list[bool]) -> Response:
    """The answer, unless the client goes first."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=0.5)
        if not task.done() and await request.is_disconnected():
            gone[0] = True
            task.cancel()
            raise ClientDisconnect
    return _model(task.result())


def openapi_document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application."""
    document = get_openapi(
        title="tinyvit",
        version="1",
        routes=api.routes,
        summary="Segment images by points, boxes and masks.",
    )
    for kind in (schema.SegmentRequest, schema.EverythingRequest):
        found = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        shared = document.setdefault("components", {}).setdefault("schemas", {})
        shared.update(found.pop("$defs", {}))
        shared[kind.__name__] = found
    for methods in document["paths"].values():
        for operation in methods.values():
            operation.get("responses", {}).pop("422", None)
            operation.setdefault("responses", {})["default"] = {
                "description": "A problem (RFC 9457)",
                "content": {problems.MEDIA_TYPE: {}},
            }
    return document


def _add_handlers(api: FastAPI) -> None:
    """Turn every failure into a problem; a failure of ours says nothing but its request id."""

    async def http(request: Request, err: Exception) -> Response:
        status = err.status_code if isinstance(err, HTTPException) else 400
        name = {404: "no-such-path", 405: "method"}.get(status, "bad-request")
        headers = dict(getattr(err, "headers", None) or {})
        return _problem(request, Problem(name, problems.TITLES[name][1], headers=headers))

    async def known(request: Request, err: Exception) -> Response:
        return _problem(request, err if isinstance(err, Problem) else Problem("our-fault", ""))

    async def parameters(request: Request, err: Exception) -> Response:
        return _problem(request, Problem("bad-parameters", "a parameter in the URL is wrong"))

    async def gone(request: Request, err: Exception) -> Response:
        return Response(status_code=499)

    async def fault(request: Request, err: Exception) -> Response:
        logger.error("request %s failed", request.state.request_id, exc_info=err)
        return _problem(request, Problem("our-fault", "the server's log has the rest"))

    from fastapi.exceptions import RequestValidationError

    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(Problem, known)
    api.add_exception_handler(RequestValidationError, parameters)
    api.add_exception_handler(ClientDisconnect, gone)
    api.add_exception_handler(Exception, fault)


def _problem(request: Request, problem: Problem) -> Response:
    state = request.scope["state"]
    state["facts"]["problem"] = problem.name
    body = problem.body(state["request_id"])
    return Response(body, problem.status, problem.all_headers(), problems.MEDIA_TYPE)


def _add_page(api: FastAPI) -> None:
    """Serve the page: a fixed table of names, read once."""
    files = {path.name: path.read_bytes() for path in sorted(_PAGE.iterdir()) if path.is_file()}

    async def page(name: str = "index.html") -> Response:
        if name not in files:
            raise Problem("no-such-path", "the page has no such file")
        kind = _TYPES[Path(name).suffix]
        return Response(files[name], media_type=kind, headers={"Cache-Control": "no-cache"})

    api.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    api.add_api_route("/page/{name}", page, methods=["GET"], include_in_schema=False)


def _body(kind: str, model: type[schema.Strict] | None = None) -> dict[str, Any]:
    """The request body of a route, for OpenAPI."""
    if model is None:
        content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}}}
    else:
        content = {kind: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def _from_query(request: Request) -> schema.SegmentRequest:
    """Prompts in the query, as on the command line."""
    query = request.query_params
    known = {"point", "box", "each", "multimask", "include", "which", "tolerance"}
    unknown = sorted(set(query.keys()) - known)
    if unknown:
        raise Problem("bad-parameters", f"known are {', '.join(sorted(known))}", where="/query")
    points = [_numbers(text, (2, 3), "point") for text in query.getlist("point")]
    boxes = [_numbers(text, (4,), "box") for text in query.getlist("box")]
    labels = [int(one[2]) if len(one) == 3 else 1 for one in points]
    coords = [one[:2] for one in points]
    prompts: list[dict[str, Any]]
    if query.get("each") == "true":
        prompts = [
            {"points": [xy], "labels": [label]} for xy, label in zip(coords, labels, strict=True)
        ]
        prompts += [{"box": box} for box in boxes]
    else:
        if len(boxes) > 1:
            raise Problem("bad-prompt", "one object has one box; each=true for one each")
        one: dict[str, Any] = {"points": coords, "labels": labels} if coords else {}
        prompts = [one | ({"box": boxes[0]} if boxes else {})]
    value: dict[str, Any] = {"prompts": prompts}
    if "multimask" in query:
        value["multimask"] = {"true": True, "false": False}.get(
            query["multimask"], query["multimask"]
        )
    if "include" in query:
        value["include"] = [word for text in query.getlist("include") for word in text.split(",")]
    if "which" in query:
        value["which"] = query["which"]
    if "tolerance" in query:
        value["tolerance"] = _numbers(query["tolerance"], (1,), "tolerance")[0]
    return schema.validate(schema.SegmentRequest, value)  # type: ignore[no-any-return]


def _numbers(text: str, counts: tuple[int, ...], name: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in counts:
        raise Problem("bad-prompt", f"{name} must be {' or '.join(map(str, counts))} numbers")
    return found


def _prompt(one: schema.PromptModel, number: int, size: tuple[int, int]) -> Prompt:
    try:
        return one.to_prompt(size)
    except ValueError as err:
        raise Problem("bad-prompt", str(err), where=f"/prompts/{number}") from err


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


def _check_id(image_id: str) -> None:
    if not _ID.match(image_id):
        raise Problem("no-such-path", "an image's id is 64 lower-case hexadecimal digits")


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


def _size(image_id: str, size: tuple[int, int]) -> dict[str, Any]:
    return {"id": image_id, "width": size[1], "height": size[0]}


def _client(request: Request) -> str:
    return str(request.state.client)


def _note(request: Request, image_id: str, timing: dict[str, float]) -> None:
    request.scope["state"]["facts"] |= {"image": image_id[:12], **timing}


def _model(value: schema.Strict, status: int = 200) -> Response:
    text = value.model_dump_json(exclude_none=True)
    headers = {"Cache-Control": "no-store"}
    return Response(text, status, headers, "application/json")


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")
