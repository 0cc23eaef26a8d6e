"""``export_model``: trace, write, certify; a folder that fails is not left behind."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from tinyvit.catalog import find_variant
from tinyvit.checkpoints.files import CLASSES, weights_sha256, write_bytes, write_text
from tinyvit.errors import MissingExtraError, TinyViTError
from tinyvit.image_spec import ImageSpec
from tinyvit.inference.bundle import FORMAT
from tinyvit.inference.graph_backend import trace
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam

from .comparing import certify
from .graphs import (
    DecoderGraph,
    EncoderGraph,
    Graph,
    Part,
    PromptsOfTransformers,
    plain,
    resized,
)
from .papers import papers
from .parts import Model, arguments_of_part, facts_of_part, part_of, spec_for
from .presets import DECODER_INPUTS, PRESETS, Preset, get_preset
from .verify import INDEX, Verified

OPSETS = range(16, 21)
OPSET = 17  # LayerNormalization as one operator; read by every runtime that was tried


@dataclass(frozen=True)
class _Order:
    """What ``export_model`` was asked for, the preset's row with the caller's changes included."""

    row: Preset
    name: str
    licence: str
    side: int | None
    opset: int
    drop_padding: bool
    num_points: int | None
    many_prompts: bool
    is_reproducible: bool
    progress: Callable[[str], None]

    def pair(self, weights: str) -> str:
        """What the files of one export have in common."""
        return weights[:16] if self.is_reproducible else secrets.token_hex(8)


class ParityError(TinyViTError):
    """An exported graph does not give what the model gives."""

    def __init__(self, words: str, verified: Verified) -> None:
        super().__init__(words)
        self.verified = verified


def export_model(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    preset: str = "tinyvit",
    part: Part | None = None,
    name: str = "model",
    licence: str = "",
    side: int | None = None,
    opset: int = OPSET,
    storage: Literal["fp32", "fp16"] | None = None,
    single_mask: bool | None = None,
    drop_padding: bool = False,
    num_points: int | None = None,
    many_prompts: bool = False,
    is_reproducible: bool = False,
    keep_failed: bool = False,
    progress: Callable[[str], None] = lambda words: None,
) -> Verified:
    """Write a model for a consumer, compare it with the model itself, and certify that.

    Args:
        model: A SAM, or an image encoder, a classifier or ``FeatureMaps``; it is not changed.
        folder: To write; it must not exist, or be empty.
        preset: A name of ``tinyvit.export.PRESETS``.
        part: "encoder", "classifier" or "features" alone, as the file ``model.onnx``: the image
            embedding, logits, or the maps of all stages. None: all of a SAM, and of another model
            what it gives.
        name: What the files call the model.
        licence: Of the weights.
        side: Run the network at this input side; None adapts weights of another side in the graph.
        opset: Of ONNX, 16 to 20.
        storage: "fp16" halves the files; arithmetic stays in fp32. None: as the preset.
        single_mask: Give the best mask alone. None: as the preset.
        drop_padding: Ignore padding points where a box is given.
        num_points: Take this number of points in every prompt, padding included, so that all
            shapes are fixed; None takes any.
        many_prompts: Take many prompts on one embedding in a call, padded to one number of points.
        is_reproducible: Two exports of one model are equal byte for byte.
        keep_failed: Leave a folder that failed.
        progress: Called with what is done next.

    Returns:
        Every comparison, all within what is allowed.

    Raises:
        ParityError: A comparison failed; the folder is gone, unless ``keep_failed``.
        ValueError: An argument is wrong, or the model cannot be exported so.
        FileExistsError: The folder is there and not empty.
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    is_part = part is not None or not isinstance(model, Sam)
    row = _row(preset, storage, single_mask, is_part)
    _check_prompts(row, is_part, drop_padding, num_points, many_prompts)
    if opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, came {opset}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there and not empty; choose another folder")
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    work.mkdir(parents=True)
    try:
        order = _Order(row, name, licence, side, opset, drop_padding, num_points, many_prompts,
                       is_reproducible, progress)  # fmt: skip
        if part is None and isinstance(model, Sam):
            verified = _write_pair(model, work, order)
        else:
            verified = _write_part(model, part, work, order)
        if verified.passed or keep_failed:
            if target.exists():
                target.rmdir()
            work.rename(target)
        if not verified.passed:
            worst = max(verified.cases, key=lambda case: case.value / case.allowed)
            raise ParityError(
                f"the exported graph differs from the model: {worst.id} by {worst.value:.2g}, "
                f"allowed is {worst.allowed:.2g}",
                verified,
            )
        return replace(verified, folder=str(target))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _row(preset: str, storage: Any, single_mask: bool | None, is_part: bool) -> Preset:
    """The row of a preset with what the caller wants otherwise."""
    row = get_preset(preset)
    if is_part and not row.takes_parts:
        fitting = ", ".join(name for name, other in PRESETS.items() if other.takes_parts)
        raise ValueError(
            f"{row.consumer} loads a whole SAM; an encoder, a classifier or features alone are for "
            f"{fitting}"
        )
    if is_part and single_mask is not None:
        raise ValueError("single_mask is for mask decoders, and there is none here")
    if row.style == "torch" and storage == "fp16":
        raise ValueError("programs of torch.export are stored in fp32; leave storage='fp16' out")
    single_mask = row.single_mask if single_mask is None else single_mask
    return replace(row, storage=storage or row.storage, single_mask=single_mask)


