"""``tinyvit evaluate``: how good a classifier or a SAM is, and whether two SAMs agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console
from tinyvit.folders.images import list_images

from . import arguments as args
from .console import Console, counted
from .settings_options import check_data, whole_numbers

if TYPE_CHECKING:
    from tinyvit.evaluate.classify import ClassifyReport, LabelledImages
    from tinyvit.train.data.masks import MaskSet


@dataclass(frozen=True)
class Part:
    """Which part of a data set: the held-out one or all, and so many drawn images of it.

    Options:
        held_out: Evaluate only what 'tinyvit train' holds out of DATA with the same --val-part and
            --split-seed.
        val_part: With --held-out: how much it is.
        split_seed: With --held-out: which it is.
        limit: Evaluate so many images, drawn by --seed.
    """

    held_out: bool = False
    val_part: float = 0.1
    split_seed: int = 0
    limit: args.Positive | None = None
    seed: args.Natural = 0

    def labelled(self, data: str, classes: Sequence[str] | None) -> LabelledImages:
        """The labelled images; an error if their classes are others than the model's."""
        from tinyvit.train.data.images import open_data_set, open_part

        if self.held_out:
            parts = open_data_set(data, val_part=self.val_part, split_seed=self.split_seed)
            if classes is not None and parts.classes != tuple(classes):
                raise ValueError(
                    f"{data!r} has the classes {', '.join(parts.classes[:5])}, ..., and the "
                    f"checkpoint {', '.join(classes[:5])}, ...; evaluate it on the data it was "
                    "trained with, or leave --held-out away"
                )
            images = parts.val
        else:
            images = open_part(data, classes)
        return images.part(drawn(len(images), self.limit, self.seed))

    def masks(self, data: str, images: Path | None) -> MaskSet:
        """The images with masks; an error if nothing can be held out."""
        from tinyvit.train import open_mask_set

        masks = open_mask_set(data, images)
        held = masks.split(self.val_part, self.split_seed)[1] if self.held_out else masks
        if not len(held):
            raise ValueError(
                f"{data} has only one image, of which none is held out; leave --held-out away"
            )
        scenes = tuple(held.scenes[index] for index in drawn(len(held), self.limit, self.seed))
        return replace(masks, scenes=scenes)


def drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """So many of the first ``count`` numbers, in order; all of them without a limit."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def classify(
    own: Console,
    data: str,
    checkpoint: str,
    *,
    part: Part,
    sheet: Path | None = None,
    batch_size: args.Positive = 8,
    device: str = "auto",
    precision: str = "fp32",
    as_json: bool = False,
) -> None:
    """Evaluate a classifier on labelled images.

    Top-1 and top-5 with 95 percent intervals, cross entropy, calibration, the classes that are
    confused most, time and memory. Take images that were not trained on. An unreadable image is
    skipped and named, and the exit code is 1.

    Options:
        data (DATA): A folder with one subfolder for each class, a CSV file, or tar files.
        checkpoint (--checkpoint NAME_OR_FILE): A name of 'tinyvit models', or a file of weights
            with a classification head.

    Examples:
        tinyvit evaluate classify photos --checkpoint run/best.safetensors --held-out
        tinyvit evaluate classify test --checkpoint run/last.safetensors --sheet wrong.png
    """
    _check(data, checkpoint, sheet)

    from tinyvit.evaluate.classify import draw_error_gallery, evaluate_classifier
    from tinyvit.images.draw import save_png
    from tinyvit.inference import Engine
    from tinyvit.train.tasks.classify import load_classifier

    args.announce(own, checkpoint)
    model, classes = load_classifier(checkpoint)
    images = part.labelled(data, classes)
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
    if sheet is not None and report.wrong:
        save_png(sheet, draw_error_gallery(report, images))
        own.say(f"gallery: {sheet}")
    elif sheet is not None:
        own.say(f"{sheet} was not written: no image was taken for another class")
    _end([f"{name}: {reason}" for name, reason in report.broken.items()])


def segment(
    own: Console,
    data: str,
    checkpoint: str = DEFAULT_CHECKPOINT,
    size: args.Positive | None = None,
    images: Path | None = None,
    *,
    part: Part,
    clicks: str = "1,3,5",
    target_iou: float = 0.85,
    most_clicks: int = 10,
    no_floors: bool = False,
    sheet: Path | None = None,
    device: str = "auto",
    precision: str = "fp32",
    as_json: bool = False,
) -> None:
    """Evaluate how well a SAM segments by clicks and boxes.

    Mean IoU at some clicks and with a box, boundary F, clicks until an IoU, and the model's own
    estimate of its masks, with 95 percent intervals over images; beside them baselines without a
    network, time and memory. What is unreadable is skipped and named, and the exit code is 1.

    Options:
        data (DATA): Images with masks: COCO's JSON, a CSV of images and masks, labelme's JSON
            files, or a folder with images and masks in it.
        images (--images FOLDER): The images, where DATA does not say.
        clicks (N,N,...): After how many clicks IoU is wanted.
        target_iou: Clicks are counted until this IoU.
        most_clicks: Where counting stops.
        no_floors: Skip the baselines without a network; faster.

    Examples:
        tinyvit evaluate segment cells --checkpoint run/best.safetensors --sheet sheet.png
        tinyvit evaluate segment cells.json --images photos --limit 100 --json
    """
    _check(data, checkpoint, sheet)

    from tinyvit.evaluate import metrics
    from tinyvit.evaluate.segment import COLUMNS, EvaluateSettings, Gallery, evaluate_segment
    from tinyvit.sam import SamPredictor

    settings = EvaluateSettings(
        tuple(whole_numbers(clicks)), target_iou, most_clicks, with_baselines=not no_floors
    )
    masks = part.masks(data, images)
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
        console.write_json(metrics.as_json(report))
    else:
        evaluated = f"{counted(report.images, 'image')}, {counted(report.masks, 'mask')}"
        console.write(f"{checkpoint} on {data}: {evaluated}")
        console.write(console.table(COLUMNS, report.rows()))
    if gallery is not None and sheet is not None:
        gallery.save(sheet, f"{checkpoint}: one click")
        own.say(f"gallery: {sheet}")
    _end(report.skipped)


def agreement(
    own: Console,
    first: str,
    second: str,
    images: list[Path],
    limit: args.Positive | None = None,
    seed: args.Natural = 0,
    grid: args.Positive = 4,
    size: args.Positive | None = None,
    backend_a: str = "auto",
    backend_b: str = "auto",
    precision_a: str = "fp32",
    precision_b: str = "fp32",
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Compare two SAMs, or one on two backends, on the same images.

    Embeddings by the cosine of each grid cell, masks by the IoU of the predictions for a grid of
    clicks, and the time of each. There is no ground truth here: two models may agree and both be
    wrong. An unreadable image is skipped and named, and the exit code is 1.

    Options:
        first (A): A name of 'tinyvit models', or a file with a whole SAM.
        second (B): Another, or the same again.
        limit: Compare on so many images, drawn by --seed.
        grid: Clicks along each side of an image.
        backend_a ([auto|torch|native|openvino|onnx]): What runs A's encoder.
        backend_b ([auto|torch|native|openvino|onnx]): What runs B's encoder.
        precision_a ([fp32|bf16|auto]): What A's encoder computes in.
        precision_b ([fp32|bf16|auto]): What B's encoder computes in.

    Examples:
        tinyvit evaluate agreement run/best.safetensors tinyvit_sam_2m photos
        tinyvit evaluate agreement mobile_sam mobile_sam photos --precision-b bf16
    """
    paths = [image.path for image in list_images(images)]
    chosen = [paths[index] for index in drawn(len(paths), limit, seed)]

    from tinyvit.evaluate import metrics
    from tinyvit.evaluate.agreement import compare
    from tinyvit.sam import SamPredictor

    sides = ((first, backend_a, precision_a), (second, backend_b, precision_b))
    one, other = (
        SamPredictor(
            args.load_sam(own, name, size),
            backend=cast("Any", backend),  # the option takes no other word
            precision=precision,
            device=device,
        )
        for name, backend, precision in sides
    )
    names = [
        f"{name} ({backend}, {precision})" if first == second else name
        for name, backend, precision in sides
    ]
    own.say(f"comparing on {counted(len(chosen), 'image')}")
    found = compare(one, other, chosen, names=(names[0], names[1]), grid=grid)
    if as_json:
        console.write_json(metrics.as_json(found))
    else:
        heads, *rows = found.rows()
        console.write(console.table(heads, rows))
    _end(found.skipped)


def _check(data: str, checkpoint: str, sheet: Path | None) -> None:
    """Refuse what is not there, and a gallery that cannot be written, before hours of work."""
    args.check_checkpoint(checkpoint)
    check_data(data, "DATA")
    if sheet is not None:
        if not sheet.parent.is_dir():
            raise ValueError(f"there is no folder {sheet.parent} to write --sheet in; make it")
        if sheet.is_dir():
            raise ValueError(f"--sheet {sheet} is a folder; choose another name")
        args.check_folder(sheet.parent, "--sheet")


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
