"""``tinyvit train write-logits`` and ``store-features``: run a teacher once, and keep its outputs.

Students are trained on what is kept (``train distill-logits`` and ``distill-features``). Both jobs
may be stopped at any moment and go on by the same command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer

from tinyvit.cli import console
from tinyvit.train.settings import Strength

from .arguments import Device, Json, matching_checkpoints, one_of
from .console import Console, Update, counted
from .settings_options import check_data, check_weights

LOGITS_EXAMPLES = (
    "tinyvit train write-logits photos --teacher teacher.safetensors -o answers",
    "tinyvit train write-logits photos --teacher big.onnx --teacher-size 384 -o answers",
)
FEATURES_EXAMPLES = (
    "tinyvit train store-features photos --teacher mobile_sam -o features",
    "tinyvit train store-features photos --teacher big.onnx --teacher-size 1024 -o features",
)

Data = Annotated[
    str, typer.Argument(metavar="DATA", help="Labelled images, as 'tinyvit train classify' has.")
]
Root = Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder to write to.")
]
TeacherName = Annotated[
    str,
    typer.Option(
        "--teacher",
        metavar="NAME_OR_FILE",
        autocompletion=matching_checkpoints,
        help="Weights of a TinyViT by name or file, or an ONNX file; for features also timm:NAME "
        "and hf:NAME.",
    ),
]
TeacherSize = Annotated[
    int | None,
    typer.Option(
        "--teacher-size",
        min=1,
        help="Side of the teacher's input, for ONNX files, which do not say it. Images are then "
        "prepared as timm's classifiers have them, or for features as SAM has them.",
    ),
]
TeacherImages = Annotated[
    str,
    typer.Option(
        "--teacher-images",
        metavar="[sam|sam3]",
        parser=one_of("sam", "sam3"),
        help="How images are prepared where --teacher-size is given: as for SAM, or squashed to a "
        "square with values from -1 to 1, as for SAM 3 (its size is 1008).",
    ),
]
Views = Annotated[int, typer.Option("--views", min=1, help="Views of each image.")]
TopK = Annotated[int, typer.Option("--top-k", min=1, help="Probabilities kept of each view.")]
Augment = Annotated[
    str,
    typer.Option(
        "--augment",
        metavar="[none|light|full]",
        parser=one_of(*get_args(Strength)),
        help="Random changes that make the views, as in 'tinyvit train classify'.",
    ),
]
Flip = Annotated[
    bool, typer.Option("--flip/--no-flip", help="Mirror half of the views; not for digits.")
]
Val = Annotated[
    str | None,
    typer.Option("--val", metavar="DATA", help="The part to validate on; not used here."),
]
ValPart = Annotated[
    float, typer.Option("--val-part", help="Part of each class that is held out and not used.")
]
SplitSeed = Annotated[
    int, typer.Option("--split-seed", help="Seed of the choice of what is held out.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random numbers.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images computed together.")]
Flips = Annotated[
    bool, typer.Option("--flips", help="Keep features of mirrored images too: twice the size.")
]


def write_logits(
    ctx: typer.Context,
    data: Data,
    teacher: TeacherName,
    output: Output,
    views: Views = 10,
    top_k: TopK = 10,
    augment: Augment = "light",
    flip: Flip = True,
    val: Val = None,
    val_part: ValPart = 0.1,
    split_seed: SplitSeed = 0,
    teacher_size: TeacherSize = None,
    batch_size: BatchSize = 32,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Keep a teacher's predictions, for 'distill-logits'.

    Each image is used in several views. Of each view the largest probabilities are kept, with the
    seed that makes the view again. What is there already is kept; a folder with predictions of
    another teacher, other images or other random changes is refused. An image that cannot be read
    is named, and the exit code is 1.
    """
    own = console.of(ctx)
    check_data(data, "DATA")
    check_weights(teacher, "--teacher")

    from tinyvit.image_spec import ImageSpec
    from tinyvit.train.data.augment import augmentation
    from tinyvit.train.data.images import open_data_set
    from tinyvit.train.tasks.teachers import open_teacher
    from tinyvit.train.tasks.teachers import write_logits as write

    parts = open_data_set(data, val, val_part=val_part, split_seed=split_seed)
    spec = None if teacher_size is None else ImageSpec.timm(teacher_size)
    chosen = augmentation(augment, flip)  # type: ignore[arg-type]  # one of the words
    opened = open_teacher(teacher, spec, device, gives="logits")
    with _running(own, opened.name, "views") as update:
        _, broken = write(
            output,
            parts.train,
            opened,
            augment=chosen,
            views=views,
            k=top_k,
            seed=seed,
            batch_size=batch_size,
            progress=update,
        )
    facts = {"output": str(output), "pictures": len(parts.train), "views": views}
    _finish(own, facts, broken, as_json)


def store_features(
    ctx: typer.Context,
    images: Root,
    teacher: TeacherName,
    output: Output,
    flips: Flips = False,
    teacher_size: TeacherSize = None,
    teacher_images: TeacherImages = "sam",
    batch_size: BatchSize = 4,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Keep a teacher's feature maps, for 'distill-features'.

    Two bytes for each number: 2 MB an image for SAM at 1024 pixels. What is there already is kept,
    an image that has changed since is computed again, and a folder of another teacher is refused.
    An image that cannot be read is named, and the exit code is 1.
    """
    own = console.of(ctx)
    check_data(str(images), "IMAGES")
    check_weights(teacher, "--teacher")

    from tinyvit.image_spec import ImageSpec
    from tinyvit.train.tasks.teachers import open_teacher
    from tinyvit.train.tasks.teachers import store_features as store

    spec = None
    if teacher_size is not None:
        spec = (ImageSpec.sam3 if teacher_images == "sam3" else ImageSpec.sam)(teacher_size)
    opened = open_teacher(teacher, spec, device)
    with _running(own, opened.name, "images") as update:
        kept = store(opened, images, output, flips=flips, batch_size=batch_size, progress=update)
    facts = {
        "output": str(output),
        "pictures": len(kept.good),
        "shape": list(kept.shapes.get("features", ())),
    }
    _finish(own, facts, kept.unreadable, as_json)


@contextmanager
def _running(own: Console, teacher: str, things: str) -> Iterator[Update]:
    """A progress bar; after Ctrl-C the words how to go on."""
    own.say(f"running {teacher}")
    try:
        with own.progress("running", things=things) as update:
            yield update
    except KeyboardInterrupt:
        console.complain("stopped; the same command goes on from there")
        raise


def _finish(
    own: Console, facts: Mapping[str, object], unreadable: Mapping[str, str], as_json: bool
) -> None:
    own.say(f"{counted(int(str(facts['pictures'])), 'image')} are in {facts['output']}")
    if as_json:
        console.write_json({**facts, "broken": dict(unreadable)})
    for name, reason in unreadable.items():
        console.complain(f"failed: {reason if name in reason else f'{name}: {reason}'}")
    if unreadable:
        raise typer.Exit(1)
