"""Windows of a map and back in one pass over the memory, with a constant as the padding.

Shapes: B images, H W height and width of the map, C channels, S window side.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, unflatten

from .fold import Weights


def copy_to_windows(x: Tensor, side: int, padding: Tensor) -> Tensor:
    """Cut a map into windows.

    Args:
        x: [B, H, W, C].
        side: S.
        padding: [C], what stands in places of a window that are outside the map.

    Returns:
        [B * ceil(H/S) * ceil(W/S), S*S, C], windows in row-major order; a view of ``x`` where
        that is possible.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // side), -(-width // side)
    if width == side and height % side == 0:  # windows lie one behind the other already
        return x.reshape(batch * rows, side * side, channels)
    windows = x.new_empty(batch, rows, columns, side, side, channels)
    for target, source in _matching(windows, x, side):
        target.copy_(source)
    if height % side:
        windows[:, -1, :, height % side :] = padding
    if width % side:
        windows[:, :, -1, :, width % side :] = padding
    return windows.view(batch * rows * columns, side * side, channels)


def copy_from_windows(windows: Tensor, side: int, like: Tensor) -> Tensor:
    """Put windows back into a map and leave out what was padding.

    Args:
        windows: [B * ceil(H/S) * ceil(W/S), S*S, C].
        side: S.
        like: Any tensor [B, H, W, ...], for the sizes.

    Returns:
        [B, H, W, C].
    """
    batch, height, width = like.shape[:3]
    rows, columns = -(-height // side), -(-width // side)
    channels = windows.shape[-1]
    if width == side and height % side == 0:
        return windows.reshape(batch, height, width, channels)
    windows = windows.reshape(batch, rows, columns, side, side, channels)
    x = windows.new_empty(batch, height, width, channels)
    for source, target in _matching(windows, x, side):
        target.copy_(source)
    return x


def _matching(windows: Tensor, x: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """Views of the windows and of the map that hold the same positions.

    Whole windows, the right edge, the bottom edge and the corner, as far as they exist.
    """
    _, height, width, _ = x.shape
    rows, columns = height // side, width // side
    bottom, right = height % side, width % side
    pairs = []
    if rows and columns:
        inner = x[:, : rows * side, : columns * side]
        inner = unflatten(unflatten(inner, 2, (columns, side)), 1, (rows, side)).transpose(2, 3)
        pairs.append((windows[:, :rows, :columns], inner))
    if rows and right:
        edge = unflatten(x[:, : rows * side, columns * side :], 1, (rows, side))
        pairs.append((windows[:, :rows, columns, :, :right], edge))
    if bottom and columns:
        edge = x[:, rows * side :, : columns * side]
        edge = unflatten(edge, 2, (columns, side)).transpose(1, 2)
        pairs.append((windows[:, rows, :columns, :bottom], edge))
    if bottom and right:
        corner = x[:, rows * side :, columns * side :]
        pairs.append((windows[:, rows, columns, :bottom, :right], corner))
    return pairs


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
