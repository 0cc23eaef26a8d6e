"""``tinyvit segment``: masks of what points and boxes mean, or of everything, as files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NewType

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT

from . import arguments as args
from .console import Console, carry_out, counted

if TYPE_CHECKING:
    from tinyvit.folders.images import Item
    from tinyvit.folders.runner import Job

Point = NewType("Point", tuple[float, float, int])  # x, y, label; typer takes no list of tuples
Box = NewType("Box", tuple[float, float, float, float])  # x0, y0, x1, y1


def parse_point(text: str) -> Point:
    """A point of ``X,Y`` or ``X,Y,LABEL``."""
    match _numbers(text):
        case [x, y]:
            return Point((x, y, 1))
        case [x, y, (0 | 1) as label]:
            return Point((x, y, int(label)))
        case [_, _, _]:
            raise typer.BadParameter(
                f"the label of {text!r} must be 1 (the object) or 0 (not the object)."
            )
    raise typer.BadParameter(f"{text!r} is not X,Y or X,Y,LABEL; for example 320,240 or 5,8,0.")


def parse_box(text: str) -> Box:
    """A box of ``X0,Y0,X1,Y1``."""
    match _numbers(text):
        case [x0, y0, x1, y1]:
            return Box((x0, y0, x1, y1))
    raise typer.BadParameter(
        f"{text!r} is not X0,Y0,X1,Y1 (left, top, right, bottom); for example 10,20,200,180."
    )


def _numbers(text: str) -> list[float]:
    """Numbers between commas; none at all where one of them is no number."""
    with suppress(ValueError):
        return [float(word) for word in text.split(",")]
    return []


Points = Annotated[list[Point] | None, typer.Option(parser=parse_point)]
Boxes = Annotated[list[Box] | None, typer.Option(parser=parse_box)]
AtMost1 = Annotated[float, typer.Option(max=1)]

LOW = 0.5  # a predicted IoU below which a mask is most often wrong
GRID = ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "crop_n_layers",
        "min_mask_region_area")  # fmt: skip


@dataclass(frozen=True)
class Prompts:
    """What is segmented, and what is written of it.

    Options:
        point (X,Y[,LABEL]): A click, in pixels of the upright image from its upper left corner.
            LABEL 1 (the default): it is on the object; 0: it is not. All --point together are about
            one object.
        box (X0,Y0,X1,Y1): A box around an object. Several --box are several objects; one goes
            together with the points.
        mask (FILE): Refine a mask: an image of it, white on black and as large as the input image,
            or an .npy or .safetensors file of low-res logits (--logits writes them).
        each: Every point and every box is an object of its own.
        prompts (FILE): Prompts for many images. JSON: {IMAGE: [{points: [[x, y], ...], labels: [1,
            ...], box: [x0, y0, x1, y1], mask: FILE, name: TEXT}, ...]}, each part optional. CSV:
            columns image, x, y, label, x0, y0, x1, y1, object; rows with the same object are one
            object, a row without is one of its own.
        everything: Segment everything, by a grid of points.
        points_per_side: With --everything: points a side. [32]
        pred_iou_thresh: With --everything: keep masks of a higher predicted IoU. [the checkpoint's
            own, else 0.88]
        stability_score_thresh: With --everything: keep masks at least this stable. [the
            checkpoint's own, else 0.95]
        crop_n_layers: With --everything: layers of crops too; layer i has 2^i a side. [0]
        min_mask_region_area: With --everything: remove smaller holes and islands. [0 pixels]
        multimask: Write the three masks of a prompt, not the best one.
        logits: Write low-res logits too, for --mask of a later call.
    """

    point: Points = None
    box: Boxes = None
    mask: Path | None = None
    each: bool = False
    prompts: Path | None = None
    everything: bool = False
    points_per_side: args.Positive | None = None
    pred_iou_thresh: AtMost1 | None = None
    stability_score_thresh: AtMost1 | None = None
    crop_n_layers: args.Natural | None = None
    min_mask_region_area: args.Natural | None = None
    multimask: bool = False
    logits: bool = False

    @property
    def grid(self) -> dict[str, int | float]:
        """Arguments for ``SamAutomaticMaskGenerator`` that were given."""
        return {name: value for name in GRID if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Refuse options that do not go together, and files that are not there."""
        clicks = ("point", "box", "mask", "each")
        for mode, others in (
            ("everything", ("prompts", *clicks, "multimask", "logits")),
            ("prompts", clicks),
        ):
            wrong = [f"--{name}" for name in others if getattr(self, name)]
            if getattr(self, mode) and wrong:
                raise ValueError(
                    f"--{mode} does not go together with {', '.join(wrong)}; leave one of them out"
                )
        if self.grid and not self.everything:
            option = f"--{next(iter(self.grid)).replace('_', '-')}"
            raise ValueError(f"{option} is for --everything; give that too, or leave it out")
        for name, file in (("mask", self.mask), ("prompts", self.prompts)):
            if file is not None and not file.exists():
                raise ValueError(f"there is no file {str(file)!r}; check the path of --{name}")

    def items(self, listed: list[Item]) -> tuple[list[Item], list[tuple[str, str]], list[str]]:
        """Images with their prompts; what fits no image, as (name, message); images without."""
        from tinyvit.folders.prompt_files import prompts_of, read_prompts, share_out

        if self.prompts is not None:
            items, missing = share_out(listed, read_prompts(self.prompts), self.prompts)
            used = {item.name for item in items}
            return items, missing, [item.name for item in listed if item.name not in used]
        if self.everything:
            return listed, [], []
        same = prompts_of(self.point or (), self.box or (), self.mask, self.each)
        return [replace(item, prompts=same) for item in listed], [], []


def segment(
    own: Console,
    images: list[Path],
    output: Path,
    *,
    what: Prompts,
    checkpoint: str | None = None,
    size: args.Positive | None = None,
    running: args.FolderOptions,
    batch_size: args.Positive = 1,
    max_pixels: args.Positive = args.MAX_PIXELS,
    overwrite: bool = False,
    as_json: bool = False,
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

    Options:
        batch_size: Images encoded together, at most. More may be faster on a GPU; memory grows with
            it.

    Examples:
        tinyvit segment cat.jpg --point 320,240 -o masks
        tinyvit segment cat.jpg --box 10,20,300,280 --point 50,60,0 -o masks
        tinyvit segment cat.jpg --box 0,0,90,80 --box 90,0,180,80 -o masks
        tinyvit segment photos --prompts prompts.json -o masks
        tinyvit segment cat.jpg --everything --points-per-side 16 -o masks
    """
    listed = args.list_and_check(images, output, checkpoint)
    what.check()
    items, missing, without = what.items(listed)
    if without:
        names = f"{', '.join(without[:5])}{', ...' if len(without) > 5 else ''}"
        own.say(f"left out {counted(len(without), 'image')} without prompts: {names}")

    from tinyvit.folders.segment import SegmentFolder
    from tinyvit.sam import Segmenter

    name = checkpoint or DEFAULT_CHECKPOINT
    arguments = running.arguments(checkpoint)
    kind = running.backend, running.device, running.precision, running.threads
    sam = args.open_sam(own, checkpoint, size, *kind)
    segmenter = Segmenter(sam, batch_size=batch_size, **arguments)
    with segmenter.encoder.engine as engine:
        work = SegmentFolder(
            segmenter,
            output,
            name,
            multimask=what.multimask,
            with_logits=what.logits,
            everything=what.grid if what.everything else None,
            progress=lambda name: own.progress(name, things="points"),
            overwrite=overwrite,
            max_pixels=max_pixels,
        )
        args.announce_engine(own, name, engine)
        carry_out(
            own,
            work,
            items,
            output,
            partial(_summary, name == DEFAULT_CHECKPOINT),
            words="" if what.everything else "segmenting",  # the generator has its own bar
            facts={**work.facts, "without_prompts": without},
            as_json=as_json,
            missing=missing,
        )


def _summary(is_starter: bool, written: Sequence[Job], seconds: float) -> str:
    """What was written, where it is, and how long it and each step took."""
    if not written:
        return "segmented nothing new"
    first = written[0].told
    scores = [mask["score"] for job in written for mask in job.told["masks"]]
    masks = counted(sum(job.told["count"] for job in written), "mask")
    line = f"segmented {counted(len(written), 'image')} in {seconds:.1f} s: {masks}"
    if len(written) > 1:
        line += f" in {Path(first['document']).parent}"
    else:
        if 0 < len(scores) <= 3:
            line += f" (predicted IoU {', '.join(f'{score:.2f}' for score in scores)})"
        line += f", seen in {first['overlay']}"
    if min(scores, default=1) < LOW and is_starter:
        line += (
            f"\npredicted IoU below {LOW} is low: the embedded weights are weak; add a click or a "
            "box, or take other weights with --checkpoint"
        )
    steps = [job.told["seconds"] for job in written]
    means = {step: sum(one[step] for one in steps) / len(steps) for step in steps[0]}
    times = ", ".join(f"{step} {mean:.3f}" for step, mean in means.items())
    return f"{line}\nseconds an image: {times}"
