"""Compare exported graphs with the model itself in float64, and write the certificate."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from tinyvit.errors import CheckpointError
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam

from . import certificate as certificates
from .certificate import Case, Certificate
from .graphs import STRIDE, Part, plain, resized
from .parts import Model, part_of, spec_for
from .presets import DECODER_INPUTS, DECODER_OUTPUTS
from .reference import Reference
from .verify import (
    Backend,
    OpenedGraph,
    Verified,
    exported_folder,
    inputs_of,
    open_graph,
    open_parts,
    positions_from,
    read_facts,
    run_cases,
    runner_of,
)

_CLICKS = 8  # on each photograph
_ALLOWED_IOU = {"fp32": (0.9995, 0.995), "fp16": (0.995, 0.97)}
"""Mean and least IoU of masks with the model's."""
_PHOTOGRAPHS = Path(__file__).parents[1] / "serve" / "page"
"""The example images that the page ships."""
_TRANSFORMERS = ("pixel_values", "input_points")
"""Inputs that name the pair of transformers.js."""


def verify_against(
    path: str | os.PathLike[str], model: Model, *, backend: Backend | None = None
) -> Verified:
    """Compare an exported folder with a model anew, in float64.

    A file that is no part of an exported folder is compared, too, where its inputs and outputs
    are those of a preset or of segment-anything's exporter.

    Args:
        path: Of the folder, of a file in it, or of a file alone.
        model: What it should have come from.
        backend: What runs the graphs.

    Raises:
        CheckpointError: It cannot be read, or takes and gives what is not known here.
        ValueError: The model does not have the part that it holds.
    """
    path = Path(path)
    folder = exported_folder(path)
    if folder is not None:
        facts = read_facts(folder)
    else:
        folder = path.parent
        facts = _facts_of_file(path, open_graph(path, backend or "onnx"), model)
    part = facts.get("part", "encoder" if not facts.get("decoder") else None)
    if part is not None:
        net: nn.Module = part_of(model, part)[0]
    elif isinstance(model, Sam):
        net = plain(model)
        if facts["factor"] == 1 and facts["side"] != max(spec_of(model).size):
            net = resized(cast(Sam, net), int(facts["side"]))
    else:
        raise ValueError("the file holds a mask decoder; compare it with a checkpoint of a SAM")
    return compare(net, ImageSpec.from_dict(facts["image_spec"]), folder, facts, {}, backend)


