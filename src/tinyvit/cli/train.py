"""``tinyvit train``: from options to the library's settings, and a run shown while it goes.

A setting is taken from the command line, else from a file (``--config``), else from the run that is
resumed. ``task.toml`` in a run's folder holds the task's settings, beside the loop's in
``settings.toml``: so a run is resumed by its folder alone, and with other settings it is refused.
``write-logits`` and ``store-features`` run a teacher once and keep its outputs, which students are
trained on; both may be stopped at any moment and go on by the same command.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from inspect import Parameter
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

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

from .arguments import Natural, Positive, announce, check_checkpoint
from .console import INTERRUPTED, Console, Update, counted
from .settings_options import (
    check_data,
    check_places,
    documented,
    flag_of,
    options_of,
    with_options,
)

if TYPE_CHECKING:
    from tinyvit.train import Progress, Result, Task


TASK_FILE, SETTINGS_FILE = "task.toml", "settings.toml"
_TASK = "task"  # the name in TASK_FILE that says which verb made the run
_NAMED = 20  # unreadable images that are named; --json has all
_PAUSE = 60.0  # seconds between two lines where there is no bar

Bf16 = Annotated[bool | None, typer.Option(rich_help_panel="What it runs on")]
Chosen = TypeVar("Chosen", bound=Settings)


# -- which settings ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskVerb:
    """A verb that trains; its task is made by ``module`` of ``tinyvit.train.tasks``."""

    name: str  # after ``tinyvit train``
    settings: type[Settings]
    module: str

    def options(self) -> list[Parameter]:
        """Those of the command itself, of the task and of the loop."""
        folder, *loop = options_of(TrainSettings)
        *control, bf16 = documented(run_training)
        return [folder, *control, *options_of(self.settings), *loop, bf16]


CLASSIFY = TaskVerb("classify", ClassifySettings, "classify")
SEGMENT = TaskVerb("segment", SegmentSettings, "segment")
DISTILL_LOGITS = TaskVerb("distill-logits", DistillLogitsSettings, "distill")
DISTILL_FEATURES = TaskVerb("distill-features", DistillFeaturesRun, "distill")


def gather(
    verb: TaskVerb,
    given: Mapping[str, object],
    config: str | None = None,
    is_resumed: bool = False,
) -> tuple[TrainSettings, Settings]:
    """The loop's settings and the task's; ``given`` has None where nothing was given."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if isinstance(places := chosen.get("data"), list | tuple):
        if len(places) > 1:
            raise typer.BadParameter(
                f"{len(places)} places of data were named, and one is wanted; for many tar files "
                "name their folder, or a pattern in quotes such as 'train-*.tar'."
            )
        chosen["data"] = places[0]
    if config is not None:
        chosen = {**_read(Path(config), verb), **chosen}
    if "folder" not in chosen:
        raise typer.BadParameter("name the folder of the run with -o RUN_FOLDER.")
    folder = Path(str(chosen["folder"]))
    before = _read_run(folder, verb) if is_resumed else {}
    values = {**before, **chosen}
    if "data" not in values:
        raise typer.BadParameter(
            "name the data to train on, or --resume a run that 'tinyvit train' has begun in "
            f"{folder}."
        )
    task = _settings(verb.settings, values)
    if "data" in before:
        begun = _settings(verb.settings, before, str(folder / TASK_FILE))
        if changes := task.changes(begun):
            raise ChangedSettingsError(str(folder), changes)
    return _settings(TrainSettings, values), task


def task_toml(verb: TaskVerb, task: Settings) -> str:
    """The text of ``task.toml``: places that exist here are written in full."""
    places = [name for name, one in settings_of(type(task)).items() if one.is_place]
    found = [(name, getattr(task, name)) for name in places if getattr(task, name)]
    whole = {name: os.path.abspath(at) for name, at in found if os.path.exists(at)}
    return f'{_TASK} = "{verb.name}"\n{replace(task, **whole).to_toml()}'


def _settings(cls: type[Chosen], values: Mapping[str, object], source: str = "") -> Chosen:
    known = settings_of(cls)
    own = {name: value for name, value in values.items() if name in known}
    return cls.from_mapping(own, source)


