"""An image encoder, a classifier or features alone: one file, ``model.onnx``, with its facts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any, TypeAlias

import torch

from tinyvit.catalog import find_variant
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import FeatureMaps, TinyViT
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam

from .graphs import Graph, Part, PartGraph
from .presets import Preset

Model: TypeAlias = "Sam | TinyViT | FeatureMaps"


def part_of(model: Model, part: Part | None) -> tuple[TinyViT, Part]:
    """The network of a model that a part needs, and what it gives.

    Args:
        model: A SAM, an encoder, a classifier or ``FeatureMaps``.
        part: What is wanted; None takes what the model is for.

    Returns:
        (the network, with ``image_spec``; "encoder", "classifier" or "features").

    Raises:
        ValueError: The model does not have it.
    """
    net = model.image_encoder if isinstance(model, Sam) else model
    if isinstance(net, FeatureMaps):
        if part not in (None, "features"):
            raise ValueError(f"FeatureMaps give features and no {part}; give the model itself")
        net, part = net.encoder, "features"
    if not isinstance(net, TinyViT):
        raise ValueError(f"wanted a Sam or a TinyViT to export, came {type(model).__name__}")
    has_head = net.head is not None and bool(net.num_classes)
    own: Part = "encoder" if net.neck is not None else "classifier" if has_head else "features"
    wanted = part or own
    if wanted == "encoder" and net.neck is None:
        raise ValueError("this model has no neck, so it gives no image embedding; export features")
    if wanted == "classifier" and not has_head:
        raise ValueError("this model has no classification head; export its features")
    return net, wanted


def spec_for(model: Model, net: TinyViT, side: int | None) -> ImageSpec:
    """How images are prepared, at another side where one is given."""
    spec = spec_of(model) if isinstance(model, Sam) else net.image_spec
    own = net.img_size if isinstance(net.img_size, int) else max(net.img_size)
    spec = spec or (ImageSpec.sam if net.neck is not None else ImageSpec.timm)(own)
    return spec if side is None else replace(spec, size=(side, side))


def facts_of_part(
    net: TinyViT, part: Part, spec: ImageSpec, row: Preset, name: str
) -> dict[str, Any]:
    """What a reader of the folder needs, as plain values."""
    outputs = {
        "encoder": ["image_embeddings"],
        "classifier": ["logits"],
        "features": [f"stage_{number}" for number in range(1, net.num_layers + 1)],
    }
    return {
        "name": name,
        "part": part,
        part: "model" + PurePath(row.decoder).suffix,
        "layout": "nchw",
        "style": row.style,
        "side": max(spec.size),
        "variant": find_variant(net.arguments()),
        "factor": 1,
        "is_static": row.is_static,
        "storage": row.storage,
        f"{part}_input": row.encoder_input,
        f"{part}_outputs": outputs[part],
        "image_spec": spec.to_dict(),
        "classes": list(net.classes) if part == "classifier" else [],
        "thresholds": dict(net.thresholds),
    }


def arguments_of_part(net: TinyViT, part: Part, spec: ImageSpec, facts: Mapping[str, Any]) -> Graph:
    """The network, ready to be traced: ``graphs.Graph``."""
    given, outputs = facts[f"{part}_input"], tuple(facts[f"{part}_outputs"])
    graph = PartGraph(net, part).eval()
    if facts["is_static"]:
        return graph, (torch.zeros(1, net.in_chans, *spec.size),), (given,), outputs, {}
    axes = {given: {0: "batch", 2: "height", 3: "width"}}
    for output in outputs:
        is_map = part != "classifier"
        axes[output] = {0: "batch", 2: f"{output}_h", 3: f"{output}_w"} if is_map else {0: "batch"}
    return graph, (torch.zeros(2, net.in_chans, 75, 58),), (given,), outputs, axes
