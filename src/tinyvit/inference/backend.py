"""What runs a network: the Backend protocol, and the choice of device and precision.

A backend knows tensors only: no images, no files, no prompts. Any object with these members can
be passed as ``Engine(backend=...)``.

Shapes: N images, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

BackendName = Literal["auto", "torch", "openvino", "onnx"]
Precision = Literal["fp32", "bf16", "auto"]

FP16_REFUSED = (
    "precision 'fp16' is refused: it ends at 65504, and sums of squares in the neck's LayerNorm "
    "were measured above that; no file says how large its values get, and on a CPU it was no "
    "faster than 'fp32'; use 'bf16', which is fast and has the range of 'fp32'"
)
"""The measurement is that of ``benchmarks/proof.py``."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@runtime_checkable
class Backend(Protocol):
    """Runs a network on prepared images."""

    @property
    def name(self) -> str:
        """What runs, in a word, e.g. "torch"."""
        ...

    @property
    def device(self) -> str:
        """Where it runs, e.g. "cpu" or "cuda:0"."""
        ...

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> the network's output, float32: [N, C, h, w] or [N, classes]."""
        ...

    def close(self) -> None:
        """Give back what is held; the backend is not used afterwards."""
        ...


@runtime_checkable
class StageBackend(Backend, Protocol):
    """A backend that also gives the maps of the stages."""

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[N, 3, H, W] float32 -> the map of each stage, [N, C, h, w] float32."""
        ...

    def with_stages(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What a call and ``stages`` give, from one pass."""
        ...


@runtime_checkable
class LogitsBackend(Backend, Protocol):
    """A backend that also gives a classifier's logits."""

    def logits(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> [N, classes] float32.

        Raises:
            ValueError: What runs has no logits.
        """
        ...


class Network(Protocol):
    """What a backend made of a model: batches in its own precision, on its own device."""

    def features(self, batch: Tensor) -> Tensor:
        """[N, C, H, W] -> the neck's output, or the last stage's map without a neck."""
        ...

    def logits(self, batch: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, classes].

        Raises:
            ValueError: The model has no head.
        """
        ...

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> the map of each stage, [N, C, h, w]."""
        ...

    def with_stages(self, batch: Tensor, as_logits: bool = False) -> tuple[Tensor, list[Tensor]]:
        """What ``features`` (or ``logits``) and ``stages`` give, in one pass."""
        ...


def choose_device(device: str) -> str:
    """The device to use; "auto" takes a GPU if there is one.

    Raises:
        ValueError: torch does not know the device, or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        first = str(err).strip().splitlines()[0]
        raise ValueError(
            f"device must be 'auto' or a device that torch can use here, got {device!r}: {first}"
        ) from err
    return device


def choose_precision(precision: str, device: str) -> tuple[Literal["fp32", "bf16"], str]:
    """The precision to compute in, and why.

    Args:
        precision: "fp32", "bf16", or "auto": bf16 where the hardware computes it natively.
        device: What ``choose_device`` gave.

    Returns:
        (precision, reason in words).

    Raises:
        ValueError: Unknown precision, or "fp16", which is refused with the reason.
    """
    if precision == "fp16":
        raise ValueError(FP16_REFUSED)
    if precision == "fp32":
        return "fp32", "exact; the default"
    if precision == "bf16":
        return "bf16", "asked for"
    if precision != "auto":
        raise ValueError(f"precision must be one of {get_args(Precision)}, got {precision!r}")
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported()
    else:
        native = device == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if native:
        return "bf16", "this device computes bf16 natively"
    return "fp32", "this device does not compute bf16 natively"