def _check_prompts(
    row: Preset, is_part: bool, drop_padding: bool, num_points: int | None, many_prompts: bool
) -> None:
    """Refuse ways to give prompts that do not go together, or that the preset has no place for."""
    if num_points is None and not many_prompts:
        return
    if is_part:
        raise ValueError("num_points and many_prompts are for mask decoders, and there is none")
    if num_points is not None and num_points < 1:
        raise ValueError(f"num_points must be at least 1, came {num_points}")
    if drop_padding:
        raise ValueError(
            "drop_padding leaves points out of one prompt, and their number could not stay that "
            "of num_points or of the other prompts; leave one of them out"
        )
    if row.style == "transformers":
        raise ValueError(f"{row.consumer} gives any number of points and prompts by itself")
    if many_prompts and (row.masks == "crop" or row.style == "torch"):
        raise ValueError(f"many_prompts: {row.consumer} takes one prompt at a time")


def _write_part(model: Model, part: Part | None, folder: Path, order: _Order) -> Verified:
    """One file of a network alone."""
    row = order.row
    net, part = part_of(model, part)
    spec = spec_for(model, net, order.side)
    net = plain(net)
    facts = facts_of_part(net, part, spec, row, order.name)
    sha256 = weights_sha256(net.state_dict())
    metadata = _metadata(facts, spec, sha256, net.strides, order)
    order.progress(f"tracing the {part}")
    _save(folder, part, arguments_of_part(net, part, spec, facts), order, facts, metadata)
    _write_index(folder, order, facts, metadata)
    return certify(net, spec, folder, row.name, facts, sha256)


def _write_pair(model: Sam, folder: Path, order: _Order) -> Verified:
    """Encoder and decoder of a SAM, as the preset wants them."""
    row, sam = order.row, plain(model)
    spec = spec_of(sam)
    own_side = max(spec.size)
    wanted = order.side or row.side or own_side
    factor = 1 if order.side is not None else wanted // own_side
    if factor * own_side != wanted and order.side is None:
        raise ValueError(
            f"{row.consumer} works with inputs of {wanted}, which is no whole multiple of the "
            f"weights' {own_side}; give side={wanted} to run the network at that size"
        )
    if factor == 1 and wanted != own_side:
        sam = resized(sam, wanted)
        spec = replace(spec, size=(wanted, wanted))
    facts = _facts(sam, spec, order, wanted, factor)
    sha256 = weights_sha256(sam.image_encoder.state_dict())
    metadata = _metadata(facts, spec, sha256, sam.image_encoder.strides, order)
    positions = sam.prompt_encoder.get_dense_pe() if row.style == "transformers" else None
    if row.encoder is not None:
        order.progress("tracing the encoder")
        graph = EncoderGraph(
            plain(sam.image_encoder), spec, row.layout, wanted, factor, positions
        ).eval()
        traced = _encoder_arguments(graph, row, wanted, factor)
        _save(folder, "encoder", traced, order, facts, metadata)
    order.progress("tracing the decoder")
    traced = _decoder_arguments(sam, row, facts, factor, order.drop_padding)
    _save(folder, "decoder", traced, order, facts, metadata)
    _write_index(folder, order, facts, metadata)
    model = model if factor > 1 or wanted == own_side else sam
    return certify(model, spec, folder, row.name, facts, sha256)


def _write_index(
    folder: Path, order: _Order, facts: dict[str, Any], metadata: Mapping[str, str]
) -> None:
    """tinyvit.json and what the consumer wants beside the graphs; IR files where it wants them."""
    index = {
        "format": FORMAT, **facts, "preset": order.row.name, "pair": metadata["tinyvit.pair"],
        "weights_sha256": metadata["tinyvit.weights_sha256"],
    }  # fmt: skip
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")
    for file, text in papers(order.row, facts, folder).items():
        write_text(folder / file, text)
    order.progress("comparing with the model in float64")


