"""The two modules that change resolution: PatchEmbed (the stem) and PatchMerging.

Shapes: B batch, C channels, H W height and width, L = H*W tokens in row-major order. Sizes come
from the tensor; ``resolution`` / ``input_resolution`` are only what a module was declared for, and
serve callers who pass tokens without their size.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from .activate import activate
from .conv import Conv2d_BN
from .mlp import Activation
from .windows import Size, to_map, to_pair, to_tokens

__all__ = ["PatchEmbed", "PatchMerging", "Stem"]

Stem = Literal["conv", "pointwise"]

_STRIDE_1_WIDTHS = frozenset({320, 448, 576})


class PatchEmbed(nn.Module):
    """Two convolutions that turn a picture into a map of patch embeddings.

    Args:
        in_chans: Input channels.
        embed_dim: Output channels; the first convolution has half of them.
        resolution: Declared picture size, one number or (height, width) in pixels.
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
        """Set the declared picture size; ``forward`` does not depend on it."""
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
