"""Read a request's body within limits; the kinds of body that are taken; JSON without surprises."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from .problems import Problem

JSON_BYTES = 16 * 2**20
_REFUSED = ("text/", "multipart/", "application/x-www-form-urlencoded", "application/json")


async def read_body(request: Request, most: int) -> bytes:
    """The body, or a problem as soon as it is too large.

    Raises:
        Problem: ``too-large`` or ``bad-request``.
        ClientDisconnect: The client has gone.
    """
    declared = request.headers.get("content-length")
    if declared is not None and declared.isdecimal() and int(declared) > most:
        raise _too_large(most)
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


async def read_json(request: Request, most: int = JSON_BYTES) -> Any:
    """The JSON of a body that says it is JSON.

    Raises:
        Problem: ``media-type``, ``too-large`` or ``bad-request``.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem("media-type", f"wanted application/json, came {kind[:80]!r}")
    body = await read_body(request, most)
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except RecursionError as err:
        raise Problem("bad-request", "the JSON is nested too deeply") from err
    except (UnicodeDecodeError, ValueError) as err:
        raise Problem("bad-request", f"the body is not JSON: {str(err)[:200]}") from err


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _too_large(most: int) -> Problem:
    return Problem(
        "too-large",
        f"at most {most / 2**20:g} MiB are taken in one request",
        headers={"Connection": "close"},
    )