def _facts_of_file(path: Path, graph: OpenedGraph, model: Model) -> dict[str, Any]:
    """Facts of a file alone, from its interface, its metadata and the model.

    Raises:
        CheckpointError: The interface is not known.
    """
    shapes = {name: words.shape for name, words in graph.inputs.items()}
    texts, names = graph.metadata, set(shapes)
    first, shape = next(iter(shapes.items()), ("", []))
    is_decoder = "image_embeddings" in names
    net, own = part_of(model, "features" if is_decoder else cast(Part, texts.get("tinyvit.part")))
    side = int(texts.get("tinyvit.input_size", 0)) or max(spec_for(model, net, None).size)
    fixed = shape[-1] if shape and isinstance(shape[-1], int) and len(shape) == 4 else None
    if fixed is not None:
        side = fixed * STRIDE if is_decoder else fixed
    factor = side // int(texts.get("tinyvit.adapted_from") or side)
    spec = spec_for(model, net, side // factor)
    part = "decoder" if is_decoder else own
    is_known = len(shapes) == 1 and len(shape) in (3, 4)
    if is_decoder:
        is_known = names >= set(DECODER_INPUTS[:-1]) and set(graph.outputs) <= set(DECODER_OUTPUTS)
        is_known = is_known or "input_points" in names
    if not is_known:
        raise CheckpointError(
            f"{path} takes {', '.join(names) or 'nothing by name'} and gives "
            f"{', '.join(graph.outputs) or 'nothing by name'}, which is no interface that is known "
            "here; those of 'tinyvit export' are, and segment-anything's"
        )
    grid = -(-side // STRIDE)
    facts = {
        part: path.name,
        "layout": "hwc" if len(shape) == 3 and not is_decoder else "nchw",
        "style": "transformers" if names & set(_TRANSFORMERS) else "sam",
        "side": side,
        "grid": grid,
        "channels": net.neck_dim,
        "factor": factor,
        "is_static": fixed is not None or part == "decoder",
        "is_foreign": "tinyvit.format" not in texts,
        "storage": texts.get("tinyvit.storage", "fp32"),
        f"{part}_input": first,
        f"{part}_outputs": list(graph.outputs),
        "decoder_inputs": list(shapes),
        "single_mask": False,
        "image_spec": spec.to_dict(),
    }
    if is_decoder and facts["style"] == "sam":
        rows, points = shapes["point_labels"]
        facts["num_points"] = points if isinstance(points, int) and points > 0 else None
        facts["many_prompts"] = rows != 1 and not facts["is_foreign"]
        case = certificates.decoder_cases(facts)[0]
        scores = graph(inputs_of(case, facts))[graph.outputs.index("iou_predictions")]
        facts["single_mask"] = scores.shape[1] == 1
    return facts | ({} if is_decoder else {"part": own})


def compare(
    model: nn.Module,
    spec: ImageSpec,
    folder: Path,
    facts: Mapping[str, Any],
    kept: dict[str, NDArray[Any]],
    backend: Backend | None = None,
) -> Verified:
    """Run all cases against the model in float64; ``kept`` takes the references."""
    reference = Reference(model, spec, facts)
    chosen = runner_of(facts, backend)
    runs = open_parts(folder, facts, chosen)
    made: dict[str, list[NDArray[Any]]] = {}
    if facts["style"] == "transformers":
        kept["positions"] = reference.positions()
    fill = positions_from(kept)

    def look_up(case: Case, number: int) -> tuple[NDArray[Any], str]:
        if case.id not in made:
            made.clear()
            inputs = inputs_of(case, facts)
            fill(inputs)
            made[case.id] = reference.run(case.part, inputs)
        value = made[case.id][number]
        name = f"{case.id} {facts[f'{case.part}_outputs'][number]}"
        kept[f"{case.id} {number}"] = certificates.keep(value, name)
        return kept[f"{case.id} {number}"], hashlib.sha256(np.float32(value).tobytes()).hexdigest()

    cases = tuple(run_cases(runs, facts, look_up, fill))
    masks = {}
    if {"encoder", "decoder"} <= runs.keys() and "masks" in facts["decoder_outputs"]:
        masks = _agreement(runs, reference, spec, facts)
    return Verified(str(folder), chosen, cases, masks)


def _agreement(
    runs: Mapping[str, OpenedGraph],
    reference: Reference,
    spec: ImageSpec,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """IoU of the pair's masks with the model's, for clicks on photographs."""
    side, threshold = int(facts["side"]), float(facts["mask_threshold"])
    ious: dict[str, float] = {}
    for path in sorted(_PHOTOGRAPHS.glob("example-*.jpg")):
        rgb = decode(path)
        wide = replace(ImageSpec.sam(side), mean=spec.mean, std=spec.std)
        x, placement = to_input(rgb, wide)
        if facts["layout"] == "hwc":
            height, width = placement.resized_size
            small = np.asarray(
                Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR)
            )
            inputs = {facts["encoder_input"]: small.astype(np.float32)}
        else:
            inputs = {facts["encoder_input"]: x[None]}
        came, right = runs["encoder"](inputs)[0], reference.encode(inputs)[0]
        grid = int(facts["grid"]) * 4
        for number in range(_CLICKS):
            place = (np.array([[number % 4 + 0.5, number // 4 + 0.5]]) / [4, _CLICKS // 4])[None]
            more = (facts.get("num_points") or 1) - 1  # padding
            coords = (place * placement.resized_size[::-1]).astype(np.float32)
            prompt = {
                "point_coords": np.pad(coords, ((0, 0), (0, more), (0, 0))),
                "point_labels": np.array([[1.0] + [-1.0] * more], np.float32),
                "mask_input": np.zeros((1, 1, grid, grid), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array(placement.original_size, np.float32),
            }
            mine = runs["decoder"]({"image_embeddings": came, **prompt})[0]
            theirs = reference.decode({"image_embeddings": right, **prompt})[0]
            if mine.dtype != np.bool_:
                mine, theirs = mine > threshold, theirs > threshold
            ious[f"{path.stem} {number}"] = _iou(mine, theirs)
    worst = min(ious, key=lambda name: ious[name])
    mean, least = float(np.mean(list(ious.values()))), ious[worst]
    allowed = _ALLOWED_IOU[str(facts["storage"])]
    passed = bool(mean >= allowed[0] and least >= allowed[1])
    return {
        "mean": mean,
        "least": least,
        "worst_case": worst,
        "passed": passed,
        "clicks": len(ious),
    }


def _iou(mine: NDArray[Any], theirs: NDArray[Any]) -> float:
    if mine.shape != theirs.shape:
        return 0.0
    either = np.count_nonzero(mine | theirs)
    return float(np.count_nonzero(mine & theirs) / either) if either else 1.0


def certify(
    model: nn.Module, spec: ImageSpec, folder: Path, preset: str, facts: Mapping[str, Any],
    sha256: str,
) -> Verified:  # fmt: skip
    """Compare, and write certificate and references."""
    kept: dict[str, NDArray[Any]] = {}
    verified = compare(model, spec, folder, facts, kept)
    own = Certificate(
        version("tinyvit"), certificates.versions("torch", "onnx"), certificates.machine(),
        preset, sha256, "torch float64", dict(facts), masks=verified.masks,
        verdict="passed" if verified.passed else "failed",
    )  # fmt: skip
    own.cases = [{**vars(case), "value": _number(case.value)} for case in verified.cases]
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            own.files[path.relative_to(folder).as_posix()] = certificates.file_facts(path)
    own.write(folder, kept)
    return verified


def _number(value: float) -> float | str:
    return value if np.isfinite(value) else "not finite"
