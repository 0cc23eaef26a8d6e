"""Exported folders: what they hold, what their files say of themselves, and what runs them.

``tinyvit export`` writes such folders; here they are read without torch and without onnx. A file
without our metadata is run, too, where the caller says how images are prepared. ``engine_for`` is
where it is decided which backend runs a checkpoint or a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from tinyvit.catalog import list_checkpoints
from tinyvit.checkpoints.files import check_format, check_thresholds, classes_in, file_sha256
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.image_spec import ImageSpec

from .backend import PRECISION_OF_DTYPE, BackendName, check_settings, choose_precision, takes_native

if TYPE_CHECKING:
    from .graphs import OnnxGraph, OpenVINOGraph

Graph: TypeAlias = "OnnxGraph | OpenVINOGraph"
EngineName = Literal["native", "torch", "onnx", "openvino"]
RuntimeName = Literal["onnx", "openvino"]
Array: TypeAlias = NDArray[np.float32]

INDEX = "tinyvit.json"
"""The file by which a folder of ``tinyvit export`` is known; it names the others."""

FORMAT = 1
"""The newest form of the metadata that is read here."""

PAIR = ("encoder", "decoder")
PARTS = (*PAIR, "classifier", "features")
TITLES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}


def is_exported(source: object) -> bool:
    """Whether this is a folder of ``tinyvit export``."""
    if not isinstance(source, (str, os.PathLike)) or os.fspath(source) in ("", *list_checkpoints()):
        return False
    return (Path(source) / INDEX).is_file()


def engine_for(source: object, backend: str = "auto", device: str = "auto") -> EngineName:
    """Which backend runs a checkpoint or an exported folder; torch is not loaded to find out.

    A checkpoint (None is the embedded weights) is run by the native engine (on a CPU) or else by
    torch, an exported folder by ONNX Runtime or else by OpenVINO. ONNX Runtime and OpenVINO run a
    checkpoint only by name: torch makes the graph.

    Raises:
        MissingExtraError: What would run it is not installed.
        ValueError: An unknown backend, or one that does not run this.
    """
    if backend not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {backend!r}")
    if is_exported(source):
        return _runtime_for(files_of(Path(cast(str, source))).values(), backend)
    if takes_native(backend, device):
        return "native"
    if find_spec("torch") is None:
        if backend != "auto":
            raise MissingExtraError(
                f"backend {backend!r} runs a checkpoint with the help of torch, which is not "
                "installed; pip install 'tinyvit[torch]', or run a folder of 'tinyvit export'"
            )
        raise MissingExtraError(
            "no engine is installed here; pip install 'tinyvit[native]' (segment, encode, serve) "
            "or 'tinyvit[torch]' (everything)"
        )
    return "torch" if backend == "auto" else cast(EngineName, backend)


def _runtime_for(files: Any, backend: str) -> RuntimeName:
    """ONNX Runtime or else OpenVINO, whichever is installed and reads these files."""
    is_ir = any(path.suffix == ".xml" for path in files)
    known: tuple[RuntimeName, ...] = ("openvino",) if is_ir else ("onnx", "openvino")
    if backend in known:
        return backend
    if backend != "auto":
        raise ValueError(
            f"backend {backend!r} does not run these exported files; "
            f"{' and '.join(map(repr, known))} {'does' if len(known) == 1 else 'do'}"
        )
    for name in known:
        if find_spec(_PACKAGES[name]) is not None:
            return name
    lines = " or ".join(f"'tinyvit[{name}]'" for name in known)
    raise MissingExtraError(
        f"no engine for an exported folder is installed here; pip install {lines}"
    )


def files_of(folder: Path) -> dict[str, Path]:
    """The graphs of an exported folder by their part, one of ``PARTS``; all files are there."""
    path = folder / INDEX
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        check_format(facts.get("format"), FORMAT, facts.get("tinyvit"), str(path))
        found = {part: folder / facts[part] for part in PARTS if facts.get(part)}
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path} is damaged: {err}; export again") from err
    if facts.get("style") == "transformers":
        raise CheckpointError(
            f"{folder} is for transformers.js and is not run here; export again without --for"
        )
    for part, file in found.items():
        if not file.is_file():
            raise CheckpointError(f"{folder} lacks its {part} {file.name}; export again")
    return found


@dataclass(frozen=True)
class Facts:
    """What a graph says of itself, or what its user says of it; None where it does not say."""

    image_spec: ImageSpec
    layout: Literal["nchw", "hwc"] = "nchw"  # what an encoder takes: normalised, RGB in 0..255
    weights_sha256: str | None = None  # of the image encoder
    pair: str = ""  # common to the encoder and the decoder of one export
    thresholds: Mapping[str, float] = field(default_factory=dict)  # of the masks of these weights
    variant: str | None = None  # whose sizes the weights have, by its name in the catalog
    network_side: int | None = None  # of the network's own input, where the graph shrinks images
    strides: tuple[int, ...] | None = None  # of the encoder's merges
    storage: str = "fp32"  # how the file holds the weights: "fp32" or "fp16"
    classes: tuple[str, ...] | None = None  # names of a classifier's classes


def facts_of(texts: Mapping[str, str], path: Path, part: str, given: ImageSpec | None) -> Facts:
    """The facts in the metadata of a graph that should be a ``part``, one of ``PARTS``.

    ``given`` is how images are prepared where the file does not say.

    Raises:
        CheckpointError: It is another part, damaged, of a newer format, or it does not say how
            images are prepared and nobody else does.
    """
    if "tinyvit.format" not in texts:
        if given is None:
            raise CheckpointError(
                f"{path} has no metadata of 'tinyvit export'; say how images are prepared, for "
                f"example image_spec=ImageSpec.sam(1024)"
            )
        return Facts(given)
    found = texts["tinyvit.format"]
    number = int(found) if found.isdigit() else found
    check_format(number, FORMAT, texts.get("tinyvit.version"), str(path))
    if texts.get("tinyvit.part") != part:
        raise CheckpointError(
            f"{path} is {_with_article(texts.get('tinyvit.part', ''))} and no {part}; give the "
            f"{part} of the same export"
        )
    try:
        spec = ImageSpec.from_dict(json.loads(texts["tinyvit.image_spec"]))
        side = int(texts["tinyvit.input_size"])
        thresholds = check_thresholds(json.loads(texts.get("tinyvit.thresholds", "{}")))
        mask_threshold = float(texts.get("tinyvit.mask_threshold", "0"))
        strides = tuple(json.loads(texts.get("tinyvit.strides", "[]"))) or None
    except (KeyError, TypeError, ValueError) as err:
        raise CheckpointError(f"{path} has damaged metadata: {err}; export again") from err
    network_side = max(spec.size)
    if network_side != side:  # the graph adapts weights of another size
        spec = replace(spec, size=(side, side))
    layout: Literal["nchw", "hwc"] = "nchw"
    if texts.get("tinyvit.layout", "").startswith("hwc"):
        layout = "hwc"
    if mask_threshold:
        thresholds.setdefault("mask_threshold", mask_threshold)
    sha256 = texts.get("tinyvit.weights_sha256") or None
    pair, variant = texts.get("tinyvit.pair", ""), texts.get("tinyvit.variant") or None
    network = variant, network_side, strides, texts.get("tinyvit.storage", "fp32")
    return Facts(given or spec, layout, sha256, pair, thresholds, *network, classes_in(texts, path))


def _with_article(part: str) -> str:
    return f"{'an' if part[:1] in 'aeiou' else 'a'} {part}" if part else "no part that is known"


@dataclass(frozen=True)
class Runtime:
    """What opens files: the library with its settings."""

    name: RuntimeName
    precision: Literal["fp32", "bf16"]
    threads: int | None
    words: str

    def open(self, source: Path | bytes) -> Graph:
        """The graph of a file or its bytes; a CheckpointError where it cannot be read."""
        from .graphs import OnnxGraph, OpenVINOGraph

        try:
            if self.name == "onnx":
                return OnnxGraph(source, self.threads)
            return OpenVINOGraph(source, precision=self.precision, threads=self.threads)
        except ValueError as err:
            raise CheckpointError(str(err)) from err


def choose_runtime(
    name: RuntimeName, device: str = "auto", precision: str = "fp32", threads: int | None = None
) -> Runtime:
    """ONNX Runtime or OpenVINO with its settings; arguments and errors are those of ``Engine``."""
    from .graphs import kept_core, load_library

    check_settings(name, device, threads)
    precision = PRECISION_OF_DTYPE.get(precision, precision)
    reason = "the only precision of this backend"
    library = load_library(_PACKAGES[name], TITLES[name])
    if precision == "auto":
        has_bf16 = name == "openvino" and "BF16" in kept_core(library).get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        )
        precision = "bf16" if has_bf16 else "fp32"
        reason = "what this machine computes natively" if name == "openvino" else reason
    elif name == "openvino" or precision != "fp32":
        precision, reason = choose_precision(precision, "cpu")
        if name == "onnx":
            raise ValueError(
                f"backend 'onnx' computes in precision 'fp32' only, got {precision!r}; 'openvino' "
                "computes in bf16"
            )
    version = library.__version__.split("-")[0]
    words = f"{_PACKAGES[name]} {version} on cpu, {precision} ({reason})"
    return Runtime(name, cast(Any, precision), threads, words)


class ExportedEncoder:
    """An exported image encoder as an engine's backend, on arrays; threads may share it.

    ``image_spec`` is how images are prepared where the file does not say.

    Raises:
        CheckpointError: The file cannot be read, or is another part.
    """

    part = "encoder"
    _result = 0  # which of the graph's outputs a call gives
    device = "cpu"
    takes_arrays = True

    def __init__(self, path: Path, runtime: Runtime, image_spec: ImageSpec | None = None) -> None:
        self.path, self.runtime = path, runtime
        self.name: str = runtime.name
        self.precision = runtime.precision
        self.graph = runtime.open(path)
        self.facts = facts_of(self.graph.metadata, path, self.part, image_spec)
        self.image_spec = self.facts.image_spec
        self._input, self._sides = next(iter(self.graph.inputs.items()))
        shape = list(self.graph.outputs.values())[self._result]
        self.channels = shape[-3] if len(shape) > 2 else None  # of the map; None: not told

    def __call__(self, batch: Array) -> Array:
        """[N, 3, H, W] float32 -> [N, C, h, w]; of a classifier [N, classes].

        A ValueError refuses another size than the only one of a graph.
        """
        return self._outputs(batch)[self._result]

    def _outputs(self, batch: Array) -> list[Array]:
        if self.facts.layout == "hwc":
            return self._one_by_one(map(self._pixels, batch))
        fixed = self._sides[2:]
        if any(a not in (None, b) for a, b in zip(fixed, batch.shape[2:], strict=True)):
            raise ValueError(
                f"{self.path.name} takes images of {fixed[0]} x {fixed[1]} alone, got "
                f"{batch.shape[2]} x {batch.shape[3]}; leave pad=False (--no-pad) out"
            )
        if self._sides[0] == 1:
            return self._one_by_one(image[None] for image in batch)
        return self._run(batch)

    def _one_by_one(self, images: Iterable[Array]) -> list[Array]:
        return [np.concatenate(one) for one in zip(*map(self._run, images), strict=True)]

    def weights_sha256(self) -> str:
        """Hash of the weights that were exported; ValueError: the file does not say."""
        if self.facts.weights_sha256 is None:
            raise ValueError(f"{self.path.name} does not say which weights it has")
        return self.facts.weights_sha256

    def explain(self) -> str:
        """What runs, and why, in words."""
        return f"{self.runtime.words}, an exported graph"

    def close(self) -> None:
        """Give the session back."""
        self.graph.close()

    def _run(self, images: Array) -> list[Array]:
        if images.ndim == 4 and len(self.graph.outputs) == 1:
            return [self.graph(images)]
        return list(self.graph.run({self._input: images}).values())

    def _pixels(self, image: Array) -> Array:
        """A prepared image [3, H, W] as the RGB [H, W, 3] in 0..255 that its graph prepares again.

        Padding becomes the mean, of which the graph makes zeros.
        """
        spec = self.image_spec
        return np.ascontiguousarray(
            image.transpose(1, 2, 0) * np.array(spec.std, np.float32)
            + np.array(spec.mean, np.float32)
        )


class ExportedFeatures(ExportedEncoder):
    """The maps of all stages; a call gives the last one."""

    part = "features"
    _result = -1

    def stages(self, batch: Array) -> list[Array]:
        """[N, 3, H, W] float32 -> the map of each stage, [N, C, h, w]."""
        return self._outputs(batch)

    def with_stages(self, batch: Array) -> tuple[Array, list[Array]]:
        """What a call and ``stages`` give, from one pass."""
        maps = self._outputs(batch)
        return maps[-1], maps


class ExportedClassifier(ExportedEncoder):
    """A classifier; a call gives logits [N, classes]."""

    part = "classifier"

    @property
    def num_classes(self) -> int:
        """How many classes the head has."""
        return cast(int, next(iter(self.graph.outputs.values()))[1])

    def logits(self, batch: Array) -> Array:
        """[N, 3, H, W] float32 -> [N, classes]."""
        return self(batch)


@dataclass(frozen=True)
class ExportedPair:
    """An encoder and a decoder of one export, open."""

    encoder: ExportedEncoder
    decoder: Graph
    path: Path  # of the decoder

    @cached_property
    def sha256(self) -> str:
        """Hash of both files; tells models apart."""
        return f"{file_sha256(self.encoder.path)[:32]}{file_sha256(self.path)[:32]}"


def open_network(
    folder: str | os.PathLike[str],
    backend: str = "auto",
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
) -> ExportedEncoder:
    """What takes images in an exported folder; other arguments and errors are those of ``Engine``.

    It is the encoder of a pair, or a network alone: its class says which.
    """
    files = files_of(Path(folder))
    kinds = (ExportedClassifier, ExportedFeatures)
    kind = next((kind for kind in kinds if kind.part in files), ExportedEncoder)
    path = _part_in(folder, files, kind.part)
    runtime = choose_runtime(_runtime_for(files.values(), backend), device, precision, threads)
    return kind(path, runtime)


def open_pair(
    source: str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]],
    backend: str = "auto",
    device: str = "auto",
    precision: str = "fp32",
    threads: int | None = None,
    image_spec: ImageSpec | None = None,
) -> ExportedPair:
    """The pair of an exported folder, or of the paths of an encoder and a decoder.

    What follows ``source`` is as for ``Engine``; the decoder computes in fp32 whatever the
    ``precision``, and ``image_spec`` is wanted where the files do not say it.

    Raises:
        CheckpointError: A file is missing, cannot be read, or is not what it should be; or the two
            are of different exports.
    """
    if isinstance(source, tuple):
        files = dict(zip(PAIR, map(Path, source), strict=True))
        for part, path in files.items():
            if not path.is_file():
                raise CheckpointError(f"no such file: {path} for {part}=")
    else:
        files = files_of(Path(source))
        for part in PAIR:
            _part_in(source, files, part)
    runtime = choose_runtime(_runtime_for(files.values(), backend), device, precision, threads)
    encoder = ExportedEncoder(files["encoder"], runtime, image_spec)
    decoder = replace(runtime, precision="fp32").open(files["decoder"])
    own = facts_of(decoder.metadata, files["decoder"], "decoder", encoder.image_spec)
    if own.pair != encoder.facts.pair:
        raise CheckpointError(
            f"{files['encoder'].name} and {files['decoder'].name} are not of one export (pairs "
            f"{encoder.facts.pair or 'none'} and {own.pair or 'none'}); take both from one folder"
        )
    return ExportedPair(encoder, decoder, files["decoder"])


def _part_in(folder: str | os.PathLike[str], files: Mapping[str, Path], part: str) -> Path:
    """The file of a part, or an error that says what its folder is for."""
    if part not in files:
        raise CheckpointError(
            f"{os.fspath(folder)} has no {part}, only {' and '.join(files) or 'other parts'}; "
            f"export again {'as a whole SAM' if part == 'decoder' else 'with an encoder'}"
        )
    return files[part]
