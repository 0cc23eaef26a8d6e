"""Prove the fast forms: each backend and precision against the plain model in float64.

    python benchmarks/proof.py

Errors of the embedding for MobileSAM's encoder with random weights at convenient and odd sizes,
and, for the embedded trained weights on the images of ``examples/pictures``, also how far
masks agree, and how large the numbers inside get (``ranges.py``): what float16 would have to hold.
Needs nothing but tinyvit with its extras; takes a minute or two. It measures no time.
"""

import argparse
import copy
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from ranges import FLOAT16_MAX, largest_values
from torch import Tensor
from weights import values, weights

import tinyvit
from tinyvit.bench import machine_facts
from tinyvit.image_spec import ImageSpec, Placement
from tinyvit.images.decode import decode
from tinyvit.images.preprocess import to_input
from tinyvit.inference import OnnxBackend, OpenVINOBackend, OpenVINOGraph, TorchBackend
from tinyvit.sam.model import build_sam

HERE = Path(__file__).parent
IMAGES = HERE.parent / "examples" / "pictures"
MODEL, CHECKPOINT = "tiny_vit_5m_sam", "tinyvit_sam_2m"
SIZES = ((1024, 1024), (683, 1024), (250, 333), (75, 58))
RANGE_SIZES = (256, 1024)
CLICKS = 5  # along a side
CALLS = {"openvino": 3}  # it compiles a shape for itself at the third; others do the same again

Run = Callable[[Tensor], Tensor]


def contestants(model) -> dict[str, Run]:
    """From name to what runs a batch [N, 3, H, W] float32; ready to run."""
    openvino = {name: OpenVINOBackend(model, precision=name) for name in ("fp32", "bf16")}
    graphs = {
        name: OpenVINOGraph(backend.graph_file, precision=name)
        for name, backend in openvino.items()
    }
    return {
        "plain model, fp32": lambda x: plain(model, torch.float32, x),
        "torch, fp32": TorchBackend(model, "cpu", "fp32"),
        "openvino, fp32": openvino["fp32"],
        "openvino graph, fp32": lambda x: torch.from_numpy(graphs["fp32"](x.numpy())),
        "onnx, fp32": OnnxBackend(model),
        "torch, bf16": TorchBackend(model, "cpu", "bf16"),
        "openvino, bf16": openvino["bf16"],
        "openvino graph, bf16": lambda x: torch.from_numpy(graphs["bf16"](x.numpy())),
        "plain model, bf16": lambda x: plain(model, torch.bfloat16, x),
        "plain model, fp16 (refused)": lambda x: plain(model, torch.float16, x),
    }


def plain(model, dtype, batch: Tensor) -> Tensor:
    """The model as it is, in another precision."""
    with torch.inference_mode():
        return copy.deepcopy(model).to(dtype)(batch.to(dtype))


def compare(output: Tensor, wanted: Tensor) -> dict[str, float]:
    """How far an output is from the wanted one, both of one shape."""
    got, wanted = output.double().flatten(), wanted.double().flatten()
    error = (got - wanted).abs()
    return {
        "max_error": float(error.max()),
        "mean_error": float(error.mean()),
        "one_minus_cosine": float(1 - torch.cosine_similarity(got, wanted, 0)),
        "largest": float(wanted.abs().max()),
    }


def worst(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several comparisons the largest of each number."""
    return {key: max(one[key] for one in found) for key in found[0]}


def errors(
    name: str, run: Run, batches: Sequence[Tensor], wanted: Sequence[Tensor]
) -> dict[str, float]:
    """The worst over all batches, and over all forms that a contestant takes."""
    calls = CALLS.get(name.partition(",")[0].partition(" ")[0], 1)
    return worst(
        [
            compare(run(batch), reference)
            for batch, reference in zip(batches, wanted, strict=True)
            for _ in range(calls)
        ]
    )


def random_cases() -> list[dict]:
    """MobileSAM's encoder with random weights, at each size."""
    model = tinyvit.create_model(MODEL)
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(v) for key, v in weights(shapes).items()})
    runs = contestants(model)
    cases = []
    for size in SIZES:
        batch = torch.from_numpy(values(f"image of {size}", (3, *size)))[None]
        wanted = [plain(model, torch.float64, batch)]
        rows = {name: errors(name, run, [batch], wanted) for name, run in runs.items()}
        cases.append({"title": f"{MODEL}, random weights, {size[0]}x{size[1]}", "rows": rows})
    return cases


def example_images(spec: ImageSpec) -> list[tuple[Tensor, Placement]]:
    """([1, 3, H, W] float32, placement) of each example image."""
    files = [path for path in sorted(IMAGES.iterdir()) if path.suffix in (".png", ".jpg")]
    prepared = [to_input(decode(path), spec) for path in files]
    return [(torch.from_numpy(pixels)[None], placement) for pixels, placement in prepared]


