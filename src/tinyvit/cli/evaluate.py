"""Options of ``tinyvit evaluate``: what they take, and what they say about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT, get_checkpoint, list_checkpoints
from tinyvit.cli import console
from tinyvit.folders.images import list_images
from tinyvit.inference.backend import BackendName

from .arguments import (
    Device,
    ImagePaths,
    Json,
    Precision,
    PrecisionName,
    Size,
    matching_checkpoints,
    parse_precision,
)
from .console import Console, counted
from .settings_options import one_of

if TYPE_CHECKING:
    from tinyvit.evaluate.classify import ClassifyReport, LabelledImages
    from tinyvit.sam import Sam, SamPredictor
    from tinyvit.train.data.masks import MaskSet

BACKENDS = get_args(BackendName)

parse_backend = one_of(BACKENDS)

SAM_HELP = "A name of 'tinyvit models', or a file with a whole SAM."

LabelledData = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        show_default=False,
        help="A folder with one subfolder for each class, a CSV file, or tar files.",
    ),
]
MaskData = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        show_default=False,
        help="Images with masks: COCO's JSON, a CSV of images and masks, labelme's JSON "
        "files, or a folder with images and masks in it.",
    ),
]
SamA = Annotated[str, typer.Argument(metavar="A", show_default=False, help=SAM_HELP)]
SamB = Annotated[
    str, typer.Argument(metavar="B", show_default=False, help="Another, or the same again.")
]
ClassifierWeights = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="NAME_OR_FILE",
        autocompletion=matching_checkpoints,
        help="A name of 'tinyvit models', or a file of weights with a classification head.",
    ),
]
SamWeights = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="NAME_OR_FILE",
        autocompletion=matching_checkpoints,
        show_default=False,
        help=f"{SAM_HELP} By default {DEFAULT_CHECKPOINT}.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", metavar="FOLDER", help="The images, where DATA does not say."),
]
HeldOut = Annotated[
    bool,
    typer.Option(
        "--held-out",
        help="Measure only what 'tinyvit train' holds out of DATA with the same --val-part and "
        "--split-seed.",
    ),
]
ValPart = Annotated[float, typer.Option("--val-part", help="With --held-out: how much it is.")]
SplitSeed = Annotated[int, typer.Option("--split-seed", help="With --held-out: which it is.")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Measure so many images only, drawn by --seed."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="What --limit draws with.")]
Sheet = Annotated[
    Path | None,
    typer.Option("--sheet", metavar="FILE.png", help="Write a contact sheet to look at."),
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
    bool, typer.Option("--no-floors", help="Leave out the floors, which is faster.")
]
Grid = Annotated[int, typer.Option("--grid", min=1, help="Clicks along each side of an image.")]
BackendOfA = Annotated[
    str,
    typer.Option(
        "--backend-a",
        metavar=f"[{'|'.join(BACKENDS)}]",
        parser=parse_backend,
        help="What runs A's encoder.",
    ),
]
BackendOfB = Annotated[
    str,
    typer.Option(
        "--backend-b",
        metavar=f"[{'|'.join(BACKENDS)}]",
        parser=parse_backend,
        help="What runs B's encoder.",
    ),
]
PrecisionOfA = Annotated[
    PrecisionName,
    typer.Option(
        "--precision-a",
        metavar="[fp32|bf16|auto]",
        parser=parse_precision,
        help="What A's encoder computes in.",
    ),
]
PrecisionOfB = Annotated[
    PrecisionName,
    typer.Option(
        "--precision-b",
        metavar="[fp32|bf16|auto]",
        parser=parse_precision,
        help="What B's encoder computes in.",
    ),
]


pass


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
    device: Device = "auto",
    precision: Precision = PrecisionName.fp32,
    as_json: Json = False,
) -> None:
    """Measure a classifier on labelled images.

    Top-1 and top-5 with 95 percent intervals, cross entropy, calibration, the classes that are
    confused most, time and memory. Measure on images that were not learnt from. A broken image
    is left out and named, and the exit code is 1.
    """
    own = console.of(ctx)

    from tinyvit.evaluate.classify import evaluate_classifier
    from tinyvit.inference import Engine
    from tinyvit.train.tasks.classify import load_classifier

    _announce(own, checkpoint)
    model, classes = load_classifier(checkpoint)
    images = _labelled(data, classes, held_out, val_part, split_seed, limit, seed)
    with Engine(model, device=device, precision=precision.value, batch_size=batch_size) as engine:
        own.say(f"{checkpoint}: {engine.explain()}")
        with own.progress("measuring") as update:
            report = evaluate_classifier(engine, images, progress=update)
    if sheet is not None:
        _write_gallery(own, sheet, report, images)
    if as_json:
        found = {"checkpoint": checkpoint, "data": data, **report.to_json()}
        console.write_json(found)
    else:
        console.write(console.fields(report.rows()))
        if report.confusions:
            console.write(f"\n{_confused(report)}")
    _end([f"{name}: {reason}" for name, reason in report.broken.items()])


def segment(
    ctx: typer.Context,
    data: MaskData,
    checkpoint: SamWeights = DEFAULT_CHECKPOINT,
    size: Size = None,
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
    device: Device = "auto",
    precision: Precision = PrecisionName.fp32,
    as_json: Json = False,
) -> None:
    """Measure how well a SAM segments by clicks and boxes.

    Mean IoU at some clicks and with a box, boundary F, clicks until an IoU, and what the model
    thinks of its own masks, with 95 percent intervals over images; beside them floors that need
    no network, time and memory. What is broken is left out and named, and the exit code is 1.
    """
    own = console.of(ctx)

    from tinyvit.evaluate.segment import COLUMNS as COLUMNS
    from tinyvit.evaluate.segment import EvaluateSettings, Gallery, evaluate_segment
    from tinyvit.sam import SamPredictor

    settings = EvaluateSettings(
        _numbers(clicks), target_iou, most_clicks, with_baselines=not no_floors
    )
    masks = _masks(data, images, held_out, val_part, split_seed, limit, seed)
    sam = _sam(own, checkpoint, size)
    predictor = SamPredictor(sam, device=device, precision=precision.value)
    own.say(f"{checkpoint}: {masks.describe().partition(';')[0]}")
    drawn = None if sheet is None else Gallery()
    with own.progress("measuring") as update:
        report = evaluate_segment(
            predictor,
            masks,
            settings,
            name=checkpoint,
            data=data,
            faults=masks.faults,
            watch=drawn,
            progress=update,
        )
    if drawn is not None and sheet is not None:
        drawn.save(sheet, f"{checkpoint}: one click")
        own.say(f"contact sheet: {sheet}")
    if as_json:
        console.write_json(json.loads(report.to_json()))
    else:
        measured = f"{counted(report.images, 'image')}, {counted(report.masks, 'mask')}"
        console.write(f"{checkpoint} on {data}: {measured}")
        console.write(console.table(COLUMNS, report.rows()))
    _end(report.skipped)


def agreement(
    ctx: typer.Context,
    first: SamA,
    second: SamB,
    images: ImagePaths,
    limit: Limit = None,
    seed: Seed = 0,
    grid: Grid = 4,
    size: Size = None,
    backend_a: BackendOfA = "auto",
    backend_b: BackendOfB = "auto",
    precision_a: PrecisionOfA = PrecisionName.fp32,
    precision_b: PrecisionOfB = PrecisionName.fp32,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare what two SAMs, or one on two backends, see in images.

    Embeddings by the cosine of each cell, masks by the IoU of the answers to a grid of clicks, and
    the time of each. There is no truth here: two models may agree and both be wrong. A broken
    image is left out and named, and the exit code is 1.
    """
    own = console.of(ctx)
    paths = [image.path for image in list_images(images)]
    chosen = [paths[index] for index in _drawn(len(paths), limit, seed)]

    from tinyvit.evaluate.agreement import compare

    one = _predictor(own, first, size, backend_a, precision_a, device)
    other = _predictor(own, second, size, backend_b, precision_b, device)
    names = tuple(
        f"{name} ({backend}, {precision.value})" if first == second else name
        for name, backend, precision in (
            (first, backend_a, precision_a),
            (second, backend_b, precision_b),
        )
    )
    own.say(f"comparing on {counted(len(chosen), 'image')}")
    found = compare(one, other, chosen, names=(names[0], names[1]), grid=grid)
    if as_json:
        console.write_json(json.loads(found.to_json()))
    else:
        heads, *rows = found.rows()
        console.write(console.table(heads, rows))
    _end(found.skipped)


