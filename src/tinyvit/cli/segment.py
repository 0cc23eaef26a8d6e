"""Options of ``tinyvit segment``: what they take, and what they say about it.

A point and a box are read from text here. What they mean together is decided in ``prompt_files``;
whether they lie in the image is the library's affair.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT, get_checkpoint, list_checkpoints
from tinyvit.cli import console
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import Box, Point, list_images

from .arguments import (
    Device,
    ImagePaths,
    Json,
    Precision,
    PrecisionName,
    Size,
    matching_checkpoints,
)
from .console import Console, Update, counted

if TYPE_CHECKING:
    from tinyvit.folders.prompt_files import Work
    from tinyvit.folders.segment import Job, Method, Outcome
    from tinyvit.sam import Sam


def parse_point(text: str) -> Point:
    """A point of ``X,Y`` or ``X,Y,LABEL``.

    Raises:
        typer.BadParameter: It is something else.
    """
    numbers = _numbers(text)
    if len(numbers) not in (2, 3):
        raise typer.BadParameter(f"{text!r} is not X,Y or X,Y,LABEL; for example 320,240 or 5,8,0.")
    if len(numbers) == 3 and numbers[2] not in (0, 1):
        raise typer.BadParameter(
            f"the label of {text!r} must be 1 (the object) or 0 (not the object)."
        )
    return Point(numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else 1)


def parse_box(text: str) -> Box:
    """A box of ``X0,Y0,X1,Y1``.

    Raises:
        typer.BadParameter: It is something else.
    """
    numbers = _numbers(text)
    if len(numbers) != 4:
        raise typer.BadParameter(
            f"{text!r} is not X0,Y0,X1,Y1 (left, top, right, bottom); for example 10,20,200,180."
        )
    return Box(*numbers)


def _numbers(text: str) -> list[float]:
    """Numbers between commas; none at all where one of them is no number."""
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        return []


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
        help="Refine a mask: an image of it, white on black and as large as the photograph, or "
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
    bool,
    typer.Option(
        "--multimask",
        help="Write the three masks that a prompt may mean. Otherwise the best one is written.",
    ),
]
Logits = Annotated[
    bool,
    typer.Option("--logits", help="Write low-res logits too, for --mask of a later call."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="NAME_OR_FILE",
        autocompletion=matching_checkpoints,
        help="A name of 'tinyvit models', or a file that holds a whole SAM, not an encoder alone. "
        f"By default {DEFAULT_CHECKPOINT}, which is small, weak, and needs no download.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        min=1,
        help="Images encoded together, at most. More may be faster on a GPU; photographs and "
        "memory grow with it.",
    ),
]
NoPad = Annotated[
    bool,
    typer.Option(
        "--no-pad",
        help="Do not pad images to a square: less work where they are not square, and masks "
        "that differ somewhat from those with padding.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Make everything anew; replace any file.")
]
PointsPerSide = Annotated[
    int | None,
    typer.Option("--points-per-side", min=1, help="With --everything: points a side. [32]"),
]
PredIouThresh = Annotated[
    float | None,
    typer.Option(
        "--pred-iou-thresh", help="With --everything: keep masks with a higher score. [0.88]"
    ),
]
StabilityScoreThresh = Annotated[
    float | None,
    typer.Option(
        "--stability-score-thresh",
        help="With --everything: keep masks at least this stable. [0.95]",
    ),
]
CropNLayers = Annotated[
    int | None,
    typer.Option(
        "--crop-n-layers",
        min=0,
        help="With --everything: layers of crops that are searched too; layer i has 2^i a side. "
        "[0]",
    ),
]
MinMaskRegionArea = Annotated[
    int | None,
    typer.Option(
        "--min-mask-region-area",
        min=0,
        help="With --everything: fill holes and remove islands of fewer pixels. [0]",
    ),
]


pass


EXAMPLES = (
    "tinyvit segment cat.jpg --point 320,240 -o masks",
    "tinyvit segment cat.jpg --box 10,20,300,280 --point 50,60,0 -o masks",
    "tinyvit segment cat.jpg --box 0,0,90,80 --box 90,0,180,80 -o masks",
    "tinyvit segment photos --prompts prompts.json -o masks",
    "tinyvit segment cat.jpg --everything --points-per-side 16 -o masks",
)


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

    What is there already is kept if it was made of the same image by the same model with the same
    prompts, and made anew otherwise. A broken image, or one that its prompts do not fit, does not
    stop the work: it is named, and the exit code is 1.
    """
    own = console.of(ctx)
    arguments = _given(
        points_per_side=points_per_side,
        pred_iou_thresh=pred_iou_thresh,
        stability_score_thresh=stability_score_thresh,
        crop_n_layers=crop_n_layers,
        min_mask_region_area=min_mask_region_area,
    )
    is_prompted = bool(point or box or mask or each)
    _check(output, is_prompted, prompts, everything, multimask or logits, arguments)
    listed = list_images(images, output)

    from tinyvit.folders.prompt_files import Work, prompts_of, read_prompts, share_out
    from tinyvit.folders.segment import Job, Settings, by_grid, by_prompts, recipe

    if prompts is not None:
        work = share_out(listed, read_prompts(prompts), prompts)
    else:
        same = () if everything else prompts_of(point or (), box or (), mask, each)
        work = Work(tuple((image, same) for image in listed))
    sam = _load(own, checkpoint, size)
    settings = Settings(device, precision.value, batch_size, False if no_pad else None)
    method: Method = (
        by_grid(sam, settings, arguments, _progress_of(own))
        if everything
        else by_prompts(sam, settings, multimask, logits)
    )
    with method.engine as engine:
        facts = recipe(sam, engine, checkpoint or DEFAULT_CHECKPOINT)
        own.say(f"{facts['checkpoint']}: {engine.explain()}")
        job = Job(method, output, facts, engine.workers, engine.ahead, overwrite)
        if not _run(own, job, work, as_json, has_bar=not everything):
            raise typer.Exit(1)


