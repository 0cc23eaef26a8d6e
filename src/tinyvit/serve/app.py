"""``create_app``: the ASGI application around one ``Service``: errors, page, document."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tinyvit.errors import TinyViTError
from tinyvit.sam.segmenter import Segmenter

from . import problems, schema
from .guard import Guard
from .problems import Problem
from .routes import Routes
from .service import Service
from .settings import ServeSettings

logger = logging.getLogger("tinyvit.serve")

_PAGE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
}


def create_app(settings: ServeSettings | None = None, segmenter: Segmenter | None = None) -> Guard:
    """Make the ASGI application of ``tinyvit serve``.

    Args:
        settings: Of the server; None takes the defaults.
        segmenter: A model that is ready; None loads the one of the settings when the server
            starts.

    Returns:
        The application, for uvicorn, Ray Serve or any other server.
    """
    settings = (settings or ServeSettings()).with_token()
    service = Service(settings, segmenter)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service))
        yield
        await asyncio.to_thread(service.close)
        await asyncio.gather(loading, return_exceptions=True)

    api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    Routes(service, settings, lambda: openapi_document(api)).add_to(api)
    _add_handlers(api)
    if settings.page:
        _add_page(api)
    for name in settings.adapters:
        module = import_module(f"tinyvit.serve.adapters.{name.replace('-', '_')}")
        module.add(api, service, settings)
    return Guard(api, settings, service)


async def _load(service: Service) -> None:
    try:
        await asyncio.to_thread(service.load)
    except (TinyViTError, ValueError, OSError, RuntimeError) as err:
        service.failure = err
        logger.error("the model could not be loaded: %s", err)
    service.on_loaded()


def openapi_document(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an application."""
    document = get_openapi(
        title="tinyvit",
        version="1",
        routes=api.routes,
        summary="Segment images by points, boxes and masks.",
    )
    shared = document.setdefault("components", {}).setdefault("schemas", {})
    for kind in (schema.SegmentRequest, schema.EverythingRequest, schema.ProblemBody):
        found = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        shared.update(found.pop("$defs", {}))
        shared[kind.__name__] = found
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which is never sent
        shared.pop(name, None)
    problem = {"schema": {"$ref": "#/components/schemas/ProblemBody"}}
    for methods in document["paths"].values():
        for operation in methods.values():
            answers = operation.setdefault("responses", {})
            answers.pop("422", None)
            answers["default"] = {
                "description": "A problem (RFC 9457)",
                "content": {problems.MEDIA_TYPE: problem},
            }
    return document


def _problem_of(request: Request, err: Exception) -> Problem:
    """What is told of a failure; one of ours says nothing but its request id."""
    if isinstance(err, Problem):
        return err
    if isinstance(err, RequestValidationError):
        first = err.errors()[0]
        if first["loc"][0] == "path":
            return Problem("no-such-path", "an image's id is 64 lower-case hexadecimal digits")
        where = "/" + "/".join(str(part)[:40] for part in first["loc"])
        return Problem("bad-parameters", f"a parameter in the URL is wrong: {first['msg']}", where)
    if isinstance(err, HTTPException):
        name = {404: "no-such-path", 405: "method"}.get(err.status_code, "bad-request")
        return Problem(name, problems.TITLES[name][1], headers=dict(err.headers or {}))
    logger.error("request %s failed", request.state.request_id, exc_info=err)
    return Problem("our-fault", "the server's log has the rest")


def _add_handlers(api: FastAPI) -> None:
    """Turn every failure into a problem."""

    async def answer(request: Request, err: Exception) -> Response:
        if isinstance(err, ClientDisconnect):
            return Response(status_code=499)
        return _problem_of(request, err).response(request.scope["state"])

    for kind in (HTTPException, Problem, RequestValidationError, ClientDisconnect, Exception):
        api.add_exception_handler(kind, answer)


def _add_page(api: FastAPI) -> None:
    """Serve the page: a fixed table of names, read once."""
    files = {path.name: path.read_bytes() for path in sorted(_PAGE.iterdir()) if path.is_file()}
    tags = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in files.items()}

    async def page(request: Request, name: str = "index.html") -> Response:
        if name not in files:
            raise Problem("no-such-path", "the page has no such file")
        headers = {"Cache-Control": "no-cache", "ETag": tags[name]}
        if request.headers.get("if-none-match") == tags[name]:
            return Response(status_code=304, headers=headers)
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=headers)

    api.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    api.add_api_route("/page/{name}", page, methods=["GET"], include_in_schema=False)