def _labelled(
    data: str,
    classes: Sequence[str] | None,
    held_out: bool,
    val_part: float,
    split_seed: int,
    limit: int | None,
    seed: int,
) -> LabelledImages:
    """The images to measure on.

    Raises:
        ValueError: The data cannot be read, or its classes are others than the model's.
    """
    import numpy as np

    from tinyvit.train.data.images import Subset, open_data_set, open_part

    if held_out:
        parts = open_data_set(data, val_part=val_part, split_seed=split_seed)
        if classes is not None and parts.classes != tuple(classes):
            raise ValueError(
                f"{data!r} has the classes {', '.join(parts.classes[:5])}, ..., and the checkpoint "
                f"{', '.join(classes[:5])}, ...; measure it on the data it was trained with, or "
                "leave --held-out away"
            )
        images = parts.val
    else:
        images = open_part(data, classes)
    if limit is None or limit >= len(images):
        return images
    return Subset(images, np.array(_drawn(len(images), limit, seed), dtype=np.int64))


def _masks(
    data: str,
    images: Path | None,
    held_out: bool,
    val_part: float,
    split_seed: int,
    limit: int | None,
    seed: int,
) -> MaskSet:
    """The images with masks to measure on.

    Raises:
        ValueError: There is no such set, nothing in it is good, or nothing can be held out.
    """
    from tinyvit.train.data.masks import open_mask_set

    masks = open_mask_set(data, images)
    if held_out:
        if len(masks) < 2:
            raise ValueError(
                f"{data} has only one image, of which none is held out; leave --held-out away"
            )
        faults = masks.faults
        masks = replace(masks.split(val_part, split_seed)[1], faults=faults)
    scenes = tuple(masks.scenes[index] for index in _drawn(len(masks), limit, seed))
    return replace(masks, scenes=scenes)


