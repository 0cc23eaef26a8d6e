"""ONNX Runtime and OpenVINO in place of a model: its graph, where it is kept, and its backends.

One graph serves any size and any batch. ONNX Runtime and OpenVINO both read it; a file of it is
all that ``OpenVINOGraph`` needs to start without torch.

Facts: traced by torch's TorchScript exporter. The newer one, which goes through torch.export,
cannot take attention apart at dynamic sizes (torch 2.13), and gathers windows where this one
reshapes them. OpenVINO's own conversion of torch models gives a graph that is no faster, takes
three times as long, and reports its use to the publisher.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tinyvit.checkpoints.download import cache_folder
from tinyvit.checkpoints.files import weights_sha256, write_bytes
from tinyvit.errors import CheckpointError
from tinyvit.lazy import need
from tinyvit.modules import TinyViT

from .backend import first_words
from .bundle import TITLES, Graph, RuntimeName, choose_runtime
from .derived import TOLERANCE, Derived, error_of
from .torch_backend import exact_inference, frozen_copy, reason_against, small_image

INPUT, OUTPUT = "images", "features"
"""Names of the graph's input [N, C, H, W] and output, float32."""

_OPSET = 18
_FORM = 2
"""Raise it when ``export_onnx`` gives another graph for the same model."""


def export_onnx(model: TinyViT) -> bytes:
    """The model's ``forward`` in eval mode and float32, as the bytes of an ONNX file.

    It goes from ``INPUT`` [N, in_chans, H, W], of any N, H and W from 1, to ``OUTPUT``.

    Raises:
        MissingExtraError: onnx is not installed; torch's exporter wants it.
        ValueError: The model cannot be traced.
    """
    need("onnx", "making a graph of a model")
    example = (torch.zeros(2, model.in_chans, 75, 58),)
    axes = {INPUT: {0: "batch", 2: "height", 3: "width"}}
    words = "this model cannot be made into an ONNX graph: {}; use backend='torch'"
    return trace(frozen_copy(model), example, [INPUT], [OUTPUT], axes, _OPSET, words)


def trace(
    module: nn.Module,
    example: Sequence[Tensor],
    inputs: Sequence[str],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    opset: int,
    words: str = "the model cannot be made into an ONNX graph: {}",
) -> bytes:
    """A module in eval mode, float32, on the CPU, as the bytes of an ONNX file.

    ``axes`` are of each name those that may have any length, with their names. The ValueError for
    a module that cannot be traced has ``words``, and the reason in them.
    """
    stream = io.BytesIO()
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")  # of its deprecation, and of torch's own use of itself
        try:
            torch.onnx.export(
                module,
                tuple(example),
                cast("Any", stream),
                dynamo=False,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: dict(found) for name, found in axes.items()},
            )
        except (RuntimeError, TypeError, ValueError) as err:
            raise ValueError(words.format(first_words(err))) from err
    return stream.getvalue()


def fingerprint(model: TinyViT) -> str | None:
    """SHA-256 of a model's architecture and tensors, and of the versions that make the graph.

    None for a model with hooks or foreign modules, whose data do not tell what it computes.
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
    """The file ``graphs/<fingerprint>.onnx`` in the cache folder; it is made if it is not there.

    The graph itself where the model has no fingerprint or the folder cannot be written to.
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


class WatchedGraph:
    """Keeps the graph of a model in step with the model, and checks it against the model.

    The model given is never changed. Its graph runs the model's ``forward`` at any size and batch.
    It is made at the first call, and again when the model has changed since.

    The first graph comes from the cache folder, or is kept there for the next program. Graphs of a
    model that changed meanwhile are not kept: there may be one for each step of a training.

    ``load`` makes what runs from a file of a graph or its bytes; ``precision`` tells how far the
    self-check may be off. ``library`` and what was chosen are for words.
    """

    name: str = "graph"
    device = "cpu"

    def __init__(
        self,
        model: TinyViT,
        load: Callable[[Path | bytes], Graph],
        library: str,
        precision: Literal["fp32", "bf16"],
        choice: str = "",
    ) -> None:
        self.precision = precision
        self.error = float("nan")
        self._model = model
        self._load = load
        self._library = library
        self._choice = choice
        self._is_first = True
        self._derived = Derived(partial(list, [model]), self._make)

    @property
    def graph_file(self) -> Path | None:
        """The file of the graph that runs; None where it is not kept. ValueError: it cannot run."""
        return self._derived.get()[1]

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> what the model's ``forward`` gives, float32, on the CPU.

        A ValueError says that the batch has another form, or that the library cannot run the model.
        """
        if batch.ndim != 4 or batch.shape[1] != self._model.in_chans or 0 in batch.shape:
            raise ValueError(
                f"the model wants images [batch, {self._model.in_chans}, height, width] of at "
                f"least 1x1, got {list(batch.shape)}"
            )
        array = batch.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(self._derived.get()[0](array))

    def logits(self, batch: Tensor) -> Tensor:
        """As a call, of a model whose ``forward`` gives logits [N, classes]; else a ValueError."""
        if self._model.neck is not None or self._model.head is None:
            raise ValueError(
                f"{self._library} runs the model's forward, which gives features and no logits; "
                f"use backend='torch'"
            )
        return self(batch)

    def explain(self) -> str:
        """What was chosen, and why, in words."""
        return self._choice

    def refresh(self) -> None:
        """Make what runs again at the next call."""
        self._derived.drop()

    def close(self) -> None:
        """Let go of what runs."""
        kept = self._derived.drop()
        if kept is not None:
            kept[0].close()

    def _make(self) -> tuple[Graph, Path | None]:
        graph = cached_graph(self._model) if self._is_first else export_onnx(self._model)
        self._is_first = False
        if isinstance(graph, Path):
            try:
                return self._checked(graph), graph
            except ValueError:  # a damaged file, or one of an older state of this package
                with suppress(OSError):
                    graph.unlink()
                graph = cached_graph(self._model)
        return self._checked(graph), graph if isinstance(graph, Path) else None

    def _checked(self, graph: Path | bytes) -> Graph:
        """What runs a graph, compared with the model on a small image."""
        runner, x = self._load(graph), small_image(self._model)
        with exact_inference("cpu"):
            wanted = frozen_copy(self._model)(x).numpy()
        got = runner(x.numpy())
        if got.shape != wanted.shape:
            raise ValueError(
                f"{self._library} gives {list(got.shape)} where the model gives "
                f"{list(wanted.shape)}; use backend='torch'"
            )
        tolerance, self.error = TOLERANCE[self.precision], error_of(got, wanted)
        if not self.error <= tolerance:
            raise ValueError(
                f"{self._library} differs from the model by {self.error:.1e} of its largest "
                f"output, more than {tolerance:.0e}; use backend='torch'"
            )
        return runner


class _RuntimeBackend(WatchedGraph):
    """What the library that is called ``name`` runs."""

    name: RuntimeName

    def __init__(
        self,
        model: TinyViT,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        runtime = choose_runtime(self.name, device, precision, threads)
        library = TITLES[self.name]
        super().__init__(model, runtime.open, library, runtime.precision, runtime.words)


class OnnxBackend(_RuntimeBackend):
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


class OpenVINOBackend(_RuntimeBackend):
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
