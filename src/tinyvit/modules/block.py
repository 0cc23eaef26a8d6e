"""The transformer block: window attention, a depthwise convolution, a perceptron.

Shapes: B batch, L = H*W tokens in row-major order, C channels, S window side.
"""

from __future__ import annotations

from torch import Tensor, nn

from .attention import Attention
from .conv import Conv2d_BN
from .drop import DropPath
from .mlp import Activation, Mlp
from .windows import Size, partition, to_map, to_pair, to_tokens, unpartition

__all__ = ["TinyViTBlock"]


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