def _facts(sam: Sam, spec: ImageSpec, order: _Order, side: int, factor: int) -> dict[str, Any]:
    """What a reader of the folder needs, as plain values."""
    row, name = order.row, order.name
    grid = sam.prompt_encoder.image_embedding_size[0] * factor
    is_sam = row.style != "transformers"
    inputs: tuple[str, ...] = DECODER_INPUTS if row.masks != "low-res" else DECODER_INPUTS[:-1]
    encoder_outputs = [row.encoder_output]
    if not is_sam:
        inputs = ("image_embeddings", "image_positional_embeddings", "input_points", "input_labels")
        encoder_outputs.append("image_positional_embeddings")
    dtype = "_fp16" if not is_sam and row.storage == "fp16" else ""  # as transformers.js names it
    files = {part: file and file.format(name=name).replace(".onnx", f"{dtype}.onnx")
             for part, file in (("encoder", row.encoder), ("decoder", row.decoder))}  # fmt: skip
    return {
        "name": name,
        **files,
        "layout": row.layout,
        "style": row.style,
        "side": side,
        "grid": grid,
        "channels": sam.prompt_encoder.embed_dim,
        "variant": find_variant(sam.image_encoder.arguments()),
        "factor": factor,
        "is_static": row.is_static,
        "single_mask": row.single_mask,
        "drop_padding": order.drop_padding,
        "num_points": order.num_points,
        "many_prompts": order.many_prompts,
        "storage": row.storage,
        "encoder_input": row.encoder_input,
        "encoder_outputs": encoder_outputs,
        "decoder_inputs": list(inputs),
        "decoder_outputs": list(row.outputs),
        "image_spec": spec.to_dict(),
        "mask_threshold": sam.mask_threshold,
        "thresholds": dict(sam.thresholds),
    }


