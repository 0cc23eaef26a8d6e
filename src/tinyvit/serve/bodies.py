"""Read a request's body within limits; the kinds of body that are taken; JSON without surprises."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from .problems import Problem

Result = TypeVar("Result")

JSON_BYTES = 16 * 2**20
SMALL = 64 * 2**10  # bytes that the event loop may parse itself
_REFUSED = ("text/", "multipart/", "application/x-www-form-urlencoded", "application/json")


class Budget:
    """The bytes that all bodies together may hold.

    Args:
        most: Bytes.
    """

    def __init__(self, most: int) -> None:
        self.free = most

    @asynccontextmanager
    async def body(self, request: Request, most: int) -> AsyncIterator[bytes]:
        """A request's body, counted from before it is read until it is let go.

        Raises:
            Problem: ``too-large``, or ``busy`` with the bodies of others.
            ClientDisconnect: The client has gone.
        """
        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else most
        if size > most:
            raise _too_large(most)
        if size > self.free:
            raise Problem("busy", "too many bodies are being read", retry_after=1)
        self.free -= size
        try:
            yield await _read(request, most)
        finally:
            self.free += size


async def _read(request: Request, most: int) -> bytes:
    parts, length = [], 0
    async for chunk in request.stream():
        length += len(chunk)
        if length > most:
            raise _too_large(most)
        parts.append(chunk)
    return b"".join(parts)


def check_image_type(request: Request) -> None:
    """Refuse bodies that say they are forms or text; an image's own bytes decide the rest.

    Raises:
        Problem: ``media-type``.
    """
    kind = request.headers.get("content-type", "").strip().lower()
    if kind.startswith(_REFUSED):
        raise Problem(
            "media-type",
            f"an image is the body itself, wanted for example image/jpeg; came {kind[:80]!r}. "
            "With curl use -T FILE, or -H 'Content-Type: image/jpeg' --data-binary @FILE",
        )


async def read_json(request: Request, budget: Budget, most: int = JSON_BYTES) -> Any:
    """The JSON of a body that says it is JSON.

    Raises:
        Problem: ``media-type``, ``too-large``, ``busy`` or ``bad-request``.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem("media-type", f"wanted application/json, came {kind[:80]!r}")
    async with budget.body(request, most) as body:
        if len(body) <= SMALL:
            return _parsed(body)
        return await asyncio.to_thread(_parsed, body)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError as err:
        raise Problem("bad-request", "the JSON is nested too deeply") from err
    except (UnicodeDecodeError, ValueError) as err:
        raise Problem("bad-request", f"the body is not JSON: {str(err)[:200]}") from err


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What the work gives; it is cancelled when the client goes. The body must have been read.

    Raises:
        ClientDisconnect: The client has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def image_in_json(text: str) -> bytes:
    """The bytes of an image that came as base64, or as a ``data:`` URL of it.

    Raises:
        Problem: ``not-an-image``.
    """
    text = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as err:
        raise Problem("not-an-image", "the image must be base64") from err


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _too_large(most: int) -> Problem:
    # The rest of the body is read and thrown away, so that the client sees this answer.
    return Problem("too-large", f"at most {most / 2**20:g} MiB are taken in one request")
