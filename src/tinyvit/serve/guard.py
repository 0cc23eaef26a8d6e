"""The first thing that every request meets: host, origin, token, headers; its line in the log.

Pure ASGI. A page in another tab must not reach a server on this machine: not by a form (content
types, Origin), not by DNS rebinding (Host), not by guessing (the token, in constant time). The log
has no names and no bodies: text for people, JSON for programs.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Response

from .problems import Problem
from .service import Service
from .settings import ServeSettings

logger = logging.getLogger("tinyvit.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"content-security-policy": POLICY.encode(),
}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")
_OPEN = ("/healthz", "/readyz")
"""Paths that need no token: what a supervisor asks."""
_PAGE = ("/page/", "/problems/")
_MOST_HEADERS = 16 * 1024
_LOOPBACK = ("127.0.0.1", "::1")
_ANY = ("0.0.0.0", "::")
MOST_LINES_A_SECOND = 20  # of one kind of problem; what is over is counted


class Guard:
    """Wraps the application.

    Args:
        app: The application.
        settings: Of the server.
        service: What the application calls.
    """

    def __init__(self, app: FastAPI, settings: ServeSettings, service: Service) -> None:
        self.app, self.settings, self.service = app, settings, service
        self.log = AccessLog(settings)
        self.observe = service.metrics.observe_request
        own = {settings.host, "localhost", *_LOOPBACK, *settings.allow_hosts}
        self._hosts = {name.strip("[]").lower() for name in own}
        self._origins = set(settings.allow_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        prefix, path = self.settings.proxy_prefix.rstrip("/"), scope["path"]
        if prefix and path.startswith(f"{prefix}/"):  # a proxy that leaves it in the path
            scope["path"] = path[len(prefix) :]
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(8)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, client=self._client(scope, headers), facts={})
        start, status, sent, received = time.perf_counter(), 499, 0, 0
        extra = {**HEADERS, b"x-request-id": request_id.encode(), **self._cors(headers)}

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                kept = [pair for pair in message.get("headers", ()) if pair[0] not in extra]
                message = {**message, "headers": [*kept, *extra.items()]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(scope, headers, receiving, sending)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", "-")
            self.observe(route, status, seconds)
            size = {"status": status, "received": received, "sent": sent}
            self.log.write(scope["method"], route, state, size, seconds)

    async def _answer(
        self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send
    ) -> None:
        state = scope["state"]
        try:
            self._check(scope, headers)
            if self._is_preflight(scope, headers):
                await Response(status_code=204)(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except Problem as problem:
            await problem.response(state)(scope, receive, send)
        except Exception:  # Starlette raises again what its handler of all errors has answered
            if state["facts"].get("problem") != "our-fault":
                raise

    def refused(self, problem: Problem, client: str) -> str:
        """Log what was refused before it was a request; gives it an id."""
        request_id = secrets.token_hex(8)
        state = {"request_id": request_id, "client": client, "facts": {"problem": problem.name}}
        self.observe("-", problem.status, 0.0)
        size = {"status": problem.status, "received": 0, "sent": 0}
        self.log.write("-", "-", state, size, 0.0)
        return request_id

    def _client(self, scope: Scope, headers: dict[str, str]) -> str:
        peer = (scope.get("client") or ("", 0))[0]
        if self.settings.trust_proxy is not None and peer == self.settings.trust_proxy:
            return headers.get("x-forwarded-for", peer).rsplit(",", 1)[-1].strip()[:64] or peer
        return peer

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > _MOST_HEADERS:
            raise Problem("bad-request", f"the headers have more than {_MOST_HEADERS} bytes")
        host = headers.get("host")
        if not host:
            raise Problem("bad-request", "the request has no Host")
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            name = ""
        arrived = (scope.get("server") or ("",))[0]
        is_bound = self.settings.host in _ANY and name == arrived  # an address, never a name
        if name not in self._hosts and not is_bound:
            raise Problem(
                "wrong-host",
                "this server answers to its own address and to names given by --allow-host",
            )
        path, method = scope["path"], scope["method"]
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            parts = urlsplit(origin) if origin.startswith(("http://", "https://")) else None
            if parts is None or parts.netloc.lower() != host.lower():
                raise Problem("wrong-origin", "only pages of this server may call it")
        is_page = method in ("GET", "HEAD") and (path == "/" or path.startswith(_PAGE))
        if headers.get("sec-fetch-site") == "cross-site" and not is_page and origin is None:
            raise Problem("wrong-origin", "only pages of this server may call it")
        if self._is_preflight(scope, headers) or path in _OPEN or is_page:
            return
        is_far = scope["state"]["client"] not in _LOOPBACK
        if path == "/metrics" and self.settings.no_token and is_far:
            raise Problem("token-wanted", "numbers are for this machine, or for who has the token")
        self._check_token(headers)

    def _check_token(self, headers: dict[str, str]) -> None:
        wanted = self.settings.token
        if wanted is None:
            return
        given = headers.get("token", "")  # X-AnyLabeling's header
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given = value.strip()
        elif kind.lower() == "basic":
            try:
                given = base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                given = ""
        if not hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode()):
            raise Problem("token-wanted", "send the header 'Authorization: Bearer <token>'")

    def _is_preflight(self, scope: Scope, headers: dict[str, str]) -> bool:
        return (
            scope["method"] == "OPTIONS"
            and headers.get("origin") in self._origins
            and "access-control-request-method" in headers
        )

    def _cors(self, headers: dict[str, str]) -> dict[bytes, bytes]:
        origin = headers.get("origin")
        if origin is None or origin not in self._origins:
            return {}
        return {
            b"access-control-allow-origin": origin.encode(),
            b"vary": b"Origin",
            b"access-control-allow-methods": b"GET, HEAD, POST, PUT, DELETE",
            b"access-control-allow-headers": b"Authorization, Content-Type, X-Request-Id",
            b"access-control-expose-headers": b"Retry-After, X-Request-Id, X-Tinyvit-Score",
            b"access-control-max-age": b"600",
            b"cross-origin-resource-policy": b"cross-origin",
        }


def _headers(scope: Scope) -> dict[str, str]:
    """Header -> value, the last of equal ones; latin-1 as HTTP has it."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


