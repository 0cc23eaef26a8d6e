"""Errors as RFC 9457 has them: one table of names, one body, no input repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response

MEDIA_TYPE = "application/problem+json"
MOST_CHARACTERS = 500

TITLES: dict[str, tuple[int, str]] = {
    "bad-request": (400, "The request is not HTTP or not JSON"),
    "token-wanted": (401, "This server wants a token"),
    "wrong-origin": (403, "Pages of this origin may not call this server"),
    "unknown-image": (404, "The image is not known here; send it again"),
    "no-such-path": (404, "There is nothing at this path"),
    "method": (405, "The path does not take this method"),
    "not-acceptable": (406, "No such form of the answer"),
    "too-slow": (408, "The request did not arrive in time"),
    "other-image": (409, "The body is another image than the path says"),
    "too-large": (413, "The body is too large"),
    "media-type": (415, "The body is of a kind that is not taken here"),
    "wrong-host": (421, "The server does not answer to this host name"),
    "not-an-image": (422, "The body is no image that can be read"),
    "too-many-pixels": (422, "The image has too many pixels"),
    "bad-prompt": (422, "A prompt is wrong"),
    "bad-parameters": (422, "A parameter is wrong"),
    "too-many-at-once": (429, "Too many requests of one client wait"),
    "our-fault": (500, "The server failed"),
    "busy": (503, "The server is busy"),
    "loading": (503, "The model is being loaded"),
    "draining": (503, "The server is about to end"),
}


@dataclass(eq=False)
class Problem(Exception):
    """What went wrong with one request.

    Attributes:
        name: A key of ``TITLES``.
        detail: What was wanted, what came, what to do.
        where: JSON pointer into the request, such as ``/prompts/2/points/0``.
        retry_after: Seconds after which the same request may be answered.
        headers: Further headers of the answer.
    """

    name: str
    detail: str
    where: str | None = None
    retry_after: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The HTTP status."""
        return TITLES[self.name][0]

    def body(self, request_id: str) -> bytes:
        """The problem as JSON."""
        facts: dict[str, object] = {
            "type": f"/problems/{self.name}",
            "title": TITLES[self.name][1],
            "status": self.status,
            "detail": self.detail[:MOST_CHARACTERS],
            "request_id": request_id,
        }
        if self.where is not None:
            facts["where"] = self.where
        return json.dumps(facts).encode()

    def response(self, state: MutableMapping[str, Any]) -> Response:
        """The answer to the request of this ASGI state; its line in the log will have the name."""
        state["facts"]["problem"] = self.name
        headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store", **self.headers}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.name == "token-wanted":
            headers["WWW-Authenticate"] = "Bearer"
        return Response(self.body(state["request_id"]), self.status, headers)


def explain(name: str) -> str:
    """The page of text at ``/problems/<name>``."""
    status, title = TITLES[name]
    return f"{name}: {title} (HTTP status {status}).\nThe field 'detail' of the answer says more.\n"
