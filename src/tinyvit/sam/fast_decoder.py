"""The mask decoder in its fast form: what an image's prompts share is computed once.

Cross attention runs between few tokens and many image tokens, so weights are moved to the side of
the few: a head's score q . (W k) equals (W^T q) . k, and sum(p W v) equals W sum(p v). In the first
layer all prompts have the same image tokens, which are projected once instead. The bias of the keys
moves all scores of a row alike; softmax does not see it, and it is left out. Masks that nobody
wants are not computed. It runs without gradients, in the weights' precision, autocast or not.

Shapes: n prompts, T tokens of a prompt, L image tokens, C channels, H heads, d a head's width,
K masks of a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.inference.torch_backend import exact_inference
from tinyvit.modules.sam.mask_decoder import (
    MLP,
    Attention,
    MaskDecoder,
    TwoWayAttentionBlock,
    TwoWayTransformer,
)
from tinyvit.modules.sam.prompt_encoder import PromptEncoder

TILE = 1024
"""Image tokens upscaled at once: with 256 channels 1 MiB, which stays in a core's own cache."""

CHUNK_TOKENS = 8 * 64 * 64
"""Image tokens of all prompts that are computed together, about; 1 kB each with 256 channels."""

MIN_WEIGHT = 1e-30
"""Weights below it count as 0. Processors multiply numbers near the smallest ones (1e-38) ten to a
hundred times slower, and a distinct softmax over thousands of tokens has many of those."""

Points = tuple[Tensor, Tensor]
_Module = TypeVar("_Module", bound=nn.Module)


def softmax(scores: Tensor, dim: int) -> Tensor:
    """Softmax without weights so small that they only cost time."""
    return F.threshold(torch.softmax(scores, dim), MIN_WEIGHT, 0.0, inplace=True)


