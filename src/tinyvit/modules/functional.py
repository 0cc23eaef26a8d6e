"""Functions on tensors: tokens and maps, windows, activations of maps, attention.

Shapes: B batch, C channels, H W height and width, L = H*W tokens in row-major order, S window
side. All sizes may be symbolic (torch.export) or traced (torch.jit.trace); there nothing branches
on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]
"""(height, width)."""


def is_tracing() -> bool:
    """Whether torch.jit.trace is recording, when Python must not branch on sizes."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def to_map(x: Tensor, size: Size) -> Tensor:
    """Tokens [B, L, C] -> map [B, H, W, C], a view; ValueError for another number of tokens."""
    batch, tokens, channels = x.shape
    if not is_tracing() and tokens != size[0] * size[1]:
        raise ValueError(
            f"{tokens} tokens do not make a map of {size[0]}x{size[1]} = {size[0] * size[1]}; "
            f"pass size=(height, width) of this input"
        )
    return x.reshape(batch, size[0], size[1], channels)


def to_tokens(x: Tensor) -> Tensor:
    """Map [B, C, H, W] -> tokens [B, L, C], a view in either memory format."""
    return x.flatten(2).transpose(1, 2)


def partition(x: Tensor, side: int) -> Tensor:
    """Map [B, H, W, C] -> windows [B * ceil(H/S) * ceil(W/S), S*S, C], in row-major order.

    Zeros are added at the bottom and right where the side S does not divide the map.
    """
    batch, height, width, channels = x.shape
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    if torch.compiler.is_exporting():
        x = F.pad(x.reshape(batch, height * width, channels), (0, 0, 0, 1))
        x = x.index_select(1, _positions_in_windows(x, side, (height, width)))
        return x.flatten(0, 1).view(batch * rows * columns, side * side, channels)
    bottom, right = rows * side - height, columns * side - width
    if is_tracing() or bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    x = x.view(batch, rows, side, columns, side, channels).transpose(2, 3)
    return x.reshape(batch * rows * columns, side * side, channels)


def unpartition(windows: Tensor, side: int, batch: int, size: Size) -> Tensor:
    """Windows of ``partition`` -> map [B, H, W, C] of ``size``; what was added is cropped."""
    height, width = size
    channels = windows.shape[-1]
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    if torch.compiler.is_exporting():
        x = windows.flatten(0, 1).view(batch, rows * columns * side * side, channels)
        x = x.index_select(1, _windows_of_positions(x, side, size))
        return x.view(batch, height, width, channels)
    x = windows.view(batch, rows, columns, side, side, channels).transpose(2, 3)
    x = x.reshape(batch, rows * side, columns * side, channels)
    return x[:, :height, :width]


# torch.export proves every size comparison for the whole range of sizes. Cutting one axis into
# (windows, side) needs comparisons that it cannot prove; gathering by computed positions does not.


def _positions_in_windows(x: Tensor, side: int, size: Size) -> Tensor:
    """For each place in each window its token's number, or H*W (the zero) for padding."""
    height, width = size
    rows, columns = (height + side - 1) // side, (width + side - 1) // side
    place = torch.arange(rows * columns * side * side, device=x.device)
    window, within = place // (side * side), place % (side * side)
    y = window // columns * side + within // side
    x_ = window % columns * side + within % side
    return torch.where((y < height) & (x_ < width), y * width + x_, height * width)


def _windows_of_positions(x: Tensor, side: int, size: Size) -> Tensor:
    """For each token of the map its place in the windows."""
    height, width = size
    columns = (width + side - 1) // side
    token = torch.arange(height * width, device=x.device)
    y, x_ = token // width, token % width
    return (((y // side) * columns + x_ // side) * side + y % side) * side + x_ % side


def activate(activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(x)`` for a map [B, C, H, W] in either memory order, which stays.

    ``nn.GELU`` is quicker on the contiguous view of a channels-last map.
    """
    y: Tensor
    if (
        type(activation) is nn.GELU
        and not is_tracing()
        and not torch.compiler.is_compiling()
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        y = activation(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    else:
        y = activation(x)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """``softmax(q k^T * scale + bias) v``.

    q [B, h, Q, D], k [B, h, K, D], v [B, h, K, Dv], bias [1, h, Q, K] -> [B, h, Q, Dv].
    """
    if not _is_plain_quicker(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    scores = (q * scale) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    with torch.autocast("cpu", enabled=False):  # which would copy the scores to float32
        weights = scores.softmax(dim=-1)
    return weights @ v


def _is_plain_quicker(q: Tensor) -> bool:
    """Whether to spell attention out: on a CPU torch has no fast backward of its fused form.

    What ``scaled_dot_product_attention`` does with a bias to learn looks for rows without a number,
    and reads and writes the scores several times more than is needed; without one its backward is
    many times slower for a few queries on many keys.
    """
    is_recorded = is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return q.device.type == "cpu" and torch.is_grad_enabled() and not is_recorded
