"""Runs the file of a graph by OpenVINO or ONNX Runtime: arrays in, arrays out, without torch.

A program that has such a file (``OpenVINOBackend.graph_file`` says where one is) starts with one of
these classes alone::

    run = OpenVINOGraph("encoder.onnx", precision="fp32")
    features = run(images)  # [N, 3, H, W] float32 -> [N, C, h, w] float32

``run.run(inputs)`` takes several inputs by name and gives every output by name.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import MissingExtraError

from .backend import check_settings

OpenVINOPrecision = Literal["fp32", "bf16"]
Arrays: TypeAlias = "dict[str, NDArray[np.float32]]"
Shapes: TypeAlias = "dict[str, tuple[int | None, ...]]"
"""Of each input or output by its name; None for a side of any length."""


@cache
def kept_core(library: Any) -> Any:
    """The one ``Core`` of OpenVINO in this process, never given back.

    When the last one goes in another thread than the first came in, OpenVINO (2026.4) leaves a
    signal stack behind that is unmapped, and the next Ctrl-C ends the process by a segmentation
    fault.
    """
    return library.Core()


_HINTS = {"fp32": "f32", "bf16": "bf16"}
_OWN_FORMS = 4
"""Shapes that have a compiled form of their own at a time; each holds its weights again."""
_EARNED = 3
"""Calls of one shape until it is compiled for itself: that takes about as long as ten calls gain
at 1024x1024, and most programs that ask three times ask many times."""
_SHAPES_COUNTED = 256
_ERRORS_ONLY = 3
"""ONNX Runtime's level of logging."""


def load_library(module: str, name: str) -> Any:
    """The package ``openvino``, ``onnxruntime`` or ``tinyvit_native``, ``name`` in the error."""
    extra = {"onnxruntime": "onnx", "tinyvit_native": "native"}.get(module, module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside it
            return importlib.import_module(module)
    except ImportError as err:
        raise MissingExtraError(
            f"the {name} backend needs the package {module}, which cannot be imported ({err}); "
            f"pip install 'tinyvit[{extra}]'"
        ) from err


class OnnxGraph:
    """A graph run by ONNX Runtime: arrays in, arrays out, of any size and batch.

    It can be copied and pickled, and then opens its source again.

    Args:
        source: The path of an ONNX file, or its bytes.
        threads: How many threads compute; None leaves it to ONNX Runtime.

    Attributes:
        inputs: Names and shapes of what the graph takes.
        outputs: Names and shapes of what it gives.
        metadata: Texts that the file holds about itself.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ValueError: ONNX Runtime cannot read the graph, or ``threads`` is below 1.
    """

    inputs: Shapes
    outputs: Shapes
    metadata: dict[str, str]

    def __init__(self, source: str | os.PathLike[str] | bytes, threads: int | None = None) -> None:
        check_settings("onnx", "cpu", threads)
        self._arguments = source, threads
        library = load_library("onnxruntime", "ONNX Runtime")
        options = library.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        graph: str | bytes = source if isinstance(source, bytes) else os.fspath(source)
        try:
            self._session = library.InferenceSession(
                graph, options, providers=["CPUExecutionProvider"]
            )
        except Exception as err:  # its errors have no common class of their own
            raise _unreadable("ONNX Runtime", library, source, str(err)) from err
        self.inputs, self.outputs = (
            {one.name: tuple(n if isinstance(n, int) else None for n in one.shape) for one in found}
            for found in (self._session.get_inputs(), self._session.get_outputs())
        )
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    def __reduce__(self) -> tuple[object, ...]:
        return OnnxGraph, self._arguments

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, C, H, W] float32 -> the graph's first output; may be called by several threads.

        Raises:
            RuntimeError: The graph was closed.
        """
        return next(iter(self.run({next(iter(self.inputs)): images}).values()))

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Inputs by name -> every output by name; as a call otherwise."""
        session = self._session
        if session is None:
            raise RuntimeError("this OnnxGraph was closed")
        return dict(zip(self.outputs, session.run(None, dict(inputs)), strict=True))

    def close(self) -> None:
        """Give back the session; the graph is not used afterwards."""
        self._session = None


