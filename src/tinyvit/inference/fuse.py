"""Folding: a trained TinyViT's norms, scales and biases as plain weights and biases.

Everything that is affine and stands next to a matrix product goes into it: batch norm into its
convolution, LayerNorm's affine into the linear layer behind it, the attention's scale into q. What
cannot be folded stays (the mean and the variance of LayerNorm). Computed in float64, given in
float32. Not folded: the pictures' mean and standard deviation into the stem, since the zero
padding at the borders would then mean another colour.

Shapes: C channels, N outputs, K inputs, k kernel side, h heads, T tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyvit.modules import Attention, Conv2d_BN, TinyViT

__all__ = ["Weights", "fold_attention", "fold_bare", "fold_conv", "fold_linear", "reason_against"]


@dataclass(frozen=True)
class Weights:
    """One matrix product or convolution: weight [N, K] or [N, C/groups, k, k], bias [N]."""

    weight: Tensor
    bias: Tensor
    stride: int = 1
    pad: int = 0
    groups: int = 1


def fold_conv(layer: Conv2d_BN) -> Weights:
    """Convolution and batch norm as one convolution with a bias."""
    conv, norm = layer.c, layer.bn
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    scale = norm.weight.double() / (var.double() + norm.eps).sqrt()
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = norm.bias.double() - mean.double() * scale
    return Weights(weight.float(), bias.float(), conv.stride[0], int(conv.padding[0]), conv.groups)


def fold_bare(conv: nn.Conv2d) -> Weights:
    """A convolution that no batch norm follows."""
    weight = conv.weight.detach().clone().float()
    bias = torch.zeros_like(weight[:, 0, 0, 0])
    if conv.bias is not None:
        bias += conv.bias.detach()
    return Weights(weight, bias, conv.stride[0], int(conv.padding[0]), conv.groups)


def fold_linear(linear: nn.Linear, norm: nn.LayerNorm | None = None) -> Weights:
    """A linear layer, with the affine of the LayerNorm in front of it."""
    weight = linear.weight.double()
    bias = torch.zeros_like(weight[:, 0]) if linear.bias is None else linear.bias.double()
    if norm is not None:
        bias = bias + weight @ norm.bias.double()
        weight = weight * norm.weight.double()
    return Weights(weight.float(), bias.float())


def fold_attention(attention: Attention) -> tuple[Weights, Weights, Tensor]:
    """The folded qkv and proj, and the bias of every pair of tokens.

    Returns:
        (qkv with LayerNorm and scale inside, its rows in the order q of all heads, k of all heads,
        v of all heads; proj; bias [h, T, T]).
    """
    qkv = fold_linear(attention.qkv, attention.norm)
    heads, key_dim, d = attention.num_heads, attention.key_dim, attention.d
    widths = [key_dim, key_dim, d]
    weights = torch.split(qkv.weight.view(heads, sum(widths), -1), widths, dim=1)
    biases = torch.split(qkv.bias.view(heads, sum(widths)), widths, dim=1)
    scales = (attention.scale, 1.0, 1.0)
    weight = torch.cat([w.flatten(0, 1) * s for w, s in zip(weights, scales, strict=True)])
    bias = torch.cat([b.flatten() * s for b, s in zip(biases, scales, strict=True)])
    return Weights(weight, bias), fold_linear(attention.proj), attention.bias().detach().float()


def reason_against(model: TinyViT) -> str | None:
    """Why a model cannot be folded, or None if it can.

    Only the network as this package builds it is folded: a module of another class, another
    activation or a hook changes what the model computes, and a folded copy would not follow.
    """
    plain = {nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.Dropout, nn.Identity}
    containers = {nn.Sequential, nn.ModuleList}
    for name, module in model.named_modules():
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook"
        if kind is nn.GELU:
            if module.approximate != "none":
                return f"{name} is an approximate GELU"
        elif not (
            kind in plain or kind in containers or kind.__module__.startswith("tinyvit.modules.")
        ):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
    return None
