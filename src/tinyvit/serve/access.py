"""One line in the log for each request: text for people, JSON for programs. No names, no bodies."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from .settings import ServeSettings

logger = logging.getLogger("tinyvit.serve")

MOST_LINES_A_SECOND = 20  # of one kind of problem; what is over is counted


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
