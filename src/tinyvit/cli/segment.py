"""``tinyvit segment``: masks of what points and boxes mean, or of everything, as files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NewType

import typer
from typer.models import OptionInfo

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console
from tinyvit.folders.images import ImageFile, list_images

from . import outcomes
from .arguments import (
    Device,
    ImagePaths,
    Json,
    NoPad,
    Output,
    Overwrite,
    Precision,
    PrecisionName,
    Size,
    checkpoint_option,
    load_sam,
)
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.folders.runner import Item, Outcome
    from tinyvit.folders.segment import SegmentFolder

Point = NewType("Point", tuple[float, float, int])  # x, y, label; typer takes no list of tuples
Box = NewType("Box", tuple[float, float, float, float])  # x0, y0, x1, y1


def parse_point(text: str) -> Point:
    """A point of ``X,Y`` or ``X,Y,LABEL``."""
    numbers = _numbers(text)
    if len(numbers) not in (2, 3):
        raise typer.BadParameter(f"{text!r} is not X,Y or X,Y,LABEL; for example 320,240 or 5,8,0.")
    if len(numbers) == 3 and numbers[2] not in (0, 1):
        raise typer.BadParameter(
            f"the label of {text!r} must be 1 (the object) or 0 (not the object)."
        )
    return Point((numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else 1))


def parse_box(text: str) -> Box:
    """A box of ``X0,Y0,X1,Y1``."""
    numbers = _numbers(text)
    if len(numbers) != 4:
        raise typer.BadParameter(
            f"{text!r} is not X0,Y0,X1,Y1 (left, top, right, bottom); for example 10,20,200,180."
        )
    x0, y0, x1, y1 = numbers
    return Box((x0, y0, x1, y1))


def _numbers(text: str) -> list[float]:
    """Numbers between commas; none at all where one of them is no number."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        return []


def _everything(flag: str, text: str, minimum: int | None = None) -> OptionInfo:
    """An option for ``--everything`` alone."""
    option: OptionInfo = typer.Option(flag, min=minimum, help=f"With --everything: {text}")
    return option


