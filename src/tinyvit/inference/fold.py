"""Folding: a trained TinyViT's norms, scales and biases as plain weights and biases, on numpy.

Everything that is affine and stands next to a matrix product goes into it: batch norm into its
convolution, LayerNorm's affine into the linear layer behind it, the attention's scale into q. What
cannot be folded stays (the mean and the variance of LayerNorm). Computed in float64, given in
float32. Not folded: the images' mean and standard deviation into the stem, since the zero
padding at the borders would then mean another colour.

Arrays come by the names of the model's state dict. Shapes: C channels, N outputs, K inputs, k
kernel side, h heads, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Arrays = Mapping[str, NDArray[np.floating]]

NORM = ("weight", "bias", "running_mean", "running_var")
EPS = 1e-5
"""Of a TinyViT's batch norms."""


class Weights(NamedTuple):
    """One matrix product or convolution: weight [N, K] or [N, C/groups, k, k], bias [N]."""

    weight: Array
    bias: Array
    stride: int = 1
    pad: int = 0
    groups: int = 1


def fold_conv(
    arrays: Arrays, name: str, stride: int = 1, *, depthwise: bool = False, eps: float = EPS
) -> Weights:
    """The convolution ``name.c`` and the batch norm ``name.bn`` as one convolution with a bias."""
    if f"{name}.bn.running_var" not in arrays:
        raise ValueError("a batch norm without running statistics cannot be folded")
    gain, shift, mean, var = (_exact(arrays[f"{name}.bn.{part}"]) for part in NORM)
    scale = gain / np.sqrt(var + eps)
    weight = _exact(arrays[f"{name}.c.weight"]) * scale[:, None, None, None]
    bias = shift - mean * scale
    groups = len(weight) if depthwise else 1
    return Weights(_rounded(weight), _rounded(bias), stride, weight.shape[-1] // 2, groups)


def fold_bare(arrays: Arrays, name: str) -> Weights:
    """A convolution that no batch norm follows, padded to keep the size."""
    weight = _exact(arrays[f"{name}.weight"])
    bias = arrays.get(f"{name}.bias", np.zeros(len(weight)))
    return Weights(_rounded(weight), _rounded(bias), pad=weight.shape[-1] // 2)


def fold_linear(arrays: Arrays, name: str, norm: str | None = None) -> Weights:
    """A linear layer, with the affine of the LayerNorm in front of it."""
    weight = _exact(arrays[f"{name}.weight"])
    bias = _exact(arrays.get(f"{name}.bias", np.zeros(len(weight))))
    if norm is not None:
        bias = bias + weight @ _exact(arrays[f"{norm}.bias"])
        weight = weight * _exact(arrays[f"{norm}.weight"])
    return Weights(_rounded(weight), _rounded(bias))


def fold_attention(
    arrays: Arrays, name: str, key_dim: int, resolution: tuple[int, int]
) -> tuple[Weights, Weights, Array]:
    """The folded qkv and proj of an attention, and the bias of every pair of tokens, [h, T, T].

    qkv has LayerNorm and scale inside, its rows in the order q of all heads, k of all heads, v of
    all heads. ``resolution`` is (height, width) of the window.
    """
    biases = arrays[f"{name}.attention_biases"]
    heads = len(biases)
    qkv = fold_linear(arrays, f"{name}.qkv", f"{name}.norm")
    rows = qkv.bias.size // heads
    by_head = np.arange(qkv.bias.size).reshape(heads, rows)
    order = [by_head[:, :key_dim], by_head[:, key_dim : 2 * key_dim], by_head[:, 2 * key_dim :]]
    index = np.concatenate([part.ravel() for part in order])
    weight, bias = qkv.weight[index], qkv.bias[index]
    for array in (weight, bias):
        array[: heads * key_dim] *= np.float32(key_dim**-0.5)
    y, x = (part.ravel() for part in np.indices(resolution))
    pairs = np.abs(y[:, None] - y) * resolution[1] + np.abs(x[:, None] - x)  # [T, T]
    return Weights(weight, bias), fold_linear(arrays, f"{name}.proj"), _rounded(biases[:, pairs])


def _exact(array: NDArray[np.floating]) -> NDArray[np.float64]:
    return array.astype(np.float64)


def _rounded(array: NDArray[np.floating]) -> Array:
    """Float32, and never the model's own memory."""
    return np.array(array, np.float32)
