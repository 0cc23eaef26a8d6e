"""Why int8 is not offered: masks and CPU time of quantised encoders beside fp32 and bf16.

ONNX Runtime's dynamic and static quantisation, and NNCF for OpenVINO, of the embedded weights'
image encoder. Calibration and evaluation take different photographs of one folder. Nothing is
chosen by the result: an encoder's masks are compared with those of the fp32 encoder, and the
photographs' own masks only say where to click.

NNCF has an environment of its own, for it wants other versions than tinyvit does:

    python -m venv .venv-nncf
    .venv-nncf/bin/pip install nncf==3.4.0 openvino==2026.4.1
    python benchmarks/int8.py DATA --nncf .venv-nncf/bin/python
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tinyvit.bench import machine_facts
from tinyvit.export.graphs import DecoderGraph, plain
from tinyvit.export.presets import DECODER_INPUTS, DECODER_OUTPUTS
from tinyvit.images.preprocess import to_input
from tinyvit.inference.graph_backend import trace
from tinyvit.sam import build_sam
from tinyvit.sam.embedding import spec_of

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "inference.md"
BEGIN, END = "<!-- written by benchmarks/int8.py -->", "<!-- end -->"
CALIBRATION, EVALUATION = 32, 20  # photographs
SEED = 7
BY_OPENVINO = (
    "static, linear layers, per channel",
    "static, convolutions and linear layers, per channel",
)
"""Files of ONNX Runtime's that OpenVINO runs, too."""
Run = Callable[[np.ndarray], np.ndarray]

NNCF = """
import sys, numpy as np, nncf, openvino as ov
source, images, target, kind = sys.argv[1:]
given = np.load(images)
model = ov.Core().read_model(source)
more = {"preset": nncf.QuantizationPreset.MIXED} if kind == "mixed" else {
    "model_type": nncf.ModelType.TRANSFORMER}
found = nncf.quantize(model, nncf.Dataset(list(given)), subset_size=len(given), **more)
ov.save_model(found, target, compress_to_fp16=False)
print(nncf.__version__)
"""


@dataclass
class Row:
    """One encoder: its size, agreement of its masks with fp32's, CPU time as a part of fp32's."""

    encoder: str
    runner: str
    megabytes: float
    click_mean: float
    click_least: float
    box_mean: float
    box_least: float
    speed: float
    """CPU time of ONNX Runtime in fp32 by this one's, median of the pairs; above 1 is faster."""
    speed_low: float
    speed_high: float


@dataclass
class Sample:
    """A prepared photograph, a click inside its object, the object's box; in the input's pixels."""

    x: np.ndarray
    click: np.ndarray
    box: np.ndarray
    size: tuple[int, int]


def photographs(folder: Path, spec: object) -> tuple[list[np.ndarray], list[Sample]]:
    """Inputs to calibrate with, and samples to evaluate with, of different photographs."""
    with open(folder / "manifest.csv", encoding="utf-8") as file:
        rows = {row["image"]: row["mask"] for row in csv.DictReader(file)}
    names = sorted(rows)
    np.random.default_rng(SEED).shuffle(names)
    calibration = [
        to_input(read(folder / "images" / name), spec)[0] for name in names[:CALIBRATION]
    ]
    samples = []
    for name in names[CALIBRATION : CALIBRATION + EVALUATION]:
        x, placement = to_input(read(folder / "images" / name), spec)
        mask = np.asarray(Image.open(folder / "masks" / rows[name]).convert("L")) > 127
        ys, xs = np.nonzero(mask)
        box = [[xs.min(), ys.min()], [xs.max() + 1, ys.max() + 1]]
        samples.append(
            Sample(
                x,
                np.array(placement.points_to_model([most_interior(mask)]), np.float32),
                np.array(placement.points_to_model(np.array(box, float)), np.float32),
                placement.original_size,
            )
        )
    return calibration, samples


def read(path: Path) -> np.ndarray:
    """RGB."""
    return np.asarray(Image.open(path).convert("RGB"))


def most_interior(mask: np.ndarray) -> list[float]:
    """The (x, y) of a mask's pixel that is farthest from its edge."""
    from scipy.ndimage import distance_transform_edt

    distance = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), mask.shape)
    return [x + 0.5, y + 0.5]


def onnx_runner(path: Path) -> Callable[..., list[np.ndarray]]:
    """A file by ONNX Runtime, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *values: session.run(None, dict(zip(names, values, strict=True)))


def openvino_runner(path: Path, hint: str = "f32") -> Callable[..., list[np.ndarray]]:
    """A file by OpenVINO, on one thread."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
    model = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda *values: [np.array(one) for one in model(list(values)).values()]


