"""Windows of a map and back in one pass over the memory, with a constant as the padding.

Shapes: B pictures, H W height and width of the map, C channels, S window side.
"""

from __future__ import annotations

from torch import Tensor, unflatten

__all__ = ["copy_from_windows", "copy_to_windows"]


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
