"""Cross attention between few tokens and many cells, with weights moved to the side of the few.

A head's score q . (W k) equals (W^T q) . k, and sum(p W v) equals W sum(p v). So nothing is ever
projected for every cell of every prompt. Where the cells are the same for all prompts (the first
layer), they are projected once instead. The bias of the keys moves all scores of a row alike;
softmax does not see it, and it is left out.

Tensors in, tensors out; without gradients.

Shapes: n prompts, C channels, L cells, T tokens of a prompt, H heads, d a head's width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .transformer import Attention

__all__ = ["ImageToToken", "TokenToImage", "in_tiles", "softmax"]

TILE = 1024
"""Cells worked on at once: with 256 channels 1 MiB, which stays in a core's own cache."""


LEAST_WEIGHT = 1e-30
"""Weights below it count as 0. Processors multiply numbers near the smallest ones (1e-38) ten to a
hundred times slower, and a distinct softmax over thousands of cells has many of those."""


def in_tiles(cells: int) -> Iterator[slice]:
    """Cut so many cells into tiles, in order."""
    for start in range(0, cells, TILE):
        yield slice(start, min(start + TILE, cells))


def softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax without weights so small that they only cost time."""
    return F.threshold(torch.softmax(scores, dim), LEAST_WEIGHT, 0.0, inplace=True)


class _Heads:
    """What both directions have in common: weights by head."""

    def __init__(self, attention: Attention) -> None:
        self.heads = attention.num_heads
        self.attention = attention
        width = attention.q_proj.out_features // self.heads
        self.scale = width**-0.5

    def _by_head(self, weight: Tensor) -> Tensor:
        """[H*d, C] -> [H, d, C]."""
        return torch.unflatten(weight, 0, (self.heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        """[n, T, H*d] -> [n, H, T, d]."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)

    def _columns(self, x: Tensor) -> Tensor:
        """[L, H*d] -> [H, d, L]."""
        return torch.unflatten(x, 1, (self.heads, -1)).permute(1, 2, 0).contiguous()


class TokenToImage(_Heads):
    """Tokens look at cells.

    Args:
        attention: The trained attention, frozen.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.to_key = self._by_head(attention.k_proj.weight)
        self.to_value = self._by_head(attention.v_proj.weight)
        self.value_bias = attention.v_proj.bias

    def queries(self, tokens: Tensor) -> Tensor:
        """[n, T, C] -> scaled queries [n, H, T, d]."""
        return self._split(self.attention.q_proj(tokens) * self.scale)

    def project(self, cells: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        """Cells [L, C], without and with their positions -> keys [H, d, L], values [H, L, d]."""
        values = torch.unflatten(self.attention.v_proj(cells), 1, (self.heads, -1)).transpose(0, 1)
        return self.project_positions(placed), values.contiguous()

    def project_positions(self, positions: Tensor) -> Tensor:
        """[L, C] -> what they add to the keys, [H, d, L]."""
        return self._columns(positions @ self.attention.k_proj.weight.T)

    def attend_shared(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention to cells that all prompts share.

        Args:
            tokens: Queries before their projection, [n, T, C].
            keys: [H, d, L].
            values: [H, L, d].

        Returns:
            [n, T, C].
        """
        count = tokens.shape[0]
        queries = self.queries(tokens).transpose(0, 1).flatten(1, 2)  # [H, n*T, d]
        scores = softmax(queries @ keys, dim=2)  # [H, n*T, L]
        given = torch.unflatten(scores @ values, 1, (count, -1)).permute(1, 2, 0, 3)  # [n, T, H, d]
        out: Tensor = self.attention.out_proj(given.flatten(2))
        return out

    def attend(self, tokens: Tensor, cells: list[Tensor], positions: Tensor) -> Tensor:
        """Attention to cells of each prompt's own.

        Args:
            tokens: Queries before their projection, [n, T, C].
            cells: [L, C] of each prompt, without positions.
            positions: What positions add to the keys, [H, d, L].

        Returns:
            [n, T, C].
        """
        queries = self.queries(tokens)
        rows = (queries @ self.to_key).flatten(1, 2)  # [n, H*T, C]
        sums = []
        for row, query, own in zip(rows, queries, cells, strict=True):
            scores = torch.unflatten(row @ own.T, 0, (self.heads, -1))  # [H, T, L]
            scores = softmax(scores.baddbmm_(query, positions), dim=2)
            sums.append(scores.flatten(0, 1) @ own)  # [H*T, C]
        by_head = torch.unflatten(torch.stack(sums), 1, (self.heads, -1))  # [n, H, T, C]
        given = (by_head @ self.to_value.transpose(1, 2)).transpose(1, 2).flatten(2)
        out: Tensor = self.attention.out_proj(given + self.value_bias)
        return out


class ImageToToken(_Heads):
    """Cells look at tokens.

    Args:
        attention: The trained attention, frozen.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.to_query = self._by_head(attention.q_proj.weight)
        self.to_out = self._by_head(attention.out_proj.weight.T)  # [H, d, C]
        self.part_of_bias = attention.out_proj.bias / self.heads  # a head's weights sum to 1

    def project(self, placed: Tensor) -> Tensor:
        """Cells with their positions, or positions alone, [L, C] -> queries [H, d, L]."""
        return self._columns(self.attention.q_proj(placed))

    def _keys_and_values(self, placed: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, T, C] with and without positions -> keys [n, H, T, d], values [n, H*T, C]."""
        keys = self._split(self.attention.k_proj(placed) * self.scale)
        values = self._split(self.attention.v_proj(tokens)) @ self.to_out  # [n, H, T, C]
        return keys, values.flatten(1, 2) + self.part_of_bias

    def weigh_shared(
        self, placed: Tensor, tokens: Tensor, queries: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each prompt weights [H*T, L] and values [H*T, C], for cells that all share.

        Args:
            placed: Tokens with their positions, [n, T, C].
            tokens: Tokens, [n, T, C].
            queries: Of the cells, [H, d, L].

        Yields:
            (weights, values): the cells get weights^T @ values.
        """
        keys, values = self._keys_and_values(placed, tokens)
        for key, value in zip(keys, values, strict=True):
            yield softmax(key @ queries, dim=1).flatten(0, 1), value

    def weigh(
        self, placed: Tensor, tokens: Tensor, cells: list[Tensor], positions: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``weigh_shared``, for cells of each prompt's own.

        Args:
            placed: Tokens with their positions, [n, T, C].
            tokens: Tokens, [n, T, C].
            cells: [L, C] of each prompt, without positions.
            positions: Queries of the positions alone, bias included, [H, d, L].

        Yields:
            (weights [H*T, L], values [H*T, C]).
        """
        keys, values = self._keys_and_values(placed, tokens)
        rows = (keys @ self.to_query).flatten(1, 2)  # [n, H*T, C]
        for key, row, value, own in zip(keys, rows, values, cells, strict=True):
            scores = torch.unflatten(row @ own.T, 0, (self.heads, -1))  # [H, T, L]
            scores = softmax(scores.baddbmm_(key, positions), dim=1)
            yield scores.flatten(0, 1), value
