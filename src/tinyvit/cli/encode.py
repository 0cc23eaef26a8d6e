"""``tinyvit encode`` and ``tinyvit classify``: features and the likeliest classes of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from tinyvit.catalog import DEFAULT_CHECKPOINT
from tinyvit.cli import console
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.folders.images import list_images
from tinyvit.labels import labels_for, read_labels

from . import arguments as args
from .console import Console, counted

if TYPE_CHECKING:
    from tinyvit.factory import StoredModel
    from tinyvit.folders.runner import Job
    from tinyvit.inference import Engine
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
            save_pretrained or 'tinyvit export'. By default tinyvit_sam_2m, which is small, weak,
            and needs no download.
        no_pictures: Write features only, which is faster.

    Examples:
        tinyvit encode cat.jpg -o features
        tinyvit encode photos -o features --checkpoint mobile_sam --no-pictures
    """
    listed = args.list_and_check(images, output, checkpoint)

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
        console.carry_out(
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


def classify(
    own: Console,
    images: list[Path],
    checkpoint: str | None = None,
    model: str | None = None,
    size: args.Positive | None = None,
    top_k: args.Positive = 5,
    labels: Path | None = None,
    *,
    running: args.EngineOptions,
    max_pixels: args.Positive = args.MAX_PIXELS,
    as_json: bool = False,
) -> None:
    """Name the likeliest classes of images.

    Each class is shown with its probability, its number and, where names are known, its name. The
    weights must have a classification head; published ones are downloaded at the first use. An
    unreadable image does not stop the work: it is named, and the exit code is 1.

    Options:
        checkpoint (NAME_OR_FILE): A name of 'tinyvit models', a file of weights, or a folder of
            save_pretrained or 'tinyvit export', with a classification head. The embedded weights
            have none, so name one.
        top_k: Classes to show for each image.
        labels (FILE): Names of the classes: one a line, or a JSON list or object. By default those
            in the file of weights, and ImageNet's for a head of 1000 classes.

    Examples:
        tinyvit classify cat.jpg --checkpoint tiny_vit_5m_224.dist_in22k_ft_in1k
        tinyvit classify photos --checkpoint mine.safetensors --labels names.txt --top-k 1
    """
    listed = list_images(images)
    args.check_checkpoint(checkpoint)
    if labels is not None:
        read_labels(labels)  # complain before a model is fetched

    import numpy as np

    from tinyvit.images.decode import decode
    from tinyvit.inference import Engine

    source: TinyViT | StoredModel | str | None = checkpoint
    if not args.is_exported(checkpoint, size, model):
        source = args.load_classifier(own, checkpoint, model, size, running)
    found: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with Engine(source, **running.arguments(checkpoint)) as engine:
        count, own_names, variant = _head(engine, checkpoint)
        names = (own_names if labels is None else None) or labels_for(count, labels)
        args.announce_engine(own, str(checkpoint), engine)
        for image in listed:
            try:
                logits = engine.logits(decode(image.path, max_pixels=max_pixels))[0]  # [classes]
            except ImageError as err:
                failed.append({"picture": str(image.path), "error": str(err)})
                console.complain(f"failed: {err}")
                continue
            shares = np.exp(logits - logits.max(), dtype=np.float64)
            shares /= shares.sum()
            rows = [
                {"class": n, "label": names[n] if names else None, "probability": float(shares[n])}
                for n in np.argsort(-shares, kind="stable")[:top_k].tolist()
            ]
            found.append({"picture": str(image.path), "top": rows})
            if not as_json:
                lines = [
                    f"{row['probability']:6.1%}  {row['class']:>5}  {row['label'] or ''}".rstrip()
                    for row in rows
                ]
                console.write("\n  ".join([str(image.path), *lines]))
    if as_json:
        facts = {"checkpoint": checkpoint, "variant": variant, "classes": count}
        console.write_json({**facts, "pictures": found, "failed": failed})
    if failed:
        console.complain(f"failed {len(failed)} of {len(listed)}, named above")
        raise typer.Exit(1)


def _head(engine: Engine, checkpoint: str | None) -> tuple[int, tuple[str, ...] | None, str | None]:
    """How many classes there are, their names where the weights have them, and the variant."""
    from tinyvit.inference.bundle import ExportedClassifier, ExportedEncoder

    backend: object = engine.backend
    if isinstance(backend, ExportedClassifier):
        return backend.num_classes, backend.facts.classes, backend.facts.variant
    if isinstance(backend, ExportedEncoder):
        raise CheckpointError(
            f"{checkpoint} has no classifier, only {backend.part}; export one with --part "
            "classifier"
        )
    model = cast("TinyViT | StoredModel", engine.model)
    return model.num_classes, model.classes, args.variant_of(model)
