"""``tinyvit train``: from options to the library's settings, and a run shown while it goes.

A setting is taken from the command line, else from a file (``--config``), else from the run that is
resumed. ``task.toml`` in a run's folder holds the task's settings, beside the loop's in
``settings.toml``: so a run is resumed by its folder alone, and with other settings it is refused.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from inspect import Parameter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from tinyvit.cli import console
from tinyvit.train.settings import (
    ChangedSettingsError,
    Settings,
    SettingsError,
    TrainSettings,
    checked_settings,
    read_toml,
    settings_of,
)
from tinyvit.train.tasks.settings import (
    ClassifySettings,
    DistillFeaturesRun,
    DistillLogitsSettings,
    SegmentSettings,
)

from .arguments import announce
from .console import INTERRUPTED, Console, bar_of
from .settings_options import check_places, flag_of, option, options_of, with_options

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from typing_extensions import Self

    from tinyvit.train import Progress, Result, Task

TASK_FILE, SETTINGS_FILE = "task.toml", "settings.toml"
_TASK = "task"  # the name in TASK_FILE that says which verb made the run
_NAMED = 20  # unreadable images that are named; --json has all
_PAUSE = 60.0  # seconds between two lines where there is no bar

EXAMPLES = {
    "classify": (
        "tinyvit train classify photos -o run --epochs 20 --batch-size 32",
        "tinyvit train classify 'shards/*.tar' -o run --config choices.toml --lr 5e-4",
        "tinyvit train classify -o run --resume",
        "torchrun --nproc-per-node 2 -m tinyvit train classify photos -o run",
    ),
    "distill-logits": (
        "tinyvit train write-logits photos --teacher teacher.safetensors -o answers",
        "tinyvit train distill-logits photos --logits answers -o run",
    ),
    "distill-features": (
        "tinyvit train store-features photos --teacher mobile_sam -o features",
        "tinyvit train distill-features photos --features features -o run",
    ),
    "segment": (
        "tinyvit train segment cells -o run --lr 5e-5 --epochs 30",
        "tinyvit train segment cells.json --images photos -o run --trainable decoder",
    ),
}

_RESUME = "Resume the run in the folder, with its settings; where there is none, begin it."
_CONFIG = (
    "Read settings from a file of 'name = value' lines; options go before it. The names are those "
    "of the options with _ for -, as in settings.toml and task.toml of a run."
)
_JSON = "Print one JSON object on stdout at the end."


def _switch(name: str, flags: str, words: str, group: str | None = None) -> Parameter:
    shown = typer.Option(flags, show_default=False, rich_help_panel=group, help=words)
    return option(name, bool, shown)


_CONTROL = [  # what is no setting: how the command itself behaves
    _switch("resume", "--resume/--no-resume", _RESUME),
    option("config", str, typer.Option(metavar="FILE.toml", show_default=False, help=_CONFIG)),
    _switch("as_json", "--json/--text", _JSON),
]
_BF16 = _switch(  # another way to say --precision
    "bf16", "--bf16/--fp32", "Short for --precision bf16, and for fp32.", "What it runs on"
)


# -- the verbs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskVerb:
    """A verb that trains; its task is made by ``module`` of ``tinyvit.train.tasks``."""

    name: str  # after ``tinyvit train``
    settings: type[Settings]
    module: str


CLASSIFY = TaskVerb("classify", ClassifySettings, "classify")
SEGMENT = TaskVerb("segment", SegmentSettings, "segment")
DISTILL_LOGITS = TaskVerb("distill-logits", DistillLogitsSettings, "distill")
DISTILL_FEATURES = TaskVerb("distill-features", DistillFeaturesRun, "distill")


def _parameters(verb: TaskVerb) -> list[Any]:
    folder, *loop = options_of(TrainSettings)
    return [folder, *_CONTROL, *options_of(verb.settings), *loop, _BF16]


@with_options(_parameters(CLASSIFY))
def classify(ctx: typer.Context, **values: object) -> None:
    """Train a classifier on images of named classes.

    The run's folder gets best.safetensors and last.safetensors, which 'tinyvit classify' loads,
    log.jsonl, curves.png, the settings, and the state from which a stopped run is resumed. Ctrl-C
    ends the step, saves the state and says how to go on.
    """
    run_training(console.of(ctx), CLASSIFY, values)


@with_options(_parameters(DISTILL_LOGITS))
def distill_logits(ctx: typer.Context, **values: object) -> None:
    """Train a classifier with a teacher's predictions.

    The predictions were written by 'tinyvit train write-logits', and belong to these images, this
    split and these random changes: --val, --val-part, --split-seed, --augment and --flip must be
    the same. The run's folder is as with 'tinyvit train classify'.
    """
    run_training(console.of(ctx), DISTILL_LOGITS, values)


@with_options(_parameters(DISTILL_FEATURES))
def distill_features(ctx: typer.Context, **values: object) -> None:
    """Train an encoder to give a teacher's features.

    The features were written by 'tinyvit train store-features'. The student prepares images as
    the teacher does, perhaps at another size. The run's folder is as with 'tinyvit train classify';
    its weights are an encoder, or with --sam a whole SAM.
    """
    run_training(console.of(ctx), DISTILL_FEATURES, values)


@with_options(_parameters(SEGMENT))
def segment(ctx: typer.Context, **values: object) -> None:
    """Train a SAM to segment by clicks and boxes.

    A learning rate of 5e-4 suits new weights, a tenth of it trained ones. The run's folder is as
    with 'tinyvit train classify'; its weights are a whole SAM, which 'tinyvit segment' loads.
    """
    run_training(console.of(ctx), SEGMENT, values)


# -- which settings ----------------------------------------------------------------------------


class Choices(NamedTuple):
    """The settings of a run, whether it is resumed, and whether its result is JSON."""

    loop: TrainSettings
    task: Settings
    resume: bool
    as_json: bool


def gather(verb: TaskVerb, given: Mapping[str, object]) -> Choices:
    """Put the settings together; ``given`` has None where the command line has nothing."""
    flags = {name: value for name, value in given.items() if value is not None}
    resume, as_json = bool(flags.pop("resume", False)), bool(flags.pop("as_json", False))
    config = flags.pop("config", None)
    if "bf16" in flags:
        flags["precision"] = "bf16" if flags.pop("bf16") else "fp32"
    if isinstance(places := flags.get("data"), list | tuple):
        if len(places) > 1:
            raise typer.BadParameter(
                f"{len(places)} places of data were named, and one is wanted; for many tar files "
                "name their folder, or a pattern in quotes such as 'train-*.tar'."
            )
        flags["data"] = places[0]
    chosen = flags if config is None else {**_read(Path(str(config)), verb), **flags}
    if "folder" not in chosen:
        raise typer.BadParameter("name the folder of the run with -o RUN_FOLDER.")
    folder = Path(str(chosen["folder"]))
    before = _read_run(folder, verb) if resume else {}
    values = {**before, **chosen}
    if "data" not in values:
        raise typer.BadParameter(
            "name the data to train on, or --resume a run that 'tinyvit train' has begun in "
            f"{folder}."
        )
    task = verb.settings.from_mapping(_part(values, verb.settings))
    if "data" in before:
        begun = verb.settings.from_mapping(_part(before, verb.settings), str(folder / TASK_FILE))
        if changes := task.changes(begun):
            raise ChangedSettingsError(str(folder), changes)
    return Choices(TrainSettings.from_mapping(_part(values, TrainSettings)), task, resume, as_json)


def task_toml(verb: TaskVerb, task: Settings) -> str:
    """The text of ``task.toml``: places that exist here are written in full."""
    places = [name for name, one in settings_of(type(task)).items() if one.is_place]
    found = [(name, getattr(task, name)) for name in places if getattr(task, name)]
    whole = {name: os.path.abspath(at) for name, at in found if os.path.exists(at)}
    return f'{_TASK} = "{verb.name}"\n{replace(task, **whole).to_toml()}'


def _part(values: Mapping[str, object], settings: type[Settings]) -> dict[str, object]:
    known = settings_of(settings)
    return {name: value for name, value in values.items() if name in known}


def _read(path: Path, verb: TaskVerb) -> dict[str, object]:
    """The settings in a TOML file, of the loop and the task, checked."""
    values = read_toml(path)
    values.pop(_TASK, None)
    known = {**settings_of(verb.settings), **settings_of(TrainSettings)}
    return checked_settings(known, values, str(path), TrainSettings.former_names)


def _read_run(folder: Path, verb: TaskVerb) -> dict[str, object]:
    """The settings a run was begun with; none where there is no run."""
    values: dict[str, object] = {}
    task, loop = folder / TASK_FILE, folder / SETTINGS_FILE
    if task.is_file():
        found = read_toml(task).get(_TASK, verb.name)
        if found != verb.name:
            raise ValueError(
                f"{folder} holds a run of 'tinyvit train {found}', not of {verb.name}; resume it "
                "by that, or choose another folder"
            )
        values.update(_read(task, verb))
    if loop.is_file():
        values.update(_read(loop, verb))
    values.pop("folder", None)
    return values


# -- the run -----------------------------------------------------------------------------------


def run_training(own: Console, verb: TaskVerb, given: Mapping[str, object]) -> None:
    """Train, and say what was reached; ``given`` has None where nothing was given."""
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        own = Console(is_quiet=True, is_debug=own.is_debug)
    if "RANK" in os.environ:  # else each process says what DistributedDataParallel might do faster
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    names = {**settings_of(verb.settings), **settings_of(TrainSettings)}
    with warnings.catch_warnings():
        if not is_first:  # what the first process warns of is not said again
            warnings.simplefilter("ignore")
        try:
            choices = gather(verb, given)
            check_places(choices.task)
            task, result = _train(own, verb, choices)
        except SettingsError as err:
            said = err.said(lambda name: flag_of(names[name]) if name in names else name)
            raise ValueError(said) from err
        except KeyboardInterrupt as err:
            if not is_first:
                raise typer.Exit(INTERRUPTED) from err
            if given.get("folder") is not None:
                _say_how_to_resume(verb, Path(str(given["folder"])), str(err))
            raise
    if is_first:
        _summarise(own, verb, task, result, choices.as_json)


def _train(own: Console, verb: TaskVerb, choices: Choices) -> tuple[Task[Any], Result]:
    from tinyvit.allocator import tune_allocator
    from tinyvit.checkpoints.files import write_text
    from tinyvit.train import train

    if sys.platform == "linux":
        tune_allocator()  # large tensors come and go in every step
    for name in ("checkpoint", "sam"):
        weights = getattr(choices.task, name, None)
        if weights is not None:
            announce(own, weights)
    tasks = importlib.import_module(f"tinyvit.train.tasks.{verb.module}")
    task: Task[Any] = tasks.make_task(choices.task)
    folder = Path(choices.loop.folder)
    own.say(f"{verb.name}: {len(task)} samples to train on, in {folder}")
    is_written: list[bool] = []
    with TrainScreen(own) as screen:

        def report(progress: Progress) -> None:
            if not is_written:  # the loop has taken the folder
                write_text(folder / TASK_FILE, task_toml(verb, choices.task))
                is_written.append(True)
            screen(progress)

        return task, train(task, choices.loop, resume=choices.resume, report=report)


def _say_how_to_resume(verb: TaskVerb, folder: Path, words: str) -> None:
    """After Ctrl-C: what was kept, and the command that resumes."""
    console.complain(words.partition("; resume")[0] or "stopped")
    if not (folder / "state.safetensors").is_file():
        console.complain("no state was saved yet; the same command begins again")
        return
    command = f"tinyvit train {verb.name} -o {shlex.quote(str(folder))} --resume"
    started = ", started by torchrun as before" if "WORLD_SIZE" in os.environ else ""
    console.complain(f"go on with: {command}{started}")


def _summarise(
    own: Console, verb: TaskVerb, task: Task[Any], result: Result, as_json: bool
) -> None:
    """Say what was reached, where it is, and what could not be read."""
    unreadable: Mapping[str, str] = getattr(task, "broken", {})
    own.say(
        f"trained {verb.name} to step {result.steps} in {time_text(result.seconds)}: "
        f"{metrics_text(result.metrics)}"
    )
    if result.best is not None:
        own.say(
            f"best {task.goal[0]} {result.best:.4f} after step {result.best_step}: "
            f"{result.best_weights}"
        )
    own.say(f"newest weights: {result.last_weights}; curves: {result.folder / 'curves.png'}")
    for name, reason in list(unreadable.items())[:_NAMED]:
        console.complain(f"skipped: {reason if name in reason else f'{name}: {reason}'}")
    if len(unreadable) > _NAMED:
        console.complain(f"skipped {len(unreadable) - _NAMED} more (--json names all)")
    if as_json:
        values = asdict(result).items()
        plain = {name: str(one) if isinstance(one, Path) else one for name, one in values}
        plain["figures"] = plain.pop("metrics")
        facts = {"task": verb.name, "goal": list(task.goal), **plain, "broken": dict(unreadable)}
        console.write_json(facts)


# -- the screen --------------------------------------------------------------------------------


class TrainScreen:
    """Shows a run: a bar on a terminal, a line a minute elsewhere; a ``report`` callback."""

    def __init__(self, own: Console) -> None:
        self._own, self._is_validating, self._said = own, False, monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        if self._own.shows_bars:
            from rich.progress import MofNCompleteColumn, TextColumn

            words = TextColumn("{task.fields[words]}", markup=False)
            self._bar = bar_of(MofNCompleteColumn(separator=" of "), words)
            self._bar.add_task("", total=None, visible=False, words="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show how far the run is."""
        if progress.words:
            self._own.say(progress.words)
        is_validating = progress.phase == "validate"
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                description="validating" if is_validating else "training",
                completed=progress.step,
                total=progress.steps,
                words=_speed(progress),
                visible=True,
            )
        if self._is_validating and not is_validating:
            self._say(f"{_place(progress)}: {metrics_text(progress.metrics)}; training ", progress)
        elif self._bar is None and progress.step and monotonic() - self._said > _PAUSE:
            self._say(f"{_place(progress)}: training ", progress)
        self._is_validating = is_validating

    def _say(self, text: str, progress: Progress) -> None:
        self._said = monotonic()
        self._own.say(text + _speed(progress))


def metrics_text(metrics: Mapping[str, float]) -> str:
    """``top1 0.9532, loss 0.2101``."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "not validated"


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