class AccessLog:
    """Writes a line for each request.

    Args:
        settings: ``log`` and ``log_clients`` count.
        clock: Seconds since 1970.
    """

    def __init__(self, settings: ServeSettings, clock: Callable[[], float] = time.time) -> None:
        self.settings, self.clock = settings, clock
        self._second = 0
        self._counts: Counter[str] = Counter()

    def write(
        self,
        method: str,
        route: str,
        state: Mapping[str, Any],
        size: Mapping[str, int],
        seconds: float,
    ) -> None:
        """Log one finished request.

        Args:
            method: Of the request.
            route: Its route, never its path.
            state: With ``request_id``, ``client`` and further ``facts``.
            size: Its status, bytes received and sent.
            seconds: It took.
        """
        facts: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.clock())),
            "request": state["request_id"],
            "method": method[:10],
            "route": route,
            **size,
            "ms": round(1000 * seconds, 1),
        }
        if self.settings.log_clients:
            facts["client"] = state["client"]
        facts |= state["facts"]
        status = size["status"]
        if status >= 400 and not self._may_write(str(facts.get("problem", status))):
            return
        level = logging.ERROR if status == 500 else logging.INFO
        if self.settings.log == "json":
            logger.log(level, "%s", json.dumps(facts, ensure_ascii=True))
        else:
            shown = " ".join(f"{key}={_plain(value)}" for key, value in facts.items())
            logger.log(level, "%s", shown)

    def _may_write(self, kind: str) -> bool:
        second = int(self.clock())
        if second != self._second:
            for name, count in self._counts.items():
                if count > MOST_LINES_A_SECOND:
                    logger.warning("%d more of %s", count - MOST_LINES_A_SECOND, name)
            self._second, self._counts = second, Counter()
        self._counts[kind] += 1
        return self._counts[kind] <= MOST_LINES_A_SECOND


def _plain(value: object) -> str:
    """A value that cannot forge a line: JSON where it has anything but plain characters."""
    text = str(value)
    is_plain = text.isascii() and text.isprintable() and " " not in text
    return text if is_plain else json.dumps(text)
