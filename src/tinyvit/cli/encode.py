"""``tinyvit encode``: features of images as files, each with an image that shows them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console
from tinyvit.errors import CheckpointError
from tinyvit.folders.images import ImageFile, list_images

from .arguments import (
    Device,
    ImagePaths,
    Json,
    Model,
    Precision,
    PrecisionName,
    Size,
    matching_checkpoints,
)
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.folders.encode import Job, Outcome


EXAMPLES = (
    "tinyvit encode cat.jpg -o features",
    "tinyvit encode photos -o features --checkpoint mobile_sam --no-pictures",
)


Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")]
Weights = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="NAME_OR_FILE",
        autocompletion=matching_checkpoints,
        help="A name of 'tinyvit models', a file of weights, or a folder of save_pretrained. "
        f"By default {DEFAULT_CHECKPOINT}, which is small, weak, and needs no download.",
    ),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Images computed together, at most.")
]
NoImages = Annotated[
    bool, typer.Option("--no-pictures", help="Write features only, which is faster.")
]
NoPad = Annotated[
    bool,
    typer.Option(
        "--no-pad",
        help="Do not pad images to a square: less work where they are not square, and features "
        "that differ a little from those with padding, most of all near the edges.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Make everything anew; replace any file.")
]


def encode(
    ctx: typer.Context,
    images: ImagePaths,
    output: Output,
    checkpoint: Weights = None,
    model: Model = None,
    size: Size = None,
    device: Device = "auto",
    precision: Precision = PrecisionName.fp32,
    batch_size: BatchSize = 8,
    no_images: NoImages = False,
    no_pad: NoPad = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Compute the features of images and write them to files.

    For each image: NAME.safetensors with the tensor 'features' [C, h, w], float32, and in its
    header the image, its sizes, the model, its preparation and precision; and NAME.png, which
    shows the features beside the photograph. A classifier gives the map of its last stage.

    What is there already is kept if it was made of the same image by the same model in the same
    way, and made anew otherwise. A broken image does not stop the work: it is named, and the
    exit code is 1. After an interruption, the same command goes on where it stopped.
    """
    own = console.of(ctx)
    listed = list_images(images, output)
    _check_output(output, listed, with_drawings=not no_images)

    from tinyvit.folders.encode import Job, recipe
    from tinyvit.inference import Engine

    from .arguments import load_encoder, variant_of

    built = load_encoder(own, checkpoint, model, size)
    with Engine(
        built,
        device=device,
        precision=precision.value,
        batch_size=batch_size,
        pad=False if no_pad else None,
    ) as engine:
        facts = recipe(engine, built, checkpoint or DEFAULT_CHECKPOINT, variant_of(built))
        own.say(f"{facts['checkpoint']}: {engine.explain()}")
        job = Job(engine, output, facts, not no_images, overwrite)
        start = time.monotonic()
        outcomes = _run(own, job, listed)
        seconds = time.monotonic() - start
    _summarise(own, outcomes, output, seconds)
    if as_json:
        end = {"output": str(output), "seconds": round(seconds, 3)}
        console.write_json({**facts, **_as_json(outcomes), **end})
    if any(outcome.state == "failed" for outcome in outcomes):
        raise typer.Exit(1)


def _run(own: Console, job: Job, images: Sequence[ImageFile]) -> list[Outcome]:
    """Do the work, show how it goes, and name what failed."""
    outcomes: list[Outcome] = []
    try:
        with own.progress("encoding") as update:
            for outcome in job.run(images):
                outcomes.append(outcome)
                update(len(outcomes), len(images))
                if outcome.state == "failed":
                    console.complain(f"failed: {outcome.reason}")
    except (KeyboardInterrupt, CheckpointError, OSError) as err:
        if outcomes or isinstance(err, KeyboardInterrupt):  # files are written ahead of outcomes
            done = f"{len(outcomes)} of {counted(len(images), 'image')}"
            own.say(f"stopped after {done}; the same command goes on from there")
        raise
    return outcomes


def _check_output(output: Path, images: Sequence[ImageFile], with_drawings: bool) -> None:
    """Refuse before any work what would end badly.

    Raises:
        ValueError: The output folder is a file, or an output would replace an image.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(output)!r} is a file; give a folder to write to")
    inputs = {os.path.realpath(image.path) for image in images}
    for image in images:
        target = output / f"{image.stem}.png"
        if with_drawings and os.path.realpath(target) in inputs:
            raise ValueError(
                f"the image of the features of {image.name!r} would replace {str(target)!r}, "
                "which is one of the images to encode; write to another folder with -o, or give "
                "--no-pictures"
            )


def _summarise(own: Console, outcomes: Sequence[Outcome], output: Path, seconds: float) -> None:
    """Say what was done, where it is, and what was not done and why."""
    written = [outcome for outcome in outcomes if outcome.state == "written"]
    shapes = sorted({outcome.shape for outcome in written if outcome.shape})
    line = "encoded nothing new"
    if written:
        rate = len(written) / max(seconds, 1e-9)
        line = f"encoded {counted(len(written), 'image')} in {seconds:.1f} s"
        line += f" ({rate:.1f} pictures/s)"
        name = Path(written[0].image.stem).name if len(written) == 1 else "NAME"
        line += f": features {' '.join(str(list(shape)) for shape in shapes[:3])}"
        line += " ..." if len(shapes) > 3 else ""
        line += f" in {output / name}.safetensors"
        line += f", seen in {output / name}.png" if written[0].drawing else ""
    own.say(line)
    states = Counter(outcome.state for outcome in outcomes)
    for reason, number in Counter(o.reason for o in written if o.reason).items():
        own.say(f"replaced {number} that were {reason}")
    if states["skipped"]:
        own.say(f"kept {states['skipped']} made before (--overwrite makes them anew)")
    if states["failed"]:
        console.complain(f"failed {states['failed']} of {len(outcomes)}, named above")


def _as_json(outcomes: Sequence[Outcome]) -> dict[str, list[dict[str, object]]]:
    """The outcomes by state, as plain data."""
    lists: dict[str, list[dict[str, object]]] = {"written": [], "skipped": [], "failed": []}
    for outcome in outcomes:
        row: dict[str, object] = {
            "picture": outcome.image.name,
            "path": str(outcome.image.path),
        }
        if outcome.state == "failed":
            row["error"] = outcome.reason
        else:
            row["features"] = str(outcome.features)
            row["drawing"] = None if outcome.drawing is None else str(outcome.drawing)
        if outcome.state == "written":
            row["shape"] = list(outcome.shape or ())
            row["instead_of"] = outcome.reason or None
        lists[outcome.state].append(row)
    return lists
