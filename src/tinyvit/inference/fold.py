"""Folding: a trained TinyViT's norms, scales and biases as plain weights and biases.

Everything that is affine and stands next to a matrix product goes into it: batch norm into its
convolution, LayerNorm's affine into the linear layer behind it, the attention's scale into q. What
cannot be folded stays (the mean and the variance of LayerNorm). Computed in float64, given in
float32. Not folded: the images' mean and standard deviation into the stem, since the zero
padding at the borders would then mean another colour.

Shapes: C channels, N outputs, K inputs, k kernel side, h heads, T tokens of a window.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules import Attention, Conv2d_BN, TinyViT


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


pass


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