def linear_layers(path: Path, more: Iterable[str] = (), but: Sequence[str] = ()) -> list[str]:
    """Names of nodes that multiply by weights, and of other kinds; those with ``but`` left out."""
    import onnx

    graph = onnx.load(path).graph
    constants = {one.name for one in graph.initializer}
    constants |= {node.output[0] for node in graph.node if node.op_type == "Constant"}
    return [
        node.name
        for node in graph.node
        if (node.op_type == "Gemm"
            or (node.op_type == "MatMul" and constants & set(node.input))
            or node.op_type in more)
        and not any(part in node.name for part in but)
    ]  # fmt: skip


class Inputs:
    """Calibration inputs as ONNX Runtime asks for them."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.left = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one, or None."""
        found = next(self.left, None)
        return None if found is None else {"images": found[None]}


def recipes(nncf: str | None) -> dict[str, Callable[[Path, list[np.ndarray]], Path]]:
    """By name what writes a quantised encoder beside the fp32 one, and gives its path."""

    def dynamic(fp32: Path, calibration: list[np.ndarray]) -> Path:
        from onnxruntime.quantization import quantize_dynamic

        target = fp32.with_name("dynamic.onnx")
        quantize_dynamic(
            prepared(fp32), target, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
        )
        return target

    def static(
        more: Sequence[str] | None, per_channel: bool = True, but: Sequence[str] = ()
    ) -> Callable[[Path, list[np.ndarray]], Path]:
        def write(fp32: Path, calibration: list[np.ndarray]) -> Path:
            from onnxruntime.quantization import (
                CalibrationDataReader,
                QuantFormat,
                quantize_static,
            )

            CalibrationDataReader.register(Inputs)
            source, target = prepared(fp32), fp32.with_name("static.onnx")
            nodes = None if more is None else linear_layers(source, more, but)
            quantize_static(
                source, target, Inputs(calibration), quant_format=QuantFormat.QDQ,
                per_channel=per_channel, nodes_to_quantize=nodes,
            )  # fmt: skip
            return target

        return write

    def by_nncf(kind: str) -> Callable[[Path, list[np.ndarray]], Path]:
        def write(fp32: Path, calibration: list[np.ndarray]) -> Path:
            images, target = fp32.with_name("images.npy"), fp32.with_name("nncf.xml")
            np.save(images, np.stack(calibration)[:, None])
            command = [nncf, "-c", NNCF, fp32, images, target, kind]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE)
            return target

        return write

    found = {
        "dynamic, linear layers": dynamic,
        "static, linear layers, per channel": static(()),
        "static, convolutions and linear layers, per channel": static(("Conv",)),
        "static, the same, per tensor": static(("Conv",), per_channel=False),
        "static, the same, per channel, stem and neck in fp32": static(
            ("Conv",), but=("patch_embed", "neck")
        ),
        "static, every operator, per channel": static(None),
    }
    if nncf is not None:
        found |= {f"NNCF, {kind}": by_nncf(kind) for kind in ("mixed", "transformer")}
    return found


def prepared(fp32: Path) -> Path:
    """The graph with what ONNX Runtime's quantisation wants to be done before."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    target = fp32.with_name("prepared.onnx")
    if not target.exists():
        quant_pre_process(fp32, target, skip_symbolic_shape=True)
    return target


def agreement(
    encode: Run, decode: Callable[..., list[np.ndarray]], samples: Sequence[Sample], right: list
) -> dict[str, float]:
    """IoU of masks with those of the fp32 encoder; the first call fills ``right``."""
    is_first, found = not right, {"click": [], "box": []}
    for number, sample in enumerate(samples):
        embedding = encode(sample.x[None])
        side = embedding.shape[-1] * 4
        for kind, points, labels in (
            ("click", [*sample.click, [0, 0]], [1, -1]),
            ("box", sample.box, [2, 3]),
        ):
            masks, scores, _ = decode(
                embedding, np.array([points], np.float32), np.array([labels], np.float32),
                np.zeros((1, 1, side, side), np.float32), np.zeros(1, np.float32),
                np.array(sample.size, np.float32),
            )  # fmt: skip
            if is_first:
                best = 0 if kind == "box" else 1 + int(scores[0, 1:].argmax())
                right.append((best, masks[0, best] > 0))
            best, theirs = right[number * 2 + (kind == "box")]
            mine = masks[0, best] > 0
            found[kind].append(float((mine & theirs).sum() / max((mine | theirs).sum(), 1)))
    return {f"{kind}_{name}": float(take(found[kind])) for kind in found
            for name, take in (("mean", np.mean), ("least", np.min))}  # fmt: skip


def speed(run: Run, baseline: Run, x: np.ndarray, pairs: int) -> dict[str, float]:
    """CPU time of the baseline by that of ``run``, in pairs that alternate who begins."""

    def seconds(one: Run) -> float:
        start = time.process_time()
        for _ in range(3):
            one(x)
        return time.process_time() - start

    for one in (run, baseline):
        one(x)
    ratios = []
    for number in range(pairs):
        if number % 2:
            mine, theirs = seconds(run), seconds(baseline)
        else:
            theirs, mine = seconds(baseline), seconds(run)
        ratios.append(theirs / mine)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    return {"speed": float(middle), "speed_low": float(low), "speed_high": float(high)}


def size_of(path: Path) -> float:
    """Megabytes of a file and, of OpenVINO's, of its weights."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(one.stat().st_size for one in files) / 1e6


