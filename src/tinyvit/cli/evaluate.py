"""``tinyvit evaluate``: how good a classifier or a SAM is, and whether two SAMs agree."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console
from tinyvit.folders.images import list_images

from . import arguments as args
from .console import Console, counted
from .settings_options import check_data

if TYPE_CHECKING:
    from tinyvit.evaluate.classify import ClassifyReport, LabelledImages
    from tinyvit.inference.backend import BackendName
    from tinyvit.sam import SamPredictor
    from tinyvit.train.data.masks import MaskSet

SAM_HELP = "A name of 'tinyvit models', or a file with a whole SAM."
_LABELLED = "A folder with one subfolder for each class, a CSV file, or tar files."
_MASKS = (
    "Images with masks: COCO's JSON, a CSV of images and masks, labelme's JSON files, or a folder "
    "with images and masks in it."
)
_CLASSIFIER = "A name of 'tinyvit models', or a file of weights with a classification head."
_HELD_OUT = (
    "Evaluate only what 'tinyvit train' holds out of DATA with the same --val-part and "
    "--split-seed."
)


def _data(name: str, text: str) -> Any:
    return typer.Argument(metavar=name, show_default=False, help=text)


def _backend(side: str) -> Any:
    words = f"[{'|'.join(args.BACKENDS)}]"
    flag = f"--backend-{side.lower()}"
    return typer.Option(
        flag, metavar=words, parser=args.one_of(*args.BACKENDS), help=f"What runs {side}'s encoder."
    )


def _precision(side: str) -> Any:
    flag = f"--precision-{side.lower()}"
    text = f"What {side}'s encoder computes in."
    return typer.Option(flag, metavar="[fp32|bf16|auto]", parser=args.parse_precision, help=text)


LabelledData = Annotated[str, _data("DATA", _LABELLED)]
MaskData = Annotated[str, _data("DATA", _MASKS)]
SamA = Annotated[str, _data("A", SAM_HELP)]
SamB = Annotated[str, _data("B", "Another, or the same again.")]
ClassifierWeights = Annotated[str, args.checkpoint_option(_CLASSIFIER)]
SamWeights = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="NAME_OR_FILE",
        autocompletion=args.matching_checkpoints,
        show_default=False,
        help=f"{SAM_HELP} By default {DEFAULT_CHECKPOINT}.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", metavar="FOLDER", help="The images, where DATA does not say."),
]
HeldOut = Annotated[bool, typer.Option("--held-out", help=_HELD_OUT)]
ValPart = Annotated[float, typer.Option("--val-part", help="With --held-out: how much it is.")]
SplitSeed = Annotated[int, typer.Option("--split-seed", help="With --held-out: which it is.")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Evaluate so many images, drawn by --seed.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="What --limit draws with.")]
Sheet = Annotated[
    Path | None, typer.Option("--sheet", metavar="FILE.png", help="Write a gallery to look at.")
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images computed together, at most.")
]
Clicks = Annotated[
    str, typer.Option("--clicks", metavar="N,N,...", help="After how many clicks IoU is wanted.")
]
TargetIou = Annotated[
    float, typer.Option("--target-iou", help="Clicks are counted until this IoU.")
]
MostClicks = Annotated[int, typer.Option("--most-clicks", help="Where counting stops.")]
NoFloors = Annotated[
    bool, typer.Option("--no-floors", help="Skip the baselines without a network; faster.")
]
Grid = Annotated[int, typer.Option("--grid", min=1, help="Clicks along each side of an image.")]
BackendOfA = Annotated[str, _backend("A")]
BackendOfB = Annotated[str, _backend("B")]
PrecisionOfA = Annotated[str, _precision("A")]
PrecisionOfB = Annotated[str, _precision("B")]

EXAMPLES = {
    "classify": (
        "tinyvit evaluate classify photos --checkpoint run/best.safetensors --held-out",
        "tinyvit evaluate classify test --checkpoint run/last.safetensors --sheet wrong.png",
    ),
    "segment": (
        "tinyvit evaluate segment cells --checkpoint run/best.safetensors --sheet sheet.png",
        "tinyvit evaluate segment cells.json --images photos --limit 100 --json",
    ),
    "agreement": (
        "tinyvit evaluate agreement run/best.safetensors tinyvit_starter photos",
        "tinyvit evaluate agreement mobile_sam mobile_sam photos --precision-b bf16",
    ),
}


class _Part(NamedTuple):
    """Which part of a data set: the held-out one or all, and so many drawn images of it."""

    held_out: bool
    val_part: float
    split_seed: int
    limit: int | None
    seed: int


def classify(
    ctx: typer.Context,
    data: LabelledData,
    checkpoint: ClassifierWeights,
    held_out: HeldOut = False,
    val_part: ValPart = 0.1,
    split_seed: SplitSeed = 0,
    limit: Limit = None,
    seed: Seed = 0,
    sheet: Sheet = None,
    batch_size: BatchSize = 8,
    device: args.Device = "auto",
    precision: args.Precision = "fp32",
    as_json: args.Json = False,
) -> None:
    """Evaluate a classifier on labelled images.

    Top-1 and top-5 with 95 percent intervals, cross entropy, calibration, the classes that are
    confused most, time and memory. Take images that were not trained on. An unreadable image is
    skipped and named, and the exit code is 1.
    """
    own = console.of(ctx)
    args.check_checkpoint(checkpoint)
    check_data(data, "DATA")

    from tinyvit.evaluate.classify import evaluate_classifier
    from tinyvit.inference import Engine
    from tinyvit.train.tasks.classify import load_classifier

    _check_place(sheet)
    args.announce(own, checkpoint)
    model, classes = load_classifier(checkpoint)
    images = _labelled(data, classes, _Part(held_out, val_part, split_seed, limit, seed))
    with Engine(model, device=device, precision=precision, batch_size=batch_size) as engine:
        args.announce_engine(own, checkpoint, engine)
        with own.progress("evaluating") as update:
            report = evaluate_classifier(engine, images, progress=update)
    if as_json:
        console.write_json({"checkpoint": checkpoint, "data": data, **report.to_json()})
    else:
        console.write(console.fields(report.rows()))
        if report.confusions:
            console.write(f"\n{_confused(report)}")
    if sheet is not None:
        _write_gallery(own, sheet, report, images)
    _end([f"{name}: {reason}" for name, reason in report.broken.items()])


def segment(
    ctx: typer.Context,
    data: MaskData,
    checkpoint: SamWeights = DEFAULT_CHECKPOINT,
    size: args.Size = None,
    images: Images = None,
    held_out: HeldOut = False,
    val_part: ValPart = 0.1,
    split_seed: SplitSeed = 0,
    limit: Limit = None,
    seed: Seed = 0,
    clicks: Clicks = "1,3,5",
    target_iou: TargetIou = 0.85,
    most_clicks: MostClicks = 10,
    no_floors: NoFloors = False,
    sheet: Sheet = None,
    device: args.Device = "auto",
    precision: args.Precision = "fp32",
    as_json: args.Json = False,
) -> None:
    """Evaluate how well a SAM segments by clicks and boxes.

    Mean IoU at some clicks and with a box, boundary F, clicks until an IoU, and the model's own
    estimate of its masks, with 95 percent intervals over images; beside them baselines without a
    network, time and memory. What is unreadable is skipped and named, and the exit code is 1.
    """
    own = console.of(ctx)
    args.check_checkpoint(checkpoint)
    check_data(data, "DATA")

    from tinyvit.evaluate.segment import COLUMNS, EvaluateSettings, Gallery, evaluate_segment
    from tinyvit.sam import SamPredictor

    _check_place(sheet)
    settings = EvaluateSettings(
        _numbers(clicks), target_iou, most_clicks, with_baselines=not no_floors
    )
    masks = _masks(data, images, _Part(held_out, val_part, split_seed, limit, seed))
    sam = args.load_sam(own, checkpoint, size)
    predictor = SamPredictor(sam, device=device, precision=precision)
    own.say(f"{checkpoint}: {masks.describe().partition(';')[0]}")
    gallery = None if sheet is None else Gallery()
    with own.progress("evaluating") as update:
        report = evaluate_segment(
            predictor,
            masks,
            settings,
            name=checkpoint,
            data=data,
            faults=masks.faults,
            watch=gallery,
            progress=update,
        )
    if as_json:
        console.write_json(json.loads(report.to_json()))
    else:
        evaluated = f"{counted(report.images, 'image')}, {counted(report.masks, 'mask')}"
        console.write(f"{checkpoint} on {data}: {evaluated}")
        console.write(console.table(COLUMNS, report.rows()))
    if gallery is not None and sheet is not None:
        gallery.save(sheet, f"{checkpoint}: one click")
        own.say(f"gallery: {sheet}")
    _end(report.skipped)


def agreement(
    ctx: typer.Context,
    first: SamA,
    second: SamB,
    images: args.ImagePaths,
    limit: Limit = None,
    seed: Seed = 0,
    grid: Grid = 4,
    size: args.Size = None,
    backend_a: BackendOfA = "auto",
    backend_b: BackendOfB = "auto",
    precision_a: PrecisionOfA = "fp32",
    precision_b: PrecisionOfB = "fp32",
    device: args.Device = "auto",
    as_json: args.Json = False,
) -> None:
    """Compare two SAMs, or one on two backends, on the same images.

    Embeddings by the cosine of each grid cell, masks by the IoU of the predictions for a grid of
    clicks, and the time of each. There is no ground truth here: two models may agree and both be
    wrong. An unreadable image is skipped and named, and the exit code is 1.
    """
    own = console.of(ctx)
    paths = [image.path for image in list_images(images)]
    chosen = [paths[index] for index in _drawn(len(paths), limit, seed)]

    from tinyvit.evaluate.agreement import compare

    sides = ((first, backend_a, precision_a), (second, backend_b, precision_b))
    one, other = (_predictor(own, *side, size, device) for side in sides)
    names = [
        f"{name} ({backend}, {precision})" if first == second else name
        for name, backend, precision in sides
    ]
    own.say(f"comparing on {counted(len(chosen), 'image')}")
    found = compare(one, other, chosen, names=(names[0], names[1]), grid=grid)
    if as_json:
        console.write_json(json.loads(found.to_json()))
    else:
        heads, *rows = found.rows()
        console.write(console.table(heads, rows))
    _end(found.skipped)


def _labelled(data: str, classes: Sequence[str] | None, part: _Part) -> LabelledImages:
    """The images to evaluate on; an error if their classes are others than the model's."""
    from tinyvit.train.data.images import open_data_set, open_part

    if part.held_out:
        parts = open_data_set(data, val_part=part.val_part, split_seed=part.split_seed)
        if classes is not None and parts.classes != tuple(classes):
            raise ValueError(
                f"{data!r} has the classes {', '.join(parts.classes[:5])}, ..., and the checkpoint "
                f"{', '.join(classes[:5])}, ...; evaluate it on the data it was trained with, or "
                "leave --held-out away"
            )
        images = parts.val
    else:
        images = open_part(data, classes)
    if part.limit is None or part.limit >= len(images):
        return images
    return images.part(_drawn(len(images), part.limit, part.seed))


