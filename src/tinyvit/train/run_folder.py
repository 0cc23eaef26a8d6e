"""The files of a run's folder: its state, its log with the curves, and a batch that went wrong.

``state.safetensors`` holds everything a run needs to be resumed bit for bit; the state before it
stays beside it, and at every moment one of them is whole. ``log.jsonl`` has a line for each
``log_every`` steps and each validation. The names of tensors, facts and columns are a file format.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from tinyvit import __version__
from tinyvit.checkpoints.files import check_format, read_state_dict, write_state_dict, write_text
from tinyvit.errors import CheckpointError, TinyViTError
from tinyvit.images.draw import save_png

from .task import Batch, Key

Kind: TypeAlias = Literal["train", "validate"]
Line: TypeAlias = dict[str, str | int | float | None]
Facts: TypeAlias = dict[str, object]
"""JSON-able values by name."""

FORMAT = 1  # of a state; 0 had no number, and called the setting trainable "moving"
LOG, CURVES, TENSORBOARD = "log.jsonl", "curves.png", "tensorboard"
CURRENT, PREVIOUS = "state.safetensors", "state.previous.safetensors"
NEXT = "state.next.safetensors"
_HEADER = "run"


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
        learning_rate: Its highest learning rate; ``rate`` is the former name.
        images_per_second: Samples of all processes by seconds, since this call began.
        seconds_left: Until the end, as fast as until now; None before the first step.
        metrics: Of the last validation, by name; ``figures`` is their former name.
        words: Something to tell once; else empty.
    """

    phase: Literal["train", "validate", "done"]
    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float | None
    learning_rate: float
    images_per_second: float
    seconds_left: float | None
    metrics: Mapping[str, float]
    words: str = ""

    @property
    def rate(self) -> float:
        """``learning_rate``."""
        return self.learning_rate

    @property
    def figures(self) -> Mapping[str, float]:
        """``metrics``."""
        return self.metrics


class NonFiniteLossError(TinyViTError, ArithmeticError):
    """The loss or the gradient became infinite or NaN; the batch that did it was kept."""


DivergedError = NonFiniteLossError
"""The former name of ``NonFiniteLossError``."""


def keep_batch(
    folder: Path, step: int, rank: int, parts: Sequence[tuple[Sequence[Key], Batch]]
) -> str:
    """Write a process's (keys, batch) of a step, from 1; gives in words where, or why it cannot."""
    path = folder / f"diverged_step_{step}_rank_{rank}.safetensors"
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    for number, (keys, batch) in enumerate(parts):
        header[f"{number}/samples"] = json.dumps(list(keys))
        for name, value in cast("Mapping[str, object]", batch).items():  # not all are tensors
            if isinstance(value, Tensor):
                tensors[f"{number}/{name}"] = value
            else:
                header[f"{number}/{name}"] = repr(value)
    try:
        write_state_dict(path, tensors, metadata=header)
    except CheckpointError as err:
        return f"its batch could not be kept ({err})"
    return f"its batch is kept in {path}"


