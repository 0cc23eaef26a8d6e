"""Run the application by uvicorn: the socket, signals, the ready line."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

import uvicorn

from .app import create_app
from .deadline import DeadlineProtocol
from .settings import ServeSettings

logger = logging.getLogger("tinyvit.serve")


def listen(settings: ServeSettings) -> socket.socket:
    """A listening socket at the address of the settings.

    Raises:
        OSError: The address cannot be taken; the words say what to do.
    """
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        own.bind((host, settings.port))
        own.listen(1024)
    except OSError as err:
        own.close()
        if err.errno == errno.EADDRINUSE:
            raise OSError(
                err.errno,
                f"port {settings.port} of {settings.host} is taken by another program; choose "
                "another with --port, or --port 0 for a free one",
            ) from err
        raise
    return own


def address(settings: ServeSettings, own: socket.socket) -> str:
    """The URL of the page; with the token in the fragment, which is not sent and not logged."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{own.getsockname()[1]}{settings.proxy_prefix}/"
    return url if settings.token is None else f"{url}#token={settings.token}"


def run(settings: ServeSettings, on_ready: Callable[[str, ServeSettings], None]) -> None:
    """Serve until a signal ends it.

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
    service = guard.service  # type: ignore[attr-defined]
    protocol = type("Protocol", (DeadlineProtocol,), {"receive_seconds": settings.receive_seconds})
    config = uvicorn.Config(
        guard,
        http=protocol,
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
        h11_max_incomplete_event_size=16 * 1024,
    )
    server = uvicorn.Server(config)
    url = address(settings, own)

    async def main() -> None:
        async def watch() -> None:
            while service.state == "loading" and service.failure is None:
                await asyncio.sleep(0.02)
            if service.failure is not None:
                server.should_exit = True
            elif service.state == "ready":
                on_ready(url, settings)

        watching = asyncio.create_task(watch())
        await server.serve(sockets=[own])
        watching.cancel()

    asyncio.run(main())
    if service.failure is not None:
        raise service.failure
