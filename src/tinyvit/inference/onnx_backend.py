"""The ONNX Runtime backend: a model's graph on this machine's CPU, in float32.

Shapes: N pictures, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyvit.errors import MissingExtraError
from tinyvit.modules import TinyViT

from .backend import choose_precision
from .watched_graph import WatchedGraph, check_settings

__all__ = ["OnnxBackend", "OnnxGraph"]

_ERRORS_ONLY = 3
_REASON = "the only precision of this backend"


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
        check_settings("onnx", "cpu", threads)
        library = _load_onnxruntime()
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

    def __call__(self, pictures: NDArray[np.float32]) -> NDArray[np.float32]:
        """[N, C, H, W] float32 -> the graph's first output; may be called by several threads.

        Raises:
            RuntimeError: The graph was closed.
        """
        session = self._session
        if session is None:
            raise RuntimeError("this OnnxGraph was closed")
        result: NDArray[np.float32] = session.run(None, {self._input: pictures})[0]
        return result

    def close(self) -> None:
        """Give back the session; the graph is not used afterwards."""
        self._session = None


class OnnxBackend(WatchedGraph):
    """Runs a TinyViT by ONNX Runtime: its ``forward``, at any size and batch, in float32.

    Args:
        model: The model; it is never changed.
        device: "auto" or "cpu".
        precision: "fp32", or "auto", which is fp32 here.
        threads: How many threads compute; None leaves it to ONNX Runtime.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        ValueError: Another device, precision or number of threads.
    """

    name = "onnx"

    def __init__(
        self,
        model: TinyViT,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        check_settings(self.name, device, threads)
        if choose_precision(precision, "cpu")[0] != "fp32" and precision != "auto":
            raise ValueError(
                f"backend 'onnx' computes in precision 'fp32' only, got {precision!r}; 'torch' and "
                f"'openvino' compute in bf16"
            )
        choice = f"onnxruntime {_load_onnxruntime().__version__} on cpu, fp32 ({_REASON})"
        super().__init__(
            model, functools.partial(OnnxGraph, threads=threads), "ONNX Runtime", "fp32", choice
        )


def _load_onnxruntime() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside it
            return importlib.import_module("onnxruntime")
    except ImportError as err:
        raise MissingExtraError(
            f"the ONNX Runtime backend needs the package onnxruntime, which cannot be imported "
            f"({err}); pip install 'tinyvit[onnx]'"
        ) from err