def _read(path: Path, verb: TaskVerb) -> dict[str, object]:
    """The settings in a TOML file, of the loop and the task, checked."""
    values = read_toml(path)
    values.pop(_TASK, None)
    known = {**settings_of(verb.settings), **settings_of(TrainSettings)}
    return checked_settings(known, values, str(path), TrainSettings.former_names)


def _read_run(folder: Path, verb: TaskVerb) -> dict[str, object]:
    """The settings a run was begun with; none where there is no run."""
    values: dict[str, object] = {}
    for file in (folder / TASK_FILE, folder / SETTINGS_FILE):
        if not file.is_file():
            continue
        found = read_toml(file).get(_TASK, verb.name)
        if found != verb.name:
            raise ValueError(
                f"{folder} holds a run of 'tinyvit train {found}', not of {verb.name}; resume it "
                "by that, or choose another folder"
            )
        values.update(_read(file, verb))
    values.pop("folder", None)
    return values


# -- the run -----------------------------------------------------------------------------------


def run_training(
    own: Console,
    verb: TaskVerb,
    *,
    resume: bool | None = None,
    config: str | None = None,
    as_json: bool | None = None,
    bf16: Bf16 = None,
    **given: object,
) -> None:
    """Train, and say what was reached; ``given`` has None where nothing was given.

    Options:
        resume (--resume/--no-resume): Resume the run in the folder, with its settings; where there
            is none, begin it.
        config (FILE.toml): Read settings from a file of 'name = value' lines; options go before it.
            The names are those of the options with _ for -, as in settings.toml and task.toml of a
            run.
        as_json (--json/--text): Print one JSON object on stdout at the end.
        bf16 (--bf16/--fp32): Short for --precision bf16, and for fp32.
    """
    if bf16 is not None:
        given["precision"] = "bf16" if bf16 else "fp32"
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
            loop, settings = gather(verb, given, config, bool(resume))
            check_places(settings)
            task, result = _train(own, verb, loop, settings, bool(resume))
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
        _summarise(own, verb, task, result, bool(as_json))


def _train(
    own: Console, verb: TaskVerb, loop: TrainSettings, settings: Settings, is_resumed: bool
) -> tuple[Task[Any], Result]:
    from tinyvit.allocator import tune_allocator
    from tinyvit.checkpoints.files import write_text
    from tinyvit.train import train

    if sys.platform == "linux":
        tune_allocator()  # large tensors come and go in every step
    for name in ("checkpoint", "sam"):
        if (weights := getattr(settings, name, None)) is not None:
            announce(own, weights)
    tasks = importlib.import_module(f"tinyvit.train.tasks.{verb.module}")
    task: Task[Any] = tasks.make_task(settings)
    folder = Path(loop.folder)
    own.say(f"{verb.name}: {len(task)} samples to train on, in {folder}")
    is_written: list[bool] = []
    with shown(own) as show:

        def report(progress: Progress) -> None:
            if not is_written:  # the loop has taken the folder
                write_text(folder / TASK_FILE, task_toml(verb, settings))
                is_written.append(True)
            show(progress)

        return task, train(task, loop, resume=is_resumed, report=report)


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


@contextmanager
def shown(own: Console) -> Iterator[Callable[[Progress], None]]:
    """A ``report`` callback that shows a run: a bar on a terminal, a line a minute elsewhere."""
    was_validating, said = False, monotonic()
    with own.progress("training", things="") as update:

        def report(progress: Progress) -> None:
            nonlocal was_validating, said
            if progress.words:
                own.say(progress.words)
            is_validating, speed = progress.phase == "validate", _speed(progress)
            what = "validating" if is_validating else "training"
            update(progress.step, progress.steps, what, speed)
            has_validated = was_validating and not is_validating
            was_validating = is_validating
            if not has_validated and (own.shows_bars or not progress.step):
                return
            if has_validated or monotonic() - said > _PAUSE:
                said = monotonic()
                epochs = f" (epoch {progress.epoch} of {progress.epochs})" if progress.step else ""
                metrics = f"{metrics_text(progress.metrics)}; " if has_validated else ""
                place = f"step {progress.step} of {progress.steps}{epochs}"
                own.say(f"{place}: {metrics}training {speed}")

        yield report