def measure(data: Path, nncf: str | None, pairs: int, wanted: Sequence[str]) -> list[Row]:
    """The rows of the table, or those of the encoders that are ``wanted``."""
    sam = plain(build_sam("tinyvit_sam_2m"))
    calibration, samples = photographs(data, spec_of(sam))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        fp32, decoder = Path(folder) / "fp32.onnx", Path(folder) / "decoder.onnx"
        side = sam.image_encoder.img_size
        axes = {name: {1: "points"} for name in DECODER_INPUTS[1:3]} | {"masks": {2: "h", 3: "w"}}
        fp32.write_bytes(trace(sam.image_encoder, [torch.zeros(1, 3, side, side)], ["images"],
                               ["image_embeddings"], {}, 17))  # fmt: skip
        example = [torch.zeros(1, 256, 16, 16), torch.zeros(1, 2, 2), torch.zeros(1, 2),
                   torch.zeros(1, 1, 64, 64), torch.zeros(1),
                   torch.tensor([64.0, 96.0])]  # fmt: skip
        decoder.write_bytes(trace(DecoderGraph(sam).eval(), example, DECODER_INPUTS,
                                  DECODER_OUTPUTS, axes, 17))  # fmt: skip
        decode, right, baseline = onnx_runner(decoder), [], onnx_runner(fp32)
        agreement(lambda x: baseline(x)[0], decode, samples, right)

        def add(name: str, runner: str, path: Path, hint: str = "f32") -> None:
            run = onnx_runner(path) if runner == "onnx" else openvino_runner(path, hint)
            found = agreement(lambda x: run(x)[0], decode, samples, right)
            paired = speed(run, baseline, samples[0].x[None], pairs)
            rows.append(Row(name, runner, size_of(path), **found, **paired))
            print(rows[-1], file=sys.stderr, flush=True)

        if not wanted or "fp32" in wanted:
            add("fp32", "onnx", fp32)
            add("fp32", "openvino", fp32)
        if not wanted or "bf16" in wanted:
            add("bf16", "openvino", fp32, "bf16")
        for name, write in recipes(nncf).items():
            if wanted and name not in wanted:
                continue
            path = write(fp32, calibration)
            if path.suffix == ".onnx":
                add(name, "onnx", path)
            if path.suffix == ".xml" or name in BY_OPENVINO:
                add(name, "openvino", path)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows in Markdown."""
    titles = ("encoder", "run by", "MB", "IoU with fp32's mask, click: mean / least",
              "box: mean / least", "speed, x fp32")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        runner = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}[row.runner]
        lines.append(
            f"| {row.encoder} | {runner} | {row.megabytes:.1f} "
            f"| {row.click_mean:.4f} / {row.click_least:.3f} "
            f"| {row.box_mean:.4f} / {row.box_least:.3f} | {row.speed:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, and write ``int8.md``, ``int8.json`` and the table in docs/inference.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with images/, masks/ and manifest.csv")
    parser.add_argument("--nncf", help="python of an environment with NNCF; without: no such rows")
    parser.add_argument("--encoder", action="append", default=[],
                        help="measure this row anew, keep the others; all by default")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=15, help="pairs of timings for each row")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of int8.md, int8.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the short table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.data, options.nncf, options.pairs, options.encoder)
    record_file = options.output / "int8.json"
    if options.encoder:
        new = {(row.encoder, row.runner): row for row in rows}
        old = [Row(**row) for row in json.loads(record_file.read_text())["rows"]]
        rows = [new.get((row.encoder, row.runner), row) for row in old]
    facts = {**machine_facts(), "onnxruntime": version("onnxruntime"),
             "openvino": version("openvino"), "calibration": CALIBRATION,
             "evaluation": EVALUATION, "seed": SEED, "pairs": options.pairs}  # fmt: skip
    words = ", ".join(f"{name} {value}" for name, value in facts.items())
    text = (
        "# int8 beside fp32 and bf16\n\nWritten by `benchmarks/int8.py`: the embedded weights' "
        "encoder at 256 x 256 on one thread. IoU is that of a mask with the fp32 encoder's mask "
        f"for the same prompt, on {EVALUATION} photographs that calibration did not see. Speed is "
        "ONNX Runtime's CPU time in fp32 by the row's, the median of pairs.\n\n"
        f"    python benchmarks/int8.py DATA --nncf PYTHON\n\n{words}\n\n{table(rows)}\n"
    )
    (options.output / "int8.md").write_text(text, encoding="utf-8")
    record = {"facts": facts, "rows": [asdict(row) for row in rows]}
    record_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = options.page.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    text = f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{rest.split(END)[1]}"
    options.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
