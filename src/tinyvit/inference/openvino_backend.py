"""The OpenVINO backend: a model's graph on this machine's CPU.

Shapes: N pictures, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tinyvit.modules import TinyViT

from .backend import choose_precision
from .openvino_graph import OpenVINOGraph, load_openvino
from .watched_graph import WatchedGraph

__all__ = ["OpenVINOBackend"]


class OpenVINOBackend:
    """Runs a TinyViT by OpenVINO: its ``forward``, at any size and batch.

    The model given is never changed. Its graph is made at the first call, kept in the cache
    folder, and made anew when the model has changed since (see ``ModelWatch``).

    Args:
        model: The model.
        device: "auto" or "cpu".
        precision: "fp32", "bf16", or "auto": bf16 where this machine computes it natively.
        threads: How many threads compute; None leaves it to OpenVINO.

    Raises:
        MissingExtraError: openvino is not installed.
        ValueError: Another device, precision or number of threads.
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self,
        model: TinyViT,
        device: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
    ) -> None:
        if device not in ("auto", "cpu"):
            raise ValueError(f"backend 'openvino' runs on device 'cpu', got {device!r}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, or None for the default, got {threads}")
        self.precision, reason = choose_precision(precision, "cpu")
        library = f"openvino {load_openvino().__version__.split('-')[0]}"
        self._choice = f"{library} on cpu, {self.precision} ({reason})"

        def load(graph: Path | bytes) -> OpenVINOGraph:
            return OpenVINOGraph(graph, precision=self.precision, threads=threads)

        self._graph = WatchedGraph(model, load, "OpenVINO", self.precision)

    @property
    def graph_file(self) -> Path | None:
        """The file of the graph that runs, for ``OpenVINOGraph``; None where it is not kept."""
        self._graph.runner()
        return self._graph.file

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> the model's ``forward``, float32, on the CPU.

        Raises:
            ValueError: The batch has another form, or OpenVINO cannot run the model.
        """
        return self._graph(batch)

    def logits(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> logits [N, classes], float32, on the CPU.

        Raises:
            ValueError: The model's ``forward`` gives no logits, or as for a call.
        """
        return self._graph.logits(batch)

    def explain(self) -> str:
        """What was chosen, and why, in words."""
        return self._choice

    def refresh(self) -> None:
        """Make the graph anew at the next call."""
        self._graph.refresh()

    def close(self) -> None:
        """Let go of the graph."""
        self._graph.close()
