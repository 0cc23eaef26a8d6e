"""One training run from the command line: choices in, the library's loop, a summary out.

Which tasks there are is known to ``train``. Under ``torchrun`` every process comes through here,
and only the first one speaks.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import typer

from tinyvit.cli import console
from tinyvit.cli.console import Console
from tinyvit.cli.errors import INTERRUPTED
from tinyvit.cli.option_rows import Row
from tinyvit.cli.train_choices import TASK_FILE, Choices, gather, speaking_of_options, task_toml
from tinyvit.cli.train_screen import TrainScreen, figures_text, time_text

if TYPE_CHECKING:
    from tinyvit.train import Progress, Result, Task, TrainSettings

__all__ = ["TaskVerb", "run_training"]

_NAMED = 20  # broken pictures that are named; --json has all


class Maker(Protocol):
    """Makes the library's task of choices."""

    def __call__(self, own: Console, values: Mapping[str, object], seed: int) -> Task[object]:
        """The task.

        Args:
            own: Where progress is shown.
            values: The task's choices; what is not there keeps the library's default.
            seed: Source of the weights that are new.
        """
        ...


@dataclass(frozen=True)
class TaskVerb:
    """A verb that trains.

    Attributes:
        name: After ``tinyvit train``.
        rows: The task's own options.
        make: Makes the task.
    """

    name: str
    rows: Sequence[Row]
    make: Maker


def run_training(own: Console, verb: TaskVerb, given: Mapping[str, object]) -> None:
    """Train, and say what was reached.

    Args:
        own: Where it is said.
        verb: The task.
        given: Values of the command line by name; None where nothing was given.

    Raises:
        ValueError: A choice is wrong, or does not fit the data or the run in the folder.
        TypeError: A choice of a file is of another kind.
        TinyViTError: A file cannot be read or written.
        OSError: The same.
        KeyboardInterrupt: Ctrl-C; it was said how to go on.
        typer.Exit: The same, in another process than the first.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        own = Console(is_quiet=True, is_debug=own.is_debug)
    if "RANK" in os.environ:  # else each process says what DistributedDataParallel might do faster
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with speaking_of_options(verb.rows), nullcontext() if is_first else _without_warnings():
        choices = gather(verb.name, verb.rows, given)

        from tinyvit.train import TrainSettings

        settings = TrainSettings.from_mapping(choices.loop)
        try:
            task, result = _train(own, verb, choices, settings)
        except KeyboardInterrupt as err:
            if not is_first:
                raise typer.Exit(INTERRUPTED) from err
            _say_how_to_go_on(verb, choices.folder, str(err))
            raise
    if is_first:
        broken: Mapping[str, str] = getattr(task, "broken", {})
        _summarise(own, verb, task, result, broken)
        if choices.as_json:
            console.write_json(_as_json(verb, task, result, broken))


def _train(
    own: Console, verb: TaskVerb, choices: Choices, settings: TrainSettings
) -> tuple[Task[object], Result]:
    from tinyvit.allocator import tune_allocator
    from tinyvit.train import train

    if sys.platform == "linux":
        tune_allocator()  # large tensors come and go in every step
    task = verb.make(own, choices.task, choices.seed)
    own.say(f"{verb.name}: {len(task)} samples to learn from, in {settings.folder}")
    with TrainScreen(own) as screen:
        report = _with_choices(screen, verb, choices)
        return task, train(task, settings, resume=choices.resume, report=report)


def _with_choices(
    screen: TrainScreen, verb: TaskVerb, choices: Choices
) -> Callable[[Progress], None]:
    """A callback that keeps the task's choices as soon as the loop has taken the folder."""
    from tinyvit.checkpoints.files import replacing

    text = task_toml(verb.name, choices)
    is_written: list[bool] = []

    def report(progress: Progress) -> None:
        if not is_written:
            path = choices.folder / TASK_FILE
            replacing(path, lambda fresh: _write(fresh, text))
            is_written.append(True)
        screen(progress)

    return report


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """What the first process warns of is not said again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _say_how_to_go_on(verb: TaskVerb, folder: Path, words: str) -> None:
    """After Ctrl-C: what was kept, and the command that goes on."""
    console.complain(words.partition(": go on")[0] or "stopped")
    if not (folder / "state.safetensors").is_file():
        console.complain("no state was saved yet; the same command begins anew")
        return
    command = f"tinyvit train {verb.name} -o {shlex.quote(str(folder))} --resume"
    started = ", started by torchrun as before" if "WORLD_SIZE" in os.environ else ""
    console.complain(f"go on with: {command}{started}")


def _summarise(
    own: Console, verb: TaskVerb, task: Task[object], result: Result, broken: Mapping[str, str]
) -> None:
    """Say what was reached, where it is, and what could not be read."""
    own.say(
        f"trained {verb.name} to step {result.steps} in {time_text(result.seconds)}: "
        f"{figures_text(result.figures)}"
    )
    if result.best is not None:
        own.say(
            f"best {task.goal[0]} {result.best:.4f} after step {result.best_step}: "
            f"{result.best_weights}"
        )
    own.say(f"newest weights: {result.last_weights}; curves: {result.folder / 'curves.png'}")
    for name, reason in list(broken.items())[:_NAMED]:
        words = reason if name in reason else f"{name}: {reason}"
        console.complain(f"left out: {words}")
    if len(broken) > _NAMED:
        console.complain(f"left out {len(broken) - _NAMED} more (--json names all)")


def _as_json(
    verb: TaskVerb, task: Task[object], result: Result, broken: Mapping[str, str]
) -> dict[str, object]:
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(result).items()
    }
    return {"task": verb.name, "goal": list(task.goal), **plain, "broken": dict(broken)}
