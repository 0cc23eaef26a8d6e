"""Options of ``tinyvit evaluate``: what they take, and what they say about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli.option_rows import Row
from tinyvit.cli.options import PrecisionName, matching_checkpoints, parse_precision

__all__ = ["parse_backend"]

BACKENDS = ("auto", "torch", "openvino", "onnx")

parse_backend = Row("backend", "text", "", words=BACKENDS).parse

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
        help="Pictures with masks: COCO's JSON, a CSV of pictures and masks, labelme's JSON "
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
    typer.Option("--images", metavar="FOLDER", help="The pictures, where DATA does not say."),
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
    typer.Option("--limit", min=1, help="Measure so many pictures only, drawn by --seed."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="What --limit draws with.")]
Sheet = Annotated[
    Path | None,
    typer.Option("--sheet", metavar="FILE.png", help="Write a contact sheet to look at."),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Pictures computed together, at most.")
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
Grid = Annotated[int, typer.Option("--grid", min=1, help="Clicks along each side of a picture.")]
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
