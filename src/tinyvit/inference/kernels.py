"""Matrix products and convolutions with what follows them, packed where this torch can.

oneDNN computes a product, its bias, GELU or a residual addition in one pass over packed weights.
torch exposes that by private operators (those that torch.compile uses on a CPU). They are probed
once, by running them; where they are missing or give something else, public operators do the same.

Shapes: M rows, K inputs, N outputs, B pictures, C channels, H W height and width.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .fuse import Weights

__all__ = ["Conv", "Kernels", "Linear", "PackedKernels", "PlainKernels", "choose_kernels"]

After = Literal["none", "gelu"]


class Linear(Protocol):
    """x [..., K] -> act(x W^T + b) [..., N]; or x W^T + b + add."""

    def __call__(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Run it."""
        ...


class Conv(Protocol):
    """x [B, C, H, W] in channels-last memory -> act(conv(x) + b), likewise.

    ``pad_rows`` replaces the padding at the top and bottom.
    """

    def __call__(self, x: Tensor, pad_rows: int | None = None) -> Tensor:
        """Run it."""
        ...


class Kernels(Protocol):
    """Makes the two; they keep their weights in their own form."""

    name: str
    dtype: torch.dtype

    def linear(self, weights: Weights, after: After = "none") -> Linear:
        """A linear layer."""
        ...

    def conv(self, weights: Weights, after: After = "none") -> Conv:
        """A convolution."""
        ...


class PlainKernels:
    """Public operators only."""

    name = "public operators"

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype = dtype
        self.device = device

    def linear(self, weights: Weights, after: After = "none") -> Linear:
        """A linear layer."""
        weight, bias = self._place(weights.weight.flatten(1)), self._place(weights.bias)

        def run(x: Tensor, add: Tensor | None = None) -> Tensor:
            y = F.linear(x, weight, bias)
            if add is not None:
                y += add
            return F.gelu(y) if after == "gelu" else y

        return run

    def conv(self, weights: Weights, after: After = "none") -> Conv:
        """A convolution."""
        weight = self._place(weights.weight).contiguous(memory_format=torch.channels_last)
        bias = self._place(weights.bias)

        def run(x: Tensor, pad_rows: int | None = None) -> Tensor:
            rows = weights.pad if pad_rows is None else pad_rows
            y = F.conv2d(
                x, weight, bias, weights.stride, (rows, weights.pad), groups=weights.groups
            )
            return F.gelu(y) if after == "gelu" else y

        return run

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype).contiguous()


class PackedKernels:
    """oneDNN's fused operators on packed weights (CPU)."""

    name = "packed oneDNN operators"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def linear(self, weights: Weights, after: After = "none") -> Linear:
        """A linear layer."""
        ops: Any = torch.ops.mkldnn
        weight = weights.weight.flatten(1).to(self.dtype).contiguous()
        packed = ops._reorder_linear_weight(weight)
        bias = weights.bias.to(self.dtype)
        algorithm = "none" if after == "gelu" else ""

        def run(x: Tensor, add: Tensor | None = None) -> Tensor:
            y: Tensor
            if add is None:
                y = ops._linear_pointwise(x, packed, bias, after, [], algorithm)
            else:
                y = ops._linear_pointwise.binary(x, add, packed, bias, "add")
            return y

        return run

    def conv(self, weights: Weights, after: After = "none") -> Conv:
        """A convolution."""
        ops: Any = torch.ops.mkldnn
        stride, groups = [weights.stride] * 2, weights.groups
        weight = weights.weight.to(self.dtype).contiguous(memory_format=torch.channels_last)
        padding = [weights.pad] * 2
        packed = ops._reorder_convolution_weight(weight, padding, stride, [1, 1], groups)
        bias = weights.bias.to(self.dtype)
        algorithm = "none" if after == "gelu" else ""

        def run(x: Tensor, pad_rows: int | None = None) -> Tensor:
            rows = weights.pad if pad_rows is None else pad_rows
            y: Tensor = ops._convolution_pointwise(
                x, packed, bias, [rows, weights.pad], stride, [1, 1], groups, after, [], algorithm
            )
            return y

        return run


@functools.cache
def choose_kernels(dtype: torch.dtype) -> PackedKernels | PlainKernels:
    """Packed kernels where this torch and this machine have them and they agree with public ones.

    Args:
        dtype: float32 or bfloat16.

    Returns:
        The faster kernels that are right.
    """
    plain = PlainKernels(dtype)
    try:
        packed = PackedKernels(dtype)
        agree = all(
            torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=tolerance)
            for tolerance in [1e-4 if dtype == torch.float32 else 5e-2]
            for ours, theirs in zip(_trial(packed), _trial(plain), strict=True)
        )
    except (RuntimeError, AttributeError, TypeError):
        return plain
    return packed if agree else plain


def _trial(kernels: PackedKernels | PlainKernels) -> list[Tensor]:
    """Small runs of everything that the network asks of its kernels."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dense = Weights(values(24, 16) / 4, values(24))
    depthwise = Weights(values(16, 1, 3, 3) / 3, values(16), pad=1, groups=16)
    strided = Weights(values(8, 16, 3, 3) / 12, values(8), stride=2, pad=1)
    x = values(1, 7, 5, 16).to(kernels.dtype)  # [B, H, W, C]
    residual = values(1, 7, 5, 24).to(kernels.dtype)
    image = x.permute(0, 3, 1, 2)
    with torch.inference_mode():
        return [
            kernels.linear(dense)(x),
            kernels.linear(dense, "gelu")(x),
            kernels.linear(dense)(x, residual),
            kernels.conv(depthwise, "gelu")(image),
            kernels.conv(depthwise)(image, pad_rows=0),
            kernels.conv(strided, "gelu")(image),
        ]
