"""``export_model``: trace, write, certify; a folder that fails is not left behind."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from tinyvit.checkpoints.files import weights_sha256, write_bytes, write_text
from tinyvit.errors import TinyViTError
from tinyvit.image_spec import ImageSpec
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.sam.embedding import spec_of
from tinyvit.sam.model import Sam

from . import certificate as certificates
from .certificate import Case, Certificate
from .graphs import DecoderGraph, EncoderGraph, PromptsOfTransformers, plain, trace
from .presets import DECODER_INPUTS, Preset, get_preset
from .reference import Reference
from .verify import Verified, inputs_of, open_graph, positions_from, read_facts, run_cases

OPSETS = range(16, 21)
OPSET = 17  # LayerNormalization as one operator; read by every runtime that was tried
STRIDE = 16
FORMAT = 1
_CLICKS = 8  # on each photograph
_ALLOWED_IOU = {"fp32": (0.9995, 0.995), "fp16": (0.995, 0.97)}
"""Mean and least IoU of masks with the model's."""
_PHOTOGRAPHS = Path(__file__).parents[1] / "serve" / "page"
"""The example images that the page ships."""


Graph: TypeAlias = (
    "tuple[nn.Module, Sequence[Tensor], Sequence[str], Sequence[str], Mapping[str, dict[int, str]]]"
)
"""(module, example, inputs, outputs, axes that may have any length)."""


class ParityError(TinyViTError):
    """An exported graph does not give what the model gives."""

    def __init__(self, words: str, verified: Verified) -> None:
        super().__init__(words)
        self.verified = verified


