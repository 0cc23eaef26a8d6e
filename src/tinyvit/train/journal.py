"""The log of a run: one JSON object a line, curves as a picture, TensorBoard if it is installed.

A line has ``kind`` ("train" or "validate"), ``step`` (counted from 1; 0 before the first) and
figures by name. Lines are on the disk before the state of their step is. A run that goes on takes
away the lines after its state, so that no step is in the log twice. What figures mean is not known
here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, cast

from tinyvit.checkpoints.files import replacing
from tinyvit.errors import TinyViTError
from tinyvit.images.draw import save_png

from .curves import draw_curves

__all__ = ["Journal", "Kind", "Line", "Progress"]

Kind: TypeAlias = Literal["train", "validate"]
Line: TypeAlias = dict[str, str | int | float | None]

LOG, CURVES, BOARD = "log.jsonl", "curves.png", "tensorboard"


@dataclass(frozen=True)
class Progress:
    """How far a run is, for a ``report`` callback; given after each step and before validations.

    Attributes:
        phase: What comes next: "train" or "validate"; "done" after the last step.
        step: Steps done.
        steps: Steps in all.
        epoch: The epoch of the last step, from 1.
        epochs: Epochs in all.
        loss: Mean loss of the last step; None before the first.
        rate: Its highest learning rate.
        images_per_second: Samples of all processes by seconds, since this call began.
        seconds_left: Until the end, as fast as until now; None before the first step.
        figures: Of the last validation.
        words: Something to tell once; else empty.
    """

    phase: Literal["train", "validate", "done"]
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float | None
    rate: float
    images_per_second: float
    seconds_left: float | None
    figures: Mapping[str, float]
    words: str = ""


class Board(Protocol):
    """What is used of TensorBoard's writer."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write a figure."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


class Journal:
    """Writes the log of a run.

    Args:
        folder: The run's folder.
        step: Steps already done; later lines of an earlier attempt are taken away.
        tensorboard: Write TensorBoard's files too, if it is installed.

    Attributes:
        lines: All lines of the run.

    Raises:
        TinyViTError: The log cannot be read or written.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.folder = folder
        self.lines = _read_until(folder / LOG, step)
        text = "".join(_as_text(line) for line in self.lines)
        replacing(folder / LOG, lambda path: _write(path, text))
        self._board = _open_board(folder / BOARD, step) if tensorboard else None
        try:
            self._file = (folder / LOG).open("a", encoding="utf-8")
        except OSError as err:
            raise _refused(folder / LOG, err) from err

    def write(self, kind: Kind, step: int, figures: Mapping[str, float]) -> None:
        """Write a line; figures that are no finite numbers are written as null.

        Raises:
            TinyViTError: The disk is full, or refuses for another reason.
        """
        line: Line = {"kind": kind, "step": step}
        for name, value in figures.items():
            line[name] = value if math.isfinite(value) else None
            if self._board is not None:
                self._board.add_scalar(f"{kind}/{name}", value, step)
        try:
            self._file.write(_as_text(line))
            self._file.flush()
        except OSError as err:
            raise _refused(self.folder / LOG, err) from err
        self.lines.append(line)

    def settle(self) -> None:
        """Bring all lines to the disk itself.

        Raises:
            TinyViTError: The disk is full, or refuses for another reason.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as err:
            raise _refused(self.folder / LOG, err) from err

    def draw(self) -> None:
        """Draw the curves anew.

        Raises:
            TinyViTError: The disk is full, or refuses for another reason.
        """
        try:
            save_png(self.folder / CURVES, draw_curves(self.lines))
        except OSError as err:
            raise _refused(self.folder / CURVES, err) from err

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def _read_until(path: Path, step: int) -> list[Line]:
    """The lines up to a step; a last line that a kill cut off is none."""
    if not path.exists() or not step:
        return []
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            is_early = int(line["step"]) <= step
        except (ValueError, KeyError, TypeError):
            continue
        if is_early:
            lines.append(line)
    return lines


def _as_text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _open_board(folder: Path, step: int) -> Board | None:
    """TensorBoard's writer, or None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return cast(Board, SummaryWriter(folder, purge_step=step + 1))


def _refused(path: Path, err: OSError) -> TinyViTError:
    reason = err.strerror or str(err)
    return TinyViTError(
        f"{path} could not be written: {reason}; free space, then go on with resume: "
        "the last saved state is whole"
    )
