"""Multi-head self-attention with a learned bias for each relative position.

Shapes: B batch (or batch times windows), N tokens, C channels, h heads. The bias of two tokens p
and q depends only on how far apart they are, (|dy|, |dx|): it is looked up in the parameter
``attention_biases`` at every call. Nothing derived from the parameter is kept, so loading, EMA,
casts and in-place changes always take effect, and the parameter gets gradients in every mode.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import attend
from .windows import Size, is_tracing, to_pair


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
        """Attend within each window.

        Args:
            x: [B, N, C] with N = height * width of ``resolution``.

        Returns:
            [B, N, C].

        Raises:
            ValueError: N is another number.
        """
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