def export_model(
    model: Sam,
    folder: str | os.PathLike[str],
    *,
    preset: str = "tinyvit",
    name: str = "model",
    licence: str = "",
    side: int | None = None,
    opset: int = OPSET,
    storage: Literal["fp32", "fp16"] | None = None,
    single_mask: bool | None = None,
    drop_padding: bool = False,
    is_reproducible: bool = False,
    keep_failed: bool = False,
    progress: Callable[[str], None] = lambda words: None,
) -> Verified:
    """Write a model for a consumer, compare it with the model itself, and certify that.

    Args:
        model: A SAM; it is not changed.
        folder: To write; it must not exist, or be empty.
        preset: A name of ``tinyvit.export.PRESETS``.
        name: What the files call the model.
        licence: Of the weights.
        side: Run the network at this input side; None adapts weights of another side in the graph.
        opset: Of ONNX, 16 to 20.
        storage: "fp16" halves the files; arithmetic stays in fp32. None: as the preset.
        single_mask: Give the best mask alone. None: as the preset.
        drop_padding: Ignore padding points where a box is given.
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
    row = get_preset(preset)
    row = replace(
        row,
        storage=storage or row.storage,
        single_mask=row.single_mask if single_mask is None else single_mask,
    )
    if opset not in OPSETS:
        raise ValueError(f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, came {opset}")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is there and not empty; choose another folder")
    work = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    work.mkdir(parents=True)
    try:
        verified = _write(
            model, work, row, name, licence, side, opset, drop_padding, is_reproducible, progress
        )
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


def _write(
    model: Sam,
    folder: Path,
    row: Preset,
    name: str,
    licence: str,
    side: int | None,
    opset: int,
    drop_padding: bool,
    is_reproducible: bool,
    progress: Callable[[str], None],
) -> Verified:
    sam = plain(model)
    spec = spec_of(sam)
    own_side = max(spec.size)
    wanted = side or row.side or own_side
    factor = 1 if side is not None else wanted // own_side
    if factor * own_side != wanted and side is None:
        raise ValueError(
            f"{row.consumer} works with inputs of {wanted}, which is no whole multiple of the "
            f"weights' {own_side}; give side={wanted} to run the network at that size"
        )
    if factor == 1 and wanted != own_side:
        sam = _resized(sam, wanted)
        spec = replace(spec, size=(wanted, wanted))
    facts = _facts(sam, spec, row, name, wanted, factor)
    encoder_hash = weights_sha256(sam.image_encoder.state_dict())
    pair = encoder_hash[:16] if is_reproducible else secrets.token_hex(8)
    metadata = _metadata(facts, row, spec, encoder_hash, licence, pair, opset, sam)
    positions = sam.prompt_encoder.get_dense_pe() if row.style == "transformers" else None
    if row.encoder is not None:
        progress("tracing the encoder")
        graph = EncoderGraph(
            plain(sam.image_encoder), spec, row.layout, wanted, factor, positions
        ).eval()
        traced = _encoder_arguments(graph, row, wanted, factor)
        own = {**metadata, "tinyvit.part": "encoder"}
        _save(folder / facts["encoder"], traced, opset, own, row.storage)
    progress("tracing the decoder")
    traced = _decoder_arguments(sam, row, facts, factor, drop_padding)
    own = {**metadata, "tinyvit.part": "decoder"}
    _save(folder / facts["decoder"], traced, opset, own, row.storage)
    write_text(folder / "tinyvit.json", json.dumps({"format": FORMAT, **facts, "preset": row.name,
               "pair": pair, "weights_sha256": encoder_hash}, indent=1) + "\n")  # fmt: skip
    for file, text in _papers(row, facts, folder).items():
        write_text(folder / file, text)
    if row.style == "openvino":
        _to_openvino(folder, facts)
    progress("comparing with the model in float64")
    return _certify(
        model if factor > 1 or wanted == own_side else sam, spec, folder, row, facts, encoder_hash
    )


def _resized(sam: Sam, side: int) -> Sam:
    """The same weights for another input side."""
    from tinyvit.modules.sam.prompt_encoder import PromptEncoder

    own = sam.prompt_encoder
    grid = -(-side // STRIDE)
    channels = cast("nn.Conv2d", own.mask_downscaling[0]).out_channels * 4
    other = PromptEncoder(own.embed_dim, (grid, grid), (side, side), channels)
    other.load_state_dict(own.state_dict())
    sam.prompt_encoder = other.eval()
    return sam


def _facts(
    sam: Sam, spec: ImageSpec, row: Preset, name: str, side: int, factor: int
) -> dict[str, Any]:
    """What a reader of the folder needs, as plain values."""
    grid = sam.prompt_encoder.image_embedding_size[0] * factor
    is_sam = row.style != "transformers"
    inputs: tuple[str, ...] = DECODER_INPUTS if row.masks != "low-res" else DECODER_INPUTS[:-1]
    encoder_outputs = [row.encoder_output]
    if not is_sam:
        inputs = ("image_embeddings", "image_positional_embeddings", "input_points", "input_labels")
        encoder_outputs.append("image_positional_embeddings")
    return {
        "name": name,
        "encoder": row.encoder and row.encoder.format(name=name),
        "decoder": row.decoder.format(name=name),
        "layout": row.layout,
        "style": row.style,
        "side": side,
        "grid": grid,
        "channels": sam.prompt_encoder.embed_dim,
        "factor": factor,
        "is_static": row.is_static,
        "single_mask": row.single_mask,
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
    facts: Mapping[str, Any], row: Preset, spec: ImageSpec, sha256: str, licence: str, pair: str,
    opset: int, sam: Sam,
) -> dict[str, str]:  # fmt: skip
    """What every file says of itself."""
    return {
        "tinyvit.format": str(FORMAT),
        "tinyvit.version": version("tinyvit"),
        "tinyvit.preset": row.name,
        "tinyvit.weights_sha256": sha256,
        "tinyvit.weights_licence": licence,
        "tinyvit.source": str(facts["name"]),
        "tinyvit.image_spec": json.dumps(spec.to_dict()),
        "tinyvit.layout": "hwc-rgb-255" if row.layout == "hwc" else "nchw-normalised",
        "tinyvit.input_size": str(facts["side"]),
        "tinyvit.grid": str(facts["grid"]),
        "tinyvit.adapted_from": str(int(facts["side"]) // int(facts["factor"]))
        if facts["factor"] != 1
        else "",
        "tinyvit.mask_threshold": str(sam.mask_threshold),
        "tinyvit.thresholds": json.dumps(sam.thresholds),
        "tinyvit.storage": row.storage,
        "tinyvit.opset": str(opset),
        "tinyvit.made_with": f"torch {torch.__version__}",
        "tinyvit.pair": pair,
    }


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
    grid, channels = int(facts["grid"]), int(facts["channels"])
    if row.style == "transformers":
        example: Sequence[Tensor] = (
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
        return (
            PromptsOfTransformers(sam).eval(),
            example,
            facts["decoder_inputs"],
            row.outputs,
            axes,
        )
    graph = DecoderGraph(
        sam, single_mask=row.single_mask, masks=row.masks, factor=factor, drop_padding=drop_padding
    ).eval()
    example = (
        torch.randn(1, channels, grid, grid),
        torch.rand(1, 5, 2) * int(facts["side"]),
        torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]]),
        torch.randn(1, 1, 4 * grid, 4 * grid),
        torch.ones(1),
        torch.tensor([1500.0, 2250.0]),
    )[: len(facts["decoder_inputs"])]
    axes = {"point_coords": {1: "num_points"}, "point_labels": {1: "num_points"}}
    if row.masks == "full":
        axes["masks"] = {2: "height", 3: "width"}
    elif row.masks == "crop":
        axes["masks"] = {0: "height", 1: "width"}
    return graph, example, facts["decoder_inputs"], row.outputs, axes


def _save(path: Path, graph: Graph, opset: int, metadata: Mapping[str, str], storage: str) -> None:
    """Trace, add metadata, store weights as wanted, write."""
    import onnx

    model = onnx.load_from_string(trace(*graph, opset))
    if storage == "fp16":
        _store_in_half(model)
    model.producer_name = "tinyvit"
    model.producer_version = version("tinyvit")
    model.doc_string = f"TinyViT {metadata['tinyvit.part']} for {metadata['tinyvit.preset']}"
    for key, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    path.parent.mkdir(parents=True, exist_ok=True)
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


def _to_openvino(folder: Path, facts: dict[str, Any]) -> None:
    """Turn the pair of ONNX files into OpenVINO's own."""
    from tinyvit.inference.graphs import load_library

    library = load_library("openvino", "OpenVINO")
    for part in ("encoder", "decoder"):
        path = folder / facts[part]  # written as ONNX under the final name
        source = path.with_suffix(".onnx")
        path.rename(source)
        library.save_model(
            library.convert_model(os.fspath(source)), os.fspath(path), compress_to_fp16=False
        )
        source.unlink()


