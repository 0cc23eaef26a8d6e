"""Convolution with batch norm, layer norm over a map's channels, and frozen batch statistics.

Shapes: B batch, C channels, H W height and width. Keys and defaults are those of TinyViT
(Wu et al., ECCV 2022); ``LayerNorm2d`` is that of Segment Anything's neck.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Conv2d_BN", "LayerNorm2d", "freeze_batch_stats", "pause_batch_stats"]

M = TypeVar("M", bound=nn.Module)


class Conv2d_BN(nn.Sequential):
    """Convolution without bias (``c``), then batch norm (``bn``, eps 1e-5, momentum 0.1).

    Args:
        a: Input channels.
        b: Output channels.
        ks: Kernel side.
        stride: Stride.
        pad: Zero padding on each side.
        dilation: Dilation.
        groups: Groups; ``groups=a=b`` is a depthwise convolution.
        bn_weight_init: First value of the batch norm's weight; 0 makes a residual branch start
            as the identity.
    """

    frozen_stats: bool

    def __init__(
        self,
        a: int,
        b: int,
        ks: int = 1,
        stride: int = 1,
        pad: int = 0,
        dilation: int = 1,
        groups: int = 1,
        bn_weight_init: float = 1,
    ) -> None:
        super().__init__()
        self.frozen_stats = False
        self.c = nn.Conv2d(a, b, ks, stride, pad, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(b)
        nn.init.constant_(self.bn.weight, bn_weight_init)

    def train(self, mode: bool = True) -> Conv2d_BN:
        """Set the mode; frozen batch statistics stay in eval mode."""
        super().train(mode)
        if self.frozen_stats:
            self.bn.eval()
        return self


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a map: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position's channel vector."""
        x = x.permute(0, 2, 3, 1)  # [B, H, W, C]; a view of channels-last memory
        x = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Width and eps."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


def freeze_batch_stats(module: M, frozen: bool = True) -> M:
    """Keep the batch norms of every ``Conv2d_BN`` in ``module`` on their running statistics.

    ``requires_grad=False`` alone does not do that: in train mode a batch norm still uses and
    updates batch statistics, and a "frozen" model drifts. After this call ``train()`` leaves them
    in eval mode; weights and biases of the norms stay trainable. ``frozen=False`` undoes it.

    Returns:
        ``module`` itself.
    """
    for layer in module.modules():
        if isinstance(layer, Conv2d_BN):
            layer.frozen_stats = frozen
            layer.train(layer.training)
    return module


@contextmanager
def pause_batch_stats(module: nn.Module) -> Iterator[None]:
    """Compute with batch statistics as the mode says, but do not update the running ones.

    Gradient checkpointing runs a block's forward a second time; this keeps that second run from
    counting the same batch twice.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())  # this run may write here; then it is dropped
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)
