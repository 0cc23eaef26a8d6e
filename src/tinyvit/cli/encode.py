"""``tinyvit encode``: features of images as files, each with an image that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinyvit.catalog import DEFAULT_CHECKPOINT

from . import arguments as args
from . import outcomes
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.factory import StoredModel
    from tinyvit.folders.runner import Job
    from tinyvit.modules import TinyViT


def encode(
    own: Console,
    images: list[Path],
    output: Path,
    checkpoint: str | None = None,
    model: str | None = None,
    size: args.Positive | None = None,
    *,
    running: args.FolderOptions,
    batch_size: args.Positive = 8,
    max_pixels: args.Positive = args.MAX_PIXELS,
    no_pictures: bool = False,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """Compute the features of images and write them to files.

    For each image: NAME.safetensors with the tensor 'features' [C, h, w], float32, and in its
    header the image, its sizes, the model, its preparation and precision; and NAME.png, which
    shows the features beside the image. A classifier gives the map of its last stage.

    Files that are there already are kept if they were made of the same image by the same model in
    the same way, and replaced otherwise. An unreadable image does not stop the work: it is named,
    and the exit code is 1. After an interruption, the same command goes on where it stopped. For
    many images, 'tinyvit embed' keeps all in one store.

    Options:
        checkpoint (NAME_OR_PATH): A name of 'tinyvit models', a file of weights, or a folder of
            save_pretrained or 'tinyvit export'. By default tinyvit_starter, which is small, weak,
            and needs no download.
        no_pictures: Write features only, which is faster.

    Examples:
        tinyvit encode cat.jpg -o features
        tinyvit encode photos -o features --checkpoint mobile_sam --no-pictures
    """
    listed = outcomes.list_and_check(images, output, checkpoint)

    from tinyvit.factory import arguments_of
    from tinyvit.folders.encode import EncodeFolder
    from tinyvit.folders.runner import facts_of_engine
    from tinyvit.inference import Engine
    from tinyvit.inference.bundle import ExportedEncoder

    arguments = running.arguments(checkpoint)
    source: TinyViT | StoredModel | str | None = checkpoint
    sizes: dict[str, object] = {}
    if not args.is_exported(checkpoint, size, model):
        source = built = args.load_encoder(own, checkpoint, model, size, running)
        sizes = {"variant": args.variant_of(built), "strides": arguments_of(built)["strides"]}
    with Engine(source, batch_size=batch_size, **arguments) as engine:
        name = checkpoint or DEFAULT_CHECKPOINT
        exported: object = engine.backend
        if isinstance(exported, ExportedEncoder):
            sizes = {"variant": exported.facts.variant}
        facts = facts_of_engine(engine, name, **sizes, weights_sha256=engine.weights_sha256())
        args.announce_engine(own, name, engine)
        work = EncodeFolder(engine, output, facts, not no_pictures, overwrite, max_pixels)
        summary = partial(_summary, output)
        outcomes.carry_out(
            own, work, listed, output, summary, words="encoding", facts=facts, as_json=as_json
        )


def _summary(output: Path, written: Sequence[Job], seconds: float) -> str:
    """What was written, how fast, and where it is."""
    if not written:
        return "encoded nothing new"
    rate = len(written) / max(seconds, 1e-9)
    shapes = sorted({tuple(job.told["shape"]) for job in written})
    name = Path(written[0].item.stem).name if len(written) == 1 else "NAME"
    line = f"encoded {counted(len(written), 'image')} in {seconds:.1f} s ({rate:.1f} pictures/s)"
    line += f": features {' '.join(str(list(shape)) for shape in shapes[:3])}"
    line += " ..." if len(shapes) > 3 else ""
    line += f" in {output / name}.safetensors"
    return line + (f", seen in {output / name}.png" if written[0].told["drawing"] else "")
