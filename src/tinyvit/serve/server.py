"""Run the application by uvicorn: the socket, deadlines of requests, signals, the ready line."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .guard import Guard
from .problems import MEDIA_TYPE, Problem
from .service import Service
from .settings import ServeSettings

MOST_CONNECTIONS = 1_000
MOST_FROM_ONE_ADDRESS = 50  # loopback is not counted: a proxy on this machine
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(settings: ServeSettings) -> socket.socket:
    """A listening socket at the address of the settings.

    Raises:
        OSError: The address cannot be taken; the words say what to do.
    """
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named: else each small answer
    # waits 40 ms for the client's acknowledgement.
    own = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, settings.port))
        own.listen(1024)
    except OSError as err:
        own.close()
        if err.errno == errno.EADDRINUSE:
            raise OSError(
                err.errno,
                f"port {settings.port} of {settings.host} is taken by {_owner(settings.port)}; "
                "choose another with --port, or --port 0 for a free one",
            ) from err
        raise
    return own


def _owner(port: int) -> str:
    """Name and number of the process that listens on a port, where Linux says it."""
    try:
        rows = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        own = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(f":{port:04X}")}
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            with contextlib.suppress(OSError):  # of another user, or gone by now
                if os.readlink(link) in own:
                    process = link.parents[1]
                    return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    except (OSError, IndexError):
        pass
    return "another program"


def address(settings: ServeSettings, own: socket.socket) -> str:
    """The URL of the page; with the token in the fragment, which is not sent and not logged."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    url = f"http://{host}:{own.getsockname()[1]}{settings.proxy_prefix}/"
    return url if settings.token is None else f"{url}#token={settings.token}"


def run(settings: ServeSettings, on_ready: Callable[[str, ServeSettings], None]) -> None:
    """Serve until a signal ends it.

    The first signal lets what runs come to its end, within ``drain_seconds``; a second one ends the
    process at once.

    Args:
        settings: Of the server.
        on_ready: Called with the page's URL and the settings (with the token, if one was made)
            when the model has answered its first click.

    Raises:
        OSError: The address cannot be taken.
        TinyViTError: The model cannot be loaded.
    """
    settings = settings.with_token()
    own = listen(settings)
    guard = create_app(settings)
    service = guard.service
    server = Server(config_of(guard, settings), service)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what clients do wrong is counted

    def loaded() -> None:
        if service.failure is not None:
            server.should_exit = True
        elif service.state == "ready":
            on_ready(address(settings, own), settings)

    service.on_loaded = loaded
    server.run(sockets=[own])
    if service.failure is not None:
        raise service.failure
    if any(lane.is_alive for lane in service.lanes):  # it computes still, and cannot be stopped
        logging.shutdown()
        os._exit(0)


def config_of(guard: Guard, settings: ServeSettings) -> uvicorn.Config:
    """The configuration of uvicorn for an application."""
    own = {"seconds": settings.receive_seconds, "on_refused": staticmethod(guard.refused)}
    return uvicorn.Config(
        guard,
        http=type("Protocol", (DeadlineProtocol,), own),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=2,
        h11_max_incomplete_event_size=16 * 1024,
    )


class Server(uvicorn.Server):
    """Runs uvicorn; a signal first drains the lanes, while what comes is answered 503.

    Args:
        config: Of uvicorn.
        service: What is drained.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT; unlike uvicorn's own, do not raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in _SIGNALS}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, then end; at once at the second signal."""
        if self.service.state == "draining":
            os._exit(128 + sig)
        self.service.state = "draining"

        def drain() -> None:
            self.service.close()
            self.should_exit = True

        threading.Thread(target=drain, daemon=True).start()


class DeadlineProtocol(H11Protocol):
    """Closes connections that take too long either way, and too many of one address.

    uvicorn has no such deadlines, and middleware is too late for them: clients that send a header a
    minute, or never read, would hold their connections for ever.
    """

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


def _ended(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No timer; the one that runs is cancelled."""
    if timer is not None:
        timer.cancel()
    return None
