"""Options as rows of data, for verbs that have many: parameters, checks, and help in groups.

A verb of ``tinyvit train`` takes what the library's settings take. Each of those is one row here:
its name in the library and in TOML, its flags, its kind and its help. A value that is not given is
None; the default stands in the library, and is repeated in a row only to be shown.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar, cast

import typer
from typer.core import TyperCommand

from .arguments import matching_checkpoints, matching_models

Kind = Literal["flag", "int", "float", "text", "ints", "part", "argument"]
Verb = TypeVar("Verb", bound=Callable[..., None])

MAIN = "Options"
_WANTED = {
    "flag": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "text",
    "ints": "whole numbers, such as [7, 7, 14, 7]",
    "part": "a number or text",
    "argument": "text",
}


@dataclass(frozen=True)
class Row:
    """One option.

    Attributes:
        name: What the library and a TOML file call it.
        kind: What it takes; "ints" are whole numbers between commas, "part" a number or text.
        help: For people.
        default: What the library takes where nothing is given, to be shown; None shows nothing.
        flags: How it is written; empty for ``--name``.
        words: The only texts it takes; empty for any.
        metavar: What stands for the value in the help.
        group: The heading it stands under.
        is_free: Whether it may differ when a run goes on.
        complete: Gives words for the shell to complete.
    """

    name: str
    kind: Kind
    help: str
    default: object = None
    flags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    metavar: str | None = None
    group: str = MAIN
    is_free: bool = False
    complete: Callable[[str], list[str]] | None = None

    @property
    def written(self) -> tuple[str, ...]:
        """All flags; that of a switch with its opposite."""
        flags = self.flags or (f"--{self.name.replace('_', '-')}",)
        if self.kind == "flag" and "/" not in flags[0]:
            flags = tuple(f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
        return flags

    @property
    def flag(self) -> str:
        """What to call it in a message."""
        return "DATA" if self.kind == "argument" else self.written[0].partition("/")[0]

    def parse(self, text: str) -> object:
        """The value of a text of the command line.

        Raises:
            typer.BadParameter: It is not of this kind, or none of the words.
        """
        if self.words and text not in self.words:
            names = ", ".join(map(repr, self.words))
            raise typer.BadParameter(f"{text!r} is not one of {names}.")
        if self.kind == "ints":
            try:
                return [int(word) for word in text.split(",")]
            except ValueError as err:
                raise typer.BadParameter(
                    f"{text!r} is not whole numbers between commas; for example 7,7,14,7."
                ) from err
        if self.kind == "part":
            try:
                return float(text)
            except ValueError:
                return text
        return text

    def check(self, value: object, source: str) -> object:
        """A value of a TOML file, if it is of this kind.

        Raises:
            ValueError: It is not.
        """
        if isinstance(value, bool):
            is_good = self.kind == "flag"
        elif isinstance(value, int):
            is_good = self.kind in ("int", "float", "part")
        elif isinstance(value, float):
            is_good = self.kind in ("float", "part")
        elif isinstance(value, list):
            is_good = self.kind == "ints" and all(type(item) is int for item in value)
        else:
            is_good = isinstance(value, str) and self.kind in ("text", "part", "argument")
        wanted = f"one of {', '.join(self.words)}" if self.words else _WANTED[self.kind]
        if not is_good or (self.words and value not in self.words):
            raise ValueError(f"{source}: {self.name} must be {wanted}, got {value!r}")
        return value


def with_rows(rows: Sequence[Row]) -> Callable[[Verb], Verb]:
    """Let a verb ``f(ctx, **values)`` take these options; values not given are None."""

    def decorate(verb: Verb) -> Verb:
        own = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [own, *map(_parameter, rows)]
        changed = cast(Any, verb)
        changed.__signature__ = inspect.Signature(parameters)
        changed.__annotations__ = {one.name: one.annotation for one in parameters}
        return verb

    return decorate


def _parameter(row: Row) -> inspect.Parameter:
    """A row as a parameter that typer reads."""
    plain: dict[str, type] = {"flag": bool, "int": int, "float": float}
    kind: Any = plain.get(row.kind, str)
    shown = "on" if row.default is True else "off" if row.default is False else row.default
    text = row.help if shown is None else f"{row.help} [{shown}]"
    if row.kind == "argument":
        info = typer.Argument(metavar=row.metavar, show_default=False, help=text)
        kind = list[str]
    else:
        info = typer.Option(
            *row.written,
            metavar=row.metavar or (f"[{'|'.join(row.words)}]" if row.words else None),
            parser=row.parse if kind is str else None,
            autocompletion=row.complete,
            rich_help_panel=row.group,
            show_default=False,
            help=text,
        )
    annotation = operator.getitem(cast(Any, Annotated), (kind | None, info))
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


class _Formatter(Protocol):
    """What is used of click's formatter of help texts."""

    def section(self, name: str) -> AbstractContextManager[None]:
        """A heading, and what is written under it."""
        ...

    def write_dl(self, rows: Sequence[tuple[str, str]]) -> None:
        """Names and what they mean."""
        ...


