"""``tinyvit classify``: the likeliest classes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from tinyvit.cli import console
from tinyvit.errors import ImageError
from tinyvit.folders.images import list_images
from tinyvit.labels import labels_for, read_labels

from . import arguments as args
from .console import Console


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
            save_pretrained, with a classification head. The embedded weights have none, so name
            one.
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

    built = args.load_classifier(own, checkpoint, model, size, running)
    own_names = None if labels is not None else built.classes
    names = own_names or labels_for(built.num_classes, labels)
    found: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    with Engine(built, **running.arguments(checkpoint)) as engine:
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
        facts = {"checkpoint": checkpoint, "variant": args.variant_of(built)}
        counts = {"classes": built.num_classes, "pictures": found, "failed": failed}
        console.write_json({**facts, **counts})
    if failed:
        console.complain(f"failed {len(failed)} of {len(listed)}, named above")
        raise typer.Exit(1)