class OpenVINOGraph:
    """A graph on this machine's CPU: arrays in, arrays out, of any size and batch.

    What runs at first is compiled once for all shapes. A shape that comes again and again gets a
    form of its own, which is faster; the four used last are kept. Calls from several threads wait
    for each other: each uses all threads of the machine. It can be copied and pickled, and then
    opens its source again.

    Args:
        source: The path of an ONNX or OpenVINO file, or the bytes of an ONNX one.
        precision: What it computes in, "fp32" or "bf16". OpenVINO's own default is bf16 where the
            machine has it; here nothing is chosen silently.
        threads: How many threads compute; None leaves it to OpenVINO.
        cache_dir: Folder for the compiled form, so that the next start is faster. None takes
            ``<file>.compiled`` beside a file that is in a folder one may write to, and keeps
            nothing for bytes.

    Attributes:
        inputs: Names and shapes of what the graph takes.
        outputs: Names and shapes of what it gives.
        metadata: Texts that the file holds about itself.

    Raises:
        MissingExtraError: openvino is not installed.
        ValueError: OpenVINO cannot read the graph, this machine does not compute in this
            precision, or ``threads`` is below 1.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        *,
        precision: OpenVINOPrecision = "fp32",
        threads: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        if precision not in _HINTS:
            raise ValueError(
                f"precision must be one of {get_args(OpenVINOPrecision)}, got {precision!r}"
            )
        check_settings("openvino", "cpu", threads)
        self._again = partial(
            OpenVINOGraph, source, precision=precision, threads=threads, cache_dir=cache_dir
        )
        self.precision = precision
        self._settings: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
        }
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._own: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._core = kept_core(load_library("openvino", "OpenVINO"))
        self._model = self._read(source)
        self.inputs, self.outputs = (
            {
                one.any_name: tuple(n.get_length() if n.is_static else None
                                    for n in one.partial_shape)
                for one in found
            }
            for found in (self._model.inputs, self._model.outputs)
        )  # fmt: skip
        self.metadata = _texts_of(self._model)
        cache = self._cache(source, cache_dir)
        self._any = self._compile(self._model, {} if cache is None else {"CACHE_DIR": str(cache)})

    def __reduce__(self) -> tuple[object, ...]:
        return self._again, ()

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run the graph.

        Args:
            images: [N, C, H, W], normalised; N, H and W from 1.

        Returns:
            The graph's first output, float32, for an encoder [N, C, h, w]; an array of its own.

        Raises:
            ValueError: An array of another rank, number of channels or dtype, or an empty one.
            RuntimeError: The graph was closed.
        """
        shape = images.shape
        wanted = next(iter(self.inputs.values()))[1] or "channels"
        if len(shape) != 4 or 0 in shape or wanted not in ("channels", shape[1]):
            raise ValueError(
                f"the graph wants images [batch, {wanted}, height, width] of at least 1x1, got "
                f"{list(shape)}"
            )
        if images.dtype != np.float32:
            raise ValueError(f"the graph wants images in float32, got {images.dtype}")
        with self._lock:
            result = self._request(shape).infer({0: np.ascontiguousarray(images)})
            return np.array(result[0], np.float32)

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Inputs by name -> every output by name, by the form for all shapes.

        Raises:
            RuntimeError: The graph was closed.
        """
        with self._lock:
            if self._any is None:
                raise RuntimeError("this OpenVINOGraph was closed")
            result = self._any.infer(dict(inputs))
            return {name: np.array(result[name], np.float32) for name in self.outputs}

    def close(self) -> None:
        """Give back the compiled forms; the graph is not used afterwards."""
        with self._lock:
            self._any = None
            self._own.clear()

    def _request(self, shape: tuple[int, ...]) -> Any:
        """What runs a shape: a form of its own where it has or now earns one."""
        if self._any is None:
            raise RuntimeError("this OpenVINOGraph was closed")
        if shape in self._own:
            self._own.move_to_end(shape)
            return self._own[shape]
        if len(self._counts) >= _SHAPES_COUNTED:
            self._counts.clear()
        self._counts[shape] += 1
        if self._counts[shape] < _EARNED:
            return self._any
        own = self._model.clone()
        own.reshape(list(shape))
        self._own[shape] = self._compile(own, {})
        if len(self._own) > _OWN_FORMS:
            oldest, _ = self._own.popitem(last=False)
            del self._counts[oldest]
        return self._own[shape]

    def _read(self, source: str | os.PathLike[str] | bytes) -> Any:
        if not isinstance(source, bytes) and not Path(source).is_file():
            raise ValueError(f"there is no graph {os.fspath(source)}")
        try:
            return self._core.read_model(source if isinstance(source, bytes) else str(source))
        except RuntimeError as err:
            library = load_library("openvino", "OpenVINO")
            raise _unreadable("OpenVINO", library, source, _last(err)) from err

    def _cache(
        self, source: str | os.PathLike[str] | bytes, chosen: str | os.PathLike[str] | None
    ) -> Path | None:
        """A folder for the compiled form of this graph, precision, library and machine alone.

        OpenVINO's own key leaves the precision out (2026.4): one folder for both lets bf16 load
        what was compiled for fp32, and gives NaN.
        """
        if isinstance(source, bytes):
            folder, state = None, hashlib.sha256(source).hexdigest()
        else:
            path = Path(source)
            found = path.stat()
            folder, state = path.with_suffix(".compiled"), f"{found.st_mtime_ns} {found.st_size}"
            if not os.access(path.parent, os.W_OK):
                folder = None
        folder = folder if chosen is None else Path(chosen)
        if folder is None:
            return None
        machine = [
            str(self._core.get_property("CPU", name))
            for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
        ]
        facts = (state, self.precision, load_library("openvino", "OpenVINO").__version__, machine)
        return folder / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _compile(self, model: Any, more: dict[str, str]) -> Any:
        """A request to a compiled form, which computes in the precision asked for."""
        try:
            compiled = self._core.compile_model(model, "CPU", {**self._settings, **more})
        except RuntimeError as err:
            raise ValueError(f"OpenVINO cannot compile the graph: {_last(err)}") from err
        runs_in = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if runs_in != _HINTS[self.precision]:
            raise ValueError(
                f"OpenVINO computes {runs_in} on this machine where {self.precision} was asked "
                f"for; use precision='fp32'"
            )
        return compiled.create_infer_request()


def _texts_of(model: Any) -> dict[str, str]:
    """What an ONNX file holds about itself, which OpenVINO's own files keep."""
    if not model.has_rt_info(["framework"]):
        return {}
    found = model.get_rt_info(["framework"]).value
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _unreadable(
    name: str, library: Any, source: str | os.PathLike[str] | bytes, words: str
) -> ValueError:
    """The error for a file that a library cannot read; of a newer opset it says what to do."""
    what = "these bytes" if isinstance(source, bytes) else os.fspath(source)
    if re.search(r"opset|ir version", words, re.IGNORECASE):
        package = library.__name__
        return ValueError(
            f"{what} is of a newer opset than {name} {library.__version__} reads; pip install "
            f"--upgrade {package}, or export again with a lower --opset"
        )
    return ValueError(f"{name} cannot read {what} as a graph: {words}")


def _last(err: Exception) -> str:
    """OpenVINO's messages begin with places in its source; the reason comes last."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[-1] if lines else type(err).__name__
