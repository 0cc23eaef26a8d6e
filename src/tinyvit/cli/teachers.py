"""``tinyvit train write-logits`` and ``store-features``: run a teacher once, and keep its outputs.

Students are trained on what is kept (``train distill-logits`` and ``distill-features``). Both jobs
may be stopped at any moment and go on by the same command.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
        views: Views of each image.
        top_k: Probabilities kept of each view.
        augment ([none|light|full]): Random changes that make the views, as in 'tinyvit train
            classify'.
        flip: Mirror half of the views; not for digits.
        val (DATA): The part to validate on; not used here.
        val_part: Part of each class that is held out and not used.
        split_seed: Seed of the choice of what is held out.
        seed: Seed of all random numbers.

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
    with _kept(own, opened.name, "views", output, as_json) as (update, facts):
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
        facts |= {"pictures": len(parts.train), "views": views, "broken": broken}


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
        flips: Keep features of mirrored images too: twice the size.
        teacher_images ([sam|sam3]): How images are prepared where --teacher-size is given: as for
            SAM, or squashed to a square with values from -1 to 1, as for SAM 3 (its size is 1008).

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
    with _kept(own, opened.name, "images", output, as_json) as (update, facts):
        kept = store(opened, images, output, flips=flips, batch_size=batch_size, progress=update)
        shape = list(kept.shapes.get("features", ()))
        facts |= {"pictures": len(kept.good), "shape": shape, "broken": dict(kept.unreadable)}


@contextmanager
def _kept(
    own: Console, teacher: str, things: str, output: Path, as_json: bool
) -> Iterator[tuple[Update, dict[str, Any]]]:
    """A progress bar, and what there is to say at the end: ``pictures``, ``broken`` and more.

    After Ctrl-C it is said how to go on.
    """
    own.say(f"running {teacher}")
    facts: dict[str, Any] = {"output": str(output)}
    try:
        with own.progress("running", things=things) as update:
            yield update, facts
    except KeyboardInterrupt:
        console.complain("stopped; the same command goes on from there")
        raise
    own.say(f"{counted(facts['pictures'], 'image')} are in {output}")
    if as_json:
        console.write_json(facts)
    for name, reason in facts["broken"].items():
        console.complain(f"failed: {reason if name in reason else f'{name}: {reason}'}")
    if facts["broken"]:
        raise typer.Exit(1)
