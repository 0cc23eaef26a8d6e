"""The layers and blocks of TinyViT: everything that its stages, stem and neck are made of.

Shapes: B batch, C channels, H W height and width, L = H*W tokens in row-major order, S window
side, N tokens of a window, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import (
    Size,
    activate,
    attend,
    is_tracing,
    partition,
    to_map,
    to_tokens,
    unpartition,
)

M = TypeVar("M", bound=nn.Module)

Activation = Callable[[], nn.Module]
"""A class (or function) without arguments that makes an activation module, e.g. ``nn.GELU``."""

Stem = Literal["conv", "pointwise"]

_STRIDE_1_WIDTHS = frozenset({320, 448, 576})


def to_pair(size: object, name: str) -> Size:
    """(height, width) from one positive whole number, or from a sequence of one or two."""
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


class Attention(nn.Module):
    """LayerNorm, then attention with relative-position biases: [B, N, C] -> [B, N, C].

    Args:
        dim: C.
        key_dim: Width of a head's query and key.
        num_heads: h.
        attn_ratio: A head's value is ``int(attn_ratio * key_dim)`` wide.
        resolution: (height, width) of the window, N = height * width.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        num_heads: int = 8,
        attn_ratio: float = 4,
        resolution: int | Size = (14, 14),
    ) -> None:
        super().__init__()
        self.resolution = to_pair(resolution, "resolution")
        self.num_heads = num_heads
        self.scale = key_dim**-0.5
        self.key_dim = key_dim
        self.nh_kd = key_dim * num_heads
        self.d = int(attn_ratio * key_dim)
        self.dh = self.d * num_heads
        self.attn_ratio = attn_ratio
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, self.dh + 2 * self.nh_kd)
        self.proj = nn.Linear(self.dh, dim)
        self.attention_biases = nn.Parameter(
            torch.zeros(num_heads, self.resolution[0] * self.resolution[1])
        )

    def bias(self) -> Tensor:
        """The bias of every pair of tokens, [h, N, N], gathered from ``attention_biases``."""
        height, width = self.resolution
        device = self.attention_biases.device
        rows = torch.arange(height, device=device)
        columns = torch.arange(width, device=device)
        dy = (rows[:, None] - rows).abs()  # [H, H]
        dx = (columns[:, None] - columns).abs()  # [W, W]
        index = dy[:, None, :, None] * width + dx[None, :, None, :]  # [H, W, H, W]
        tokens = height * width
        return self.attention_biases.index_select(1, index.flatten()).view(-1, tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within each window, [B, N, C] -> [B, N, C]; ValueError for another N."""
        batch, tokens, _ = x.shape
        height, width = self.resolution
        if not is_tracing() and tokens != height * width:
            raise ValueError(
                f"attention over a window of {height}x{width} wants {height * width} tokens, "
                f"got {tokens} in an input of shape {tuple(x.shape)}"
            )
        widths = (self.key_dim, self.key_dim, self.d)
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.num_heads, sum(widths))
        q, k, v = qkv.transpose(1, 2).split(widths, dim=-1)  # [B, h, N, .]
        bias = self.bias().to(q.dtype)[None]  # [1, h, N, N]
        y = attend(q, k, v, self.scale, bias)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, tokens, self.dh))
        return out

    def extra_repr(self) -> str:
        """Sizes that the children do not show."""
        return f"num_heads={self.num_heads}, key_dim={self.key_dim}, resolution={self.resolution}"


class MBConv(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1, add the input, activate.

    Args:
        in_chans: Input channels.
        out_chans: Output channels; must equal ``in_chans``, since the input is added.
        expand_ratio: Hidden channels are ``int(in_chans * expand_ratio)``.
        activation: Makes the activations.
        drop_path: Probability of leaving the branch out in training.

    Raises:
        ValueError: ``in_chans`` and ``out_chans`` differ, or no hidden channel is left.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        expand_ratio: float,
        activation: Activation,
        drop_path: float,
    ) -> None:
        super().__init__()
        if in_chans != out_chans:
            raise ValueError(
                f"MBConv adds its input to its output, so out_chans must equal in_chans; "
                f"got in_chans={in_chans}, out_chans={out_chans}"
            )
        if int(in_chans * expand_ratio) < 1:
            raise ValueError(
                f"expand_ratio must leave at least 1 hidden channel, got {expand_ratio} for "
                f"in_chans={in_chans}"
            )
        self.in_chans = in_chans
        self.out_chans = out_chans
        self.hidden_chans = int(in_chans * expand_ratio)
        self.conv1 = Conv2d_BN(in_chans, self.hidden_chans, ks=1)
        self.act1 = activation()
        self.conv2 = Conv2d_BN(
            self.hidden_chans, self.hidden_chans, ks=3, pad=1, groups=self.hidden_chans
        )
        self.act2 = activation()
        self.conv3 = Conv2d_BN(self.hidden_chans, out_chans, ks=1, bn_weight_init=0.0)
        self.act3 = activation()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        y = activate(self.act1, self.conv1(x))
        y = activate(self.act2, self.conv2(y))
        y = self.drop_path(self.conv3(y))
        return activate(self.act3, x + y)


class PatchEmbed(nn.Module):
    """Two convolutions that turn an image into a map of patch embeddings.

    Args:
        in_chans: Input channels.
        embed_dim: Output channels; the first convolution has half of them.
        resolution: Declared image size, one number or (height, width) in pixels.
        activation: Makes the activation between the two.
        stem: "conv" (3x3, stride 2, twice; a quarter of the size, rounded up) or "pointwise"
            (1x1, stride 1, twice; the same size: LiteMedSAM's stem).

    Raises:
        ValueError: Unknown ``stem``.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        resolution: int | Size,
        activation: Activation,
        stem: Stem = "conv",
    ) -> None:
        super().__init__()
        if stem not in ("conv", "pointwise"):
            raise ValueError(f"stem must be 'conv' or 'pointwise', got {stem!r}")
        ks, stride, pad = (3, 2, 1) if stem == "conv" else (1, 1, 0)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.reduction = stride * stride
        self.declare(to_pair(resolution, "resolution"))
        half = embed_dim // 2
        self.seq = nn.Sequential(
            Conv2d_BN(in_chans, half, ks, stride, pad),
            activation(),
            Conv2d_BN(half, embed_dim, ks, stride, pad),
        )

    def declare(self, resolution: Size) -> None:
        """Set the declared image size; ``forward`` does not depend on it."""
        self.patches_resolution: Size = (
            -(-resolution[0] // self.reduction),
            -(-resolution[1] // self.reduction),
        )
        self.num_patches = self.patches_resolution[0] * self.patches_resolution[1]

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, embed_dim, ceil(H/4), ceil(W/4)] (stem "conv")."""
        first, activation, second = self.seq
        y: Tensor = second(activate(activation, first(x)))
        return y


class PatchMerging(nn.Module):
    """Between two stages: change the width, and halve the size or keep it.

    Args:
        input_resolution: Declared (height, width) of the incoming map.
        dim: Input channels.
        out_dim: Output channels.
        activation: Makes the activations.
        stride: 1 or 2. None follows the rule of the published code, which tells SAM's last merge
            by its width: 1 if ``out_dim`` is 320, 448 or 576, else 2.
    """

    def __init__(
        self,
        input_resolution: Size,
        dim: int,
        out_dim: int,
        activation: Activation,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        if stride is None:
            stride = 1 if out_dim in _STRIDE_1_WIDTHS else 2
        self.input_resolution = to_pair(input_resolution, "input_resolution")
        self.dim = dim
        self.out_dim = out_dim
        self.stride = stride
        self.act = activation()
        self.conv1 = Conv2d_BN(dim, out_dim, 1)
        self.conv2 = Conv2d_BN(out_dim, out_dim, 3, stride, 1, groups=out_dim)
        self.conv3 = Conv2d_BN(out_dim, out_dim, 1)

    def output_size(self, size: Size) -> Size:
        """(height, width) of the outgoing map for an incoming one: ceil(n / stride)."""
        return (size[0] - 1) // self.stride + 1, (size[1] - 1) // self.stride + 1

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """A map [B, C, H, W] or its tokens [B, L, C] -> tokens [B, L', out_dim].

        ``size`` is the (height, width) of tokens, None means ``input_resolution``; a ValueError
        says that L does not fit it.
        """
        if x.ndim == 3:
            x = to_map(x, size or self.input_resolution).permute(0, 3, 1, 2)  # [B, C, H, W]
        x = activate(self.act, self.conv1(x))
        x = activate(self.act, self.conv2(x))
        x = self.conv3(x)
        return to_tokens(x)


class TinyViTBlock(nn.Module):
    """x + attention(x) in windows; local_conv(x); x + mlp(x).  [B, L, C] -> [B, L, C].

    Where the map is no multiple of the window, zeros are added at the bottom and right before the
    attention's LayerNorm and cropped afterwards, as all published TinyViT weights expect.

    Args:
        dim: C.
        input_resolution: Declared (height, width) of the map, used only for tokens that come
            without a size.
        num_heads: Heads; each is ``dim // num_heads`` wide.
        window_size: S.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        drop: Dropout probability in the MLP.
        drop_path: Probability of leaving out a residual branch in training.
        local_conv_size: Odd kernel side of the depthwise convolution.
        activation: Makes the MLP's activation.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``, the window is not positive, or
            ``local_conv_size`` is even.
    """

    def __init__(
        self,
        dim: int,
        input_resolution: int | Size,
        num_heads: int,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        local_conv_size: int = 3,
        activation: Activation = nn.GELU,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got dim={dim}, num_heads={num_heads}")
        if window_size < 1:
            raise ValueError(f"window_size must be positive, got {window_size}")
        if local_conv_size < 1 or local_conv_size % 2 == 0:
            raise ValueError(
                f"local_conv_size must be odd, so that the map keeps its size; "
                f"got {local_conv_size}"
            )
        self.dim = dim
        self.input_resolution = to_pair(input_resolution, "input_resolution")
        self.num_heads = num_heads
        self.window_size = window_size
        self.mlp_ratio = mlp_ratio
        self.attn = Attention(
            dim, dim // num_heads, num_heads, attn_ratio=1, resolution=(window_size, window_size)
        )
        self.drop_path = DropPath(drop_path)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=activation, drop=drop)
        self.local_conv = Conv2d_BN(
            dim, dim, ks=local_conv_size, stride=1, pad=local_conv_size // 2, groups=dim
        )

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Tokens [B, L, C] of a map of ``size`` -> [B, L, C].

        ``size`` is (height, width), None means ``input_resolution``; a ValueError says that L is
        not height * width.
        """
        size = size or self.input_resolution
        x = to_map(x, size)  # [B, H, W, C]
        batch = x.shape[0]
        windows = self.attn(partition(x, self.window_size))
        x = x + self.drop_path(unpartition(windows, self.window_size, batch, size))
        x = self.local_conv(x.permute(0, 3, 1, 2))  # [B, C, H, W]
        x = to_tokens(x)
        y: Tensor = x + self.drop_path(self.mlp(x))
        return y

    def extra_repr(self) -> str:
        """The arguments that the children do not show."""
        return (
            f"dim={self.dim}, input_resolution={self.input_resolution}, "
            f"num_heads={self.num_heads}, window_size={self.window_size}, "
            f"mlp_ratio={self.mlp_ratio}"
        )