def _metadata(
    facts: Mapping[str, Any], spec: ImageSpec, sha256: str, strides: Sequence[int], order: _Order
) -> dict[str, str]:
    """What every file says of itself."""
    is_adapted = facts["factor"] != 1
    found = {
        "tinyvit.format": str(FORMAT),
        "tinyvit.version": version("tinyvit"),
        "tinyvit.preset": order.row.name,
        "tinyvit.variant": facts.get("variant") or "",
        "tinyvit.strides": json.dumps(list(strides)),
        "tinyvit.weights_sha256": sha256,
        "tinyvit.weights_licence": order.licence,
        "tinyvit.source": order.name,
        "tinyvit.image_spec": json.dumps(spec.to_dict()),
        "tinyvit.layout": "hwc-rgb-255" if facts["layout"] == "hwc" else "nchw-normalised",
        "tinyvit.input_size": str(facts["side"]),
        "tinyvit.adapted_from": str(facts["side"] // facts["factor"]) if is_adapted else "",
        "tinyvit.thresholds": json.dumps(facts["thresholds"]),
        "tinyvit.storage": order.row.storage,
        "tinyvit.opset": str(order.opset),
        "tinyvit.made_with": f"torch {torch.__version__}",
        "tinyvit.pair": order.pair(sha256),
    }
    if "grid" in facts:
        found["tinyvit.grid"] = str(facts["grid"])
        found["tinyvit.mask_threshold"] = str(facts["mask_threshold"])
    if facts.get("classes"):
        found[CLASSES] = json.dumps(facts["classes"])
    return found


def _encoder_arguments(graph: nn.Module, row: Preset, side: int, factor: int) -> Graph:
    """The encoder, ready to be traced."""
    outputs = [row.encoder_output]
    axes: dict[str, dict[int, str]] = {}
    if row.layout == "hwc":
        example = torch.zeros(side // 2, side * 3 // 4, 3)
        axes = {row.encoder_input: {0: "height", 1: "width"}}
    elif row.is_static or row.style == "transformers" or factor > 1:
        example = torch.zeros(1, 3, side, side)
        if not row.is_static:
            axes = {row.encoder_input: {0: "batch"}, row.encoder_output: {0: "batch"}}
    else:
        example = torch.zeros(2, 3, 75, 58)
        axes = {row.encoder_input: {0: "batch", 2: "height", 3: "width"},
                row.encoder_output: {0: "batch", 2: "h", 3: "w"}}  # fmt: skip
    if row.style == "transformers":
        outputs.append("image_positional_embeddings")
        axes["image_positional_embeddings"] = {0: "batch"}
    return graph, (example,), (row.encoder_input,), tuple(outputs), axes


def _decoder_arguments(
    sam: Sam, row: Preset, facts: Mapping[str, Any], factor: int, drop_padding: bool
) -> Graph:
    """The decoder, ready to be traced."""
    if row.style == "transformers":
        return _transformers_arguments(sam, row, facts)
    grid, channels = int(facts["grid"]), int(facts["channels"])
    graph = DecoderGraph(
        sam, single_mask=row.single_mask, masks=row.masks, factor=factor, drop_padding=drop_padding
    ).eval()
    rows, points = 2 if facts["many_prompts"] else 1, facts["num_points"] or 5
    example = (
        torch.randn(1, channels, grid, grid),
        torch.rand(rows, points, 2) * int(facts["side"]),
        (torch.arange(rows * points) % 5 - 1.0).view(rows, points),
        torch.randn(1, 1, 4 * grid, 4 * grid),
        torch.ones(1),
        torch.tensor([1500.0, 2250.0]),
    )[: len(facts["decoder_inputs"])]
    prompts = {0: "num_prompts"} if rows > 1 else {}
    free = prompts if facts["num_points"] else {**prompts, 1: "num_points"}
    axes = {name: dict(prompts) for name in row.outputs}
    axes |= {name: dict(free) for name in ("point_coords", "point_labels")}
    if row.masks != "low-res":
        axes["masks"] |= {2: "height", 3: "width"}
    return graph, example, facts["decoder_inputs"], row.outputs, axes


def _transformers_arguments(sam: Sam, row: Preset, facts: Mapping[str, Any]) -> Graph:
    """The decoder for transformers.js, ready to be traced."""
    grid, channels = int(facts["grid"]), int(facts["channels"])
    example = (
        torch.randn(1, channels, grid, grid),
        torch.randn(1, channels, grid, grid),
        torch.rand(1, 2, 3, 2) * int(facts["side"]),
        torch.ones(1, 2, 3, dtype=torch.int64),
    )
    prompts = {0: "batch", 1: "prompts", 2: "points"}
    axes: dict[str, dict[int, str]] = {
        "image_embeddings": {0: "batch"}, "image_positional_embeddings": {0: "batch"},
        "input_points": prompts, "input_labels": prompts,
        "iou_scores": {0: "batch", 1: "prompts"}, "pred_masks": {0: "batch", 1: "prompts"},
    }  # fmt: skip
    return PromptsOfTransformers(sam).eval(), example, facts["decoder_inputs"], row.outputs, axes


def _save(
    folder: Path, part: str, graph: Graph, order: _Order, facts: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> None:  # fmt: skip
    """Trace, add metadata, store weights as wanted, write."""
    path, metadata = folder / facts[part], {**metadata, "tinyvit.part": part}
    path.parent.mkdir(parents=True, exist_ok=True)
    if order.row.style == "torch":
        from .programs import save_program

        module, example, inputs, _, axes = graph
        points = [1 if "num_points" in axes.get(name, {}).values() else None for name in inputs]
        write_bytes(path, save_program(module, example, points, metadata))
        return
    if find_spec("onnx") is None:
        raise MissingExtraError("export needs the package onnx; pip install 'tinyvit[export]'")
    import onnx

    model = onnx.load_from_string(trace(*graph, order.opset))
    if order.row.storage == "fp16":
        _store_in_half(model)
    model.producer_name = "tinyvit"
    model.producer_version = version("tinyvit")
    model.doc_string = f"TinyViT {part} for {order.row.name}"
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    if order.row.style == "openvino":
        _write_openvino(model, path)
    else:
        write_bytes(path, model.SerializeToString(deterministic=True))


def _store_in_half(model: Any) -> None:
    """Weights in fp16 with a cast behind each, which runtimes fold; arithmetic stays in fp32."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT:
            continue
        values = numpy_helper.to_array(tensor)
        if values.size < 256 or np.abs(values).max(initial=0) > 65504:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(helper.make_node("Cast", [f"{name}_fp16"], [name], to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def _write_openvino(model: Any, path: Path) -> None:
    """OpenVINO's own pair of files from a graph of ONNX."""
    from tinyvit.inference.graphs import kept_core, load_library

    library = load_library("openvino", "OpenVINO")
    source = path.with_suffix(".onnx")
    try:
        write_bytes(source, model.SerializeToString(deterministic=True))
        # convert_model reports to its makers
        read = kept_core(library).read_model(os.fspath(source))
        library.save_model(read, os.fspath(path), compress_to_fp16=False)
    finally:
        source.unlink(missing_ok=True)