class GroupedCommand(TyperCommand):
    """A verb whose help shows its options under headings."""

    def format_options(self, ctx: object, formatter: object) -> None:
        """Write arguments first, then each group in the order of its first option."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], MAIN: []}
        for parameter in self.get_params(cast(Any, ctx)):
            record = parameter.get_help_record(cast(Any, ctx))
            if record is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None) or MAIN
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            groups.setdefault(heading, []).append(record)
        writer = cast(_Formatter, formatter)
        for heading, records in groups.items():
            if records:
                with writer.section(heading):
                    writer.write_dl(records)


pass


LENGTH, RATES = "How long and how fast", "How it learns"
MACHINE, LOG = "What it runs on", "What is written"

CONTROL = (
    Row(
        "resume",
        "flag",
        "Go on with the run in the folder, with its choices; where there is none, begin it.",
        flags=("--resume/--no-resume",),
    ),
    Row(
        "config",
        "text",
        "Read choices from a file of 'name = value' lines; options go before it. The names are "
        "those of the options with _ for -, as in settings.toml and task.toml of a run.",
        metavar="FILE.toml",
    ),
    Row("as_json", "flag", "Print one JSON object on stdout at the end.", flags=("--json/--text",)),
)
"""What is no setting: how the command itself behaves."""

LOOP = (
    Row("folder", "text", "Folder of the run.", flags=("--output", "-o"), metavar="RUN_FOLDER"),
    Row("epochs", "int", "Passes over the data.", 10, group=LENGTH),
    Row("steps", "int", "Steps of the optimiser, instead of epochs.", group=LENGTH),
    Row(
        "batch_size",
        "int",
        "Samples of a step, over all processes together.",
        8,
        group=LENGTH,
    ),
    Row(
        "accumulate",
        "int",
        "Parts that a step's samples are computed in, one after the other: less memory.",
        1,
        group=LENGTH,
        is_free=True,
    ),
    Row("drop_last", "flag", "Leave out an epoch's last, smaller step.", False, group=LENGTH),
    Row("seed", "int", "Source of all chance.", 0, group=LENGTH),
    Row("learning_rate", "float", "The highest rate.", 1e-3, ("--lr", "--learning-rate"),
        group=RATES),
    Row("warmup_steps", "int", "Steps in which the rate rises.", 0, ("--warmup", "--warmup-steps"),
        group=RATES),
    Row("final_rate", "float", "The last rate, as a part of the highest.", 0.01, group=RATES),
    Row("layer_decay", "float", "Factor on the rate from a block to the one before it.", 1.0,
        group=RATES),
    Row("optimiser", "text", "AdamW for everything, or Muon for the matrices of linear layers: "
        "a step takes longer, and fewer may do.", "adamw", ("--optimiser", "--optimizer"),
        ("adamw", "muon"), group=RATES),
    Row("weight_decay", "float", "Decay of matrices and kernels.", 0.05, group=RATES),
    Row("beta1", "float", "AdamW's memory of the gradient.", 0.9, group=RATES),
    Row("beta2", "float", "AdamW's memory of its square.", 0.999, group=RATES),
    Row("clip_norm", "float", "Largest norm of the gradient; 0 for none.", 1.0,
        ("--clip", "--clip-norm"), group=RATES),
    Row("ema_decay", "float", "Memory of averaged weights, such as 0.999; 0 for none.", 0.0,
        ("--ema", "--ema-decay"), group=RATES),
    Row("drop_path", "float", "Stochastic depth of the last block. By default the model's.",
        group=RATES),
    Row(
        "moving",
        "text",
        "What may change: all; a part alone; or low-rank additions to frozen weights.",
        "full",
        ("--move", "--moving"),
        ("full", "decoder", "neck", "head", "lora"),
        group=RATES,
    ),
    Row("lora_rank", "int", "Rank of the low-rank additions.", 8, group=RATES),
    Row(
        "batch_stats",
        "text",
        "Statistics of batch norms: kept, moved by each process, or by all together (GPUs). auto "
        "keeps those that were learnt before.",
        "auto",
        words=("auto", "frozen", "own", "synchronised"),
        group=RATES,
    ),
    Row("device", "text", "cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.", "auto",
        group=MACHINE, is_free=True),
    Row("workers", "int", "Processes that prepare samples; 0 prepares them in the main one.", 0,
        group=MACHINE, is_free=True),
    Row("precision", "text", "What to compute in; bf16 by autocast.", "fp32",
        words=("fp32", "bf16"), group=MACHINE),
    Row("bf16", "flag", "Short for --precision bf16, and for fp32.", flags=("--bf16/--fp32",),
        group=MACHINE),
    Row("grad_checkpointing", "flag", "Compute activations twice instead of keeping them.", False,
        group=MACHINE, is_free=True),
    Row("channels_last", "flag", "Keep maps and kernels in channels-last memory.", True,
        group=MACHINE, is_free=True),
    Row("log_every", "int", "Steps between two lines of the log.", 10, group=LOG, is_free=True),
    Row("validate_every", "int", "Steps between two measurements; 0: after each epoch.", 0,
        group=LOG, is_free=True),
    Row("validate_at_start", "flag", "Measure before the first step as well.", False, group=LOG,
        is_free=True),
    Row("save_every", "int", "Steps between two saved states; 0: after each measurement.", 0,
        group=LOG, is_free=True),
    Row("tensorboard", "flag", "Write TensorBoard's files too, if it is installed.", True,
        group=LOG, is_free=True),
)  # fmt: skip
"""The settings of the loop; ``bf16`` is another way to say ``precision``."""


pass


DATA, START, TASK = "Data", "What it starts from", "What is learnt"

_WEIGHTS = Row(
    "checkpoint",
    "text",
    "A name of 'tinyvit models' or a file of weights. By default tinyvit_starter, unless --model "
    "is given, which starts from chance.",
    metavar="NAME_OR_FILE",
    group=START,
    is_free=True,
    complete=matching_checkpoints,
)
_VARIANT = Row(
    "model",
    "text",
    "A variant of 'tinyvit models'. By default the checkpoint's.",
    metavar="VARIANT",
    group=START,
    complete=matching_models,
)
_SIZE = Row("img_size", "int", "Side of the images in pixels. By default the checkpoint's or "
            "variant's.", flags=("--img-size", "--size"), group=START)  # fmt: skip
_BROKEN = Row("on_broken", "text", "A broken image is named and left out, or ends the run.",
              "skip", words=("skip", "error"), group=DATA, is_free=True)  # fmt: skip
_SPLIT_SEED = Row("split_seed", "int", "Which images are held out.", 0, group=DATA)

_LABELLED = (
    Row(
        "data",
        "argument",
        "A folder with one subfolder for each class, or with train and val in it; a CSV file; a "
        "tar file, a folder of them, or a quoted pattern such as 'train-*.tar'. May be left out "
        "with --resume.",
        metavar="DATA",
        is_free=True,
    ),
    Row("val", "text", "The part to measure on, of any of these kinds. By default the one in DATA, "
        "or some of it that is held out.", metavar="DATA", group=DATA, is_free=True),
    Row("val_part", "float", "Part of each class that is held out.", 0.1, group=DATA),
    _SPLIT_SEED,
    _BROKEN,
    Row("val_batch_size", "int", "Images measured together.", 64, group=DATA, is_free=True),
    _WEIGHTS,
    _VARIANT,
    _SIZE,
    Row("window_sizes", "ints", "Sides of the windows of the four stages. By default chosen for "
        "the size of the images.", metavar="N,N,N,N", group=START),
    Row("augment", "text", "Chance that each image goes through: none, some, or TinyViT's recipe "
        "for ImageNet.", "light", words=("none", "light", "full"), group=TASK),
    Row("flip", "flag", "Mirror half of the images; --no-flip for letters and digits.", True,
        group=TASK),
)  # fmt: skip

CLASSIFY = (
    *_LABELLED,
    Row("mixup", "float", "Lay images over each other; 0.8 in TinyViT's recipe.", 0.0,
        group=TASK),
    Row("cutmix", "float", "Put parts of images into others; 1.0 in TinyViT's recipe.", 0.0,
        group=TASK),
    Row("smoothing", "float", "Part of a label that is spread over all classes.", 0.1, group=TASK),
)  # fmt: skip

DISTILL_LOGITS = (
    *_LABELLED,
    Row("logits", "text", "Folder of answers that 'tinyvit train write-logits' wrote.",
        metavar="FOLDER", group=DATA, is_free=True),
)  # fmt: skip

DISTILL_FEATURES = (
    Row("data", "argument", "Folder of the images whose features were stored. May be left out "
        "with --resume.", metavar="IMAGES", is_free=True),
    Row("features", "text", "Folder of features that 'tinyvit train store-features' wrote.",
        metavar="FOLDER", group=DATA, is_free=True),
    Row("held_out", "part", "What is measured on and not learnt from: a part of the images, or "
        "the name of a folder below IMAGES.", 0.1, metavar="PART|FOLDER", group=DATA),
    _SPLIT_SEED,
    Row("val_batch_size", "int", "Images measured together.", 16, group=DATA, is_free=True),
    Row("val_points", "int", "Points for each image when masks are measured.", 8, group=DATA),
    _WEIGHTS,
    _VARIANT,
    _SIZE,
    Row("sam", "text", "A file or a name with a whole SAM: the teacher's. Then masks are measured, "
        "and the result is a whole SAM.", metavar="NAME_OR_FILE", group=START, is_free=True,
        complete=matching_checkpoints),
    Row("loss", "text", "Distance of the maps; mse is MobileSAM's.", "mse",
        words=("mse", "huber", "cosine"), group=TASK),
    Row("mask_weight", "float", "Weight of the masks' loss; wants --sam. 0 for none.", 0.0,
        group=TASK),
    Row("points", "int", "Random points for each image, for the masks' loss.", 4, group=TASK),
)  # fmt: skip

SEGMENT = (
    Row(
        "data",
        "argument",
        "Images with masks: COCO's JSON, a CSV of images and masks, labelme's JSON files, or a "
        "folder with images and masks in it. May be left out with --resume.",
        metavar="DATA",
        is_free=True,
    ),
    Row("images", "text", "Folder of the images, where DATA does not say.", metavar="FOLDER",
        group=DATA, is_free=True),
    Row("val", "text", "Others to measure on. By default some of DATA are held out.",
        metavar="DATA", group=DATA, is_free=True),
    Row("val_images", "text", "Folder of the images of --val.", metavar="FOLDER", group=DATA,
        is_free=True),
    Row("val_part", "float", "Part of the images that is held out.", 0.1, group=DATA),
    _SPLIT_SEED,
    Row("val_masks", "int", "The most masks to measure on.", 200, group=DATA),
    Row("on_broken", "text", "What is broken is named and left out, or ends the run.", "skip",
        words=("skip", "error"), group=DATA, is_free=True),
    _WEIGHTS,
    _VARIANT,
    _SIZE,
    Row("objects", "int", "Objects of an image that are prompted in a step.", 4, group=TASK),
    Row("augment", "text", "Chance: none; or crop, scale, mirror image and colours.", "full",
        words=("none", "full"), group=TASK),
    Row("least_pixels", "int", "Smaller objects are not learnt from.", 64, group=TASK),
    Row("box_share", "float", "How many objects are prompted by a box, 0 to 1.", 0.4, group=TASK),
    Row("corrective_share", "float", "In how many steps clicks correct answers. [1/3]",
        group=TASK),
    Row("most_corrections", "int", "The most clicks that correct one object.", 3, group=TASK),
    Row("focal", "float", "Weight of the focal loss.", 10.0, group=TASK),
    Row("dice", "float", "Weight of the dice loss.", 1.0, group=TASK),
    Row("iou", "float", "Weight of the predicted IoU's error.", 1.0, group=TASK),
    Row("cached_features", "int", "Embeddings kept in memory, for --move decoder with --augment "
        "none.", 0, group=TASK),
)  # fmt: skip
