"""The deploy form of a TinyViT: a frozen network of folded weights.

One memory layout from the first convolution to the last: maps are [B, H, W, C], which is
channels-last memory, so a 1x1 convolution is a matrix product and a token is a row. Work is cut
into pieces of rows whose temporaries stay near ``PIECE`` bytes: they stay in the cache, and the
allocator never has to ask the system for memory. A window's padding is added after qkv, where it
is a constant, so products run on real tokens only.

Any size and any batch; nothing is compiled. Values are those of the plain model up to rounding.

Shapes: B images, C channels, H W height and width of a map, S window side, T = S*S tokens,
h heads, d a head's width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules import Conv2d_BN, LayerNorm2d, MBConv, PatchMerging, TinyViT, TinyViTBlock

from .fold import Weights, fold_attention, fold_bare, fold_conv, fold_linear
from .kernels import Kernels, copy_from_windows, copy_to_windows

PIECE = 4 << 20
"""Bytes that the largest temporary of one piece of work has, about."""

Step = Callable[[Tensor], Tensor]
"""[B, H, W, C] -> [B, H', W', C']."""


class DeployedTinyViT:
    """Runs a folded TinyViT. The model it is made from is neither kept nor changed.

    Args:
        model: The trained model.
        kernels: What computes products and convolutions, and in which precision.
    """

    def __init__(self, model: TinyViT, kernels: Kernels) -> None:
        self.dtype = kernels.dtype
        first, _, second = model.patch_embed.seq
        self._stem: Step = _Convolutions([first, second], kernels)
        self._blocks: list[list[Step]] = []
        self._merges: list[Step] = []
        for stage in model.stages():
            self._blocks.append([_make_block(block, kernels) for block in stage.blocks])
            if isinstance(stage.downsample, PatchMerging):
                self._merges.append(_Merge(stage.downsample, kernels))
        self._neck = None if model.neck is None else _Neck(model.neck, kernels)
        self._head = (
            None
            if model.head is None or not isinstance(model.norm_head, nn.LayerNorm)
            else _Head(model.norm_head, model.head, kernels)
        )

    def features(self, batch: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> the neck's output, or the last stage's map without a neck."""
        return self._end(self._run(batch)[-1])

    def logits(self, batch: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> [B, classes].

        Raises:
            ValueError: The model has no head.
        """
        head = self._trained_head()
        return head(self._run(batch)[-1])

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> the map of each stage, [B, C, h, w]."""
        return [stage.permute(0, 3, 1, 2) for stage in self._run(batch, keep=True)]

    def with_stages(self, batch: Tensor, as_logits: bool = False) -> tuple[Tensor, list[Tensor]]:
        """What ``features`` (or ``logits``) and ``stages`` give, in one pass.

        Raises:
            ValueError: Logits are wanted and the model has no head.
        """
        end = self._trained_head() if as_logits else self._end
        maps = self._run(batch, keep=True)
        return end(maps[-1]), [stage.permute(0, 3, 1, 2) for stage in maps]

    def _end(self, x: Tensor) -> Tensor:
        """The last stage's map [B, h, w, C] -> what ``features`` gives."""
        return (x if self._neck is None else self._neck(x)).permute(0, 3, 1, 2)

    def _trained_head(self) -> Step:
        """The head; an error where there is none."""
        if self._head is None:
            raise ValueError("this TinyViT was built without a classification head")
        return self._head

    def _run(self, batch: Tensor, keep: bool = False) -> list[Tensor]:
        """The maps [B, h, w, C] at the end of the stages: all of them, or only the last."""
        if batch.shape[0] == 0:  # sizes follow from any image of this shape
            return [x[:0] for x in self._run(batch.new_zeros(1, *batch.shape[1:]), keep)]
        x = batch.to(self.dtype).contiguous(memory_format=torch.channels_last)
        x = self._stem(x.permute(0, 2, 3, 1))
        maps: list[Tensor] = []
        for i, blocks in enumerate(self._blocks):
            for block in blocks:
                x = block(x)
            is_last = i == len(self._merges)
            if keep or is_last:
                maps.append(x)
            if not is_last:
                x = self._merges[i](x)
        return maps


# -- pieces of work ------------------------------------------------------------------------------


def _pieces(
    batch: int, rows: int, bytes_per_row: int, multiple: int = 1
) -> Iterator[tuple[slice, int, int]]:
    """Cut a batch of maps into (images, first row, row behind the last), in order.

    Small maps go together, large ones are cut into strips of a multiple of ``multiple`` rows.
    """
    at_once = max(PIECE // max(bytes_per_row, 1), 1)
    if at_once >= rows:
        images = max(at_once // max(rows, 1), 1)
        for i in range(0, batch, images):
            yield slice(i, i + images), 0, rows
        return
    strips = -(-rows // max(at_once // multiple * multiple, multiple))
    height = -(-rows // strips)
    height = -(-height // multiple) * multiple
    for i in range(batch):
        for top in range(0, rows, height):
            yield slice(i, i + 1), top, min(top + height, rows)


def _assemble(
    piece: Callable[[slice, int, int], Tensor],
    batch: int,
    rows: int,
    bytes_per_row: int,
    multiple: int = 1,
) -> Tensor:
    """The map [B, rows, W, C] that ``piece(images, top, bottom)`` gives in parts."""
    out: Tensor | None = None
    for images, top, bottom in _pieces(batch, rows, bytes_per_row, multiple):
        part = piece(images, top, bottom)
        if part.shape[0] == batch and part.shape[1] == rows:
            return part
        if out is None:
            out = part.new_empty(batch, rows, *part.shape[2:])
        out[images, top:bottom] = part
    if out is None:
        raise ValueError("a batch without images has no pieces")
    return out


class _RowConv:
    """A convolution that can give a part of its output rows."""

    def __init__(self, weights: Weights, kernels: Kernels, gelu: bool) -> None:
        self.conv = kernels.conv(weights, "gelu" if gelu else "none")
        self.side, self.stride, self.pad = weights.weight.shape[-1], weights.stride, weights.pad
        self.channels = weights.weight.shape[0]

    def output(self, length: int) -> int:
        """Rows (columns) of the output for that many of the input."""
        return (length + 2 * self.pad - self.side) // self.stride + 1

    def needs(self, top: int, bottom: int) -> tuple[int, int]:
        """The input rows that output rows [top, bottom) see; may reach beyond the map."""
        first = top * self.stride - self.pad
        return first, (bottom - 1) * self.stride - self.pad + self.side

    def rows(self, x: Tensor, top: int, bottom: int, offset: int = 0, height: int = -1) -> Tensor:
        """Output rows [top, bottom) from ``x``, which starts at row ``offset`` of the map.

        ``height`` is that of the whole map; what lies outside it is zero.
        """
        height = x.shape[1] if height < 0 else height
        image = x.permute(0, 3, 1, 2)
        if top == 0 and bottom == self.output(height):
            return self.conv(image).permute(0, 2, 3, 1)
        first, behind = self.needs(top, bottom)
        image = image[:, :, max(first, 0) - offset : min(behind, height) - offset]
        above, below = max(-first, 0), max(behind - height, 0)
        if above or below:
            image = F.pad(image, (0, 0, above, below))
        return self.conv(image, pad_rows=0).permute(0, 2, 3, 1)


class _Convolutions:
    """The stem: two convolutions, the first with GELU, in strips."""

    def __init__(self, layers: Sequence[nn.Module], kernels: Kernels) -> None:
        first, second = (fold_conv(layer) for layer in layers if isinstance(layer, Conv2d_BN))
        self.first = _RowConv(first, kernels, gelu=True)
        self.second = _RowConv(second, kernels, gelu=False)

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        middle = self.first.output(height), self.first.output(width)
        per_row = middle[1] * self.first.channels * x.element_size() * self.second.stride

        def piece(images: slice, top: int, bottom: int) -> Tensor:
            low, high = self.second.needs(top, bottom)
            low, high = max(low, 0), min(high, middle[0])
            y = self.first.rows(x[images], low, high)
            return self.second.rows(y, top, bottom, low, middle[0])

        return _assemble(piece, batch, self.second.output(middle[0]), per_row)


# -- blocks --------------------------------------------------------------------------------------


def _make_block(block: nn.Module, kernels: Kernels) -> Step:
    if isinstance(block, MBConv):
        return _Bottleneck(block, kernels)
    if isinstance(block, TinyViTBlock):
        return _TokenBlock(block, kernels)
    raise TypeError(f"a {type(block).__name__} cannot be folded")


class _Bottleneck:
    """MBConv: expand, depthwise, project, add, activate, in strips."""

    def __init__(self, block: MBConv, kernels: Kernels) -> None:
        self.hidden = block.hidden_chans
        self.expand = kernels.linear(fold_conv(block.conv1), "gelu")
        self.depthwise = _RowConv(fold_conv(block.conv2), kernels, gelu=True)
        self.project = kernels.linear(fold_conv(block.conv3))

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        per_row = width * self.hidden * x.element_size()

        def piece(images: slice, top: int, bottom: int) -> Tensor:
            low, high = max(top - 1, 0), min(bottom + 1, height)
            y = self.expand(x[images, low:high])
            y = self.depthwise.rows(y, top, bottom, low, height)
            return F.gelu(self.project(y, x[images, top:bottom]))

        return _assemble(piece, batch, height, per_row)


class _Merge:
    """PatchMerging: 1x1, depthwise with stride, 1x1, in strips."""

    def __init__(self, merge: PatchMerging, kernels: Kernels) -> None:
        self.channels = merge.out_dim
        self.widen = kernels.linear(fold_conv(merge.conv1), "gelu")
        self.depthwise = _RowConv(fold_conv(merge.conv2), kernels, gelu=True)
        self.mix = kernels.linear(fold_conv(merge.conv3))

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        per_row = width * self.channels * x.element_size() * self.depthwise.stride

        def piece(images: slice, top: int, bottom: int) -> Tensor:
            low, high = self.depthwise.needs(top, bottom)
            low, high = max(low, 0), min(high, height)
            y = self.widen(x[images, low:high])
            return self.mix(self.depthwise.rows(y, top, bottom, low, height))

        return _assemble(piece, batch, self.depthwise.output(height), per_row)


class _TokenBlock:
    """TinyViTBlock: window attention, then depthwise convolution and perceptron."""

    def __init__(self, block: TinyViTBlock, kernels: Kernels) -> None:
        qkv, proj, bias = fold_attention(block.attn)
        self.side = block.window_size
        self.heads = block.num_heads
        self.eps = block.attn.norm.eps
        self.qkv = kernels.linear(qkv)
        self.padding = qkv.bias.to(kernels.dtype)
        self.proj = kernels.linear(proj)
        self.bias = bias.to(kernels.dtype)[None]  # [1, h, T, T]
        self.local = _RowConv(fold_conv(block.local_conv), kernels, gelu=False)
        self.fc1 = kernels.linear(fold_linear(block.mlp.fc1, block.mlp.norm), "gelu")
        self.fc2 = kernels.linear(fold_linear(block.mlp.fc2))
        self.hidden = block.mlp.fc1.out_features

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        per_row = width * x.element_size()

        def attend(images: slice, top: int, bottom: int) -> Tensor:
            rows = x[images, top:bottom]
            return self.proj(self._attend(rows), rows)

        attended = _assemble(attend, batch, height, per_row * 3 * channels, self.side)

        def mix(images: slice, top: int, bottom: int) -> Tensor:
            y = self.local.rows(attended[images], top, bottom)
            normed = F.layer_norm(y, (channels,), None, None, self.eps)
            return self.fc2(self.fc1(normed), y)

        return _assemble(mix, batch, height, per_row * self.hidden)

    def _attend(self, x: Tensor) -> Tensor:
        """Attention within the windows of whole rows of windows, before proj: [B, R, W, C]."""
        channels = x.shape[-1]
        qkv = self.qkv(F.layer_norm(x, (channels,), None, None, self.eps))
        windows = copy_to_windows(qkv, self.side, self.padding)  # [windows, T, 3C]
        q, k, v = torch.unflatten(windows, 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        return copy_from_windows(y.transpose(1, 2).flatten(2), self.side, x)


class _Neck:
    """1x1 convolution, LayerNorm, 3x3 convolution, LayerNorm."""

    def __init__(self, neck: nn.Sequential, kernels: Kernels) -> None:
        reduce, conv = (fold_bare(layer) for layer in neck if isinstance(layer, nn.Conv2d))
        self.reduce = kernels.linear(reduce)
        self.conv = _RowConv(conv, kernels, gelu=False)
        self.norm1, self.norm2 = (
            _Norm(layer.weight, layer.bias, layer.eps, kernels.dtype)
            for layer in neck
            if isinstance(layer, LayerNorm2d)
        )

    def __call__(self, x: Tensor) -> Tensor:
        x = self.norm1(self.reduce(x))
        return self.norm2(self.conv.rows(x, 0, x.shape[1]))


class _Head:
    """Mean over the positions, LayerNorm, linear layer."""

    def __init__(self, norm: nn.LayerNorm, head: nn.Module, kernels: Kernels) -> None:
        self.norm = _Norm(norm.weight, norm.bias, norm.eps, kernels.dtype)
        self.linear = kernels.linear(fold_linear(head)) if isinstance(head, nn.Linear) else None

    def __call__(self, x: Tensor) -> Tensor:
        x = self.norm(x.mean((1, 2)))
        return x if self.linear is None else self.linear(x)


class _Norm:
    """LayerNorm over the last axis."""

    def __init__(self, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> None:
        self.weight, self.bias = (t.detach().clone().to(dtype) for t in (weight, bias))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)
