"""``tinyvit classify``: the likeliest classes of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from tinyvit.cli import console
from tinyvit.errors import CheckpointError, ImageError
from tinyvit.folders.images import list_images
from tinyvit.labels import labels_for, read_labels

from . import arguments as args
from .console import Console

if TYPE_CHECKING:
    from tinyvit.factory import StoredModel
    from tinyvit.inference import Engine
    from tinyvit.modules import TinyViT


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
        facts = {"checkpoint": checkpoint, "variant": variant}
        counts = {"classes": count, "pictures": found, "failed": failed}
        console.write_json({**facts, **counts})
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