def _papers(row: Preset, facts: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Files that a consumer or its user wants beside the graphs."""
    lines = [
        f"For {row.consumer}.",
        f"Inputs of {facts['side']} x {facts['side']} pixels.",
        row.note,
    ]
    papers = {"README.txt": "\n".join(line for line in lines if line) + "\n"}
    name = facts["name"]
    if row.name == "x-anylabeling":
        papers[f"{name}.yaml"] = "\n".join([
            "type: segment_anything", f"name: {name}-tinyvit", "provider: tinyvit",
            f"display_name: {name} (tinyvit)", f"encoder_model_path: {facts['encoder']}",
            f"decoder_model_path: {facts['decoder']}", "input_size: 1024", "max_width: 1024",
            "max_height: 682", "",
        ])  # fmt: skip
    elif row.name == "samexporter":
        papers["config.yaml"] = "\n".join([
            "type: segment_anything", f"name: {name}", f"display_name: {name} (tinyvit)",
            f"encoder_model_path: {facts['encoder']}", f"decoder_model_path: {facts['decoder']}",
            "input_size: 1024", "max_width: 1024", "max_height: 682", "",
        ])  # fmt: skip
    elif row.name == "osam":
        hashes = {part: hashlib.sha256((folder / facts[part]).read_bytes()).hexdigest()
                  for part in ("encoder", "decoder")}  # fmt: skip
        papers["README.txt"] += (
            "\nPut the files where osam looks for them, under ~/.cache/osam/models/blobs as\n"
            f"sha256-{hashes['encoder']} (encoder) and\nsha256-{hashes['decoder']} (decoder), and "
            "register a class:\n\n"
            "from osam import apis, types\nfrom osam._models import sam\n\n"
            "class TinyViT(sam.Sam1):\n"
            f'    name = "{name}"\n    _blobs = {{\n'
            f'        "encoder": types.Blob(url="", hash="sha256:{hashes["encoder"]}"),\n'
            f'        "decoder": types.Blob(url="", hash="sha256:{hashes["decoder"]}"),\n    }}\n\n'
            "apis.registered_model_types.append(TinyViT)\n"
        )
    elif row.style == "transformers":
        spec, side = facts["image_spec"], facts["side"]
        papers["config.json"] = json.dumps({
            "model_type": "sam", "architectures": ["SamModel"],
            "vision_config": {"image_size": side, "patch_size": 16},
            "prompt_encoder_config": {"image_size": side}, "mask_decoder_config": {},
        }, indent=1)  # fmt: skip
        papers["preprocessor_config.json"] = json.dumps({
            "image_processor_type": "SamImageProcessor", "processor_class": "SamProcessor",
            "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True,
            "do_resize": True, "image_mean": [value / 255 for value in spec["mean"]],
            "image_std": [value / 255 for value in spec["std"]], "rescale_factor": 1 / 255,
            "pad_size": {"height": side, "width": side}, "resample": 2,
            "size": {"longest_edge": side},
        }, indent=1)  # fmt: skip
    return papers


def verify_against(
    path: str | os.PathLike[str], model: Sam, *, backend: Literal["onnx", "openvino"] | None = None
) -> Verified:
    """Compare an exported folder with a model anew, in float64.

    Args:
        path: Of the folder, or of a file in it.
        model: What it should have come from.
        backend: What runs the graphs.

    Raises:
        CheckpointError: It is no folder of ``export_model``.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    facts = read_facts(folder)
    row = replace(
        get_preset(str(facts["preset"])), storage=facts["storage"], single_mask=facts["single_mask"]
    )
    spec = ImageSpec.from_dict(facts["image_spec"])
    sam = plain(model)
    if facts["factor"] == 1 and facts["side"] != max(spec_of(sam).size):
        sam = _resized(sam, int(facts["side"]))
    return _compare(sam, spec, folder, row, facts, {}, backend)


def _compare(
    model: Sam, spec: ImageSpec, folder: Path, row: Preset, facts: Mapping[str, Any],
    kept: dict[str, NDArray[Any]], backend: Literal["onnx", "openvino"] | None = None,
) -> Verified:  # fmt: skip
    """Run all cases against the model in float64; ``kept`` takes the references."""
    reference = Reference(model, spec, row, facts)
    chosen = backend or ("openvino" if row.style == "openvino" else "onnx")
    runs = {part: open_graph(folder / facts[part], chosen)
            for part in ("encoder", "decoder") if facts.get(part)}  # fmt: skip
    made: dict[str, list[NDArray[Any]]] = {}
    if row.style == "transformers":
        kept["positions"] = model.prompt_encoder.get_dense_pe().float().numpy()
    fill = positions_from(kept)

    def look_up(case: Case, number: int) -> tuple[NDArray[Any], str]:
        if case.id not in made:
            made.clear()
            inputs = inputs_of(case, facts)
            fill(inputs)
            run = reference.encode if case.part == "encoder" else reference.decode
            made[case.id] = run(inputs)
        value = made[case.id][number]
        name = f"{case.id} {facts[f'{case.part}_outputs'][number]}"
        kept[f"{case.id} {number}"] = certificates.keep(value, name)
        return kept[f"{case.id} {number}"], hashlib.sha256(np.float32(value).tobytes()).hexdigest()

    cases = tuple(run_cases(runs, facts, look_up, fill))
    masks = {}
    if row.style != "transformers" and row.masks == "full" and row.encoder:
        masks = _agreement(runs, reference, spec, facts)
    return Verified(str(folder), chosen, cases, masks)


def _agreement(
    runs: Mapping[str, certificates.Run],
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
            prompt = {
                "point_coords": (place * placement.resized_size[::-1]).astype(np.float32),
                "point_labels": np.ones((1, 1), np.float32),
                "mask_input": np.zeros((1, 1, grid, grid), np.float32),
                "has_mask_input": np.zeros(1, np.float32),
                "orig_im_size": np.array(placement.original_size, np.float32),
            }
            mine = runs["decoder"]({"image_embeddings": came, **prompt})[0] > threshold
            theirs = reference.decode({"image_embeddings": right, **prompt})[0] > threshold
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


def _certify(
    model: Sam, spec: ImageSpec, folder: Path, row: Preset, facts: Mapping[str, Any], sha256: str
) -> Verified:
    """Compare, and write certificate and references."""
    kept: dict[str, NDArray[Any]] = {}
    verified = _compare(model, spec, folder, row, facts, kept)
    own = Certificate(
        version("tinyvit"), certificates.versions("torch", "onnx"), certificates.machine(),
        row.name, sha256, "torch float64", dict(facts), masks=verified.masks,
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
