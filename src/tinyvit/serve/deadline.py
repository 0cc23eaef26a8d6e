"""uvicorn's HTTP protocol with a deadline for receiving a request.

uvicorn has none, and middleware is too late for one: clients that send a header a minute would
hold their connections for ever.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST_CONNECTIONS = 1_000
MOST_FROM_ONE_ADDRESS = 50  # loopback is not counted: a proxy on this machine


class DeadlineProtocol(H11Protocol):
    """Closes connections whose request does not arrive in time, and too many of one address."""

    receive_seconds: ClassVar[float] = 30.0

    def connection_made(self, transport: Any) -> None:
        """Arm the timer; refuse one connection too many."""
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        others = [one for one in self.connections if one is not self]
        same = sum(getattr(one, "_peer", None) == self._peer for one in others)
        is_near = self._peer in ("127.0.0.1", "::1", "")
        if len(others) >= MOST_CONNECTIONS or (same >= MOST_FROM_ONE_ADDRESS and not is_near):
            transport.abort()
            return
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Arm at a request's first byte, disarm when it is whole."""
        if self._timer is None and (self.cycle is None or self.cycle.response_complete):
            self._arm()
        super().data_received(data)
        if self.cycle is not None and not self.cycle.more_body:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        """Disarm."""
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._disarm()
        self._timer = self.loop.call_later(self.receive_seconds, self._too_late)

    def _disarm(self) -> None:
        if getattr(self, "_timer", None) is not None:
            self._timer.cancel()  # type: ignore[union-attr]
        self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.abort()