def _masks(data: str, images: Path | None, part: _Part) -> MaskSet:
    """The images with masks to evaluate on; an error if nothing can be held out."""
    from tinyvit.train import open_mask_set

    masks = open_mask_set(data, images)
    if part.held_out:
        if len(masks) < 2:
            raise ValueError(
                f"{data} has only one image, of which none is held out; leave --held-out away"
            )
        held = masks.split(part.val_part, part.split_seed)[1]
        masks = replace(held, faults=masks.faults)
    chosen = _drawn(len(masks), part.limit, part.seed)
    return replace(masks, scenes=tuple(masks.scenes[index] for index in chosen))


def _drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """So many of the first ``count`` numbers, in order; all of them without a limit."""
    import random

    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as err:
        raise typer.BadParameter(
            f"--clicks {text!r} is not whole numbers between commas; for example 1,3,5."
        ) from err


def _predictor(
    own: Console,
    checkpoint: str,
    backend: str,
    precision: str,
    size: int | None,
    device: str,
) -> SamPredictor:
    from tinyvit.sam import SamPredictor

    sam = args.load_sam(own, checkpoint, size)
    runner = cast("BackendName", backend)  # the option takes no other word
    return SamPredictor(sam, backend=runner, precision=precision, device=device)


def _write_gallery(
    own: Console, sheet: Path, report: ClassifyReport, images: LabelledImages
) -> None:
    """Write the most confidently wrong images, if any is wrong."""
    from tinyvit.evaluate.classify import draw_error_gallery
    from tinyvit.images.draw import save_png

    if not report.wrong:
        own.say(f"{sheet} was not written: no image was taken for another class")
        return
    save_png(sheet, draw_error_gallery(report, images))
    own.say(f"gallery: {sheet}")


def _check_place(sheet: Path | None) -> None:
    """Refuse a gallery that cannot be written, before hours of evaluation."""
    if sheet is None:
        return
    if not sheet.parent.is_dir():
        raise ValueError(f"there is no folder {sheet.parent} to write --sheet in; make it")
    if sheet.is_dir() or not os.access(sheet.parent, os.W_OK):
        raise ValueError(f"--sheet {sheet} cannot be written: choose another name or folder")


def _confused(report: ClassifyReport) -> str:
    """The classes that are found least, as a table."""
    rows = [
        (
            one.name,
            str(one.images),
            f"{one.accuracy:.1%}",
            ", ".join(f"{name} ({count})" for name, count in one.taken_for),
        )
        for one in report.confusions
    ]
    return console.table(("class", "images", "found", "taken for"), rows, right=(1, 2))


def _end(skipped: Sequence[str]) -> None:
    """Name what was not evaluated; then the exit code is 1."""
    for words in skipped:
        console.complain(f"skipped: {words}")
    if skipped:
        raise typer.Exit(1)
