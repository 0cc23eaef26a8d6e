"""How a training run is shown: a bar on a terminal, lines elsewhere, on stderr.

After each measurement its figures are a line that stays. Between them a terminal shows step, loss,
pictures per second and the time that is left; where nobody looks, a line a minute says the same.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING

from tinyvit.cli.console import Console

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from tinyvit.train import Progress

__all__ = ["TrainScreen", "figures_text", "time_text"]

_PAUSE = 60.0  # seconds between two lines where there is no bar


class TrainScreen:
    """Shows a run; its instances are ``report`` callbacks.

    Args:
        own: Whether anything is said.
    """

    def __init__(self, own: Console) -> None:
        self._own = own
        self._is_measuring = False
        self._said = monotonic()
        self._stack = ExitStack()
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        if not self._own.is_quiet and sys.stderr.isatty():
            self._bar = self._stack.enter_context(_Bar())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __call__(self, progress: Progress) -> None:
        """Show how far the run is."""
        if progress.words:
            self._own.say(progress.words)
        if self._bar is not None:
            self._bar.show(progress)
        if self._is_measuring and progress.phase != "validate":
            self._say(f"{_place(progress)}: {figures_text(progress.figures)}; training ", progress)
        elif self._bar is None and progress.step and monotonic() - self._said > _PAUSE:
            self._say(f"{_place(progress)}: training ", progress)
        self._is_measuring = progress.phase == "validate"

    def _say(self, text: str, progress: Progress) -> None:
        self._said = monotonic()
        self._own.say(text + _speed(progress))


class _Bar:
    """A bar of rich's, gone at the end."""

    def __init__(self) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[words]}", markup=False),
            console=RichConsole(stderr=True),
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._progress.add_task("", total=None, visible=False, words="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar."""
        self._progress.update(
            self._task,
            description="measuring" if progress.phase == "validate" else "training",
            completed=progress.step,
            total=progress.steps,
            words=f"{progress.step} of {progress.steps}, {_speed(progress)}",
            visible=True,
        )


def figures_text(figures: Mapping[str, float]) -> str:
    """``top1 0.9532, loss 0.2101``."""
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items()) or "nothing measured"


def time_text(seconds: float) -> str:
    """``0:02:13``."""
    return str(timedelta(seconds=round(seconds)))


def _place(progress: Progress) -> str:
    epochs = f" (epoch {progress.epoch} of {progress.epochs})" if progress.step else ""
    return f"step {progress.step} of {progress.steps}{epochs}"


def _speed(progress: Progress) -> str:
    if progress.loss is None:
        return "not begun"
    words = f"loss {progress.loss:.4f}, {progress.images_per_second:.1f} images/s"
    if progress.seconds_left is not None and progress.step < progress.steps:
        words += f", {time_text(progress.seconds_left)} left"
    return words
