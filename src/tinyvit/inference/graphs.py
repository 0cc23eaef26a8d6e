"""Runs the file of a graph by OpenVINO or ONNX Runtime: arrays in, arrays out, without torch.

A program that has such a file (``OpenVINOBackend.graph_file`` says where one is) starts with one of
these classes alone::

    run = OpenVINOGraph("encoder.onnx", precision="fp32")
    features = run(images)  # [N, 3, H, W] float32 -> [N, C, h, w] float32
"""

from __future__ import annotations

import hashlib
import importlib
import os
import threading
import warnings
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import MissingExtraError

OpenVINOPrecision = Literal["fp32", "bf16"]

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
    """The package ``openvino``, ``onnxruntime`` or ``tinyvit_native``, ``name`` in the error.

    Raises:
        MissingExtraError: It is not installed.
    """
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

    Args:
        source: The path of an ONNX file, or its bytes.
        threads: How many threads compute; None leaves it to ONNX Runtime.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ValueError: ONNX Runtime cannot read the graph, or ``threads`` is below 1.
    """

    def __init__(self, source: str | os.PathLike[str] | bytes, threads: int | None = None) -> None:
        _check_threads(threads)
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
            name = "these bytes" if isinstance(source, bytes) else os.fspath(source)
            raise ValueError(f"ONNX Runtime cannot read {name} as a graph: {err}") from err
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, C, H, W] float32 -> the graph's first output; may be called by several threads.

        Raises:
            RuntimeError: The graph was closed.
        """
        session = self._session
        if session is None:
            raise RuntimeError("this OnnxGraph was closed")
        result: NDArray[np.float32] = session.run(None, {self._input: images})[0]
        return result

    def close(self) -> None:
        """Give back the session; the graph is not used afterwards."""
        self._session = None


class OpenVINOGraph:
    """A graph on this machine's CPU: arrays in, arrays out, of any size and batch.

    What runs at first is compiled once for all shapes. A shape that comes again and again gets a
    form of its own, which is faster; the four used last are kept. Calls from several threads wait
    for each other: each uses all threads of the machine.

    Args:
        source: The path of an ONNX or OpenVINO file, or the bytes of an ONNX one.
        precision: What it computes in, "fp32" or "bf16". OpenVINO's own default is bf16 where the
            machine has it; here nothing is chosen silently.
        threads: How many threads compute; None leaves it to OpenVINO.
        cache_dir: Folder for the compiled form, so that the next start is faster. None takes
            ``<file>.compiled`` beside a file that is in a folder one may write to, and keeps
            nothing for bytes.

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
        _check_threads(threads)
        self.precision = precision
        self._settings: dict[str, object] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            **({} if threads is None else {"INFERENCE_NUM_THREADS": threads}),
        }
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._own: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._core = load_library("openvino", "OpenVINO").Core()
        self._model = self._read(source)
        cache = self._cache(source, cache_dir)
        self._any = self._compile(self._model, {} if cache is None else {"CACHE_DIR": str(cache)})

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
        channels = self._model.inputs[0].partial_shape[1]
        wanted = channels.get_length() if channels.is_static else "channels"
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
            name = "these bytes" if isinstance(source, bytes) else os.fspath(source)
            raise ValueError(f"OpenVINO cannot read {name} as a graph: {_last(err)}") from err

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


def _last(err: Exception) -> str:
    """OpenVINO's messages begin with places in its source; the reason comes last."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[-1] if lines else type(err).__name__


def _check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, or None for the default, got {threads}")
