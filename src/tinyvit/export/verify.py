"""Run the cases of a certificate on the files of a folder, without torch."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinyvit.checkpoints.files import check_format
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.inference.graphs import kept_core, load_library

from . import certificate as own
from .certificate import Case, Certificate, Compared

Backend = Literal["onnx", "openvino"]
Runner = Literal["onnx", "openvino", "torch"]
INDEX = "tinyvit.json"
"""The file by which an exported folder is known."""
_ERRORS_ONLY = 3
_TYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(float16)": "float16"}


class ChangedFileError(CheckpointError):
    """A file is not the one that the certificate names."""


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        folder: What was verified.
        backend: What ran the graphs.
        cases: Each comparison.
        masks: IoU of the pair's masks on photographs with the model's, where they were compared:
            mean, least and the case of the least.
    """

    folder: str
    backend: str
    cases: tuple[Compared, ...]
    masks: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every case is within what is allowed."""
        return all(case.passed for case in self.cases) and self.masks.get("passed", True)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class GraphInput:
    """Type and shape of an input; what may have any length has a name or -1 in its shape."""

    type: str
    shape: list[int | str]


@dataclass(frozen=True)
class OpenedGraph:
    """A file's graph, ready to run.

    Attributes:
        run: Inputs by name -> outputs in order.
        producer: Who made the file, as it says itself.
        inputs: Type and shape of each input by its name.
        outputs: Names of its outputs.
        metadata: Texts that it holds.
    """

    run: own.Run
    producer: str
    inputs: dict[str, GraphInput]
    outputs: tuple[str, ...]
    metadata: dict[str, str]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
        """Run it."""
        return self.run(inputs)


def open_graph(path: Path, backend: Backend = "onnx") -> OpenedGraph:
    """A file's graph.

    Raises:
        MissingExtraError: The runtime is not installed.
        CheckpointError: It cannot read the file.
    """
    if path.suffix == ".pt2":
        return _open_program(path)
    try:
        if backend == "onnx" and path.suffix != ".xml":
            return _open_onnx(path)
        return _open_openvino(path)
    except (RuntimeError, ValueError, OSError) as err:
        raise CheckpointError(f"{path} cannot be read as a graph: {str(err)[:300]}") from err
    except Exception as err:
        if type(err).__module__.startswith("onnxruntime"):
            raise CheckpointError(f"{path} cannot be read as a graph: {str(err)[:300]}") from err
        raise


def _open_onnx(path: Path) -> OpenedGraph:
    library = load_library("onnxruntime", "ONNX Runtime")
    options = library.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    session = library.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta()
    return OpenedGraph(
        lambda inputs: session.run(None, dict(inputs)),
        about.producer_name or "somebody who left no name",
        {one.name: GraphInput(_TYPES.get(one.type, one.type), list(one.shape))
         for one in session.get_inputs()},
        tuple(one.name for one in session.get_outputs()),
        dict(about.custom_metadata_map),
    )  # fmt: skip


def _open_openvino(path: Path) -> OpenedGraph:
    library = load_library("openvino", "OpenVINO")
    core = kept_core(library)
    read = core.read_model(os.fspath(path))
    model = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    has_texts = read.has_rt_info(["framework"])
    texts = read.get_rt_info(["framework"]).value if has_texts else {}
    return OpenedGraph(
        lambda inputs: list(model(dict(inputs)).values()),
        "OpenVINO",
        {one.any_name: GraphInput(one.element_type.to_dtype().name,
                                  [n.get_length() if n.is_static else -1
                                   for n in one.partial_shape])
         for one in read.inputs},
        tuple(one.any_name for one in read.outputs),
        {str(key): str(value) for key, value in texts.items()} if isinstance(texts, dict) else {},
    )  # fmt: skip


def _open_program(path: Path) -> OpenedGraph:
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(
            f"{path.name} is a program of torch.export, which only torch runs; verify it where "
            "torch is installed: pip install 'tinyvit[torch]'"
        )
    from .programs import Program

    program = Program(path)
    return OpenedGraph(program, "torch.export", {}, (), program.metadata)


def cases_of(facts: Mapping[str, Any]) -> list[Case]:
    """All cases of an export."""
    found: list[Case] = []
    for part in own.PARTS:
        if not facts.get(part):
            continue
        if part != "decoder":
            found += own.image_cases(part, facts)
        elif facts["style"] == "transformers":
            found += transformers_cases()
        else:
            found += own.decoder_cases(facts)
    return found


def transformers_cases() -> list[Case]:
    """Cases of the pair for transformers.js."""
    return [
        Case(f"prompts-{n}x{p}", "decoder", (n, p)) for n, p in ((1, 1), (1, 2), (3, 1), (2, 7))
    ]


def inputs_of(case: Case, facts: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs of a case."""
    if case.part == "decoder" and facts["style"] == "transformers":
        rng = np.random.Generator(np.random.PCG64(len(case.id) + sum(case.shape)))
        count, points = case.shape
        grid, channels, side = (int(facts[name]) for name in ("grid", "channels", "side"))
        return {
            "image_embeddings": rng.standard_normal((1, channels, grid, grid), np.float32),
            "image_positional_embeddings": np.zeros((1, channels, grid, grid), np.float32),
            "input_points": (rng.random((1, count, points, 2)) * side).astype(np.float32),
            "input_labels": rng.integers(-1, 2, (1, count, points)).astype(np.int64),
        }
    return dict(own.make_inputs(case, facts))


