"""Run the cases of a certificate on the files of a folder, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import CheckpointError
from tinyvit.inference.graphs import load_library

from . import certificate as own
from .certificate import Case, Certificate, Compared

Backend = Literal["onnx", "openvino"]
_ERRORS_ONLY = 3


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


def open_graph(path: Path, backend: Backend = "onnx") -> own.Run:
    """A file's graph: inputs by name -> outputs in order.

    Raises:
        MissingExtraError: The runtime is not installed.
        CheckpointError: It cannot read the file.
    """
    try:
        if backend == "onnx" and path.suffix == ".onnx":
            library = load_library("onnxruntime", "ONNX Runtime")
            options = library.SessionOptions()
            options.log_severity_level = _ERRORS_ONLY
            session = library.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
            return lambda inputs: session.run(None, dict(inputs))
        library = load_library("openvino", "OpenVINO")
        core = library.Core()
        model = core.compile_model(
            core.read_model(os.fspath(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        return lambda inputs: [value for value in model(dict(inputs)).values()]
    except (RuntimeError, ValueError, OSError) as err:
        raise CheckpointError(f"{path} cannot be read as a graph: {str(err)[:300]}") from err
    except Exception as err:
        if type(err).__module__.startswith("onnxruntime"):
            raise CheckpointError(f"{path} cannot be read as a graph: {str(err)[:300]}") from err
        raise


def cases_of(facts: Mapping[str, Any]) -> list[Case]:
    """All cases of an export."""
    found = own.encoder_cases(facts) if facts.get("encoder") else []
    if facts.get("decoder"):
        found += (
            transformers_cases() if facts["style"] == "transformers" else own.decoder_cases(facts)
        )
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
        backend: What runs the graphs; None takes ONNX Runtime, OpenVINO for its own files.
        progress: Called with (comparisons done, all).

    Returns:
        What was found; ``passed`` says the rest.

    Raises:
        ChangedFileError: A file is missing or not the one that the certificate names.
        CheckpointError: There is no certificate, or it is damaged.
        MissingExtraError: The runtime is not installed.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    certificate = Certificate.read(folder)
    for name, facts in certificate.files.items():
        file = folder / name
        if not file.is_file():
            raise ChangedFileError(f"{file} is missing; export again")
        if own.file_facts(file)["sha256"] != facts["sha256"]:
            raise ChangedFileError(f"{file} is not the file that was certified; export again")
    facts = certificate.facts
    chosen: Backend = backend or ("openvino" if facts["style"] == "openvino" else "onnx")
    runs = {part: open_graph(folder / facts[part], chosen)
            for part in ("encoder", "decoder") if facts.get(part)}  # fmt: skip
    with np.load(folder / own.REFERENCES) as file:
        kept = {name: file[name] for name in file.files}
    total, found = len(certificate.cases), []
    prepare = positions_from(kept)
    lookup = lambda case, number: (kept[f"{case.id} {number}"], "")  # noqa: E731
    for one in run_cases(runs, facts, lookup, prepare):
        found.append(one)
        progress(len(found), total)
    return Verified(str(folder), chosen, tuple(found), certificate.masks)


def positions_from(kept: Mapping[str, NDArray[Any]]) -> Callable[[dict[str, NDArray[Any]]], None]:
    """Fills in the positions that the pair for transformers.js hands from encoder to decoder."""

    def fill(inputs: dict[str, NDArray[Any]]) -> None:
        if "image_positional_embeddings" in inputs and "positions" in kept:
            inputs["image_positional_embeddings"] = kept["positions"]

    return fill


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``tinyvit.json`` says of an exported folder.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "tinyvit.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{folder} is no folder of 'tinyvit export'") from err