class _Heads:
    """What both directions of cross attention have in common: weights by head."""

    def __init__(self, attention: Attention) -> None:
        self.heads = attention.num_heads
        self.attention = attention
        self.scale = (attention.q_proj.out_features // self.heads) ** -0.5

    def _by_head(self, weight: Tensor) -> Tensor:
        """[H*d, C] -> [H, d, C]."""
        return torch.unflatten(weight, 0, (self.heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        """[n, T, H*d] -> [n, H, T, d]."""
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)

    def _columns(self, x: Tensor) -> Tensor:
        """[L, H*d] -> [H, d, L]."""
        return torch.unflatten(x, 1, (self.heads, -1)).permute(1, 2, 0).contiguous()

    def _own_scores(self, row: Tensor, query: Tensor, image: Tensor, positions: Tensor) -> Tensor:
        """A prompt's scores [H, T, L] with image tokens [L, C] and positions [H, d, L]."""
        scores = torch.unflatten(row @ image.T, 0, (self.heads, -1))
        return scores.baddbmm_(query, positions)


class TokenToImage(_Heads):
    """Attention of tokens to image tokens."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.to_key = self._by_head(attention.k_proj.weight)
        self.to_value = self._by_head(attention.v_proj.weight)
        self.value_bias = attention.v_proj.bias

    def queries(self, tokens: Tensor) -> Tensor:
        """[n, T, C] -> scaled queries [n, H, T, d]."""
        return self._split(self.attention.q_proj(tokens) * self.scale)

    def project(self, image: Tensor, placed: Tensor) -> tuple[Tensor, Tensor]:
        """[L, C], without and with their positions -> keys [H, d, L], values [H, L, d]."""
        values = torch.unflatten(self.attention.v_proj(image), 1, (self.heads, -1)).transpose(0, 1)
        return self.project_positions(placed), values.contiguous()

    def project_positions(self, positions: Tensor) -> Tensor:
        """[L, C] -> what they add to the keys, [H, d, L]."""
        return self._columns(positions @ self.attention.k_proj.weight.T)

    def attend_shared(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Tokens [n, T, C] to keys [H, d, L] and values [H, L, d] of all prompts -> [n, T, C]."""
        count = tokens.shape[0]
        queries = self.queries(tokens).transpose(0, 1).flatten(1, 2)  # [H, n*T, d]
        scores = softmax(queries @ keys, dim=2)  # [H, n*T, L]
        out = torch.unflatten(scores @ values, 1, (count, -1)).permute(1, 2, 0, 3)  # [n, T, H, d]
        return cast(Tensor, self.attention.out_proj(out.flatten(2)))

    def attend(self, tokens: Tensor, images: list[Tensor], positions: Tensor) -> Tensor:
        """As ``attend_shared``, to image tokens [L, C] of each prompt's own."""
        queries = self.queries(tokens)
        rows = (queries @ self.to_key).flatten(1, 2)  # [n, H*T, C]
        sums = []
        for row, query, image in zip(rows, queries, images, strict=True):
            weights = softmax(self._own_scores(row, query, image, positions), dim=2)
            sums.append(weights.flatten(0, 1) @ image)  # [H*T, C]
        by_head = torch.unflatten(torch.stack(sums), 1, (self.heads, -1))  # [n, H, T, C]
        out = (by_head @ self.to_value.transpose(1, 2)).transpose(1, 2).flatten(2)
        return cast(Tensor, self.attention.out_proj(out + self.value_bias))


class ImageToToken(_Heads):
    """Attention of image tokens to tokens: image tokens get weights^T @ values."""

    def __init__(self, attention: Attention) -> None:
        super().__init__(attention)
        self.to_query = self._by_head(attention.q_proj.weight)
        self.to_out = self._by_head(attention.out_proj.weight.T)  # [H, d, C]
        self.part_of_bias = attention.out_proj.bias / self.heads  # a head's weights sum to 1

    def project(self, placed: Tensor) -> Tensor:
        """Image tokens with their positions, or positions alone, [L, C] -> queries [H, d, L]."""
        return self._columns(self.attention.q_proj(placed))

    def _keys_and_values(self, placed: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [n, T, C] with and without positions -> keys [n, H, T, d], values [n, H*T, C]."""
        keys = self._split(self.attention.k_proj(placed) * self.scale)
        values = self._split(self.attention.v_proj(tokens)) @ self.to_out  # [n, H, T, C]
        return keys, values.flatten(1, 2) + self.part_of_bias

    def shared_attention_weights(
        self, placed: Tensor, tokens: Tensor, queries: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights [H*T, L] and values [H*T, C] of each prompt, for image tokens that all share."""
        for key, value in zip(*self._keys_and_values(placed, tokens), strict=True):
            yield softmax(key @ queries, dim=1).flatten(0, 1), value

    def attention_weights(
        self, placed: Tensor, tokens: Tensor, images: list[Tensor], positions: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As ``shared_attention_weights``, for image tokens [L, C] of each prompt's own.

        ``positions`` are the queries of the positions alone, bias included.
        """
        keys, values = self._keys_and_values(placed, tokens)
        rows = (keys @ self.to_query).flatten(1, 2)  # [n, H*T, C]
        for key, row, value, image in zip(keys, rows, values, images, strict=True):
            scores = self._own_scores(row, key, image, positions)
            yield softmax(scores, dim=1).flatten(0, 1), value


class SharedImage(NamedTuple):
    """What all prompts on one image share."""

    size: tuple[int, int]  # (h, w) of the embedding
    tokens: Tensor  # [L, C]: embedding and dense prompt
    keys: Tensor  # [H, d, L], values [H, L, d], queries [H, d, L]: of the first layer
    values: Tensor
    queries: Tensor


class _Positions(NamedTuple):
    """Position encoding of a grid, [L, C], and what it adds to keys and queries, [H, d, L] each."""

    tokens: Tensor
    keys: list[Tensor]
    queries: list[Tensor]
    last: Tensor


class FastMaskDecoder:
    """Prompt encoder and mask decoder, frozen: an image is prepared once, for many prompts.

    Copies the modules; when they change, make a new one. ``dtype`` float64 is three times slower,
    and exact to the last digit of the float32 numbers that come back.
    """

    def __init__(
        self,
        prompt_encoder: PromptEncoder,
        mask_decoder: MaskDecoder,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self._prompts = frozen(prompt_encoder, device, dtype)
        decoder = frozen(mask_decoder, device, dtype)
        transformer = cast("TwoWayTransformer", decoder.transformer)
        self._layers = [_Layer(cast("TwoWayAttentionBlock", b)) for b in transformer.layers]
        self._last = TokenToImage(transformer.final_attn_token_to_image)
        self._last_norm = transformer.norm_final_attn
        self._output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        self._iou_head = _Mlps([decoder.iou_prediction_head])
        hypers = cast("list[MLP]", list(decoder.output_hypernetworks_mlps))
        self._single, self._multi = _Mlps(hypers[:1]), _Mlps(hypers[1:])
        self._upscale = _Upscale(decoder.output_upscaling)
        self._positions: dict[tuple[int, int], _Positions] = {}

    def prepare(self, features: Tensor, masks: Tensor | None = None) -> list[SharedImage]:
        """What all prompts on an image's features [1, C, h, w] share.

        One for all prompts; with mask prompts, low-res logits [N, 1, 4h, 4w], one for each.
        """
        size = int(features.shape[2]), int(features.shape[3])
        images = []
        with exact_inference(self.device):
            x = features.to(self.device, self.dtype)
            if masks is not None:
                masks = masks.to(self.device, self.dtype)
            _, dense = self._prompts(None, None, masks, size)
            positions, first = self._positions_of(size), self._layers[0]
            for one in dense:
                tokens = (x[0] + one).flatten(1).T.contiguous()  # [L, C]
                placed = tokens + positions.tokens
                keys, values = first.to_image.project(tokens, placed)
                queries = first.to_tokens.project(placed)
                images.append(SharedImage(size, tokens, keys, values, queries))
        return images

    def decode(
        self,
        shared: list[SharedImage],
        points: Points | None = None,
        boxes: Tensor | None = None,
        multimask_output: bool = True,
        min_iou: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decode N prompts of one kind on what ``prepare`` gave.

        ``points`` are ([N, P, 2], labels [N, P]), ``boxes`` [N, 4], in pixels of the model's input.
        Gives low-res logits [M, 4h, 4w] and predicted IoU [N, K], float32: of all masks, or of
        those whose predicted IoU exceeds ``min_iou`` alone, in the order of (prompt, mask).
        """
        with exact_inference(self.device):
            if points is not None:
                points = points[0].to(self.device, self.dtype), points[1].to(self.device)
            if boxes is not None:
                boxes = boxes.to(self.device, self.dtype)
            sparse, _ = self._prompts(points, boxes, None, shared[0].size)
            if points is None and boxes is None:  # [1, 0, C]
                sparse = sparse.expand(len(shared), -1, -1)
            if len(shared) not in (1, len(sparse)):
                raise ValueError(f"{len(sparse)} prompts do not go with {len(shared)} masks")
            step = max(CHUNK_TOKENS // len(shared[0].tokens), 1) if len(shared) == 1 else 1
            found = []
            for start in range(0, len(sparse), step):
                image = shared[0] if len(shared) == 1 else shared[start]
                few = sparse[start : start + step]
                found.append(self._decode_chunk(image, few, multimask_output, min_iou))
            logits, scores = zip(*found, strict=True)
            return torch.cat(logits), torch.cat(scores)

    def _positions_of(self, size: tuple[int, int]) -> _Positions:
        """The position encoding of a grid and its projections; kept for the last few grids."""
        if size not in self._positions:
            while len(self._positions) >= 4:
                self._positions.pop(next(iter(self._positions)))
            tokens = self._prompts.get_dense_pe(size)[0].flatten(1).T.contiguous()  # [L, C]
            keys = [layer.to_image.project_positions(tokens) for layer in self._layers[1:]]
            queries = [layer.to_tokens.project(tokens) for layer in self._layers[1:]]
            last = self._last.project_positions(tokens)
            self._positions[size] = _Positions(tokens, keys, queries, last)
        return self._positions[size]

    def _decode_chunk(
        self, image: SharedImage, sparse: Tensor, multimask_output: bool, min_iou: float | None
    ) -> tuple[Tensor, Tensor]:
        """``decode`` for a few prompts, embedded."""
        own = self._output_tokens[None].expand(len(sparse), -1, -1)
        tokens, images = self._transformer(image, torch.cat([own, sparse], dim=1))
        which = slice(1, None) if multimask_output else slice(0, 1)
        iou = self._iou_head(tokens[None, :, 0])[0, :, which].float()  # [n, K]
        wanted = torch.ones_like(iou, dtype=torch.bool) if min_iou is None else iou > min_iou
        mask_tokens = tokens[:, 1 : len(self._output_tokens)][:, which].transpose(0, 1)
        hypers = self._multi if multimask_output else self._single
        filters = hypers(mask_tokens).transpose(0, 1)  # [n, K, C']
        height, width = image.size
        masks = torch.empty(int(wanted.sum()), 4 * height, 4 * width, device=self.device)
        start = 0
        for i, count in enumerate(wanted.sum(1).tolist()):
            if count:
                self._upscale(images[i], filters[i][wanted[i]], masks[start : start + count])
            start += count
        return masks, iou

    def _transformer(self, image: SharedImage, prompt: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [n, T, C] before -> tokens [n, T, C] after, image tokens [L, C] of each prompt."""
        positions = self._positions_of(image.size)
        first = self._layers[0]
        tokens = first.self_attention(prompt, prompt)
        out = first.to_image.attend_shared(tokens + prompt, image.keys, image.values)
        tokens = first.mlp(tokens + out)
        weighted = first.to_tokens.shared_attention_weights(tokens + prompt, tokens, image.queries)
        images = [first.norm_image(torch.addmm(image.tokens, w.T, v)) for w, v in weighted]
        for layer, keys, queries in zip(
            self._layers[1:], positions.keys, positions.queries, strict=True
        ):
            tokens = layer.self_attention(tokens, prompt)
            tokens = layer.mlp(tokens + layer.to_image.attend(tokens + prompt, images, keys))
            weighted = layer.to_tokens.attention_weights(tokens + prompt, tokens, images, queries)
            for i, (weights, values) in enumerate(weighted):
                images[i] = layer.norm_image(images[i].addmm_(weights.T, values))
        out = self._last.attend(tokens + prompt, images, positions.last)
        return self._last_norm(tokens + out), images


class _Layer(_Heads):
    """A block of the two-way transformer."""

    def __init__(self, block: TwoWayAttentionBlock) -> None:
        super().__init__(block.self_attn)
        self.to_image = TokenToImage(block.cross_attn_token_to_image)
        self.to_tokens = ImageToToken(block.cross_attn_image_to_token)
        self.norm_image = block.norm4
        self._block = block

    def self_attention(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Self-attention of the tokens [n, T, C], and its norm."""
        block, attention = self._block, self.attention
        placed = tokens if block.skip_first_layer_pe else tokens + prompt
        queries = self._split(attention.q_proj(placed) * self.scale)
        scores = queries @ self._split(attention.k_proj(placed)).transpose(2, 3)  # [n, H, T, T]
        out = scores.softmax(3) @ self._split(attention.v_proj(tokens))
        attended = attention.out_proj(out.transpose(1, 2).flatten(2))
        after = attended if block.skip_first_layer_pe else tokens + attended
        return cast(Tensor, block.norm1(after))

    def mlp(self, tokens: Tensor) -> Tensor:
        """What follows attention to the image: norm, MLP, norm; [n, T, C]."""
        block, tokens = self._block, self._block.norm2(tokens)
        hidden = block.mlp.act(block.mlp.lin1(tokens))
        return cast(Tensor, block.norm3(tokens + block.mlp.lin2(hidden)))


class _Mlps:
    """MLPs of one size, run together: [K, n, in] -> [K, n, out]."""

    def __init__(self, mlps: Sequence[MLP]) -> None:
        self._ends_in_sigmoid = mlps[0].sigmoid_output
        self._layers = []
        for linears in zip(*(cast("list[nn.Linear]", mlp.layers) for mlp in mlps), strict=True):
            weight = torch.stack([linear.weight.T for linear in linears])  # [K, in, out]
            self._layers.append((weight, torch.stack([linear.bias[None] for linear in linears])))

    def __call__(self, x: Tensor) -> Tensor:
        for number, (weight, bias) in enumerate(self._layers):
            x = torch.baddbmm(bias, F.relu(x) if number else x, weight)
        return x.sigmoid() if self._ends_in_sigmoid else x


class _Upscale:
    """Two transposed convolutions with norm and GELU, then a mask for each filter."""

    def __init__(self, upscaling: nn.Sequential) -> None:
        first, self._norm, _, second, _ = cast("Any", upscaling)
        self._first, self._second = _as_linear(first), _as_linear(second)

    def __call__(self, image: Tensor, filters: Tensor, masks: Tensor) -> None:
        """Image tokens [L, C] and filters [k, C/8] -> logits into ``masks`` [k, 4h, 4w]."""
        (weight, bias), (weight2, bias2), norm = self._first, self._second, self._norm
        logits = image.new_empty(len(filters), len(image) * 16)
        for start in range(0, len(image), TILE):
            x = torch.addmm(bias, image[start : start + TILE], weight)
            x = torch.unflatten(x, 1, (4, -1)).flatten(0, 1)  # [4 * tile, C/4]
            x = F.gelu(F.layer_norm(x, (x.shape[1],), norm.weight, norm.bias, norm.eps))
            x = F.gelu(torch.addmm(bias2, x, weight2))
            x = torch.unflatten(x, 1, (4, -1)).flatten(0, 1)  # [16 * tile, C/8]
            logits[:, start * 16 : (start + TILE) * 16] = filters @ x.T
        k, height, width = masks.shape
        parts = logits.view(k, height // 4, width // 4, 2, 2, 2, 2)  # k, y, x, dy, dx, dy2, dx2
        places = masks.view(k, height // 4, 2, 2, width // 4, 2, 2)  # k, y, dy, dy2, x, dx, dx2
        places.copy_(parts.permute(0, 1, 3, 5, 2, 4, 6))


def _as_linear(conv: nn.ConvTranspose2d) -> tuple[Tensor, Tensor]:
    """A 2x2 transposed convolution of stride 2 as weight [in, 4 * out] and bias [4 * out]."""
    bias = cast("Tensor", conv.bias)
    return conv.weight.permute(0, 2, 3, 1).flatten(1).contiguous(), bias.repeat(4)


def frozen(module: _Module, device: str, dtype: torch.dtype) -> _Module:
    """A copy in eval mode and one precision that takes no gradients."""
    return copy.deepcopy(module).to(device, dtype).eval().requires_grad_(False)
