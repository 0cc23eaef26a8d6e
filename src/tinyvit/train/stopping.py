"""Ctrl-C and SIGTERM as a wish: the step is finished and the state saved before the run stops.

A second one stops at once; then, as after a kill, what was done since the last saved state is done
again when the run goes on. Only the main thread hears signals; elsewhere nothing is changed.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopWish", "hear_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """Whether somebody asked the run to stop.

    Attributes:
        is_there: True once asked.
    """

    def __init__(self) -> None:
        self.is_there = False


@contextmanager
def hear_signals() -> Iterator[StopWish]:
    """Hear Ctrl-C and SIGTERM; what was set for them before is set again at the end."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in _SIGNALS}

    def hear(number: int, frame: FrameType | None) -> None:
        wish.is_there = True
        for one, handler in before.items():
            signal.signal(one, handler)

    for number in _SIGNALS:
        signal.signal(number, hear)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
