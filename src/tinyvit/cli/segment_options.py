"""Options of ``tinyvit segment``: what they take, and what they say about it.

A point and a box are read from text here. What they mean together is decided in ``prompt_files``;
whether they lie in the picture is the library's affair.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli.options import matching_checkpoints

__all__ = ["Box", "Point", "parse_box", "parse_point"]


@dataclass(frozen=True)
class Point:
    """A click.

    Attributes:
        x: Pixels from the left edge of the upright picture.
        y: Pixels from its top.
        label: 1 the object, 0 not the object.
    """

    x: float
    y: float
    label: int = 1


@dataclass(frozen=True)
class Box:
    """A box around an object, in pixels of the upright picture.

    Attributes:
        x0: Its left edge.
        y0: Its top.
        x1: Its right edge.
        y1: Its bottom.
    """

    x0: float
    y0: float
    x1: float
    y1: float


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
        help="A click, in pixels of the upright picture from its upper left corner. LABEL 1 (the "
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
        help="Refine a mask: a picture of it, white on black and as large as the photograph, or "
        "an .npy or .safetensors file of low-res logits (--logits writes them).",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="Prompts for many pictures. JSON: {PICTURE: [{points: [[x, y], ...], labels: [1, "
        "...], box: [x0, y0, x1, y1], mask: FILE, name: TEXT}, ...]}, each part optional. CSV: "
        "columns picture, x, y, label, x0, y0, x1, y1, object; rows with the same object are one "
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
        help="Pictures encoded together, at most. More may be faster on a GPU; photographs and "
        "memory grow with it.",
    ),
]
NoPad = Annotated[
    bool,
    typer.Option(
        "--no-pad",
        help="Do not pad pictures to a square: less work where they are not square, and masks "
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