def run_cases(
    runs: Mapping[str, own.Run],
    facts: Mapping[str, Any],
    references: Callable[[Case, int], tuple[NDArray[Any], str]],
    prepare: Callable[[dict[str, NDArray[Any]]], None] = lambda inputs: None,
) -> Iterable[Compared]:
    """Run every case and compare each output with what ``references`` gives for it."""
    allowed = own.ALLOWED[str(facts["storage"])]
    for case in cases_of(facts):
        inputs = inputs_of(case, facts)
        prepare(inputs)
        names: Sequence[str] = facts[f"{case.part}_outputs"]
        for number, came in enumerate(runs[case.part](inputs)):
            kept, digest = references(case, number)
            found = own.compare(case, names[number], came, kept, allowed)
            yield Compared(**{**asdict(found), "reference_sha256": digest})


def verify(
    path: str | os.PathLike[str],
    *,
    backend: Backend | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Verify an exported folder, or the folder of an exported file.

    Hashes first, then every case of the certificate again; no torch is needed.

    Args:
        path: Of the folder, or of a file in it.
        backend: What runs the graphs; None takes ONNX Runtime, and what else a file is for where it
            is none of ONNX.
        progress: Called with (comparisons done, all).

    Returns:
        What was found; ``passed`` says the rest.

    Raises:
        ChangedFileError: A file is missing or not the one that the certificate names.
        CheckpointError: There is no certificate, or it is damaged.
        MissingExtraError: The runtime is not installed.
    """
    path = Path(path)
    folder = exported_folder(path)
    if folder is None:
        raise CheckpointError(without_certificate(path, backend))
    certificate = Certificate.read(folder)
    for name, facts in certificate.files.items():
        file = folder / name
        if not file.is_file():
            raise ChangedFileError(f"{file} is missing; export again")
        if own.file_facts(file)["sha256"] != facts["sha256"]:
            raise ChangedFileError(f"{file} is not the file that was certified; export again")
    facts = certificate.facts
    chosen = runner_of(facts, backend)
    runs = open_parts(folder, facts, chosen)
    _check_metadata(folder, runs, certificate)
    kept = _references(folder)
    total, found = len(certificate.cases), []
    prepare = positions_from(kept)

    def lookup(case: Case, number: int) -> tuple[NDArray[Any], str]:
        if f"{case.id} {number}" not in kept:
            raise ChangedFileError(f"{folder / own.REFERENCES} lacks {case.id}; export again")
        return kept[f"{case.id} {number}"], ""

    for one in run_cases(runs, facts, lookup, prepare):
        found.append(one)
        progress(len(found), total)
    return Verified(str(folder), chosen, tuple(found), certificate.masks)


def _references(folder: Path) -> dict[str, NDArray[Any]]:
    """The reference outputs that are kept, by case and number of the output."""
    path = folder / own.REFERENCES
    try:
        with np.load(io.BytesIO(path.read_bytes())) as file:  # refuses pickles
            return {name: file[name] for name in file.files}
    except FileNotFoundError as err:
        raise ChangedFileError(f"{folder} has no {own.REFERENCES}; export again") from err
    except (OSError, ValueError, zipfile.BadZipFile) as err:
        raise ChangedFileError(f"{path} is damaged: {err}; export again") from err


def runner_of(facts: Mapping[str, Any], backend: Backend | None) -> Runner:
    """What runs an export.

    Raises:
        ValueError: ``backend`` does not run these files.
    """
    only: Runner | None = {"openvino": "openvino", "torch": "torch"}.get(facts["style"])  # type: ignore[assignment]
    if only is not None and backend not in (None, only):
        raise ValueError(f"backend {backend!r} does not run these files, which are for {only}")
    return only or backend or "onnx"


def open_parts(folder: Path, facts: Mapping[str, Any], runner: Runner) -> dict[str, OpenedGraph]:
    """The graph of each part of an export; CVAT's decoder gives masks in the image here."""
    library: Backend = "openvino" if runner == "openvino" else "onnx"
    found = {part: open_graph(folder / facts[part], library)
             for part in own.PARTS if facts.get(part)}  # fmt: skip
    if "xtl" in facts.get("decoder_outputs", ()):
        cut = found["decoder"]

        def run(inputs: Mapping[str, NDArray[Any]]) -> Sequence[NDArray[Any]]:
            height, width = (int(side) for side in inputs["orig_im_size"])
            return uncut(cut(inputs), (height, width))

        found["decoder"] = replace(cut, run=run)
    return found


def uncut(outputs: Sequence[NDArray[Any]], size: tuple[int, int]) -> list[NDArray[Any]]:
    """CVAT's outputs with the mask in the image, bool, in place of the mask in its box.

    One pixel more may move the box far, and is one pixel of the image.
    """
    cut, *others, left, top, right, bottom = outputs
    mask = np.zeros((1, 1, *size), np.bool_)
    part = mask[..., int(top) : int(bottom) + 1, int(left) : int(right) + 1]
    if part.shape == cut.shape:  # else the graph is wrong, and the mask stays empty
        part[:] = cut != 0
    return [mask, *others]


def _check_metadata(
    folder: Path, graphs: Mapping[str, OpenedGraph], certificate: Certificate
) -> None:
    """Refuse a file that says it is another part, of other weights, or of another pair."""
    found = {part: graph.metadata for part, graph in graphs.items() if graph.metadata}
    for part, texts in found.items():
        name = folder / certificate.facts[part]
        if texts.get("tinyvit.part") != part:
            raise ChangedFileError(f"{name} says it is {texts.get('tinyvit.part')}, not {part}")
        if texts.get("tinyvit.weights_sha256") != certificate.weights_sha256:
            raise ChangedFileError(f"{name} is of other weights than those that were certified")
    if len({texts.get("tinyvit.pair") for texts in found.values()}) > 1:
        raise ChangedFileError(f"the files of {folder} come from different exports; export again")


def exported_folder(path: Path) -> Path | None:
    """The exported folder of a path: itself, or the one whose index names this file; or None.

    Raises:
        CheckpointError: There is nothing at the path.
    """
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}; check the path")
    if path.is_dir():
        return path
    for folder in path.absolute().parents[:2]:  # transformers.js has its graphs one folder deeper
        if (folder / INDEX).is_file():
            facts = read_facts(folder)
            if path.absolute() in [folder / facts[part] for part in own.PARTS if facts.get(part)]:
                return folder
    return None


def without_certificate(path: Path, backend: Backend | None = None) -> str:
    """What can be said of a file that has none."""
    graph = open_graph(path, backend or "onnx")
    inputs = ", ".join(f"{name} {one.type} {one.shape}".replace("'", "")
                       for name, one in graph.inputs.items())  # fmt: skip
    return (
        f"{path} has no certificate; made by {graph.producer}; inputs {inputs or 'unnamed'}; "
        "verify it with --against CHECKPOINT"
    )


def positions_from(kept: Mapping[str, NDArray[Any]]) -> Callable[[dict[str, NDArray[Any]]], None]:
    """Fills in the positions that the pair for transformers.js hands from encoder to decoder."""

    def fill(inputs: dict[str, NDArray[Any]]) -> None:
        if "image_positional_embeddings" in inputs and "positions" in kept:
            inputs["image_positional_embeddings"] = kept["positions"]

    return fill


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``tinyvit.json`` says of an exported folder.

    Raises:
        CheckpointError: There is none, or it is damaged or of a newer format.
    """
    path = folder / INDEX
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_format(found.get("format", 0), own.FORMAT, found.get("tinyvit"), str(path))
    except (OSError, ValueError) as err:
        if isinstance(err, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is no folder of 'tinyvit export'") from err
    return found
