"""Read a TinyViT's sizes off the shapes of its tensors, and list the tensors of given sizes.

Each size is read from every tensor that shows it and the majority wins, so one damaged or missing
tensor is later reported as such instead of being believed. Shapes in, plain data out: no tensors'
values, no files, no families. Strides are not here: they leave no trace in any shape.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tinyvit.errors import CheckpointError

__all__ = ["Architecture", "Shape", "encoder_shapes", "read_architecture"]

Shape: TypeAlias = tuple[int, ...]

_STAGE_KEY = re.compile(r"^layers\.(\d+)\.")
_BLOCK_KEY = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(.+)$")
_HEAD_DIM = 32  # the family's channels per attention head, used only where no bias table is left


@dataclass(frozen=True)
class Architecture:
    """The sizes of a TinyViT that its tensors show.

    Attributes:
        embed_dims: Channels of each stage.
        depths: Blocks of each stage.
        num_heads: Attention heads of each stage; the first stage has none and gets its channels
            over 32, at least 1.
        window_sizes: Window side of each stage in tokens; the first has none and gets the second's.
        mlp_ratio: Hidden over outer channels of the MLPs.
        mbconv_expand_ratio: Hidden over outer channels of the first stage's convolutions.
        local_conv_size: Kernel side of the depthwise convolution in each block.
        in_chans: Channels of the picture.
        stem: ``"conv"`` (3x3) or ``"pointwise"`` (1x1).
        num_classes: Outputs of the head, or None without a head.
        neck_dim: Outputs of the neck, or None without a neck.
    """

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_sizes: tuple[int, ...]
    mlp_ratio: float
    mbconv_expand_ratio: float
    local_conv_size: int
    in_chans: int
    stem: Literal["conv", "pointwise"]
    num_classes: int | None
    neck_dim: int | None


def read_architecture(shapes: Mapping[str, Shape]) -> Architecture:
    """Read the sizes of an encoder off its tensors' shapes.

    Args:
        shapes: Canonical key -> shape; other parts' keys are ignored.

    Returns:
        The sizes. Tensors that contradict them can be found with ``encoder_shapes``.

    Raises:
        CheckpointError: If a size that nothing else shows is missing, or a window is not square.
    """
    stages = {int(m[1]) for key in shapes if (m := _STAGE_KEY.match(key))}
    if not stages:
        raise CheckpointError("no tensor of a TinyViT stage (layers.0 … layers.3) is in the file")
    last = max(stages)
    dims = tuple(_dim_of_stage(shapes, stage) for stage in range(last + 1))
    heads = [max(1, dims[0] // _HEAD_DIM)]
    windows = []
    for stage in range(1, last + 1):
        tables = list(_of_stage(shapes, stage, "attn.attention_biases", 2))
        fallback = max(1, dims[stage] // _HEAD_DIM)
        heads.append(_majority((table[0] for table in tables), fallback))
        windows.append(_window(stage, [table[1] for table in tables]))
    stem_kernels = [s[-1] for key in _STEM if len(s := shapes.get(key, ())) == 4]
    kernel = _majority(stem_kernels, 3)
    hidden = [
        (dims[stage], _majority((s[0] for s in _of_stage(shapes, stage, "mlp.fc1.weight", 2)), 0))
        for stage in range(1, last + 1)
    ]
    expanded = _majority((s[0] for s in _of_stage(shapes, 0, "conv1.c.weight", 4)), 0)
    local = [
        shape[-1]
        for stage in range(1, last + 1)
        for shape in _of_stage(shapes, stage, "local_conv.c.weight", 4)
    ]
    stem_weight = shapes.get(_STEM[0], ())
    return Architecture(
        embed_dims=dims,
        depths=tuple(_depth_of_stage(shapes, stage) for stage in range(last + 1)),
        num_heads=tuple(heads),
        window_sizes=(windows[0] if windows else 7, *windows),
        mlp_ratio=_ratio(hidden),
        mbconv_expand_ratio=_ratio([(dims[0], expanded)]),
        local_conv_size=_majority(local, 3),
        in_chans=stem_weight[1] if len(stem_weight) == 4 else 3,
        stem="pointwise" if kernel == 1 else "conv",
        num_classes=_first(shapes, "head.weight", "head.bias"),
        neck_dim=_first(shapes, "neck.0.weight", "neck.1.weight", "neck.2.weight", "neck.3.weight"),
    )


def encoder_shapes(architecture: Architecture, has_head: bool, has_neck: bool) -> dict[str, Shape]:
    """List the tensors of a complete encoder.

    Args:
        architecture: The sizes.
        has_head: Whether ``norm_head`` and ``head`` are wanted.
        has_neck: Whether the neck is wanted.

    Returns:
        Canonical key -> shape, in the order of a state dict.
    """
    shapes: dict[str, Shape] = {}
    dims = architecture.embed_dims
    kernel = 3 if architecture.stem == "conv" else 1
    half = dims[0] // 2
    _add_conv_bn(shapes, "patch_embed.seq.0", (half, architecture.in_chans, kernel, kernel))
    _add_conv_bn(shapes, "patch_embed.seq.2", (dims[0], half, kernel, kernel))
    for stage, dim in enumerate(dims):
        for block in range(architecture.depths[stage]):
            name = f"layers.{stage}.blocks.{block}"
            if stage == 0:
                hidden = int(dim * architecture.mbconv_expand_ratio)
                _add_bottleneck(shapes, name, (dim, hidden, dim))
            else:
                _add_attention_block(shapes, name, stage, architecture)
        if stage + 1 < len(dims):
            out = dims[stage + 1]
            _add_bottleneck(shapes, f"layers.{stage}.downsample", (dim, out, out))
    if has_head:
        classes = architecture.num_classes if architecture.num_classes is not None else 1000
        _add_pair(shapes, "norm_head", (dims[-1],))
        _add_pair(shapes, "head", (classes, dims[-1]))
    if has_neck:
        out = architecture.neck_dim if architecture.neck_dim is not None else 256
        shapes["neck.0.weight"] = (out, dims[-1], 1, 1)
        _add_pair(shapes, "neck.1", (out,))
        shapes["neck.2.weight"] = (out, out, 3, 3)
        _add_pair(shapes, "neck.3", (out,))
    return shapes


_STEM = ("patch_embed.seq.0.c.weight", "patch_embed.seq.2.c.weight")

# Which dimension of which tensor of a block shows the stage's channels.
_DIM_SHOWN_BY = {
    "conv1.c.weight": (4, 1),
    "conv3.c.weight": (4, 0),
    "attn.norm.weight": (1, 0),
    "attn.qkv.weight": (2, 1),
    "attn.proj.weight": (2, 0),
    "mlp.norm.weight": (1, 0),
    "mlp.fc1.weight": (2, 1),
    "mlp.fc2.weight": (2, 0),
}


def _add_pair(shapes: dict[str, Shape], name: str, weight: Shape) -> None:
    """Add a weight and the bias that goes with it."""
    shapes[f"{name}.weight"] = weight
    shapes[f"{name}.bias"] = weight[:1]


def _add_conv_bn(shapes: dict[str, Shape], name: str, weight: Shape) -> None:
    """Add a Conv2d_BN; ``weight`` is [out, in / groups, k, k]."""
    shapes[f"{name}.c.weight"] = weight
    _add_pair(shapes, f"{name}.bn", weight[:1])
    shapes[f"{name}.bn.running_mean"] = weight[:1]
    shapes[f"{name}.bn.running_var"] = weight[:1]
    shapes[f"{name}.bn.num_batches_tracked"] = ()


def _add_bottleneck(shapes: dict[str, Shape], name: str, dims: tuple[int, int, int]) -> None:
    """Add 1x1, depthwise 3x3, 1x1: the body of MBConv and of PatchMerging."""
    into, middle, out = dims
    _add_conv_bn(shapes, f"{name}.conv1", (middle, into, 1, 1))
    _add_conv_bn(shapes, f"{name}.conv2", (middle, 1, 3, 3))
    _add_conv_bn(shapes, f"{name}.conv3", (out, middle, 1, 1))


def _add_attention_block(
    shapes: dict[str, Shape], name: str, stage: int, architecture: Architecture
) -> None:
    """Add a TinyViTBlock of one stage."""
    dim, heads = architecture.embed_dims[stage], architecture.num_heads[stage]
    inner = heads * (dim // heads)
    hidden = int(dim * architecture.mlp_ratio)
    kernel = architecture.local_conv_size
    shapes[f"{name}.attn.attention_biases"] = (heads, architecture.window_sizes[stage] ** 2)
    _add_pair(shapes, f"{name}.attn.norm", (dim,))
    _add_pair(shapes, f"{name}.attn.qkv", (3 * inner, dim))
    _add_pair(shapes, f"{name}.attn.proj", (dim, inner))
    _add_pair(shapes, f"{name}.mlp.norm", (dim,))
    _add_pair(shapes, f"{name}.mlp.fc1", (hidden, dim))
    _add_pair(shapes, f"{name}.mlp.fc2", (dim, hidden))
    _add_conv_bn(shapes, f"{name}.local_conv", (dim, 1, kernel, kernel))


def _of_stage(shapes: Mapping[str, Shape], stage: int, suffix: str, rank: int) -> Iterator[Shape]:
    """Yield the shapes of one tensor in all blocks of a stage, if it has the right rank."""
    for key, shape in shapes.items():
        match = _BLOCK_KEY.match(key)
        if match and int(match[1]) == stage and match[3] == suffix and len(shape) == rank:
            yield shape


def _dim_of_stage(shapes: Mapping[str, Shape], stage: int) -> int:
    """Channels of a stage, from its blocks and the merges on both sides."""
    votes = [
        shape[axis]
        for suffix, (rank, axis) in _DIM_SHOWN_BY.items()
        for shape in _of_stage(shapes, stage, suffix, rank)
    ]
    for key, axis in (
        (f"layers.{stage - 1}.downsample.conv3.c.weight", 0),
        (f"layers.{stage}.downsample.conv1.c.weight", 1),
    ):
        if len(shapes.get(key, ())) == 4:
            votes.append(shapes[key][axis])
    dim = _majority(votes, 0)
    if dim < 1:
        raise CheckpointError(f"nothing shows the channels of stage {stage + 1} (layers.{stage})")
    return dim


def _depth_of_stage(shapes: Mapping[str, Shape], stage: int) -> int:
    """Blocks of a stage: the highest number among its keys plus one."""
    blocks = [int(m[2]) for key in shapes if (m := _BLOCK_KEY.match(key)) and int(m[1]) == stage]
    return max(blocks, default=-1) + 1


def _window(stage: int, areas: list[int]) -> int:
    """Window side of a stage from the lengths of its bias tables."""
    area = _majority(areas, 0)
    if area < 1:
        raise CheckpointError(
            f"no attention_biases of stage {stage + 1} (layers.{stage}) is in the file, "
            "so its window is unknown"
        )
    side = math.isqrt(area)
    if side * side != area:
        raise CheckpointError(
            f"the attention_biases of layers.{stage} have {area} entries, which is no square window"
        )
    return side


def _ratio(pairs: list[tuple[int, int]]) -> float:
    """The shortest decimal r with ``int(outer * r) == hidden`` for all (outer, hidden) > 0."""
    known = [(outer, hidden) for outer, hidden in pairs if hidden > 0]
    if not known:
        return 4.0
    lowest = max(hidden / outer for outer, hidden in known)
    for digits in range(7):
        ratio = math.ceil(round(lowest * 10.0**digits, 6)) / 10.0**digits
        if all(int(outer * ratio) == hidden for outer, hidden in known):
            return ratio
    return lowest


def _majority(votes: Iterable[int], fallback: int) -> int:
    """The most frequent value (the first of equals), or the fallback."""
    counted = Counter(votes).most_common(1)
    return counted[0][0] if counted else fallback


def _first(shapes: Mapping[str, Shape], *keys: str) -> int | None:
    """The first dimension of the first of these tensors that is there."""
    return next((shapes[key][0] for key in keys if shapes.get(key)), None)
