"""The two-way transformer of Segment Anything (Kirillov et al., 2023): cross attention both ways.

Shapes: B prompts, T tokens of a prompt, L = h * w image tokens, C channels.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from tinyvit.modules.functional import attend


class Attention(nn.Module):
    """Attention of queries, keys and values of ``embedding_dim // downsample_rate`` channels."""

    def __init__(self, embedding_dim: int, num_heads: int, downsample_rate: int = 1) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.internal_dim = embedding_dim // downsample_rate
        self.num_heads = num_heads
        if self.internal_dim % num_heads:
            raise ValueError(
                f"num_heads must divide embedding_dim // downsample_rate = {self.internal_dim}, "
                f"got {num_heads}"
            )
        self.q_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.k_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.v_proj = nn.Linear(embedding_dim, self.internal_dim)
        self.out_proj = nn.Linear(self.internal_dim, embedding_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries [B, Tq, C] to keys and values [B, Tk, C] -> [B, Tq, C]."""
        width = self.internal_dim // self.num_heads
        q, k, v = (  # [B, heads, T, C']
            x.reshape(x.shape[0], x.shape[1], self.num_heads, width).transpose(1, 2)
            for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v))
        )
        out = attend(q, k, v, width**-0.5)
        return cast(Tensor, self.out_proj(out.transpose(1, 2).flatten(2)))


class _MLPBlock(nn.Module):
    """Two linear layers, under Segment Anything's key names."""

    def __init__(self, embedding_dim: int, mlp_dim: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.lin1 = nn.Linear(embedding_dim, mlp_dim)
        self.lin2 = nn.Linear(mlp_dim, embedding_dim)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.lin2(self.act(self.lin1(x))))


class TwoWayAttentionBlock(nn.Module):
    """Tokens to tokens, tokens to image, MLP on the tokens, image to tokens.

    ``skip_first_layer_pe`` leaves the position out of the first attention, and its residual too:
    the first block's tokens are their own positions.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int = 2048,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
        skip_first_layer_pe: bool = False,
    ) -> None:
        super().__init__()
        rate = attention_downsample_rate
        self.self_attn = Attention(embedding_dim, num_heads)
        self.norm1 = nn.LayerNorm(embedding_dim)
        self.cross_attn_token_to_image = Attention(embedding_dim, num_heads, rate)
        self.norm2 = nn.LayerNorm(embedding_dim)
        self.mlp = _MLPBlock(embedding_dim, mlp_dim, activation)
        self.norm3 = nn.LayerNorm(embedding_dim)
        self.norm4 = nn.LayerNorm(embedding_dim)
        self.cross_attn_image_to_token = Attention(embedding_dim, num_heads, rate)
        self.skip_first_layer_pe = skip_first_layer_pe

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, T, C], image tokens [B, L, C] and the positions of each -> both."""
        if self.skip_first_layer_pe:
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_pe
            queries = queries + self.self_attn(q, q, queries)
        queries = self.norm1(queries)
        k = keys + key_pe
        queries = queries + self.cross_attn_token_to_image(queries + query_pe, k, keys)
        queries = self.norm2(queries)
        queries = self.norm3(queries + self.mlp(queries))
        keys = keys + self.cross_attn_image_to_token(k, queries + query_pe, queries)
        return queries, self.norm4(keys)


class TwoWayTransformer(nn.Module):
    """Blocks of both ways, then a last attention of the tokens to the image.

    Args:
        depth: Blocks.
        embedding_dim: Channels C.
        num_heads: Heads of all attentions.
        mlp_dim: Hidden width of the MLPs.
        activation: Class of the MLPs' activation.
        attention_downsample_rate: C over the inner width of the attentions across.
    """

    def __init__(
        self,
        depth: int,
        embedding_dim: int,
        num_heads: int,
        mlp_dim: int,
        activation: type[nn.Module] = nn.ReLU,
        attention_downsample_rate: int = 2,
    ) -> None:
        super().__init__()
        rate = attention_downsample_rate
        self.depth = depth
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.mlp_dim = mlp_dim
        self.layers = nn.ModuleList(
            TwoWayAttentionBlock(embedding_dim, num_heads, mlp_dim, activation, rate, index == 0)
            for index in range(depth)
        )
        self.final_attn_token_to_image = Attention(embedding_dim, num_heads, rate)
        self.norm_final_attn = nn.LayerNorm(embedding_dim)

    def forward(
        self, image_embedding: Tensor, image_pe: Tensor, point_embedding: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Let tokens and image attend to each other.

        Args:
            image_embedding: [B, C, h, w].
            image_pe: [B or 1, C, h, w], positions of the image tokens.
            point_embedding: [B, T, C], the tokens; they are their own positions.

        Returns:
            (tokens [B, T, C], image tokens [B, h * w, C], row by row).
        """
        keys = image_embedding.flatten(2).transpose(1, 2)  # [B, L, C]
        key_pe = image_pe.flatten(2).transpose(1, 2)
        queries = point_embedding
        for layer in self.layers:
            queries, keys = layer(queries, keys, point_embedding, key_pe)
        out = self.final_attn_token_to_image(queries + point_embedding, keys + key_pe, keys)
        queries = self.norm_final_attn(queries + out)
        return queries, keys
