"""Stochastic depth (Huang et al., ECCV 2016): a residual branch is left out at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .windows import is_tracing


class DropPath(nn.Module):
    """In training, zero a sample's whole branch with probability ``drop_prob``.

    What stays is divided by the probability of staying, so the expectation is unchanged.
    In eval mode, and at probability 0, the input is returned as it is.

    Raises:
        ValueError: ``drop_prob`` is outside [0, 1].
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"drop_path must be a probability between 0 and 1, got {drop_prob}")
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [B, ...]."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        if self.drop_prob == 1.0:
            return x * 0.0
        keep = 1.0 - self.drop_prob
        mask = torch.empty((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """The probability."""
        return f"drop_prob={self.drop_prob:g}"


def drop_path_rates(drop_path: float | Sequence[float], depth: int) -> list[float]:
    """One rate for each of ``depth`` blocks, from one number or a sequence of ``depth`` numbers.

    Raises:
        ValueError: The sequence has another length.
    """
    if isinstance(drop_path, Sequence):
        if len(drop_path) != depth:
            raise ValueError(
                f"drop_path wants one rate for each of the {depth} blocks, got {len(drop_path)}: "
                f"{list(drop_path)}; pass {depth} rates or a single number"
            )
        return [float(rate) for rate in drop_path]
    return [float(drop_path)] * depth


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


def activate(activation: nn.Module, x: Tensor) -> Tensor:
    """``activation(x)`` for a map.

    Args:
        activation: Any; only ``nn.GELU`` is called another way.
        x: [B, C, H, W] in either memory order.

    Returns:
        [B, C, H, W], in the same order.
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


Activation = Callable[[], nn.Module]
"""A class (or function) without arguments that makes an activation module, e.g. ``nn.GELU``."""


class Mlp(nn.Module):
    """``norm`` -> ``fc1`` -> ``act`` -> ``drop`` -> ``fc2`` -> ``drop``; [..., in] -> [..., out].

    Args:
        in_features: Input width.
        hidden_features: Hidden width; None means ``in_features``.
        out_features: Output width; None means ``in_features``.
        act_layer: Makes the activation.
        drop: Dropout probability in training.
        activation: Another name for ``act_layer``, as later copies of the file spell it.

    Raises:
        ValueError: ``hidden_features`` is below 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Activation = nn.GELU,
        drop: float = 0.0,
        *,
        activation: Activation | None = None,
    ) -> None:
        super().__init__()
        hidden_features = in_features if hidden_features is None else hidden_features
        if hidden_features < 1:
            raise ValueError(f"hidden_features must be at least 1, got {hidden_features}")
        self.norm = nn.LayerNorm(in_features)
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.act = (activation or act_layer)()
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        x = self.drop(self.act(self.fc1(self.norm(x))))
        y: Tensor = self.drop(self.fc2(x))
        return y


MLP = Mlp


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
