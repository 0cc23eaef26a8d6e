"""What was chosen for a run: options before a file's lines before what the run had before.

Names and values only; what they mean is known to the library. ``task.toml`` in a run's folder holds
the task's choices, beside the loop's in ``settings.toml``: so a run goes on by its folder alone,
and with other choices it is refused.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT, get_checkpoint, list_checkpoints
from tinyvit.cli import console
from tinyvit.errors import TinyViTError

from .console import INTERRUPTED, Console
from .settings_options import (
    CLASSIFY,
    CONTROL,
    DISTILL_FEATURES,
    DISTILL_LOGITS,
    LOOP,
    SEGMENT,
    Row,
    with_rows,
)

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from tinyvit.modules import TinyViT
    from tinyvit.train import Progress, Result, Task, TrainSettings
    from tinyvit.train.tasks.classify import ClassifySettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]


Values = dict[str, object]

TASK_FILE, SETTINGS_FILE = "task.toml", "settings.toml"
_VERB = "task"
_PLACES = ("data", "val", "images", "val_images", "logits", "features", "checkpoint", "sam")


@dataclass(frozen=True)
class Choices:
    """What was chosen; what is not named keeps the library's default.

    Attributes:
        loop: Of ``TrainSettings``, with the folder.
        task: Of the task's own settings, with places of data.
        resume: Go on with the run in the folder.
        as_json: Print the result as JSON.
    """

    loop: Values
    task: Values
    resume: bool
    as_json: bool

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(str(self.loop["folder"]))

    @property
    def seed(self) -> int:
        """Source of all chance."""
        seed = self.loop.get("seed", 0)
        return seed if isinstance(seed, int) else 0


def gather(verb: str, rows: Sequence[Row], given: Mapping[str, object]) -> Choices:
    """Put the choices together.

    Args:
        verb: The task, as it is called on the command line.
        rows: The task's own options.
        given: Values of the command line by name; None where nothing was given.

    Raises:
        typer.BadParameter: The folder or the data is missing, or there are several data.
        ValueError: A file holds something else, or the folder holds another run.
        OSError: A file cannot be read.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    resume, as_json = bool(flags.pop("resume", False)), bool(flags.pop("as_json", False))
    config = flags.pop("config", None)
    if "bf16" in flags:
        flags["precision"] = "bf16" if flags.pop("bf16") else "fp32"
    if "data" in flags:
        flags["data"] = _only(flags["data"])
    chosen = flags if config is None else {**_read(Path(str(config)), rows), **flags}
    if "folder" not in chosen:
        raise typer.BadParameter("name the folder of the run with -o RUN_FOLDER.")
    folder = Path(str(chosen["folder"]))
    before = _before(folder, verb, rows) if resume else {}
    _refuse_changes(folder, rows, before, chosen)
    values = {**before, **chosen}
    if "data" not in values:
        raise typer.BadParameter(
            "name the data to learn from, or --resume a run that 'tinyvit train' has begun in "
            f"{folder}."
        )
    own = {row.name for row in rows}
    loop = {name: value for name, value in values.items() if name not in own}
    return Choices(loop, {name: values[name] for name in values if name in own}, resume, as_json)


def task_toml(verb: str, choices: Choices) -> str:
    """The text of ``task.toml``: places that exist here are written in full."""
    lines = [f"{_VERB} = {json.dumps(verb)}\n"]
    for name, value in choices.task.items():
        if name in _PLACES and os.path.exists(str(value)):
            value = os.path.abspath(str(value))
        lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}\n")
    return "".join(lines)


@contextmanager
def speaking_of_options(rows: Sequence[Row]) -> Iterator[None]:
    """Let the library's errors speak of options instead of names.

    Raises:
        ValueError: As it came, in other words.
        TypeError: The same.
        TinyViTError: The same, of the kind that came.
    """
    try:
        yield
    except (TinyViTError, ValueError, TypeError) as err:
        text = _in_options(str(err), (*LOOP, *rows))
        is_plain = isinstance(err, TinyViTError) or type(err) in (ValueError, TypeError)
        if text == str(err) or not is_plain:
            raise
        raise type(err)(text) from err


