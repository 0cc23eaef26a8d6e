"""A backend that runs a graph in place of a model, and makes it anew when the model has changed.

Knows nothing of the library that runs it: that is a function from a graph to a ``GraphRunner``.
The backends of OpenVINO and ONNX Runtime are this one with that function and their settings.

Shapes: N pictures, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.modules import TinyViT

from .copies import frozen_copy
from .graphs import cached_graph, export_onnx
from .watch import ModelWatch

__all__ = ["GraphRunner", "WatchedGraph", "check_settings"]

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest error of the self-check, relative to the largest output: 3e-6 in fp32 and 2e-2 in bf16
were measured; a mistake gives 1."""


class GraphRunner(Protocol):
    """Runs one graph on arrays."""

    def __call__(self, pictures: NDArray[np.float32], /) -> NDArray[np.float32]:
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
                f"the model wants pictures [batch, {self._model.in_chans}, height, width] of at "
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
        """What runs a graph, compared with the model on a small picture of no convenient size."""
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