def trained_cases() -> list[dict]:
    """The embedded weights on the example images: errors of the embedding, and IoU of masks."""
    sam = build_sam(CHECKPOINT)
    model = sam.image_encoder
    runs = contestants(model)
    cases = []
    for padded in (True, False):
        spec = ImageSpec.sam(max(model.image_spec.size), pad=padded)
        images = example_images(spec)
        batches = [batch for batch, _ in images]
        wanted = [plain(model, torch.float64, batch) for batch in batches]
        rows = {name: errors(name, run, batches, wanted) for name, run in runs.items()}
        if padded:
            places = [place for _, place in images]
            reference = [masks(sam, *pair) for pair in zip(wanted, places, strict=True)]
            for name, run in runs.items():
                ours = [masks(sam, run(batch), place) for batch, place in images]
                overlaps = np.concatenate(
                    [iou(*pair) for pair in zip(ours, reference, strict=True)]
                )
                rows[name] |= {"mean_iou": float(overlaps.mean()), "min_iou": float(overlaps.min())}
        words = "padded to a square" if padded else "not padded"
        title = f"{CHECKPOINT}, trained weights, {len(batches)} images, {words}"
        cases.append({"title": title, "rows": rows})
    return cases


def masks(sam, embedding: Tensor, placement: Placement) -> np.ndarray:
    """Masks of a grid of clicks on one image: [clicks, H, W] bool, heads in float32."""
    height, width = placement.original_size
    steps = (np.arange(CLICKS) + 0.5) / CLICKS
    clicks = np.stack(np.meshgrid(steps * width, steps * height), axis=-1).reshape(-1, 1, 2)
    points = torch.from_numpy(placement.points_to_model(clicks)).float()
    labels = torch.ones(points.shape[:2], dtype=torch.int64)
    with torch.inference_mode():
        sparse, dense = sam.prompt_encoder((points, labels), None, None)
        position = sam.prompt_encoder.get_dense_pe()
        low_res, _ = sam.mask_decoder(embedding.float(), position, sparse, dense, False)
        logits = sam.postprocess_masks(low_res, placement.resized_size, placement.original_size)
    return (logits[:, 0] > 0).numpy()


def iou(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Intersection over union of masks [N, H, W]: [N]; 1 where both are empty."""
    both, either = (ours & theirs).sum((1, 2)), (ours | theirs).sum((1, 2))
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def ranges() -> dict[str, dict[str, float]]:
    """Largest magnitude of each kind of value for each size; embedded weights, example images."""
    model = tinyvit.create_model(checkpoint=CHECKPOINT)
    found = {}
    for size in RANGE_SIZES:
        specs = [ImageSpec.sam(size, pad=padded) for padded in (True, False)]
        batches = [batch for spec in specs for batch, _ in example_images(spec)]
        found[str(size)] = largest_values(copy.deepcopy(model), batches)
    return found


def markdown(found: Mapping) -> str:
    """What was found, for people."""
    machine = {
        **found["machine"],
        "memory": f"{(found['machine'].get('memory') or 0) / 1e9:.0f} GB",
    }
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if value)
    lines = [
        "# The fast forms against the plain model in float64",
        "",
        "Written by `benchmarks/proof.py`. Each number is the worst of all images of a case; "
        "mean errors are the mean over one embedding. IoU is that of the masks of "
        f"{CLICKS}x{CLICKS} clicks on each image with those from the float64 embedding.",
        "",
        f"    {found['command']}",
        "",
        f"{facts}; {found['threads']} threads",
        "",
    ]
    for case in found["cases"]:
        lines += [f"## {case['title']}", "", *_table(case["rows"]), ""]
    lines += [
        f"## Largest values inside, {CHECKPOINT}, example images",
        "",
        f"float16 ends at {FLOAT16_MAX:.0f}. Padded and unpadded images.",
        "",
        *_range_table(found["ranges"]),
        "",
    ]
    return "\n".join(lines)


def _table(rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    largest = max(row["largest"] for row in rows.values())
    has_masks = any("mean_iou" in row for row in rows.values())
    heads = ["", f"max error (values to {largest:.1f})", "mean error", "1 - cosine"]
    heads += ["mean IoU", "least IoU"] if has_masks else []
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for name, row in rows.items():
        numbers = [f"{row[key]:.1e}" for key in ("max_error", "mean_error", "one_minus_cosine")]
        if has_masks:
            numbers += [f"{row[key]:.4f}" for key in ("mean_iou", "min_iou")]
        lines.append([name, *numbers])
    return [f"| {' | '.join(line)} |" for line in lines]


def _range_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    largest = list(found.values())[-1]
    kinds = sorted(largest, key=lambda kind: largest[kind])
    lines = [["kind of value", *(f"{size} pixels" for size in found)]]
    lines += [["---", *["---:"] * len(found)]]
    lines += [[kind, *(f"{row[kind]:.1f}" for row in found.values())] for kind in kinds]
    return [f"| {' | '.join(line)} |" for line in lines]


def main(arguments: Sequence[str]) -> None:
    """Compare everything; write ``proof.md`` and ``proof.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="folder; this one by default")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        os.environ["TINYVIT_CACHE"] = folder
        found = {
            "command": shlex.join(["python", "benchmarks/proof.py", *arguments]),
            "machine": machine_facts("openvino", "onnxruntime"),
            "threads": torch.get_num_threads(),
            "cases": [*random_cases(), *trained_cases()],
            "ranges": ranges(),
        }
    text = markdown(found)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    texts = {"proof.md": text, "proof.json": json.dumps(found, indent=1) + "\n"}
    for name, content in texts.items():
        fresh = options.output / f".{name}.part"
        fresh.write_text(content, encoding="utf-8")
        os.replace(fresh, options.output / name)


if __name__ == "__main__":
    main(sys.argv[1:])
