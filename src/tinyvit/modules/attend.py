"""Scaled dot-product attention, by whichever of torch's ways is the quickest to learn through.

Knows no windows and no tokens' meaning. Letters: B batch, h heads, Q queries, K keys, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .windows import is_tracing

__all__ = ["attend"]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """``softmax(q k^T * scale + bias) v``.

    Args:
        q: [B, h, Q, D].
        k: [B, h, K, D].
        v: [B, h, K, Dv].
        scale: Factor on the scores.
        bias: [1, h, Q, K], added to the scores.

    Returns:
        [B, h, Q, Dv].
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