def metrics_text(metrics: Mapping[str, float]) -> str:
    """``top1 0.9532, loss 0.2101``."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()) or "not validated"


def time_text(seconds: float) -> str:
    """``0:02:13``."""
    return str(timedelta(seconds=round(seconds)))


def _speed(progress: Progress) -> str:
    if progress.loss is None:
        return "not begun"
    words = f"loss {progress.loss:.4f}, {progress.images_per_second:.1f} images/s"
    if progress.seconds_left is not None and progress.step < progress.steps:
        words += f", {time_text(progress.seconds_left)} left"
    return words


# -- the verbs ---------------------------------------------------------------------------------


@with_options(CLASSIFY.options())
def classify(own: Console, **values: Any) -> None:
    """Train a classifier on images of named classes.

    The run's folder gets best.safetensors and last.safetensors, which 'tinyvit classify' loads,
    log.jsonl, curves.png, the settings, and the state from which a stopped run is resumed. Ctrl-C
    ends the step, saves the state and says how to go on.

    Examples:
        tinyvit train classify photos -o run --epochs 20 --batch-size 32
        tinyvit train classify 'shards/*.tar' -o run --config choices.toml --lr 5e-4
        tinyvit train classify -o run --resume
        torchrun --nproc-per-node 2 -m tinyvit train classify photos -o run
    """
    run_training(own, CLASSIFY, **values)


@with_options(DISTILL_LOGITS.options())
def distill_logits(own: Console, **values: Any) -> None:
    """Train a classifier with a teacher's predictions.

    The predictions were written by 'tinyvit train write-logits', and belong to these images, this
    split and these random changes: --val, --val-part, --split-seed, --augment and --flip must be
    the same. The run's folder is as with 'tinyvit train classify'.

    Examples:
        tinyvit train write-logits photos --teacher teacher.safetensors -o answers
        tinyvit train distill-logits photos --logits answers -o run
    """
    run_training(own, DISTILL_LOGITS, **values)


@with_options(DISTILL_FEATURES.options())
def distill_features(own: Console, **values: Any) -> None:
    """Train an encoder to give a teacher's features.

    The features were written by 'tinyvit train store-features'. The student prepares images as
    the teacher does, perhaps at another size. The run's folder is as with 'tinyvit train classify';
    its weights are an encoder, or with --sam a whole SAM.

    Examples:
        tinyvit train store-features photos --teacher mobile_sam -o features
        tinyvit train distill-features photos --features features -o run
    """
    run_training(own, DISTILL_FEATURES, **values)


@with_options(SEGMENT.options())
def segment(own: Console, **values: Any) -> None:
    """Train a SAM to segment by clicks and boxes.

    A learning rate of 5e-4 suits new weights, a tenth of it trained ones. The run's folder is as
    with 'tinyvit train classify'; its weights are a whole SAM, which 'tinyvit segment' loads.

    Examples:
        tinyvit train segment cells -o run --lr 5e-5 --epochs 30
        tinyvit train segment cells.json --images photos -o run --trainable decoder
    """
    run_training(own, SEGMENT, **values)


def write_logits(
    own: Console,
    data: str,
    teacher: str,
    output: Path,
    views: Positive = 10,
    top_k: Positive = 10,
    augment: str = "light",
    flip: bool = True,
    val: str | None = None,
    val_part: float = 0.1,
    split_seed: int = 0,
    teacher_size: Positive | None = None,
    batch_size: Positive = 32,
    seed: Natural = 0,
    device: str = "cpu",
    as_json: bool = False,
) -> None:
    """Keep a teacher's predictions, for 'distill-logits'.

    Each image is used in several views. Of each view the largest probabilities are kept, with the
    seed that makes the view again. What is there already is kept; a folder with predictions of
    another teacher, other images or other random changes is refused. An image that cannot be read
    is named, and the exit code is 1.

    Options:
        data (DATA): Labelled images, as 'tinyvit train classify' has.
        views: Views of each image.
        top_k: Probabilities kept of each view.
        augment ([none|light|full]): Random changes that make the views, as in 'tinyvit train
            classify'.
        flip: Mirror half of the views; not for digits.
        val (DATA): The part to validate on; not used here.
        val_part: Part of each class that is held out and not used.
        split_seed: Seed of the choice of what is held out.
        seed: Seed of all random numbers.

    Examples:
        tinyvit train write-logits photos --teacher teacher.safetensors -o answers
        tinyvit train write-logits photos --teacher big.onnx --teacher-size 384 -o answers
    """
    check_data(data, "DATA")
    check_checkpoint(teacher, "--teacher")

    from tinyvit.image_spec import ImageSpec
    from tinyvit.train.data.augment import augmentation
    from tinyvit.train.data.images import open_data_set
    from tinyvit.train.tasks.teachers import open_teacher
    from tinyvit.train.tasks.teachers import write_logits as write

    parts = open_data_set(data, val, val_part=val_part, split_seed=split_seed)
    spec = None if teacher_size is None else ImageSpec.timm(teacher_size)
    chosen = augmentation(augment, flip)  # type: ignore[arg-type]  # one of the words
    opened = open_teacher(teacher, spec, device, gives="logits")
    with _kept(own, opened.name, "views", output, as_json) as (update, facts):
        _, broken = write(
            output,
            parts.train,
            opened,
            augment=chosen,
            views=views,
            k=top_k,
            seed=seed,
            batch_size=batch_size,
            progress=update,
        )
        facts |= {"pictures": len(parts.train), "views": views, "broken": broken}


def store_features(
    own: Console,
    images: Path,
    teacher: str,
    output: Path,
    flips: bool = False,
    teacher_size: Positive | None = None,
    teacher_images: str = "sam",
    batch_size: Positive = 4,
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Keep a teacher's feature maps, for 'distill-features'.

    Two bytes for each number: 2 MB an image for SAM at 1024 pixels. What is there already is kept,
    an image that has changed since is computed again, and a folder of another teacher is refused.
    An image that cannot be read is named, and the exit code is 1.

    Options:
        images (IMAGES): A folder of images.
        flips: Keep features of mirrored images too: twice the size.
        teacher_images ([sam|sam3]): How images are prepared where --teacher-size is given: as for
            SAM, or squashed to a square with values from -1 to 1, as for SAM 3 (its size is 1008).

    Examples:
        tinyvit train store-features photos --teacher mobile_sam -o features
        tinyvit train store-features photos --teacher big.onnx --teacher-size 1024 -o features
    """
    check_data(str(images), "IMAGES")
    check_checkpoint(teacher, "--teacher")

    from tinyvit.image_spec import ImageSpec
    from tinyvit.train.tasks.teachers import open_teacher
    from tinyvit.train.tasks.teachers import store_features as store

    spec = None
    if teacher_size is not None:
        spec = (ImageSpec.sam3 if teacher_images == "sam3" else ImageSpec.sam)(teacher_size)
    opened = open_teacher(teacher, spec, device)
    with _kept(own, opened.name, "images", output, as_json) as (update, facts):
        kept = store(opened, images, output, flips=flips, batch_size=batch_size, progress=update)
        shape = list(kept.shapes.get("features", ()))
        facts |= {"pictures": len(kept.good), "shape": shape, "broken": dict(kept.unreadable)}


@contextmanager
def _kept(
    own: Console, teacher: str, things: str, output: Path, as_json: bool
) -> Iterator[tuple[Update, dict[str, Any]]]:
    """A progress bar, and what there is to say at the end: ``pictures``, ``broken`` and more."""
    own.say(f"running {teacher}")
    facts: dict[str, Any] = {"output": str(output)}
    try:
        with own.progress("running", things=things) as update:
            yield update, facts
    except KeyboardInterrupt:
        console.complain("stopped; the same command goes on from there")
        raise
    own.say(f"{counted(facts['pictures'], 'image')} are in {output}")
    if as_json:
        console.write_json(facts)
    for name, reason in facts["broken"].items():
        console.complain(f"failed: {reason if name in reason else f'{name}: {reason}'}")
    if facts["broken"]:
        raise typer.Exit(1)
