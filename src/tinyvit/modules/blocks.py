"""Mobile inverted bottleneck convolution (Sandler et al., CVPR 2018), the block of stage 1."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from .attention import Attention
from .layers import Activation, Conv2d_BN, DropPath, Mlp, activate
from .windows import Size, partition, to_map, to_pair, to_tokens, unpartition


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


Stem = Literal["conv", "pointwise"]

_STRIDE_1_WIDTHS = frozenset({320, 448, 576})


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
        """Merge a map or its tokens.

        Args:
            x: A map [B, C, H, W], or tokens [B, L, C].
            size: (height, width) of tokens; None means ``input_resolution``.

        Returns:
            Tokens [B, L', out_dim].

        Raises:
            ValueError: The number of tokens does not fit the size.
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
        mlp_ratio: Hidden width of the perceptron over ``dim``.
        drop: Dropout probability in the perceptron.
        drop_path: Probability of leaving out a residual branch in training.
        local_conv_size: Odd kernel side of the depthwise convolution.
        activation: Makes the perceptron's activation.

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
        self.drop_path = DropPath(drop_path)
        self.attn = Attention(
            dim, dim // num_heads, num_heads, attn_ratio=1, resolution=(window_size, window_size)
        )
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=activation, drop=drop)
        self.local_conv = Conv2d_BN(
            dim, dim, ks=local_conv_size, stride=1, pad=local_conv_size // 2, groups=dim
        )

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Run the block.

        Args:
            x: [B, L, C].
            size: (height, width) of the map; None means ``input_resolution``.

        Returns:
            [B, L, C].

        Raises:
            ValueError: L is not height * width.
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
