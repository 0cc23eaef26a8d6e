"""uvicorn's HTTP protocol with deadlines for receiving a request and for reading an answer.

uvicorn has none, and middleware is too late for them: clients that send a header a minute, or never
read, would hold their connections for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .problems import MEDIA_TYPE, Problem
from .settings import ServeSettings

MOST_CONNECTIONS = 1_000
MOST_FROM_ONE_ADDRESS = 50  # loopback is not counted: a proxy on this machine


class DeadlineProtocol(H11Protocol):
    """Closes connections that take too long either way, and too many of one address."""

    seconds: ClassVar[float] = 30.0
    on_refused: ClassVar[Callable[[Problem, str], str]]  # gives the id of the request

    def connection_made(self, transport: Any) -> None:
        """Arm the timer; refuse one connection too many."""
        super().connection_made(transport)
        self._receiving: asyncio.TimerHandle | None = None
        self._sending: asyncio.TimerHandle | None = None
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        others = [one for one in self.connections if one is not self]
        same = sum(getattr(one, "_peer", None) == self._peer for one in others)
        is_near = self._peer in ("127.0.0.1", "::1", "")
        if len(others) >= MOST_CONNECTIONS or (same >= MOST_FROM_ONE_ADDRESS and not is_near):
            transport.abort()
            return
        self._receiving = self.loop.call_later(self.seconds, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Arm at a request's first byte, disarm when it is whole."""
        super().data_received(data)
        self._watch_receiving()

    def on_response_complete(self) -> None:
        """The next request may be here already, or a part of it."""
        super().on_response_complete()
        self._watch_receiving()

    def _watch_receiving(self) -> None:
        state = self.conn.their_state
        is_begun = state is h11.IDLE and bool(self.conn.trailing_data[0])
        if state is not h11.SEND_BODY and not is_begun:
            self._receiving = _ended(self._receiving)
        elif self._receiving is None:
            self._receiving = self.loop.call_later(self.seconds, self._too_slow)

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._sending = self.loop.call_later(self.seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        self._sending = _ended(self._sending)

    def connection_lost(self, exc: Exception | None) -> None:
        """Disarm."""
        self._receiving, self._sending = _ended(self._receiving), _ended(self._sending)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP with a problem."""
        self._refuse(Problem("bad-request", "the request is not HTTP/1.1 as it should be"))

    def _too_slow(self) -> None:
        self._receiving = None
        self._refuse(Problem("too-slow", f"a request must arrive within {self.seconds:g} s"))

    def _refuse(self, problem: Problem) -> None:
        """Answer without the application, if nothing has been answered, and hang up."""
        if self.transport.is_closing():
            return
        request_id = type(self).on_refused(problem, self._peer)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = problem.body(request_id)
            head = (
                f"HTTP/1.1 {problem.status} Refused\r\nContent-Type: {MEDIA_TYPE}\r\n"
                f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\n"
                "X-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()
        self.loop.call_later(1.0, self.transport.abort)  # it may not read this, either


def protocol(
    settings: ServeSettings, on_refused: Callable[[Problem, str], str]
) -> type[DeadlineProtocol]:
    """The protocol with the limits of a server.

    Args:
        settings: Of the server.
        on_refused: Called with what was refused and the client's address; gives the request's id.
    """
    facts = {"seconds": settings.receive_seconds, "on_refused": staticmethod(on_refused)}
    return type("Protocol", (DeadlineProtocol,), facts)


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer; the one that runs is cancelled."""
    if timer is not None:
        timer.cancel()
    return None