def _drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """So many of the first ``count`` numbers, in order; all of them without a limit."""
    import random

    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas.

    Raises:
        typer.BadParameter: It is something else.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as err:
        raise typer.BadParameter(
            f"--clicks {text!r} is not whole numbers between commas; for example 1,3,5."
        ) from err


def _announce(own: Console, checkpoint: str) -> None:
    from .arguments import announce

    if checkpoint in list_checkpoints():
        announce(own, get_checkpoint(checkpoint))


def _sam(own: Console, checkpoint: str, size: int | None) -> Sam:
    from tinyvit.sam import build_sam

    _announce(own, checkpoint)
    with own.progress("downloading", counts_bytes=True) as update:
        return build_sam(checkpoint, img_size=size, progress=update)


def _predictor(
    own: Console,
    checkpoint: str,
    size: int | None,
    backend: str,
    precision: PrecisionName,
    device: str,
) -> SamPredictor:
    from tinyvit.sam import SamPredictor

    sam = _sam(own, checkpoint, size)
    runner = cast("BackendName", backend)  # the option takes no other word
    return SamPredictor(sam, backend=runner, precision=precision.value, device=device)


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
    own.say(f"contact sheet: {sheet}")


def _confused(report: ClassifyReport) -> str:
    """The classes that are found least, as a table."""
    heads = ("class", "images", "found", "taken for")
    rows = [
        (
            one.name,
            str(one.images),
            f"{one.accuracy:.1%}",
            ", ".join(f"{name} ({count})" for name, count in one.taken_for),
        )
        for one in report.confusions
    ]
    return console.table(heads, rows, right=(1, 2))


def _end(left_out: Sequence[str]) -> None:
    """Name what was not measured.

    Raises:
        typer.Exit: There is something.
    """
    for words in left_out:
        console.complain(f"left out: {words}")
    if left_out:
        raise typer.Exit(1)
