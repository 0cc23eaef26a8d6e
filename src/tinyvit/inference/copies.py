"""Copies of a model to run: frozen, or frozen with its norms folded and still of plain modules.

The folded copy is for GPUs, where whole maps go through public operators and torch's graphs take
away the cost of starting them; on a CPU ``deploy.py`` does better. Knows no device.

Shapes: W windows, T tokens of a window, C channels, h heads.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules import Attention, Conv2d_BN, TinyViT

from .fuse import Weights, fold_attention, fold_conv

__all__ = ["folded_copy", "frozen_copy"]


def frozen_copy(model: TinyViT) -> TinyViT:
    """A copy of the model on the CPU, in eval mode and float32, without gradients."""
    with torch.inference_mode(False):
        return copy.deepcopy(model).eval().requires_grad_(False).to("cpu", torch.float32)


def folded_copy(model: TinyViT) -> TinyViT:
    """A frozen copy: batch norms in their convolutions, biases looked up, channels-last weights.

    Args:
        model: A model that ``reason_against`` has nothing against; it is not changed.

    Returns:
        A TinyViT with the same values up to rounding, on the CPU and in float32, and with other
        keys: it is for running only.
    """
    frozen = frozen_copy(model)
    with torch.inference_mode(False), torch.no_grad():
        for module in list(frozen.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, Conv2d_BN):
                    setattr(module, name, _convolution(fold_conv(child), child.c))
                elif isinstance(child, Attention):
                    setattr(module, name, _FixedAttention(child))
        for module in frozen.modules():
            if isinstance(module, nn.Conv2d):
                channels_last = module.weight.contiguous(memory_format=torch.channels_last)
                module.weight = nn.Parameter(channels_last)
    return frozen.eval().requires_grad_(False)


def _convolution(weights: Weights, like: nn.Conv2d) -> nn.Conv2d:
    """``like`` with a bias and these weights."""
    groups, side = weights.groups, weights.weight.shape[-1]
    conv = nn.Conv2d(
        like.in_channels, like.out_channels, side, weights.stride, weights.pad, groups=groups
    )
    conv.weight.copy_(weights.weight)
    conv.bias = nn.Parameter(weights.bias)
    return conv


class _FixedAttention(nn.Module):
    """Attention with its norm's affine and its scale folded and its biases looked up, once."""

    bias: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        qkv, proj, bias = fold_attention(attention)
        self.heads, self.eps = attention.num_heads, attention.norm.eps
        self.qkv, self.proj = _linear(qkv), _linear(proj)
        self.register_buffer("bias", bias[None])  # [1, h, T, T]

    def forward(self, x: Tensor) -> Tensor:
        """[W, T, C] -> [W, T, C]."""
        qkv = self.qkv(F.layer_norm(x, x.shape[-1:], None, None, self.eps))
        q, k, v = torch.unflatten(qkv, 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


def _linear(weights: Weights) -> nn.Linear:
    linear = nn.Linear(weights.weight.shape[1], weights.weight.shape[0])
    linear.weight.copy_(weights.weight)
    linear.bias.copy_(weights.bias)
    return linear
