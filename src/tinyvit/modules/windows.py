"""Sizes, tokens and windows: pure functions between [B, L, C], [B, H, W, C] and windows.

Shapes: B batch, C channels, H W height and width, L = H*W tokens in row-major order, S window
side. All sizes may be symbolic (torch.export) or traced (torch.jit.trace); there nothing branches
on them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]
"""(height, width)."""


def is_tracing() -> bool:
    """Whether torch.jit.trace is recording, when Python must not branch on sizes."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def to_pair(size: object, name: str) -> Size:
    """(height, width) from one positive whole number, or from a sequence of two.

    Raises:
        TypeError: ``size`` is neither.
        ValueError: A side is not positive, or there are not one or two of them.
    """
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, (tuple, list)) or not all(
        isinstance(side, int) and not isinstance(side, bool) for side in sides
    ):
        raise TypeError(f"{name} must be a whole number or a pair (height, width), got {size!r}")
    if len(sides) == 1:
        sides = (sides[0], sides[0])
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"{name} must be positive, as n or (height, width), got {size!r}")
    return sides[0], sides[1]


def to_map(x: Tensor, size: Size) -> Tensor:
    """Tokens [B, L, C] -> map [B, H, W, C], a view.

    Raises:
        ValueError: ``x`` does not have H*W tokens.
    """
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
    """Cut a map into windows; zeros are added at the bottom and right where it does not divide.

    Args:
        x: [B, H, W, C].
        side: S.

    Returns:
        [B * ceil(H/S) * ceil(W/S), S*S, C], windows in row-major order.
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
    """Put windows back into a map and crop what ``partition`` added.

    Args:
        windows: [B * ceil(H/S) * ceil(W/S), S*S, C].
        side: S.
        batch: B.
        size: (H, W).

    Returns:
        [B, H, W, C].
    """
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