def _given(**options: int | float | None) -> dict[str, int | float]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _check(
    output: Path,
    is_prompted: bool,
    prompts: Path | None,
    everything: bool,
    wants_more: bool,
    arguments: Mapping[str, object],
) -> None:
    """Refuse before any work what would end badly, and options that do not go together.

    Raises:
        ValueError: The output folder is a file, or options contradict each other.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(output)!r} is a file; give a folder to write to")
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


def _load(own: Console, checkpoint: str | None, size: int | None) -> Sam:
    """The model, with progress of a download."""
    from tinyvit.sam import build_sam

    from .arguments import announce

    name = checkpoint or DEFAULT_CHECKPOINT
    if name in list_checkpoints():
        announce(own, get_checkpoint(name))
    elif Path(name).is_dir():
        raise CheckpointError(
            f"{name!r} is a folder, and folders of save_pretrained hold an encoder alone; give a "
            "file or a name with a whole SAM"
        )
    with own.progress("downloading", counts_bytes=True) as update:
        return build_sam(name, img_size=size, progress=update)


def _progress_of(own: Console) -> Callable[[str], AbstractContextManager[Update]]:
    return lambda name: own.progress(name, things="points")


def _run(own: Console, job: Job, work: Work, as_json: bool, has_bar: bool) -> bool:
    """Do the work, show how it goes, name what failed, sum up; whether nothing failed."""
    outcomes: list[Outcome] = []
    for _, words in work.missing:
        console.complain(f"failed: {words}")
    start = time.monotonic()
    try:
        with own.progress("segmenting") if has_bar else nullcontext(_tell_nobody) as update:
            for outcome in job.run(work.tasks):
                outcomes.append(outcome)
                update(len(outcomes), len(work.tasks))
                if outcome.state == "failed":
                    console.complain(f"failed: {outcome.reason}")
    except (KeyboardInterrupt, CheckpointError, OSError) as err:
        if outcomes or isinstance(err, KeyboardInterrupt):  # files are written ahead of outcomes
            done = f"{len(outcomes)} of {counted(len(work.tasks), 'image')}"
            own.say(f"stopped after {done}; the same command goes on from there")
        raise
    seconds = time.monotonic() - start
    _summarise(own, outcomes, work, seconds)
    if as_json:
        end = {"output": str(job.folder), "seconds": round(seconds, 3)}
        console.write_json({**job.recipe, **_as_json(outcomes, work), **end})
    return not work.missing and all(outcome.state != "failed" for outcome in outcomes)


def _tell_nobody(done: int, total: int | None) -> None:
    """In the place of a bar."""


def _summarise(own: Console, outcomes: Sequence[Outcome], work: Work, seconds: float) -> None:
    """Say what was done, how long it took, where it is, and what was not done and why."""
    written = [outcome for outcome in outcomes if outcome.state == "written"]
    line = "segmented nothing new"
    if written:
        masks = counted(sum(outcome.count for outcome in written), "mask")
        line = f"segmented {counted(len(written), 'image')} in {seconds:.1f} s: {masks}"
        if len(written) == 1 and 0 < len(written[0].masks) <= 3:
            scores = ", ".join(f"{mask['score']:.2f}" for mask in written[0].masks)
            line += f" (predicted IoU {scores})"
        names = written[0].names
        if names is not None:
            line += f", seen in {names.overlay}" if len(written) == 1 else ""
            line += f" in {names.document.parent}" if len(written) > 1 else ""
    own.say(line)
    if written:
        own.say(f"seconds an image: {_seconds_of(written)}")
    for reason, number in Counter(o.reason for o in written if o.reason).items():
        own.say(f"replaced {number} that were {reason}")
    states = Counter(outcome.state for outcome in outcomes)
    if states["skipped"]:
        own.say(f"kept {states['skipped']} made before (--overwrite makes them anew)")
    if work.without:
        names_of = ", ".join(image.name for image in work.without[:5])
        more = ", ..." if len(work.without) > 5 else ""
        without = counted(len(work.without), "image")
        own.say(f"left out {without} without prompts: {names_of}{more}")
    failed = states["failed"] + len(work.missing)
    if failed:
        total = len(outcomes) + len(work.missing)
        console.complain(f"failed {failed} of {total}, named above")


def _seconds_of(written: Sequence[Outcome]) -> str:
    """The mean of each step."""
    steps = list(written[0].seconds)
    means = [sum(one.seconds[step] for one in written) / len(written) for step in steps]
    return ", ".join(f"{step} {mean:.3f}" for step, mean in zip(steps, means, strict=True))


def _as_json(outcomes: Sequence[Outcome], work: Work) -> dict[str, object]:
    """The outcomes by state, as plain data."""
    lists: dict[str, list[dict[str, object]]] = {"written": [], "skipped": [], "failed": []}
    for outcome in outcomes:
        row: dict[str, object] = {
            "picture": outcome.image.name,
            "path": str(outcome.image.path),
        }
        if outcome.state == "failed":
            row["error"] = outcome.reason
        if outcome.names is not None:
            row["document"] = str(outcome.names.document)
            row["overlay"] = str(outcome.names.overlay)
        if outcome.state == "written":
            row["count"], row["seconds"] = outcome.count, dict(outcome.seconds)
            row["masks"] = list(outcome.masks)
            row["instead_of"] = outcome.reason or None
        lists[outcome.state].append(row)
    lists["failed"][:0] = [
        {"picture": name, "path": None, "error": words} for name, words in work.missing
    ]
    return {**lists, "without_prompts": [image.name for image in work.without]}
