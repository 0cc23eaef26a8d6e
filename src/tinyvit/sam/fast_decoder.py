"""Cross attention between few tokens and many cells, with weights moved to the side of the few.

A head's score q . (W k) equals (W^T q) . k, and sum(p W v) equals W sum(p v). So nothing is ever
projected for every cell of every prompt. Where the cells are the same for all prompts (the first
layer), they are projected once instead. The bias of the keys moves all scores of a row alike;
softmax does not see it, and it is left out.

Tensors in, tensors out; without gradients.

Shapes: n prompts, C channels, L cells, T tokens of a prompt, H heads, d a head's width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules import LayerNorm2d
from tinyvit.modules.sam.mask_decoder import MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.modules.sam.transformer import Attention, TwoWayAttentionBlock, TwoWayTransformer

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


pass


CHUNK_CELLS = 8 * 64 * 64
"""Cells of all prompts that are computed together, about; 1 kB each with 256 channels."""

Points = tuple[Tensor, Tensor]
_Module = TypeVar("_Module", bound=nn.Module)


@dataclass(frozen=True)
class SharedImage:
    """What all prompts on one image share; ``DeployedMaskDecoder.look`` makes it.

    Attributes:
        size: (h, w) of the embedding.
        tokens: [L, C]: embedding and dense prompt.
        keys: [H, d, L], values: [H, L, d], queries: [H, d, L]: projections of the first layer.
    """

    size: tuple[int, int]
    tokens: Tensor
    keys: Tensor
    values: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Decoded:
    """Masks of many prompts, in the order of (prompt, token).

    Attributes:
        low_res_logits: [M, 4h, 4w] float32.
        iou_predictions: [M] float32.
        prompts: [M] int64: of which prompt.
        tokens: [M] int64: which of the prompt's masks, from 0.
    """

    low_res_logits: Tensor
    iou_predictions: Tensor
    prompts: Tensor
    tokens: Tensor


class DeployedMaskDecoder:
    """Prompt encoder and mask decoder, frozen: one look at an image, many prompts.

    The modules are copied; when they change, make a new one (see ``ModelWatch``).

    Args:
        prompt_encoder: The trained prompt encoder.
        mask_decoder: The trained mask decoder.
        device: Where to compute.
        dtype: In which precision; float64 is three times slower, and exact to the last digit of
            the float32 numbers that come back.

    Raises:
        TypeError: ``mask_decoder`` is of a kind that is not known here (Light HQ-SAM's).
    """

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if type(mask_decoder) is not MaskDecoder:
            kind = type(mask_decoder).__name__
            raise TypeError(f"only a MaskDecoder can be deployed; came {kind}; call it as it is")
        self.device = device
        self.dtype = dtype
        self._prompts = _frozen(prompt_encoder, device, dtype)
        decoder = _frozen(mask_decoder, device, dtype)
        transformer = decoder.transformer
        if not isinstance(transformer, TwoWayTransformer):
            raise TypeError(f"wanted a TwoWayTransformer; came {type(transformer).__name__}")
        blocks = [b for b in transformer.layers if isinstance(b, TwoWayAttentionBlock)]
        self._layers = [_Layer(block) for block in blocks]
        self._last = TokenToImage(transformer.final_attn_token_to_image)
        self._last_norm = transformer.norm_final_attn
        self._output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        self._iou_head = decoder.iou_prediction_head
        self._hypers = list(decoder.output_hypernetworks_mlps)
        self._upscale = _Upscale(decoder.output_upscaling)
        self._positions: dict[tuple[int, int], _Positions] = {}

    @torch.inference_mode()
    def look(self, image_embedding: Tensor, masks: Tensor | None = None) -> list[SharedImage]:
        """Compute what all prompts on an image share.

        Args:
            image_embedding: [1, C, h, w], or [C, h, w].
            masks: Low-resolution logits [N, 1, 4h, 4w] of earlier answers; None for none.

        Returns:
            One for all prompts; with masks, one for each.

        Raises:
            ValueError: Another shape.
        """
        x = image_embedding if image_embedding.ndim == 4 else image_embedding[None]
        if x.ndim != 4 or x.shape[0] != 1:
            raise ValueError(
                f"wanted the embedding of one image, [1, C, h, w]; "
                f"came {list(image_embedding.shape)}"
            )
        x = x.to(self.device, self.dtype)
        size = int(x.shape[2]), int(x.shape[3])
        if masks is not None:
            masks = masks.to(self.device, self.dtype)
        _, dense = self._prompts(points=None, boxes=None, masks=masks, embedding_size=size)
        positions = self._positions_of(size)
        first = self._layers[0]
        images = []
        for one in dense:
            tokens = (x[0] + one).flatten(1).T.contiguous()  # [L, C]
            placed = tokens + positions.cells
            keys, values = first.to_image.project(tokens, placed)
            queries = first.to_tokens.project(placed)
            images.append(SharedImage(size, tokens, keys, values, queries))
        return images

    @torch.inference_mode()
    def decode(
        self,
        shared: list[SharedImage],
        points: Points | None = None,
        boxes: Tensor | None = None,
        multimask_output: bool = True,
        wanted: Callable[[Tensor], Tensor] | None = None,
    ) -> Decoded:
        """Decode prompts.

        Args:
            shared: What ``look`` gave.
            points: ([N, P, 2] in the model's frame, labels [N, P]); None for none.
            boxes: [N, 4] xyxy in the model's frame; None for none.
            multimask_output: Give three masks of a prompt, else one.
            wanted: Gets the predicted IoU [n, K] of some prompts and gives bool [n, K]; masks that
                are not wanted are not computed. None wants all.

        Returns:
            The masks.

        Raises:
            ValueError: The numbers of prompts differ.
        """
        sparse = self._sparse(shared[0].size, points, boxes)
        prompts = sparse.shape[0] if points is not None or boxes is not None else len(shared)
        sparse = sparse.expand(prompts, -1, -1)
        if len(shared) not in (1, prompts):
            raise ValueError(f"{prompts} prompts do not go with {len(shared)} masks")
        cells = shared[0].size[0] * shared[0].size[1]
        step = max(CHUNK_CELLS // cells, 1) if len(shared) == 1 else 1
        masks = [torch.empty(0, *_logits_size(shared[0].size), device=self.device)]
        scores, numbers, tokens = [torch.empty(0, device=self.device)], [], []
        for start in range(0, prompts, step):
            image = shared[0] if len(shared) == 1 else shared[start]
            few = sparse[start : start + step]
            logits, iou, chosen = self._chunk(image, few, multimask_output, wanted)
            masks.append(logits)
            scores.append(iou[chosen].float())
            where = chosen.nonzero()  # [m, 2]
            numbers.append(where[:, 0] + start)
            tokens.append(where[:, 1])
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        return Decoded(*map(torch.cat, (masks, scores, [none, *numbers], [none, *tokens])))

    def _sparse(self, size: tuple[int, int], points: Points | None, boxes: Tensor | None) -> Tensor:
        """Sparse prompt embeddings [N, P, C]."""
        if points is not None:
            points = points[0].to(self.device, self.dtype), points[1].to(self.device)
        if boxes is not None:
            boxes = boxes.to(self.device, self.dtype)
        sparse: Tensor = self._prompts(points=points, boxes=boxes, masks=None, embedding_size=size)[
            0
        ]
        return sparse

    def _positions_of(self, size: tuple[int, int]) -> _Positions:
        """The position encoding of a grid and its projections; kept for the last few grids."""
        if size not in self._positions:
            while len(self._positions) >= 4:
                self._positions.pop(next(iter(self._positions)))
            cells = self._prompts.get_dense_pe(size)[0].flatten(1).T.contiguous()  # [L, C]
            keys = [layer.to_image.project_positions(cells) for layer in self._layers[1:]]
            queries = [layer.to_tokens.project(cells) for layer in self._layers[1:]]
            last = self._last.project_positions(cells)
            self._positions[size] = _Positions(cells, keys, queries, last)
        return self._positions[size]

    def _chunk(
        self,
        image: SharedImage,
        sparse: Tensor,
        multimask_output: bool,
        wanted: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [m, 4h, 4w], predicted IoU [n, K], chosen bool [n, K]) of a few prompts."""
        output_tokens = self._output_tokens[None].expand(len(sparse), -1, -1)
        tokens, cells = self._two_ways(image, torch.cat([output_tokens, sparse], dim=1))
        which = slice(1, None) if multimask_output else slice(0, 1)
        iou = self._iou_head(tokens[:, 0])[:, which]  # [n, K]
        chosen = torch.ones_like(iou, dtype=torch.bool) if wanted is None else wanted(iou)
        mask_tokens = tokens[:, 1 : 1 + len(self._hypers)][:, which].unbind(1)
        hypers = [mlp(t) for mlp, t in zip(self._hypers[which], mask_tokens, strict=True)]
        filters = torch.stack(hypers, dim=1)  # [n, K, C']
        size = _logits_size(image.size)
        masks = torch.empty(int(chosen.sum()), *size, device=self.device)
        start = 0
        for i, count in enumerate(chosen.sum(1).tolist()):
            if count:
                self._upscale(cells[i], filters[i][chosen[i]], masks[start : start + count])
            start += count
        return masks, iou, chosen

    def _two_ways(self, image: SharedImage, prompt: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The transformer: tokens [n, T, C] before -> tokens [n, T, C], cells [L, C] of each."""
        positions = self._positions_of(image.size)
        first = self._layers[0]
        tokens = first.among_tokens(prompt, prompt)
        given = first.to_image.attend_shared(tokens + prompt, image.keys, image.values)
        tokens = first.think(tokens + given)
        weighed = first.to_tokens.weigh_shared(tokens + prompt, tokens, image.queries)
        cells = [first.norm_cells(torch.addmm(image.tokens, w.T, v)) for w, v in weighed]
        for layer, keys, queries in zip(
            self._layers[1:], positions.keys, positions.queries, strict=True
        ):
            tokens = layer.among_tokens(tokens, prompt)
            tokens = layer.think(tokens + layer.to_image.attend(tokens + prompt, cells, keys))
            weighed = layer.to_tokens.weigh(tokens + prompt, tokens, cells, queries)
            for i, (weights, values) in enumerate(weighed):
                cells[i] = layer.norm_cells(cells[i].addmm_(weights.T, values))
        given = self._last.attend(tokens + prompt, cells, positions.last)
        return self._last_norm(tokens + given), cells


@dataclass(frozen=True)
class _Positions:
    """Position encoding of a grid, [L, C], and what it adds to keys and queries, [H, d, L] each."""

    cells: Tensor
    keys: list[Tensor]
    queries: list[Tensor]
    last: Tensor


class _Layer:
    """A block of the two-way transformer."""

    def __init__(self, block: TwoWayAttentionBlock) -> None:
        self.to_image = TokenToImage(block.cross_attn_token_to_image)
        self.to_tokens = ImageToToken(block.cross_attn_image_to_token)
        self.norm_cells = block.norm4
        self._block = block

    def among_tokens(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Self-attention of the tokens [n, T, C], and its norm."""
        block = self._block
        if block.skip_first_layer_pe:
            tokens = block.self_attn(q=tokens, k=tokens, v=tokens)
        else:
            placed = tokens + prompt
            tokens = tokens + block.self_attn(q=placed, k=placed, v=tokens)
        normed: Tensor = block.norm1(tokens)
        return normed

    def think(self, tokens: Tensor) -> Tensor:
        """What follows attention to the image: norm, perceptron, norm; [n, T, C]."""
        tokens = self._block.norm2(tokens)
        thought: Tensor = self._block.norm3(tokens + self._block.mlp(tokens))
        return thought


class _Upscale:
    """Two transposed convolutions with norm and GELU, then a mask for each filter.

    Args:
        upscaling: ``output_upscaling`` of the mask decoder.
    """

    def __init__(self, upscaling: nn.Sequential) -> None:
        first, norm, _, second, _ = upscaling
        if not isinstance(norm, LayerNorm2d):
            raise TypeError(f"wanted a LayerNorm2d between the upscalings; came {norm}")
        self._norm = norm
        self._first, self._second = _as_linear(first), _as_linear(second)

    def __call__(self, cells: Tensor, filters: Tensor, masks: Tensor) -> None:
        """Cells [L, C] and filters [k, C/8] -> logits into ``masks`` [k, 4h, 4w]."""
        (weight, bias), (weight2, bias2) = self._first, self._second
        logits = cells.new_empty(len(filters), len(cells) * 16)
        for rows in in_tiles(len(cells)):
            x = _cells_of(torch.addmm(bias, cells[rows], weight))
            x = F.gelu(self._norm_last(x))  # [4 * tile, C/4]
            x = _cells_of(F.gelu(torch.addmm(bias2, x, weight2)))
            logits[:, rows.start * 16 : rows.stop * 16] = filters @ x.T
        k, height, width = masks.shape
        parts = logits.view(k, height // 4, width // 4, 2, 2, 2, 2)  # k, y, x, dy, dx, dy2, dx2
        places = masks.view(k, height // 4, 2, 2, width // 4, 2, 2)  # k, y, dy, dy2, x, dx, dx2
        places.copy_(parts.permute(0, 1, 3, 5, 2, 4, 6))

    def _norm_last(self, x: Tensor) -> Tensor:
        norm = self._norm
        return F.layer_norm(x, (x.shape[1],), norm.weight, norm.bias, norm.eps)


def _logits_size(size: tuple[int, int]) -> tuple[int, int]:
    """(4h, 4w) of the logits for an embedding (h, w)."""
    return size[0] * 4, size[1] * 4


def _cells_of(x: Tensor) -> Tensor:
    """Rows of four cells each, [m, 4 * C] -> [4 * m, C]."""
    return torch.unflatten(x, 1, (4, -1)).flatten(0, 1)


def _as_linear(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as weight [in, 4 * out] and bias [4 * out]."""
    if not isinstance(conv, nn.ConvTranspose2d) or conv.bias is None:
        raise TypeError(f"wanted a transposed convolution with bias; came {type(conv).__name__}")
    return conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous(), conv.bias.repeat(4)


def _frozen(module: _Module, device: str, dtype: torch.dtype) -> _Module:
    """A copy in eval mode and one precision that takes no gradients."""
    return copy.deepcopy(module).to(device, dtype).eval().requires_grad_(False)
