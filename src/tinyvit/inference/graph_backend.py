"""A TinyViT as an ONNX graph for other libraries, and where such graphs are kept.

One graph serves any size and any batch. ONNX Runtime and OpenVINO both read it; a file of it is
all that ``OpenVINOGraph`` needs to start without torch.

Facts: traced by torch's TorchScript exporter. The newer one, which goes through torch.export,
cannot take attention apart at dynamic sizes (torch 2.13), and gathers windows where this one
reshapes them. OpenVINO's own conversion of torch models gives a graph that is no faster, takes
three times as long, and reports its use to the publisher.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.checkpoints.download import cache_folder
from tinyvit.checkpoints.files import weights_sha256, write_bytes
from tinyvit.errors import CheckpointError, MissingExtraError
from tinyvit.modules import TinyViT

from .backend import choose_precision
from .derived import ModelWatch
from .fold import frozen_copy, reason_against
from .graphs import OpenVINOGraph, load_openvino

INPUT, OUTPUT = "pictures", "features"
"""Names of the graph's input [N, C, H, W] and output, float32."""

_OPSET = 18
_FORM = 1
"""Raise it when ``export_onnx`` gives another graph for the same model."""


def export_onnx(model: TinyViT) -> bytes:
    """The model's ``forward`` in eval mode and float32, as the bytes of an ONNX file.

    Args:
        model: The model; it is not changed.

    Returns:
        A graph from ``INPUT`` [N, in_chans, H, W], of any N, H and W from 1, to ``OUTPUT``.

    Raises:
        MissingExtraError: onnx is not installed; torch's exporter wants it.
        ValueError: The model cannot be traced.
    """
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError(
            "making a graph of a model needs the package onnx, which is not installed; "
            "pip install 'tinyvit[openvino]' or 'tinyvit[onnx]'"
        )
    frozen = frozen_copy(model)
    example = torch.zeros(2, model.in_chans, 75, 58)
    axes = {0: "batch", 2: "height", 3: "width"}
    with (
        TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        file = Path(folder) / "graph.onnx"
        warnings.simplefilter("ignore")  # of its deprecation, and of torch's own use of itself
        try:
            torch.onnx.export(
                frozen,
                (example,),
                file,
                dynamo=False,
                opset_version=_OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: axes},
            )
        except (RuntimeError, TypeError, ValueError) as err:
            first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
            raise ValueError(
                f"this model cannot be made into an ONNX graph: {first}; use backend='torch'"
            ) from err
        return file.read_bytes()


def fingerprint(model: TinyViT) -> str | None:
    """What tells the graphs of two models apart, or None where the model's data do not tell.

    Args:
        model: The model.

    Returns:
        Hexadecimal SHA-256 of its architecture, its tensors and the versions that make the graph;
        None for a model with hooks or foreign modules.
    """
    if reason_against(model) is not None:
        return None
    settings = [
        (name, type(module).__qualname__, module.extra_repr())
        for name, module in model.named_modules()
    ]
    state = model.state_dict()
    types = sorted({str(tensor.dtype) for tensor in state.values()})
    made_by = (_FORM, version("tinyvit"), torch.__version__, model.arguments(), settings, types)
    return hashlib.sha256(f"{made_by!r} {weights_sha256(state)}".encode()).hexdigest()


def cached_graph(model: TinyViT) -> Path | bytes:
    """The model's graph as a file in the cache folder; it is made if it is not there.

    Args:
        model: The model.

    Returns:
        The file ``graphs/<fingerprint>.onnx`` in tinyvit's cache folder; the graph itself where
        the model has no fingerprint or the folder cannot be written to.

    Raises:
        ValueError: The model cannot be traced.
    """
    key = fingerprint(model)
    if key is None:
        return export_onnx(model)
    path = cache_folder() / "graphs" / f"{key}.onnx"
    if path.is_file():
        return path
    graph = export_onnx(model)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, graph)
    except (OSError, CheckpointError):  # read-only or full: the graph is as good from memory
        return graph
    return path


pass


_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest error of the self-check, relative to the largest output: 3e-6 in fp32 and 2e-2 in bf16
were measured; a mistake gives 1."""


class GraphRunner(Protocol):
    """Runs one graph on arrays."""

    def __call__(self, images: NDArray[np.float32], /) -> NDArray[np.float32]:
        """[N, C, H, W] -> the graph's output."""
        ...

    def close(self) -> None:
        """Give back what is held."""
        ...


def check_settings(backend: str, device: str, threads: int | None) -> None:
    """Refuse what a library on this machine's CPU cannot do.

    Raises:
        ValueError: Another device than the CPU, or fewer than one thread.
    """
    if device not in ("auto", "cpu"):
        raise ValueError(f"backend {backend!r} runs on device 'cpu', got {device!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, or None for the default, got {threads}")