Points = Annotated[
    list[Point] | None,
    typer.Option(
        "--point",
        metavar="X,Y[,LABEL]",
        parser=parse_point,
        help="A click, in pixels of the upright image from its upper left corner. LABEL 1 (the "
        "default): it is on the object; 0: it is not. All --point together are about one object.",
    ),
]
Boxes = Annotated[
    list[Box] | None,
    typer.Option(
        "--box",
        metavar="X0,Y0,X1,Y1",
        parser=parse_box,
        help="A box around an object. Several --box are several objects; one goes together with "
        "the points.",
    ),
]
Each = Annotated[
    bool, typer.Option("--each", help="Every point and every box is an object of its own.")
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        metavar="FILE",
        help="Refine a mask: an image of it, white on black and as large as the input image, or "
        "an .npy or .safetensors file of low-res logits (--logits writes them).",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts for many images. JSON: {IMAGE: [{points: [[x, y], ...], labels: [1, "
        "...], box: [x0, y0, x1, y1], mask: FILE, name: TEXT}, ...]}, each part optional. CSV: "
        "columns image, x, y, label, x0, y0, x1, y1, object; rows with the same object are one "
        "object, a row without is one of its own.",
    ),
]
Everything = Annotated[
    bool, typer.Option("--everything", help="Segment everything, by a grid of points.")
]
Multimask = Annotated[
    bool, typer.Option("--multimask", help="Write the three masks of a prompt, not the best one.")
]
Logits = Annotated[
    bool, typer.Option("--logits", help="Write low-res logits too, for --mask of a later call.")
]
Weights = Annotated[
    str | None,
    checkpoint_option(
        "A name of 'tinyvit models', or a file that holds a whole SAM, not an encoder alone. By "
        f"default {DEFAULT_CHECKPOINT}, which is small, weak, and needs no download."
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        help="Images encoded together, at most. More may be faster on a GPU; memory grows with it.",
    ),
]
PointsPerSide = Annotated[int | None, _everything("--points-per-side", "points a side. [32]", 1)]
PredIouThresh = Annotated[
    float | None, _everything("--pred-iou-thresh", "keep masks with a higher score. [0.88]")
]
StabilityScoreThresh = Annotated[
    float | None, _everything("--stability-score-thresh", "keep masks at least this stable. [0.95]")
]
CropNLayers = Annotated[
    int | None,
    _everything("--crop-n-layers", "layers of crops too; layer i has 2^i a side. [0]", 0),
]
MinMaskRegionArea = Annotated[
    int | None,
    _everything("--min-mask-region-area", "remove holes and islands of fewer pixels. [0]", 0),
]

EXAMPLES = (
    "tinyvit segment cat.jpg --point 320,240 -o masks",
    "tinyvit segment cat.jpg --box 10,20,300,280 --point 50,60,0 -o masks",
    "tinyvit segment cat.jpg --box 0,0,90,80 --box 90,0,180,80 -o masks",
    "tinyvit segment photos --prompts prompts.json -o masks",
    "tinyvit segment cat.jpg --everything --points-per-side 16 -o masks",
)


OF_EVERYTHING = (
    *("points_per_side", "pred_iou_thresh", "stability_score_thresh"),
    *("crop_n_layers", "min_mask_region_area"),
)
"""Parameters that are arguments of ``SamAutomaticMaskGenerator``."""


def segment(
    ctx: typer.Context,
    images: ImagePaths,
    output: Output,
    point: Points = None,
    box: Boxes = None,
    mask: MaskFile = None,
    each: Each = False,
    prompts: PromptsFile = None,
    everything: Everything = False,
    multimask: Multimask = False,
    logits: Logits = False,
    checkpoint: Weights = None,
    size: Size = None,
    device: Device = "auto",
    precision: Precision = PrecisionName.fp32,
    batch_size: BatchSize = 1,
    no_pad: NoPad = False,
    points_per_side: PointsPerSide = None,
    pred_iou_thresh: PredIouThresh = None,
    stability_score_thresh: StabilityScoreThresh = None,
    crop_n_layers: CropNLayers = None,
    min_mask_region_area: MinMaskRegionArea = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the masks of what points and boxes mean, or of everything.

    Coordinates are pixels of the upright image, x to the right and y down: a photograph that its
    EXIF block turns is turned first. All --point of a call are about one object, with one --box or
    a --mask too; several --box are several objects; with --each every point and box is one. The
    same prompts go to every image, unless --prompts says which go to which.

    For each image: NAME.json as COCO has it, with the run lengths, area, box, score and prompt of
    each mask, hash of the model, and seconds; NAME.overlay.png, masks and prompts over the
    photograph; and NAME.mask-1.png, ... (NAME.mask-1-1.png, ... with --multimask), which
    --everything leaves out.

    Files that are there already are kept if they were made of the same image by the same model
    with the same prompts, and replaced otherwise. An unreadable image, or one that its prompts do
    not fit, does not stop the work: it is named, and the exit code is 1.
    """
    own = console.of(ctx)
    given = {name: ctx.params[name] for name in OF_EVERYTHING if ctx.params[name] is not None}
    outcomes.check_output(output)
    same = None if everything else (point or (), box or (), mask, each)
    _check(bool(point or box or mask or each), prompts, everything, multimask or logits, given)
    listed = list_images(images, output)

    from tinyvit.folders.segment import SegmentFolder
    from tinyvit.sam import Segmenter

    items, missing = _items(listed, prompts, same)
    segmenter = Segmenter(
        load_sam(own, checkpoint, size),
        device=device,
        precision=precision.value,
        batch_size=batch_size,
        pad=False if no_pad else None,
    )
    with segmenter.encoder.engine as engine:
        work = SegmentFolder(
            segmenter,
            output,
            checkpoint or DEFAULT_CHECKPOINT,
            multimask=multimask,
            with_logits=logits,
            everything=given if everything else None,
            progress=lambda name: own.progress(name, things="points"),
            overwrite=overwrite,
        )
        own.say(f"{work.facts['checkpoint']}: {engine.explain()}")
        _run(own, work, items, listed, missing, as_json)


def _items(
    listed: Sequence[ImageFile],
    prompts: Path | None,
    same: tuple[Sequence[Point], Sequence[Box], Path | None, bool] | None,
) -> tuple[list[Item], list[tuple[str, str]]]:
    """Images with their prompts, and (name, message) of prompts for images that are not there.

    Prompts are those of a file, or points, boxes, mask and ``--each`` for all images, or none.
    """
    from tinyvit.folders.prompt_files import prompts_of, read_prompts, share_out
    from tinyvit.folders.runner import Item

    if prompts is not None:
        return share_out(listed, read_prompts(prompts), prompts)
    one = () if same is None else prompts_of(*same)
    return [Item(image, one) for image in listed], []


def _run(
    own: Console,
    work: SegmentFolder,
    items: Sequence[Item],
    listed: Sequence[ImageFile],
    missing: Sequence[tuple[str, str]],
    as_json: bool,
) -> None:
    """Do the work and sum it up; ``items`` are those of the images ``listed`` with prompts."""
    for _, words in missing:
        console.complain(f"failed: {words}")
    words = "" if work.generator is not None else "segmenting"  # the generator has its own bar
    start = time.monotonic()
    done = outcomes.follow(own, work.run(items), len(items), words)
    seconds = time.monotonic() - start
    written = outcomes.written(done)
    own.say(_summary(written, seconds))
    if written:
        own.say(f"seconds an image: {_seconds_of(written)}")
    outcomes.say_replaced_and_kept(own, done)
    prompted = {item.image for item in items}
    without = [image.name for image in listed if image not in prompted]
    if without:
        more = ", ..." if len(without) > 5 else ""
        names = f"{', '.join(without[:5])}{more}"
        own.say(f"left out {counted(len(without), 'image')} without prompts: {names}")
    has_failed = outcomes.complain_of_failed(done, len(missing))
    if as_json:
        rows = outcomes.as_json(done)
        rows["failed"][:0] = [
            {"picture": name, "path": None, "error": text} for name, text in missing
        ]
        end = {"output": str(work.folder), "seconds": round(seconds, 3)}
        console.write_json({**work.facts, **rows, "without_prompts": without, **end})
    if has_failed:
        raise typer.Exit(1)


def _check(
    is_prompted: bool,
    prompts: Path | None,
    everything: bool,
    wants_more: bool,
    arguments: Mapping[str, object],
) -> None:
    """Refuse options that do not go together."""
    if is_prompted and (everything or prompts is not None):
        other = "--everything" if everything else "--prompts"
        raise ValueError(f"{other} does not go together with --point, --box, --mask and --each")
    if everything and prompts is not None:
        raise ValueError("--everything does not go together with --prompts; give one of them")
    if everything and wants_more:
        raise ValueError("--everything does not go together with --multimask and --logits")
    if arguments and not everything:
        option = f"--{next(iter(arguments)).replace('_', '-')}"
        raise ValueError(f"{option} is for --everything; give that too, or leave it out")


def _summary(written: Sequence[Outcome], seconds: float) -> str:
    """What was written, how long it took, and where it is."""
    if not written:
        return "segmented nothing new"
    first = written[0].facts
    masks = counted(sum(outcome.facts["count"] for outcome in written), "mask")
    line = f"segmented {counted(len(written), 'image')} in {seconds:.1f} s: {masks}"
    if len(written) > 1:
        return f"{line} in {Path(first['document']).parent}"
    if 0 < len(first["masks"]) <= 3:
        scores = ", ".join(f"{mask['score']:.2f}" for mask in first["masks"])
        line += f" (predicted IoU {scores})"
    return f"{line}, seen in {first['overlay']}"


def _seconds_of(written: Sequence[Outcome]) -> str:
    """The mean of each step."""
    steps = [outcome.facts["seconds"] for outcome in written]
    means = {step: sum(one[step] for one in steps) / len(steps) for step in steps[0]}
    return ", ".join(f"{step} {mean:.3f}" for step, mean in means.items())