def _in_options(text: str, rows: Sequence[Row]) -> str:
    text = re.sub(r"\b(by|with) resume\b", r"\1 --resume", text)
    for row in rows:
        before, option = r"(?<![\w/'\".-])", row.flag
        if "_" in row.name:  # no word of English
            text = re.sub(rf"{before}{row.name}(?![\w/.-])=?", f"{option} ", text)
        else:
            text = re.sub(rf"{before}{row.name}=", f"{option} ", text)
            text = re.sub(rf"{before}{row.name} (must|was) ", rf"{option} \1 ", text)
    return re.sub(r" +([;,.)]|$)", r"\1", re.sub(r"  +", " ", text))


def _only(data: object) -> object:
    """The one place of data.

    Raises:
        typer.BadParameter: There are several.
    """
    if not isinstance(data, (list, tuple)):
        return data
    if len(data) > 1:
        raise typer.BadParameter(
            f"{len(data)} places of data were named, and one is wanted; for many tar files name "
            "their folder, or a pattern in quotes such as 'train-*.tar'."
        )
    return data[0] if data else None


def _read(path: Path, rows: Sequence[Row]) -> Values:
    """The choices in a TOML file.

    Raises:
        ValueError: It is no TOML, a name is unknown, or a value is of another kind.
        OSError: It cannot be read.
    """
    try:
        values: Values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{path} is no TOML file: {err}") from err
    values.pop(_VERB, None)
    known = {row.name: row for row in (*LOOP, *rows) if row.name != "bf16"}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{path}: unknown names {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )
    return {name: known[name].check(value, str(path)) for name, value in values.items()}


def _before(folder: Path, verb: str, rows: Sequence[Row]) -> Values:
    """What the run in a folder was begun with.

    Raises:
        ValueError: It is another task's run, or a file of it is damaged.
        OSError: A file cannot be read.
    """
    values: Values = {}
    task = folder / TASK_FILE
    if task.is_file():
        text = task.read_text(encoding="utf-8")
        found = re.search(rf'^{_VERB} = "(.*)"$', text, re.MULTILINE)
        if found is not None and found[1] != verb:
            raise ValueError(
                f"{folder} holds a run of 'tinyvit train {found[1]}', not of {verb}; go on with it "
                "by that, or choose another folder"
            )
        values.update(_read(task, rows))
    if (folder / SETTINGS_FILE).is_file():
        values.update(_read(folder / SETTINGS_FILE, rows))
    values.pop("folder", None)
    return values


def _refuse_changes(folder: Path, rows: Sequence[Row], before: Values, chosen: Values) -> None:
    """The task's choices must be those the run was begun with; the loop checks its own.

    Raises:
        ValueError: Some differ.
    """
    if not (before.keys() & {row.name for row in rows}):
        return
    against = [
        f"{row.flag} was {before.get(row.name, row.default)!r} and is {chosen[row.name]!r}"
        for row in rows
        if row.name in chosen
        and not row.is_free
        and chosen[row.name] != before.get(row.name, row.default)
    ]
    if against:
        raise ValueError(
            f"{folder} holds a run with other choices, and going on would not give its numbers: "
            f"{'; '.join(against)}. Leave them out, or start in another folder"
        )


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


pass
pass


_NAMED = 20  # broken images that are named; --json has all


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
    from tinyvit.checkpoints.files import write_text

    text = task_toml(verb.name, choices)
    is_written: list[bool] = []

    def report(progress: Progress) -> None:
        if not is_written:
            path = choices.folder / TASK_FILE
            write_text(path, text)
            is_written.append(True)
        screen(progress)

    return report


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


pass


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
        "tinyvit train segment cells.json --images photos -o run --move decoder",
    ),
}


@with_rows((*LOOP[:1], *CONTROL, *CLASSIFY, *LOOP[1:]))
def classify(ctx: typer.Context, **values: object) -> None:
    """Train a classifier on images of named classes.

    The run's folder gets best.safetensors and last.safetensors, which 'tinyvit classify' loads,
    log.jsonl, curves.png, the choices, and the state from which a stopped run goes on. Ctrl-C ends
    the step, saves the state and says how to go on.
    """
    run_training(console.of(ctx), TaskVerb("classify", CLASSIFY, _make_classify), values)


