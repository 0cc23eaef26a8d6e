"""The fast form of a TinyViT: a frozen network of folded weights, and the kernels it runs on.

One memory layout from the first convolution to the last: maps are [B, H, W, C], which is
channels-last memory, so a 1x1 convolution is a matrix product and a token is a row. Work is cut
into pieces of rows whose temporaries stay near ``PIECE`` bytes: they stay in the cache, and the
allocator never has to ask the system for memory. A window's padding is added after qkv, where it
is a constant, so products run on real tokens only.

Any size and any batch; nothing is compiled. Values are those of the plain model up to rounding.

Shapes: B images, C channels, H W height and width of a map, S window side, T = S*S tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn, unflatten

from tinyvit.modules import Conv2d_BN, LayerNorm2d, MBConv, PatchMerging, TinyViT, TinyViTBlock
from tinyvit.modules.stage import SAM3Neck

from .fold import NORM, Array, Arrays, Weights, fold_attention, fold_bare, fold_conv, fold_linear

if TYPE_CHECKING:
    from .cuda_graphs import Output

PIECE = 4 << 20
"""Bytes that the largest temporary of one piece of work has, about."""

Step = Callable[[Tensor], Tensor]
"""[B, H, W, C] -> [B, H', W', C']."""

After = Literal["none", "gelu"]
Linear = Callable[..., Tensor]
"""(x [..., K], add=None) -> act(x W^T + b) [..., N]; or x W^T + b + add."""
Conv = Callable[..., Tensor]
"""(x [B, C, H, W] in channels-last memory, pad_rows=None) -> act(conv(x) + b), likewise;
``pad_rows`` replaces the padding at the top and bottom."""


def arrays_of(model: nn.Module) -> dict[str, Any]:
    """The floating-point tensors of a model's state dict as arrays; they may share its memory."""
    tensors = {key: t.detach().cpu() for key, t in model.state_dict().items()}
    return {
        key: (t.float() if t.dtype == torch.bfloat16 else t).numpy()  # numpy has no bfloat16
        for key, t in tensors.items()
        if t.is_floating_point()
    }


class DeployedTinyViT:
    """A ``Network`` of folded weights; the model it is made from is neither kept nor changed."""

    def __init__(self, model: TinyViT, kernels: PlainKernels) -> None:
        self.dtype = kernels.dtype
        arrays = arrays_of(model)
        self._stem: Step = _Stem(model, arrays, kernels)
        self._blocks: list[list[Step]] = []
        self._merges: list[Step] = []
        for i, stage in enumerate(model.stages()):
            name = f"layers.{i}"
            blocks = enumerate(stage.blocks)
            self._blocks.append(
                [_make_block(block, f"{name}.blocks.{j}", arrays, kernels) for j, block in blocks]
            )
            if stage.downsample is not None:
                name = f"{name}.downsample"
                self._merges.append(_make_block(stage.downsample, name, arrays, kernels))
        self._neck = None if model.neck is None else _make_neck(model.neck, arrays, kernels)
        self._head: Step | None = None
        if model.head is not None and isinstance(model.norm_head, nn.LayerNorm):
            self._head = _make_head(model.norm_head.eps, arrays, kernels)

    def __call__(
        self, batch: Tensor, output: Output | None = "features", stages: bool = False
    ) -> list[Tensor]:
        """See ``Network``."""
        if output == "logits" and self._head is None:
            raise ValueError("this TinyViT was built without a classification head")
        *before, last = self._run(batch, keep=stages)
        maps = [x.permute(0, 3, 1, 2) for x in (*before, last)] if stages else []
        if output == "logits" and self._head is not None:
            return [self._head(last), *maps]
        if output == "features":
            return [(last if self._neck is None else self._neck(last)).permute(0, 3, 1, 2), *maps]
        return maps

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


# -- pieces of work -----------------------------------------------------------------------------


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

    def __init__(self, weights: Weights, kernels: PlainKernels, gelu: bool) -> None:
        self.conv = kernels.conv(weights, "gelu" if gelu else "none")
        self.channels, self.side = len(weights.weight), int(weights.weight.shape[-1])
        self.stride, self.pad = weights.stride, weights.pad

    def output(self, length: int) -> int:
        """Rows (columns) of the output for that many of the input."""
        return (length + 2 * self.pad - self.side) // self.stride + 1

    def rows(self, x: Tensor, top: int, bottom: int) -> Tensor:
        """Output rows [top, bottom) of a map."""
        return self.after(lambda low, high: x[:, low:high], x.shape[1], top, bottom)

    def after(
        self, before: Callable[[int, int], Tensor], height: int, top: int, bottom: int
    ) -> Tensor:
        """Output rows [top, bottom) of the map of ``height`` whose rows ``before`` gives.

        What lies outside the map is zero.
        """
        first = top * self.stride - self.pad
        behind = (bottom - 1) * self.stride - self.pad + self.side
        image = before(max(first, 0), min(behind, height)).permute(0, 3, 1, 2)
        if top == 0 and bottom == self.output(height):
            return self.conv(image).permute(0, 2, 3, 1)
        above, below = max(-first, 0), max(behind - height, 0)
        if above or below:
            image = F.pad(image, (0, 0, above, below))
        return self.conv(image, pad_rows=0).permute(0, 2, 3, 1)


class _Stem:
    """Two convolutions, the first with GELU, in strips."""

    def __init__(self, model: TinyViT, arrays: Arrays, kernels: PlainKernels) -> None:
        first, second = (
            fold_conv(arrays, f"patch_embed.seq.{i}", layer.c.stride[0], eps=layer.bn.eps)
            for i, layer in enumerate(model.patch_embed.seq)
            if isinstance(layer, Conv2d_BN)
        )
        self.first = _RowConv(first, kernels, gelu=True)
        self.second = _RowConv(second, kernels, gelu=False)

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        middle = self.first.output(height), self.first.output(width)
        per_row = middle[1] * self.first.channels * x.element_size() * self.second.stride

        def piece(images: slice, top: int, bottom: int) -> Tensor:
            before = functools.partial(self.first.rows, x[images])
            return self.second.after(before, middle[0], top, bottom)

        return _assemble(piece, batch, self.second.output(middle[0]), per_row)


# -- blocks -------------------------------------------------------------------------------------


def _make_block(block: nn.Module, name: str, arrays: Arrays, kernels: PlainKernels) -> Step:
    if isinstance(block, (MBConv, PatchMerging)):
        return _ThreeConvolutions(block, name, arrays, kernels)
    if isinstance(block, TinyViTBlock):
        return _TokenBlock(block, name, arrays, kernels)
    raise TypeError(f"a {type(block).__name__} cannot be folded")


class _ThreeConvolutions:
    """1x1, depthwise, 1x1, in strips: PatchMerging, or MBConv, which adds its input, too."""

    def __init__(
        self, block: MBConv | PatchMerging, name: str, arrays: Arrays, kernels: PlainKernels
    ) -> None:
        convs = enumerate((block.conv1, block.conv2, block.conv3), 1)
        first, second, third = (
            fold_conv(arrays, f"{name}.conv{i}", one.c.stride[0], depthwise=i == 2, eps=one.bn.eps)
            for i, one in convs
        )
        self.adds = isinstance(block, MBConv)
        self.first, self.third = kernels.linear(first, "gelu"), kernels.linear(third)
        self.depthwise = _RowConv(second, kernels, gelu=True)

    def __call__(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        conv = self.depthwise
        per_row = width * conv.channels * x.element_size() * conv.stride

        def piece(images: slice, top: int, bottom: int) -> Tensor:
            y = conv.after(lambda low, high: self.first(x[images, low:high]), height, top, bottom)
            return F.gelu(self.third(y, x[images, top:bottom])) if self.adds else self.third(y)

        return _assemble(piece, batch, conv.output(height), per_row)


class _TokenBlock:
    """TinyViTBlock: window attention, then depthwise convolution and MLP."""

    def __init__(
        self, block: TinyViTBlock, name: str, arrays: Arrays, kernels: PlainKernels
    ) -> None:
        attention = block.attn
        qkv, proj, bias = fold_attention(
            arrays, f"{name}.attn", attention.key_dim, attention.resolution
        )
        self.side = block.window_size
        self.heads = block.num_heads
        self.eps = attention.norm.eps
        self.qkv = kernels.linear(qkv)
        self.padding = torch.from_numpy(qkv.bias).to(kernels.dtype)
        self.proj = kernels.linear(proj)
        self.bias = torch.from_numpy(bias).to(kernels.dtype)[None]  # [1, h, T, T]
        eps = block.local_conv.bn.eps
        local = fold_conv(arrays, f"{name}.local_conv", depthwise=True, eps=eps)
        self.local = _RowConv(local, kernels, gelu=False)
        self.fc1 = kernels.linear(
            fold_linear(arrays, f"{name}.mlp.fc1", f"{name}.mlp.norm"), "gelu"
        )
        self.fc2 = kernels.linear(fold_linear(arrays, f"{name}.mlp.fc2"))
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
        q, k, v = unflatten(windows, 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        return copy_from_windows(y.transpose(1, 2).flatten(2), self.side, x)


def _make_neck(neck: nn.Sequential, arrays: Arrays, kernels: PlainKernels) -> Step:
    """SAM's neck, or EfficientSAM3's: its batch norm is folded, and it ends in a resize."""
    if isinstance(neck, SAM3Neck):
        eps, size = cast(nn.BatchNorm2d, neck[1]).eps, (neck.size, neck.size)
        named = {"first.c.weight": arrays["neck.0.weight"]}
        named |= {f"first.bn.{part}": arrays[f"neck.1.{part}"] for part in NORM}
        reduce = kernels.linear(fold_conv(named, "first", eps=eps), "gelu")
        conv = _RowConv(fold_bare(arrays, "neck.3"), kernels, gelu=False)

        def resized(x: Tensor) -> Tensor:
            x = conv.rows(reduce(x), 0, x.shape[1]).permute(0, 3, 1, 2)
            return F.interpolate(x, size, mode="bilinear").permute(0, 2, 3, 1)

        return resized
    reduce = kernels.linear(fold_bare(arrays, "neck.0"))
    conv = _RowConv(fold_bare(arrays, "neck.2"), kernels, gelu=False)
    norm1, norm2 = (
        _make_norm(arrays, f"neck.{i}", layer.eps, kernels.dtype)
        for i, layer in enumerate(neck)
        if isinstance(layer, LayerNorm2d)
    )
    return lambda x: norm2(conv.rows(norm1(reduce(x)), 0, x.shape[1]))


def _make_head(eps: float, arrays: Arrays, kernels: PlainKernels) -> Step:
    """Mean over the positions, LayerNorm, linear layer: [B, H, W, C] -> [B, classes]."""
    norm = _make_norm(arrays, "norm_head", eps, kernels.dtype)
    if "head.weight" not in arrays:
        return lambda x: norm(x.mean((1, 2)))
    linear = kernels.linear(fold_linear(arrays, "head"))
    return lambda x: linear(norm(x.mean((1, 2))))


def _make_norm(arrays: Arrays, name: str, eps: float, dtype: torch.dtype) -> Step:
    """LayerNorm over the last axis."""
    weight, bias = (torch.tensor(arrays[f"{name}.{part}"]).to(dtype) for part in ("weight", "bias"))
    return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)


# -- windows ---------------------------------------------------------------------------------------


def copy_to_windows(x: Tensor, side: int, padding: Tensor) -> Tensor:
    """Cut a map [B, H, W, C] into windows [B * ceil(H/S) * ceil(W/S), S*S, C], in row-major order.

    ``padding`` [C] stands in places of a window that are outside the map. A view of ``x`` where
    that is possible.
    """
    batch, height, width, channels = x.shape
    rows, columns = -(-height // side), -(-width // side)
    if width == side and height % side == 0:  # windows lie one behind the other already
        return x.reshape(batch * rows, side * side, channels)
    windows = x.new_empty(batch, rows, columns, side, side, channels)
    for target, source in _matching(windows, x, side):
        target.copy_(source)
    if height % side:
        windows[:, -1, :, height % side :] = padding
    if width % side:
        windows[:, :, -1, :, width % side :] = padding
    return windows.view(batch * rows * columns, side * side, channels)


def copy_from_windows(windows: Tensor, side: int, like: Tensor) -> Tensor:
    """Put windows back into a map [B, H, W, C] of the sizes of ``like``, without the padding."""
    batch, height, width = like.shape[:3]
    rows, columns = -(-height // side), -(-width // side)
    channels = windows.shape[-1]
    if width == side and height % side == 0:
        return windows.reshape(batch, height, width, channels)
    windows = windows.reshape(batch, rows, columns, side, side, channels)
    x = windows.new_empty(batch, height, width, channels)
    for source, target in _matching(windows, x, side):
        target.copy_(source)
    return x


def _matching(windows: Tensor, x: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """Views of the windows and of the map that hold the same positions.

    Whole windows, the right edge, the bottom edge and the corner, as far as they exist.
    """
    # along each axis: the first window, how many, and their side
    parts = [((0, n // side, side), (n // side, 1, n % side)) for n in x.shape[1:3]]
    pairs = []
    for (top, rows, high), (left, columns, wide) in itertools.product(*parts):
        if rows and columns and high and wide:
            cut = x[:, top * side :, left * side :][:, : rows * high, : columns * wide]
            cut = unflatten(unflatten(cut, 2, (columns, wide)), 1, (rows, high)).transpose(2, 3)
            same = windows[:, top : top + rows, left : left + columns, :high, :wide]
            pairs.append((same, cut))
    return pairs


# -- kernels ---------------------------------------------------------------------------------------


class PlainKernels:
    """Public operators only."""

    name = "public operators"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def linear(self, weights: Weights, after: After = "none") -> Linear:
        """A linear layer."""
        weight, bias = self._place(weights.weight).flatten(1), self._place(weights.bias)

        def run(x: Tensor, add: Tensor | None = None) -> Tensor:
            y = F.linear(x, weight, bias)
            if add is not None:
                y += add
            return F.gelu(y) if after == "gelu" else y

        return run

    def conv(self, weights: Weights, after: After = "none") -> Conv:
        """A convolution."""
        weight, bias = self._place(weights.weight), self._place(weights.bias)

        def run(x: Tensor, pad_rows: int | None = None) -> Tensor:
            padding = (weights.pad if pad_rows is None else pad_rows, weights.pad)
            y = F.conv2d(x, weight, bias, weights.stride, padding, groups=weights.groups)
            return F.gelu(y) if after == "gelu" else y

        return run

    def _place(self, array: Array) -> Tensor:
        """In this precision; what has four axes in channels-last memory."""
        layout = torch.channels_last if array.ndim == 4 else torch.contiguous_format
        return torch.from_numpy(array).to(self.dtype).contiguous(memory_format=layout)


class PackedKernels(PlainKernels):
    """oneDNN's fused operators on packed weights (CPU)."""

    name = "packed oneDNN operators"

    def linear(self, weights: Weights, after: After = "none") -> Linear:
        """A linear layer."""
        ops: Any = torch.ops.mkldnn
        packed = ops._reorder_linear_weight(self._place(weights.weight).flatten(1).contiguous())
        bias = self._place(weights.bias)
        algorithm = "none" if after == "gelu" else ""

        def run(x: Tensor, add: Tensor | None = None) -> Tensor:
            y: Tensor
            if add is None:
                y = ops._linear_pointwise(x, packed, bias, after, [], algorithm)
            else:
                y = ops._linear_pointwise.binary(x, add, packed, bias, "add")
            return y

        return run

    def conv(self, weights: Weights, after: After = "none") -> Conv:
        """A convolution."""
        ops: Any = torch.ops.mkldnn
        stride, ones, groups, pad = [weights.stride] * 2, [1, 1], weights.groups, weights.pad
        weight, bias = self._place(weights.weight), self._place(weights.bias)
        packed = ops._reorder_convolution_weight(weight, [pad, pad], stride, ones, groups)
        algorithm = "none" if after == "gelu" else ""

        def run(x: Tensor, pad_rows: int | None = None) -> Tensor:
            padding = [pad if pad_rows is None else pad_rows, pad]
            y: Tensor = ops._convolution_pointwise(
                x, packed, bias, padding, stride, ones, groups, after, [], algorithm
            )
            return y

        return run


@functools.cache
def choose_kernels(dtype: torch.dtype) -> PlainKernels:
    """Packed kernels where this torch and machine have them and they agree with public ones."""
    plain = PlainKernels(dtype)
    try:
        packed = PackedKernels(dtype)
        agree = all(
            torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=tolerance)
            for tolerance in [1e-4 if dtype == torch.float32 else 5e-2]
            for ours, theirs in zip(_trial(packed), _trial(plain), strict=True)
        )
    except (RuntimeError, AttributeError, TypeError):
        return plain
    return packed if agree else plain


def _trial(kernels: PlainKernels) -> list[Tensor]:
    """Small runs of everything that the network asks of its kernels."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def weights(*shape: int, stride: int = 1, pad: int = 0, groups: int = 1) -> Weights:
        scale = (shape[0] if len(shape) == 2 else 9 * shape[1]) ** -0.5
        weight, bias = values(*shape) * scale, values(shape[0])
        return Weights(weight.numpy(), bias.numpy(), stride, pad, groups)

    dense = weights(24, 16)
    depthwise = weights(16, 1, 3, 3, pad=1, groups=16)
    strided = weights(8, 16, 3, 3, stride=2, pad=1)
    x = values(1, 7, 5, 16).to(kernels.dtype)  # [B, H, W, C]
    residual = values(1, 7, 5, 24).to(kernels.dtype)
    image = x.permute(0, 3, 1, 2)
    with torch.inference_mode():
        return [
            kernels.linear(dense)(x),
            kernels.linear(dense, "gelu")(x),
            kernels.linear(dense)(x, residual),
            kernels.conv(depthwise, "gelu")(image),
            kernels.conv(depthwise)(image, pad_rows=0),
            kernels.conv(strided, "gelu")(image),
        ]
