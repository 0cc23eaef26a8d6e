"""Run the application by uvicorn: the socket, signals, the ready line."""

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

import uvicorn

from .app import create_app
from .deadline import protocol
from .guard import Guard
from .service import Service
from .settings import ServeSettings

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

    async def main() -> None:
        async def watch() -> None:
            while service.state == "loading" and service.failure is None:
                await asyncio.sleep(0.02)
            if service.failure is not None:
                server.should_exit = True
            elif service.state == "ready":
                on_ready(address(settings, own), settings)

        watching = asyncio.create_task(watch())
        await server.serve(sockets=[own])
        watching.cancel()

    asyncio.run(main())
    if service.failure is not None:
        raise service.failure
    if any(lane.is_alive for lane in service.lanes):  # it computes still, and cannot be stopped
        logging.shutdown()
        os._exit(0)


def config_of(guard: Guard, settings: ServeSettings) -> uvicorn.Config:
    """The configuration of uvicorn for an application."""
    return uvicorn.Config(
        guard,
        http=protocol(settings, guard.refused),
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
