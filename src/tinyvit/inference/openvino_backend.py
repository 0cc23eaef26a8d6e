"""The OpenVINO backend: a model's graph on this machine's CPU.

Knows only the settings; ``watched_graph`` keeps the graph, ``openvino_graph`` runs it.
"""

from __future__ import annotations

import functools

from tinyvit.modules import TinyViT

from .backend import choose_precision
from .openvino_graph import OpenVINOGraph, load_openvino
from .watched_graph import WatchedGraph, check_settings

__all__ = ["OpenVINOBackend"]


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
