"""A network on a GPU whose calls are recorded once for each shape and then replayed.

Starting the 365 kernels of a TinyViT one by one takes longer than a GPU computes at batch 1. A CUDA
graph starts them all at once, for one shape and at fixed places in memory: the input is copied in,
the results are copied out. Recording sits behind ``Capture``, so that all the rest can be tried
without a GPU.

Facts: torch's documentation of CUDA graphs (warm-up on the stream of the capture, one memory pool
for graphs that never run at the same time, ``capture_error_mode``) and of TF32.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from .backend import first_words

Output = Literal["features", "logits"]

Run = Callable[[Tensor], Sequence[Tensor]]
"""A batch [N, C, H, W] -> results."""

SHAPES = 4
"""Graphs kept at a time: those used last."""
EARNED = 2
"""Calls of one shape until it is captured: capturing takes about as long as five calls."""
_SHAPES_COUNTED = 256
_WARM_UPS = 3

_ALONE = threading.RLock()
"""torch allows one capture at a time in a process; the switch of TF32 is the process's, too."""

logger = logging.getLogger("tinyvit")


class Network(Protocol):
    """What a backend made of a model: batches in its own precision, on its own device."""

    def __call__(
        self, batch: Tensor, output: Output | None = "features", stages: bool = False
    ) -> list[Tensor]:
        """[N, C, H, W] -> the output, if any, then the maps of the stages, where asked for.

        "features" are the neck's output, or the last stage's map without a neck; "logits"
        [N, classes], a ValueError where the model has no head; None is no output.
        """


class Capture(Protocol):
    """Records what a function does with a batch of one shape."""

    def __call__(self, run: Run, example: Tensor) -> Run:
        """Record ``run``, which may be called several times, with a batch of the shape.

        What comes back does the same to a batch of this shape; its results are overwritten by its
        next call. A RuntimeError says that it cannot be recorded.
        """


class CudaCapture:
    """Records CUDA graphs of a device, which share one pool of memory."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        with torch.cuda.device(self._device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run, example: Tensor) -> Run:
        """See ``Capture``."""
        with _ALONE, torch.cuda.device(self._device):
            given = example.clone()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):  # libraries choose algorithms and take workspaces here
                    run(given)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                results = run(given)

        def replay(batch: Tensor) -> Sequence[Tensor]:
            given.copy_(batch)
            graph.replay()
            return results

        return replay


class GraphedNetwork:
    """Gives what a network gives; shapes that come again are replayed.

    A shape is captured at its second call, and the four used last are kept. Where capturing fails
    (no memory for it, say), that is logged, ``failure`` says why, and the network runs kernel by
    kernel from then on, with the same results. Calls from several threads wait for each other.

    The network is frozen, and does the same work at every call of a shape. ``is_exact`` computes
    float32 convolutions in float32; by torch's default cuDNN takes TF32, which keeps 11 bits.
    """

    def __init__(self, network: Network, capture: Capture, is_exact: bool = True) -> None:
        self.failure: str | None = None
        self._network, self._capture = network, capture
        self._arithmetic = _full_float32 if is_exact else nullcontext
        self._lock = threading.Lock()
        self._counts: Counter[tuple[object, ...]] = Counter()
        self._graphs: OrderedDict[tuple[object, ...], Run] = OrderedDict()

    def __call__(
        self, batch: Tensor, output: Output | None = "features", stages: bool = False
    ) -> list[Tensor]:
        """See ``Network``."""
        batch = batch.contiguous(memory_format=torch.channels_last)
        run = partial(self._network, output=output, stages=stages)
        with self._lock, torch.inference_mode():
            replay = self._replay((output, stages, *batch.shape), run, batch)
            if replay is None:
                with self._arithmetic():
                    return list(run(batch))
            results = [result.clone() for result in replay(batch)]
            if batch.is_cuda:  # another thread may replay next, and on another stream
                torch.cuda.current_stream(batch.device).synchronize()
            return results

    def _replay(self, key: tuple[object, ...], run: Run, batch: Tensor) -> Run | None:
        """The graph for this batch; None where it has not earned one or cannot have one."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if self.failure is not None or batch.numel() == 0:
            return None
        if len(self._counts) >= _SHAPES_COUNTED:
            self._counts.clear()
        self._counts[key] += 1
        if self._counts[key] < EARNED:
            return None
        if len(self._graphs) >= SHAPES:
            forgotten, _ = self._graphs.popitem(last=False)
            del self._counts[forgotten]
        try:
            with self._arithmetic():
                self._graphs[key] = self._capture(run, batch)
        except RuntimeError as err:  # out of memory is one of them
            self._graphs.clear()
            self.failure = first_words(err)
            logger.warning("no CUDA graph, kernels are started one by one: %s", self.failure)
            return None
        return self._graphs[key]


@contextmanager
def _full_float32() -> Iterator[None]:
    """Keep cuDNN from rounding float32 to TF32 meanwhile."""
    cudnn = torch.backends.cudnn
    with _ALONE:
        before = cudnn.allow_tf32
        cudnn.allow_tf32 = False
        try:
            yield
        finally:
            cudnn.allow_tf32 = before
