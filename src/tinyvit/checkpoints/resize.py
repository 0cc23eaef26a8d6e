"""Fit tables of relative-position biases to another window size.

A table holds one bias per head and per offset (|dy|, |dx|) of two tokens in a window:
[heads, side * side], row-major. For another window it is resized like an image, bicubically.
Two habits exist and both are offered: Cream without, timm with antialiasing (they differ only
when a table shrinks).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyvit.errors import CheckpointError

_BIAS_KEY = re.compile(r"^layers\.(\d+)\.blocks\.\d+\.attn\.attention_biases$")


def resize_bias_table(
    table: Tensor, window: int | tuple[int, int], antialias: bool = False
) -> Tensor:
    """Resize one table to another window.

    Args:
        table: [heads, side * side], floating point; the window it was trained for is square.
        window: Side of the new window in tokens, or its (height, width).
        antialias: False as in Cream, True as in timm.

    Returns:
        [heads, height * width], the table's dtype; the table itself if nothing changes. Computed
        in float32, or in float64 for a float64 table.

    Raises:
        ValueError: The window is smaller than 1.
        CheckpointError: The table is not [heads, side * side] of floating point.

    Examples:
        >>> resize_bias_table(torch.zeros(2, 49), 14).shape
        torch.Size([2, 196])
    """
    height, width = (window, window) if isinstance(window, int) else window
    if height < 1 or width < 1:
        raise ValueError(f"window must be at least 1 by 1 token, got {height} by {width}")
    side = math.isqrt(table.shape[1]) if table.dim() == 2 else 0
    if side < 1 or side * side != table.shape[1] or not table.is_floating_point():
        raise CheckpointError(
            "a table of attention biases must be [heads, side * side] of floating point, "
            f"got {list(table.shape)} of {table.dtype}; the file does not fit TinyViT"
        )
    if (height, width) == (side, side):
        return table
    work = torch.float64 if table.dtype == torch.float64 else torch.float32
    image = table.detach().to(work).view(1, -1, side, side)  # [1, heads, side, side]
    resized = F.interpolate(
        image, size=(height, width), mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized.view(-1, height * width).to(table.dtype)  # [heads, height * width]


def resize_bias_tables(
    state: Mapping[str, Tensor], window_sizes: Sequence[int], antialias: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Resize every table of a canonical state dict to the windows of a network.

    Args:
        state: Canonical key -> tensor.
        window_sizes: Window side of each stage in tokens, as in ``TinyViT(window_sizes=...)``.
        antialias: False as in Cream, True as in timm.

    Returns:
        A new dict (tensors that fit are the same objects) and the keys that were resized.

    Raises:
        ValueError: A table belongs to a stage that ``window_sizes`` does not name.
        CheckpointError: A table is not square.
    """
    fitted = dict(state)
    resized: list[str] = []
    for key, table in state.items():
        match = _BIAS_KEY.match(key)
        if match is None:
            continue
        stage = int(match[1])
        if stage >= len(window_sizes):
            raise ValueError(
                f"{key} belongs to stage {stage + 1}, but window_sizes names "
                f"{len(window_sizes)} stages: {tuple(window_sizes)}"
            )
        fitted[key] = resize_bias_table(table, window_sizes[stage], antialias)
        if fitted[key].shape != table.shape:
            resized.append(key)
    return fitted, resized
