"""``tinyvit train write-logits`` and ``store-features``: run a teacher once, and keep its outputs.

Students are trained on what is kept (``train distill-logits`` and ``distill-features``). Both jobs
may be stopped at any moment and go on by the same command.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import typer

from tinyvit.cli import console

from .arguments import Natural, Positive, check_checkpoint
from .console import Console, Update, counted
from .settings_options import check_data


def write_logits(
    own: Console,
    data: str,
    teacher: str,
    output: Path,
    views: Positive = 10,
    top_k: Positive = 10,
    augment: str = "light",
    flip: bool = True,
    val: str | None = None,
    val_part: float = 0.1,
    split_seed: int = 0,
    teacher_size: Positive | None = None,
    batch_size: Positive = 32,
    seed: Natural = 0,
    device: str = "cpu",
    as_json: bool = False,
) -> None:
    """Keep a teacher's predictions, for 'distill-logits'.

    Each image is used in several views. Of each view the largest probabilities are kept, with the
    seed that makes the view again. What is there already is kept; a folder with predictions of
    another teacher, other images or other random changes is refused. An image that cannot be read
    is named, and the exit code is 1.

    Options:
        data (DATA): Labelled images, as 'tinyvit train classify' has.
        teacher (--teacher NAME_OR_FILE): Weights of a TinyViT by name or file, or an ONNX file; for
            features also timm:NAME and hf:NAME.
        output (--output -o FOLDER): Folder to write to.
        views: Views of each image.
        top_k: Probabilities kept of each view.
        augment ([none|light|full]): Random changes that make the views, as in 'tinyvit train
            classify'.
        flip: Mirror half of the views; not for digits.
        val (DATA): The part to validate on; not used here.
        val_part: Part of each class that is held out and not used.
        split_seed: Seed of the choice of what is held out.
        seed: Seed of all random numbers.
        teacher_size: Side of the teacher's input, for ONNX files, which do not say it. Images are
            then prepared as timm's classifiers have them, or for features as SAM has them.
        batch_size: Images computed together.

    Examples:
        tinyvit train write-logits photos --teacher teacher.safetensors -o answers
        tinyvit train write-logits photos --teacher big.onnx --teacher-size 384 -o answers
    """
    check_data(data, "DATA")
    check_checkpoint(teacher, "--teacher")

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
    _finish(own, output, len(parts.train), {"views": views}, broken, as_json)


def store_features(
    own: Console,
    images: Path,
    teacher: str,
    output: Path,
    flips: bool = False,
    teacher_size: Positive | None = None,
    teacher_images: str = "sam",
    batch_size: Positive = 4,
    device: str = "auto",
    as_json: bool = False,
) -> None:
    """Keep a teacher's feature maps, for 'distill-features'.

    Two bytes for each number: 2 MB an image for SAM at 1024 pixels. What is there already is kept,
    an image that has changed since is computed again, and a folder of another teacher is refused.
    An image that cannot be read is named, and the exit code is 1.

    Options:
        images (IMAGES): A folder of images.
        teacher (--teacher NAME_OR_FILE): Weights of a TinyViT by name or file, or an ONNX file; for
            features also timm:NAME and hf:NAME.
        output (--output -o FOLDER): Folder to write to.
        flips: Keep features of mirrored images too: twice the size.
        teacher_size: Side of the teacher's input, for ONNX files, which do not say it. Images are
            then prepared as timm's classifiers have them, or for features as SAM has them.
        teacher_images ([sam|sam3]): How images are prepared where --teacher-size is given: as for
            SAM, or squashed to a square with values from -1 to 1, as for SAM 3 (its size is 1008).
        batch_size: Images computed together.

    Examples:
        tinyvit train store-features photos --teacher mobile_sam -o features
        tinyvit train store-features photos --teacher big.onnx --teacher-size 1024 -o features
    """
    check_data(str(images), "IMAGES")
    check_checkpoint(teacher, "--teacher")

    from tinyvit.image_spec import ImageSpec
    from tinyvit.train.tasks.teachers import open_teacher
    from tinyvit.train.tasks.teachers import store_features as store

    spec = None
    if teacher_size is not None:
        spec = (ImageSpec.sam3 if teacher_images == "sam3" else ImageSpec.sam)(teacher_size)
    opened = open_teacher(teacher, spec, device)
    with _running(own, opened.name, "images") as update:
        kept = store(opened, images, output, flips=flips, batch_size=batch_size, progress=update)
    shape = list(kept.shapes.get("features", ()))
    _finish(own, output, len(kept.good), {"shape": shape}, kept.unreadable, as_json)


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
    own: Console,
    output: Path,
    images: int,
    facts: Mapping[str, object],
    unreadable: Mapping[str, str],
    as_json: bool,
) -> None:
    own.say(f"{counted(images, 'image')} are in {output}")
    if as_json:
        head = {"output": str(output), "pictures": images}
        console.write_json({**head, **facts, "broken": dict(unreadable)})
    for name, reason in unreadable.items():
        console.complain(f"failed: {reason if name in reason else f'{name}: {reason}'}")
    if unreadable:
        raise typer.Exit(1)