@with_rows((*LOOP[:1], *CONTROL, *DISTILL_LOGITS, *LOOP[1:]))
def distill_logits(ctx: typer.Context, **values: object) -> None:
    """Train a classifier with a teacher's answers.

    The answers were written by 'tinyvit train write-logits', and belong to these images, this
    split and this chance: --val, --val-part, --split-seed, --augment and --flip must be the same.
    The run's folder is as with 'tinyvit train classify'.
    """
    run_training(console.of(ctx), TaskVerb("distill-logits", DISTILL_LOGITS, _make_logits), values)


@with_rows((*LOOP[:1], *CONTROL, *DISTILL_FEATURES, *LOOP[1:]))
def distill_features(ctx: typer.Context, **values: object) -> None:
    """Train an encoder to give a teacher's features.

    The features were written by 'tinyvit train store-features'. The student prepares images as
    the teacher does, perhaps at another size. The run's folder is as with 'tinyvit train classify';
    its weights are an encoder, or with --sam a whole SAM.
    """
    verb = TaskVerb("distill-features", DISTILL_FEATURES, _make_features)
    run_training(console.of(ctx), verb, values)


@with_rows((*LOOP[:1], *CONTROL, *SEGMENT, *LOOP[1:]))
def segment(ctx: typer.Context, **values: object) -> None:
    """Train a SAM to segment by clicks and boxes.

    A rate of 5e-4 suits a start from chance, a tenth of it trained weights. The run's folder is as
    with 'tinyvit train classify'; its weights are a whole SAM, which 'tinyvit segment' loads.
    """
    run_training(console.of(ctx), TaskVerb("segment", SEGMENT, _make_segment), values)


def _make_classify(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.train.tasks.classify import make_task

    return make_task(_classifier(own, values, seed))


def _make_logits(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.train.tasks.distill import make_logits_task as make_task

    rest = dict(values)
    store = rest.pop("logits", None)
    if store is None:
        raise ValueError("name the folder of the teacher's answers with --logits FOLDER")
    return make_task(_classifier(own, rest, seed), str(store))


def _classifier(own: Console, values: Mapping[str, object], seed: int) -> ClassifySettings:
    from tinyvit.train.tasks.classify import ClassifySettings

    _announce(own, values)
    rest: dict[str, Any] = dict(values)
    if "window_sizes" in rest:
        rest["window_sizes"] = tuple(rest["window_sizes"])
    return ClassifySettings(**rest, seed=seed)


def _make_segment(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.train.tasks.segment import SegmentSettings, make_task

    _announce(own, values)
    rest: dict[str, Any] = dict(values)
    if "model" in rest:
        rest.setdefault("checkpoint", None)
    return make_task(SegmentSettings(**rest, seed=seed))


def _make_features(own: Console, values: Mapping[str, object], seed: int) -> Task[Any]:
    from tinyvit.sam import build_sam
    from tinyvit.train.tasks.distill import DistillFeaturesSettings
    from tinyvit.train.tasks.distill import make_features_task as make_task

    rest: dict[str, Any] = dict(values)
    names = ("data", "features", "sam", "checkpoint", "model", "img_size")
    root, store, sam, checkpoint, model, size = (rest.pop(name, None) for name in names)
    if store is None:
        raise ValueError("name the folder of the teacher's features with --features FOLDER")
    _announce(own, values)
    student = _student(checkpoint, model, size, seed)
    heads = None if sam is None else build_sam(sam)
    return make_task(student, store, root, DistillFeaturesSettings(**rest), heads)


def _student(checkpoint: str | None, model: str | None, size: int | None, seed: int) -> TinyViT:
    import torch

    from tinyvit.factory import create_model

    if checkpoint is None and model is None:
        checkpoint = DEFAULT_CHECKPOINT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_model(model, checkpoint, img_size=size)


def _announce(own: Console, values: Mapping[str, object]) -> None:
    """Say what is about to be fetched."""
    from .arguments import announce

    for name in ("checkpoint", "sam"):
        text = values.get(name)
        if isinstance(text, str) and text in list_checkpoints():
            announce(own, get_checkpoint(text))