class RunLog:
    """Writes the log of a run; every method raises TinyViTError where the disk refuses.

    ``step`` are the steps already done; later ``lines`` of an earlier attempt are taken away.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False) -> None:
        self.folder = folder
        self.lines: list[Line] = []
        if step and (folder / LOG).exists():
            for text in (folder / LOG).read_text("utf-8", "replace").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a kill may cut off the last line
                    line = json.loads(text)
                    if int(line["step"]) <= step:
                        self.lines.append(line)
        write_text(folder / LOG, "".join(map(_as_text, self.lines)))
        self._tensorboard: Any = None
        if tensorboard and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / TENSORBOARD, purge_step=step + 1)
        with _writing(folder / LOG):
            self._file = (folder / LOG).open("a", encoding="utf-8")

    def write(self, kind: Kind, step: int, metrics: Mapping[str, float]) -> None:
        """Write a line; what is not finite is written as null."""
        line: Line = {"kind": kind, "step": step}
        for name, value in metrics.items():
            line[name] = value if math.isfinite(value) else None
            if self._tensorboard is not None:
                self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        with _writing(self.folder / LOG):
            self._file.write(_as_text(line))
            self._file.flush()
        self.lines.append(line)

    def sync(self) -> None:
        """Bring all lines to the disk itself."""
        with _writing(self.folder / LOG):
            os.fsync(self._file.fileno())

    def draw(self) -> None:
        """Draw the curves again."""
        with _writing(self.folder / CURVES):
            save_png(self.folder / CURVES, draw_curves(self.lines))

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise TinyViTError(
            f"{path} could not be written: {err.strerror or err}; free space, then resume the run: "
            "the last saved state is whole"
        ) from err


def _as_text(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"


_Point: TypeAlias = tuple[float, float]
SMOOTH = 2  # drawn larger by this, then reduced, so that lines are smooth
WIDTH, HEIGHT, COLUMNS = 420, 260, 3  # pixels of a panel; panels in a row
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 36, 30  # its margins
MOST_PANELS, FONT, TICKS = 12, 12, 4
PAPER, INK, GRID = (255, 255, 255), (40, 44, 52), (224, 226, 230)
COLOURS = {"train": (31, 98, 176), "validate": (196, 78, 28)}
HIDDEN = {"kind", "step", "epoch", "images_per_second"}


def draw_curves(lines: Iterable[Mapping[str, Any]]) -> NDArray[np.uint8]:
    """Draw the metrics of a log's lines that are finite numbers against the step, [H, W, 3].

    Up to twelve panels, training before validation; an empty one where there is nothing to draw.
    """
    curves: dict[tuple[str, str], list[_Point]] = {}
    for line in lines:
        for name, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if name not in HIDDEN and is_number and math.isfinite(value):
                curves.setdefault((line["kind"], name), []).append((line["step"], value))
    shown = sorted(curves, key=lambda key: key[0])[:MOST_PANELS]  # stable: names in their order
    columns = min(COLUMNS, max(1, len(shown)))
    sheet = Image.new("RGB", (columns * WIDTH, max(1, -(-len(shown) // columns)) * HEIGHT), PAPER)
    for number, key in enumerate(shown):
        corner = number % columns * WIDTH, number // columns * HEIGHT
        sheet.paste(_draw_panel(*key, curves[key]), corner)
    return np.array(sheet)


def _draw_panel(kind: str, name: str, points: list[_Point]) -> Image.Image:
    """One curve with its title, grid and numbers."""
    panel = Image.new("RGB", (WIDTH * SMOOTH, HEIGHT * SMOOTH), PAPER)
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(size=FONT * SMOOTH)
    sides = LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM
    x0, y0, x1, y1 = (SMOOTH * side for side in sides)
    (first, last), (low, high) = (_range(list(axis)) for axis in zip(*points, strict=True))

    def place(step: float, value: float) -> _Point:
        x = x0 + (x1 - x0) * (step - first) / (last - first)
        return x, y1 - (y1 - y0) * (value - low) / (high - low)

    for i in range(TICKS + 1):
        value = low + (high - low) * i / TICKS
        y = place(first, value)[1]
        pen.line([(x0, y), (x1, y)], fill=GRID, width=SMOOTH)
        pen.text((x0 - 6 * SMOOTH, y), f"{value:.3g}", fill=INK, font=font, anchor="rm")
    for side, step, anchor in ((x0, first, "la"), (x1, last, "ra")):
        pen.text((side, y1 + 6 * SMOOTH), f"{step:.0f}", fill=INK, font=font, anchor=anchor)
    pen.text((x0, y0 // 2), f"{kind}: {name}", fill=INK, font=font, anchor="lm")
    colour = COLOURS.get(kind, INK)
    places = [place(*point) for point in points]
    if len(places) > 1:
        pen.line(places, fill=colour, width=2 * SMOOTH, joint="curve")
    if len(places) <= 40:
        for x, y in places:
            pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)
    return panel.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


def _range(values: list[float]) -> _Point:
    """Lowest and highest, apart even where they are alike."""
    low, high = min(values), max(values)
    margin = 0.0 if high > low else abs(low) * 0.1 or 1.0
    return low - margin, high + margin


@dataclass(frozen=True)
class RunState:
    """What was read of ``path``: ``tensors`` as ``pack`` gives them, and the facts."""

    path: Path
    tensors: dict[str, Tensor]
    facts: Facts
    unreadable: tuple[str, ...] = ()  # newer files that could not be read, in words


def write_state(folder: Path, tensors: Mapping[str, Tensor], facts: Facts) -> None:
    """Write what ``pack`` gives, and the facts, beside the state before; or change nothing."""
    current, fresh = folder / CURRENT, folder / NEXT
    header = json.dumps({"format": FORMAT, "version": __version__, **facts})
    try:
        write_state_dict(fresh, tensors, metadata={_HEADER: header})
    except CheckpointError as err:
        kept = f"the state before it, {current}, is whole" if current.exists() else "none was kept"
        raise CheckpointError(
            f"the run's state could not be saved, and {kept}: {err}; then resume the run"
        ) from err
    if current.exists():
        os.replace(current, folder / PREVIOUS)
    os.replace(fresh, current)
    if os.name == "posix":  # make the renames survive a power cut
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_state(folder: Path) -> RunState | None:
    """Read the newest whole state of a folder; None where none was ever written.

    CheckpointError where there are states and none can be read, or one is of a newer format.
    """
    unreadable: list[str] = []
    for name in (NEXT, CURRENT, PREVIOUS):  # NEXT is there only if a kill came between renames
        path = folder / name
        if not path.exists():
            continue
        try:
            file = read_state_dict(path)
            facts = json.loads(file.metadata[_HEADER])
        except (CheckpointError, KeyError, ValueError) as err:
            unreadable.append(f"{path} is no whole state ({err})")
            continue
        check_format(facts.get("format"), FORMAT, facts.get("version"), str(path))
        return RunState(path, file.tensors, facts, tuple(unreadable))
    if unreadable:
        raise CheckpointError(
            f"{'; '.join(unreadable)}; no other state is there: begin again in another folder"
        )
    return None


def remove_temporary_files(folder: Path) -> None:
    """Remove what a kill left half written: temporary files beside the run's own."""
    for pattern in (".*.safetensors.*.tmp", ".*.toml.*.tmp", ".*.jsonl.*.tmp", ".*.png.*.part"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def pack(
    model: nn.Module, average: nn.Module | None, optimiser: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Flatten a run's tensors: ``model/…``, ``average/…``, ``optimiser/parameter/…``."""
    tensors = {f"model/{key}": value for key, value in model.state_dict().items()}
    if average is not None:
        tensors.update({f"average/{key}": value for key, value in average.state_dict().items()})
    for name, parameter in _named(optimiser):
        state = optimiser.state[parameter]
        tensors.update({f"optimiser/{name}/{key}": value for key, value in state.items()})
    return tensors


def unpack(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    average: nn.Module | None,
    optimiser: torch.optim.Optimizer,
) -> None:
    """Put tensors back where ``pack`` took them from; CheckpointError for another network."""

    def part(name: str) -> dict[str, Tensor]:
        start = f"{name}/"
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}

    try:
        model.load_state_dict(part("model"))
        if average is not None:
            average.load_state_dict(part("average"))
    except RuntimeError as err:
        raise CheckpointError(f"the state is of another network: {err}") from err
    trained, unknown = dict(_named(optimiser)), set()
    for key, value in part("optimiser").items():
        name, _, what = key.rpartition("/")
        if (parameter := trained.get(name)) is None:
            unknown.add(name)
        elif what == "step":
            optimiser.state[parameter][what] = value.clone()
        else:  # in memory as the parameter is: channels last or not
            own = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            optimiser.state[parameter][what] = own.copy_(value)
    if unknown:
        raise CheckpointError(
            f"the state is of another run: it trained {', '.join(sorted(unknown))}, which is not "
            "trainable now"
        )


def _named(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimiser's parameters by the names that ``parameter_groups`` gave them."""
    for group in optimiser.param_groups:
        yield from zip(group["names"], group["params"], strict=True)