class WatchedGraph:
    """Keeps the graph of a model in step with the model, and checks it against the model.

    The model given is never changed. Its graph runs the model's ``forward`` at any size and batch.
    It is made at the first call, and anew when the model has changed since (see ``ModelWatch``).

    The first graph comes from the cache folder, or is kept there for the next program. Graphs of a
    model that changed meanwhile are not kept: there may be one for each step of a training.

    Args:
        model: The model; it is referred to and never changed.
        load: Makes what runs from a file of a graph, or from its bytes.
        library: Who runs it, for messages.
        precision: "fp32" or "bf16": how far the self-check may be off.
        choice: What was chosen, and why, in words.
    """

    name = "graph"
    device = "cpu"

    def __init__(
        self,
        model: TinyViT,
        load: Callable[[Path | bytes], GraphRunner],
        library: str,
        precision: Literal["fp32", "bf16"],
        choice: str = "",
    ) -> None:
        self.precision = precision
        self._model = model
        self._load = load
        self._library = library
        self._choice = choice
        self._tolerance = _TOLERANCE[precision]
        self._lock = threading.Lock()
        self._made: tuple[GraphRunner, ModelWatch] | None = None
        self._is_first = True
        self._file: Path | None = None
        self.error = float("nan")

    @property
    def graph_file(self) -> Path | None:
        """The file of the graph that runs; None where it is not kept.

        Raises:
            ValueError: The library cannot run the model, or gives other values.
        """
        self.runner()
        return self._file

    def __call__(self, batch: Tensor) -> Tensor:
        """Run a batch.

        Args:
            batch: [N, in_chans, H, W], N, H and W from 1.

        Returns:
            What the model's ``forward`` gives, float32, on the CPU.

        Raises:
            ValueError: The batch has another form, or the library cannot run the model.
        """
        if batch.ndim != 4 or batch.shape[1] != self._model.in_chans or 0 in batch.shape:
            raise ValueError(
                f"the model wants images [batch, {self._model.in_chans}, height, width] of at "
                f"least 1x1, got {list(batch.shape)}"
            )
        array = batch.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self.runner()(array))

    def logits(self, batch: Tensor) -> Tensor:
        """As a call, of a model whose ``forward`` gives logits: [N, classes].

        Raises:
            ValueError: It gives something else, or as for a call.
        """
        if self._model.neck is not None or self._model.head is None:
            raise ValueError(
                f"{self._library} runs the model's forward, which gives features and no logits; "
                f"use backend='torch'"
            )
        return self(batch)

    def explain(self) -> str:
        """What was chosen, and why, in words."""
        return self._choice

    def runner(self) -> GraphRunner:
        """What runs now; it is made if there is none, or if the model has changed.

        Raises:
            ValueError: The library cannot run the model, or gives other values.
        """
        with self._lock:
            if self._made is None or self._made[1].has_changed():
                watch = ModelWatch(self._model)
                self._made = self._make(), watch
            return self._made[0]

    def refresh(self) -> None:
        """Make what runs anew at the next call."""
        with self._lock:
            self._made = None

    def close(self) -> None:
        """Let go of what runs."""
        with self._lock:
            if self._made is not None:
                self._made[0].close()
            self._made = None

    def _make(self) -> GraphRunner:
        self._file = None
        graph = cached_graph(self._model) if self._is_first else export_onnx(self._model)
        self._is_first = False
        if isinstance(graph, Path):
            try:
                runner = self._checked(graph)
            except ValueError:  # a damaged file, or one of an older state of this package
                with suppress(OSError):
                    graph.unlink()
                graph = cached_graph(self._model)
            else:
                self._file = graph
                return runner
        runner = self._checked(graph)
        self._file = graph if isinstance(graph, Path) else None
        return runner

    def _checked(self, graph: Path | bytes) -> GraphRunner:
        """What runs a graph, compared with the model on a small image of no convenient size."""
        runner = self._load(graph)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, self._model.in_chans, 75, 58, generator=generator)
        with torch.inference_mode():
            wanted = frozen_copy(self._model)(x).numpy()
        got = runner(x.numpy())
        if got.shape != wanted.shape:
            raise ValueError(
                f"{self._library} gives {list(got.shape)} where the model gives "
                f"{list(wanted.shape)}; use backend='torch'"
            )
        scale = max(float(np.abs(wanted).max(initial=0)), 1e-12)
        self.error = float(np.abs(got - wanted).max(initial=0)) / scale
        if not self.error <= self._tolerance:
            raise ValueError(
                f"{self._library} differs from the model by {self.error:.1e} of its largest "
                f"output, more than {self._tolerance:.0e}; use backend='torch'"
            )
        return runner


pass


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


pass


class OpenVINOBackend(WatchedGraph):
    """Runs a TinyViT by OpenVINO: its ``forward``, at any size and batch.

    ``graph_file`` is a file for ``OpenVINOGraph``, which needs no torch.

    Args:
        model: The model; it is never changed.
        device: "auto" or "cpu".
        precision: "fp32", "bf16", or "auto": bf16 where this machine computes it natively.
        threads: How many threads compute; None leaves it to OpenVINO.

    Raises:
        MissingExtraError: openvino is not installed.
        ValueError: Another device, precision or number of threads.
    """

    name = "openvino"

    def __init__(
        self,
        model: TinyViT,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        check_settings(self.name, device, threads)
        chosen, reason = choose_precision(precision, "cpu")
        library = f"openvino {load_openvino().__version__.split('-')[0]}"
        super().__init__(
            model,
            functools.partial(OpenVINOGraph, precision=chosen, threads=threads),
            "OpenVINO",
            chosen,
            f"{library} on cpu, {chosen} ({reason})",
        )
