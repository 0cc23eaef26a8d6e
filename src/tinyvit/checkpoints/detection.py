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
from pathlib import PurePath
from typing import Literal, TypeAlias

from torch import Tensor

from tinyvit.catalog import VARIANTS, Family, Variant
from tinyvit.errors import CheckpointError

from .families import (
    IDENTICAL_KEYS,
    LAYOUTS,
    ORDER,
    Part,
    key_from_canonical,
    key_to_canonical,
    part_of,
    to_canonical,
)

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
        in_chans: Channels of the image.
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


pass


_MASK_TOKENS = 4  # three masks of an ambiguous prompt and a single one
_MLP_DIM = 2048
_MASK_IN_CHANS = 16


def prompt_encoder_shapes(width: int = 256) -> dict[str, Shape]:
    """List the tensors of a prompt encoder.

    Args:
        width: Channels of the image embedding.

    Returns:
        Key -> shape.
    """
    quarter = _MASK_IN_CHANS // 4
    name = "prompt_encoder."
    shapes: dict[str, Shape] = {
        f"{name}pe_layer.positional_encoding_gaussian_matrix": (2, width // 2),
        **{f"{name}point_embeddings.{i}.weight": (1, width) for i in range(4)},
        f"{name}not_a_point_embed.weight": (1, width),
        f"{name}no_mask_embed.weight": (1, width),
    }
    shapes.update(_layer(f"{name}mask_downscaling.0", (quarter, 1, 2, 2)))
    shapes.update(_layer(f"{name}mask_downscaling.1", (quarter,)))
    shapes.update(_layer(f"{name}mask_downscaling.3", (_MASK_IN_CHANS, quarter, 2, 2)))
    shapes.update(_layer(f"{name}mask_downscaling.4", (_MASK_IN_CHANS,)))
    shapes.update(_layer(f"{name}mask_downscaling.6", (width, _MASK_IN_CHANS, 1, 1)))
    return shapes


def mask_decoder_shapes(width: int = 256) -> dict[str, Shape]:
    """List the tensors of a mask decoder.

    Args:
        width: Channels of the image embedding.

    Returns:
        Key -> shape.
    """
    name = "mask_decoder."
    shapes: dict[str, Shape] = {}
    for layer in range(2):
        prefix = f"{name}transformer.layers.{layer}."
        shapes.update(_attention(f"{prefix}self_attn", width, width))
        shapes.update(_attention(f"{prefix}cross_attn_token_to_image", width, width // 2))
        shapes.update(_attention(f"{prefix}cross_attn_image_to_token", width, width // 2))
        shapes.update(_layer(f"{prefix}mlp.lin1", (_MLP_DIM, width)))
        shapes.update(_layer(f"{prefix}mlp.lin2", (width, _MLP_DIM)))
        for norm in range(1, 5):
            shapes.update(_layer(f"{prefix}norm{norm}", (width,)))
    last = f"{name}transformer.final_attn_token_to_image"
    shapes.update(_attention(last, width, width // 2))
    shapes.update(_layer(f"{name}transformer.norm_final_attn", (width,)))
    shapes[f"{name}iou_token.weight"] = (1, width)
    shapes[f"{name}mask_tokens.weight"] = (_MASK_TOKENS, width)
    shapes.update(_transposed(f"{name}output_upscaling.0", (width, width // 4, 2, 2)))
    shapes.update(_layer(f"{name}output_upscaling.1", (width // 4,)))
    shapes.update(_transposed(f"{name}output_upscaling.3", (width // 4, width // 8, 2, 2)))
    for token in range(_MASK_TOKENS):
        shapes.update(_mlp(f"{name}output_hypernetworks_mlps.{token}", width, width // 8))
    shapes.update(_mlp(f"{name}iou_prediction_head", width, _MASK_TOKENS))
    return shapes


def hq_decoder_shapes(width: int = 256, vit_dim: int = 160) -> dict[str, Shape]:
    """List the tensors Light HQ-SAM adds to the mask decoder.

    Args:
        width: Channels of the image embedding.
        vit_dim: Channels after the encoder's second stage and its merge.

    Returns:
        Key -> shape.
    """
    name = "mask_decoder."
    quarter, eighth = width // 4, width // 8
    shapes: dict[str, Shape] = {f"{name}hf_token.weight": (1, width)}
    shapes.update(_mlp(f"{name}hf_mlp", width, eighth))
    shapes.update(_transposed(f"{name}compress_vit_feat.0", (vit_dim, width, 2, 2)))
    shapes.update(_layer(f"{name}compress_vit_feat.1", (width,)))
    shapes.update(_transposed(f"{name}compress_vit_feat.3", (width, eighth, 2, 2)))
    shapes.update(_transposed(f"{name}embedding_encoder.0", (width, quarter, 2, 2)))
    shapes.update(_layer(f"{name}embedding_encoder.1", (quarter,)))
    shapes.update(_transposed(f"{name}embedding_encoder.3", (quarter, eighth, 2, 2)))
    shapes.update(_layer(f"{name}embedding_maskfeature.0", (quarter, eighth, 3, 3)))
    shapes.update(_layer(f"{name}embedding_maskfeature.1", (quarter,)))
    shapes.update(_layer(f"{name}embedding_maskfeature.3", (eighth, quarter, 3, 3)))
    return shapes


def _layer(name: str, weight: Shape) -> Mapping[str, Shape]:
    """A weight [out, …] and its bias."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _transposed(name: str, weight: Shape) -> Mapping[str, Shape]:
    """A transposed convolution: weight [in, out, k, k] and its bias [out]."""
    return {f"{name}.weight": weight, f"{name}.bias": weight[1:2]}


def _attention(name: str, width: int, inner: int) -> dict[str, Shape]:
    """Projections of an attention whose inner width may be smaller."""
    shapes: dict[str, Shape] = {}
    for projection in ("q_proj", "k_proj", "v_proj"):
        shapes.update(_layer(f"{name}.{projection}", (inner, width)))
    shapes.update(_layer(f"{name}.out_proj", (width, inner)))
    return shapes


def _mlp(name: str, width: int, out: int) -> dict[str, Shape]:
    """Three linear layers, the last to ``out``."""
    shapes: dict[str, Shape] = {}
    for layer, outputs in enumerate((width, width, out)):
        shapes.update(_layer(f"{name}.layers.{layer}", (outputs, width)))
    return shapes


pass
pass


@dataclass(frozen=True)
class Detection:
    """What a state dict is.

    Attributes:
        family: Whose key names it uses; the likeliest where several are identical.
        also: Families whose files look exactly the same.
        variant: Name of the catalog's variant with these sizes, or None for sizes of its own.
        architecture: The encoder's sizes, or None for a file without an encoder.
        parts: The parts of a model in the file.
        strides: Strides of the merges that will be used.
        strides_reason: Why those: no tensor shows them.
        img_size: Side of the square image the weights were probably trained for.
        parameters: Number of parameters in the file, buffers not counted.
        dtypes: Dtype -> number of tensors.
        missing: Keys a complete file would have, in the file's spelling.
        unexpected: Keys that belong to nothing, in the file's spelling.
        wrong_shapes: Key -> (wanted shape, shape in the file).
        ignored: Keys that no loader needs (``attention_bias_idxs``).
    """

    family: Family
    also: tuple[Family, ...]
    variant: str | None
    architecture: Architecture | None
    parts: tuple[Part, ...]
    strides: tuple[int, ...]
    strides_reason: str
    img_size: int
    parameters: int
    dtypes: dict[str, int]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shapes: dict[str, tuple[Shape, Shape]]
    ignored: tuple[str, ...]

    @property
    def has_encoder(self) -> bool:
        """Whether there is an image encoder or classifier."""
        return "trunk" in self.parts

    @property
    def has_head(self) -> bool:
        """Whether there is a classification head."""
        return "head" in self.parts

    @property
    def has_neck(self) -> bool:
        """Whether there is a SAM neck."""
        return "neck" in self.parts

    @property
    def has_prompt_encoder(self) -> bool:
        """Whether there is a prompt encoder."""
        return "prompt_encoder" in self.parts

    @property
    def has_mask_decoder(self) -> bool:
        """Whether there is a mask decoder."""
        return "mask_decoder" in self.parts

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing and every shape fits."""
        return not self.missing and not self.wrong_shapes

    def arguments(self) -> dict[str, object]:
        """Return the arguments with which ``TinyViT`` has exactly these tensors.

        Returns:
            A new dict of plain data.

        Raises:
            CheckpointError: If the file holds no encoder.
        """
        sizes = self.architecture
        if sizes is None:
            raise CheckpointError(
                f"a {self.family} file holds no image encoder to build; give the encoder's file too"
            )
        return {
            "img_size": self.img_size,
            "in_chans": sizes.in_chans,
            "num_classes": 1000 if sizes.num_classes is None else sizes.num_classes,
            "embed_dims": sizes.embed_dims,
            "depths": sizes.depths,
            "num_heads": sizes.num_heads,
            "window_sizes": sizes.window_sizes,
            "mlp_ratio": sizes.mlp_ratio,
            "mbconv_expand_ratio": sizes.mbconv_expand_ratio,
            "local_conv_size": sizes.local_conv_size,
            "strides": self.strides,
            "stem": sizes.stem,
            "neck_dim": sizes.neck_dim,
            "head": self.has_head,
        }


def detect(
    tensors: Mapping[str, Tensor],
    filename: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Detection:
    """Say what a state dict is.

    Args:
        tensors: Key -> tensor, as read from a file; tensors on the meta device will do.
        filename: The file's name; tells apart projects whose files are identical.
        metadata: The file's header texts; ``tinyvit.family`` there tells such projects apart too,
            and ``tinyvit.strides`` settles the strides.

    Returns:
        The answer, with everything missing or left over at once.

    Raises:
        CheckpointError: If it is no TinyViT; the text says what is missing and what it looks like.
    """
    family = _family_of(tensors)
    canonical = to_canonical(tensors, family)
    spelt = {key_to_canonical(key, family): key for key in tensors}
    shapes = {key: tuple(tensor.shape) for key, tensor in canonical.items()}
    parts = _parts(shapes)
    sizes = read_architecture(shapes) if "trunk" in parts else None
    family = _refined(family, parts, sizes)
    candidates = _identical(family)
    family = _named(filename, metadata or {}, candidates) or family
    also = tuple(name for name in candidates if name != family)
    is_sam = LAYOUTS[family].strides[-1] == 1 and (family != "tinyvit" or "neck" in parts)
    strides, reason = _strides(family, is_sam, sizes, metadata or {})
    variant = _variant(sizes, is_sam)
    expected = _expected(family, parts, sizes, shapes)
    return Detection(
        family=family,
        also=also,
        variant=variant.name if variant else None,
        architecture=sizes,
        parts=parts,
        strides=strides,
        strides_reason=reason,
        img_size=variant.img_size if variant else _img_size(sizes, is_sam),
        parameters=sum(t.numel() for key, t in canonical.items() if not _is_buffer(key)),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        missing=tuple(
            key_from_canonical(key, family)
            for key in expected
            if key not in shapes and not key.endswith("num_batches_tracked")
        ),
        unexpected=tuple(
            spelt[key] for key in shapes if key not in expected and part_of(key) != "decoder_state"
        ),
        wrong_shapes={
            spelt[key]: (shape, shapes[key])
            for key, shape in expected.items()
            if key in shapes and shapes[key] != shape
        },
        ignored=tuple(spelt[key] for key in spelt if part_of(key) == "bias_indices"),
    )


# First match wins: how other networks' keys start, and what they are.
_OTHERS = (
    ("image_encoder.blocks.", "Segment Anything with a ViT-B, -L or -H encoder"),
    ("image_encoder.trunk.", "SAM 2 (Hiera encoder)"),
    ("image_encoder.backbone.", "EfficientViT-SAM or another SAM with its own backbone"),
    ("image_encoder.", "a SAM with another image encoder"),
    ("vision_encoder.", "a SAM of the transformers library"),
    ("visual.", "CLIP"),
    ("text_model.", "CLIP"),
    ("cls_token", "a plain vision transformer (ViT)"),
    ("blocks.", "a vision transformer (ViT)"),
    ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin transformer"),
    ("stages.0.blocks.0.", "another network of timm"),
    ("layer1.", "a ResNet"),
    ("features.", "a torchvision network"),
    ("0.conv.", "a YOLO detector"),
)


def _family_of(tensors: Mapping[str, Tensor]) -> Family:
    """The family by the way the stages' keys are spelt; refined later."""
    keys = tensors.keys()
    if any(key.startswith("image_encoder.layers.") for key in keys):
        return "mobile_sam"
    if any(key.startswith("layers.0.blocks.0.conv1.c.") for key in keys) or any(
        key.startswith("layers.") and key.endswith("attn.attention_biases") for key in keys
    ):
        return "cream"
    if any(key.startswith("stages.0.blocks.0.conv1.conv.") for key in keys) or any(
        key.startswith("stages.") and key.endswith("attn.attention_biases") for key in keys
    ):
        return "timm"
    starts = {key.partition(".")[0] for key in keys}
    if starts and starts <= {"prompt_encoder", "mask_decoder"}:
        return "mobile_sam_v2_decoder"
    what = next(
        (name for start, name in _OTHERS if any(key.startswith(start) for key in keys)), None
    )
    looks = (
        f"it looks like {what}" if what else f"its keys begin with {', '.join(sorted(starts)[:6])}"
    )
    raise CheckpointError(
        f"these {len(tensors)} tensors are no TinyViT: {looks}; wanted were the keys of a TinyViT "
        "stage, 'layers.0.blocks…', 'image_encoder.layers.0.blocks…' or 'stages.0.blocks…'"
    )


def _parts(shapes: Mapping[str, Shape]) -> tuple[Part, ...]:
    """The parts that are there, in the usual order."""
    there = {part_of(key) for key in shapes}
    return tuple(part for part in ORDER if part in there and part != "unknown")


def _refined(family: Family, parts: tuple[Part, ...], sizes: Architecture | None) -> Family:
    """Tell families of one spelling apart by the parts they hold."""
    if family == "cream" and ("neck" in parts or "head" not in parts or _is_pointwise(sizes)):
        return "tinyvit"
    if family != "mobile_sam":
        return family
    if "decoder_state" in parts:
        return "micro_sam"
    if "hq_decoder" in parts:
        return "hq_sam"
    if "head" in parts:
        return "mobile_sam"
    return "litemedsam" if _is_pointwise(sizes) else "tinyvit_sam"


def _is_pointwise(sizes: Architecture | None) -> bool:
    """Whether the stem is LiteMedSAM's."""
    return sizes is not None and sizes.stem == "pointwise"


def _identical(family: Family) -> tuple[Family, ...]:
    """The families whose files have these very keys and shapes, itself first."""
    if family == "mobile_sam":
        return (*IDENTICAL_KEYS, "tinyvit_sam")
    if family == "cream":
        return ("cream", "tinyvit")
    if family in ("hq_sam", "litemedsam"):
        return (family, "tinyvit_sam")
    return (family,)


def _named(
    filename: str | None, metadata: Mapping[str, str], candidates: tuple[Family, ...]
) -> Family | None:
    """The candidate that the file's header or else its name names, if any."""
    written = metadata.get("tinyvit.family")
    if written in candidates:
        return next(name for name in candidates if name == written)
    plain = PurePath(filename or "").stem.lower().replace("_", "").replace("-", "")
    foreign = [name for name in candidates if not name.startswith("tinyvit")]
    longest_first = sorted(foreign, key=len, reverse=True)
    return next((name for name in longest_first if name.replace("_", "") in plain), None)


def _strides(
    family: Family, is_sam: bool, sizes: Architecture | None, metadata: Mapping[str, str]
) -> tuple[tuple[int, ...], str]:
    """The strides to use, and why."""
    merges = len(sizes.embed_dims) - 1 if sizes else 3
    written = metadata.get("tinyvit.strides", "")
    values = tuple(int(text) for text in written.split(",") if text.strip() in ("1", "2"))
    if len(values) == merges:
        return values, f"strides {written}: written in the file's header"
    values = (2,) * (merges - 1) + (1 if is_sam else 2,) if merges else ()
    shown = ",".join(str(value) for value in values)
    kind = "a SAM encoder" if is_sam else "a classification network"
    if family == "tinyvit":
        title = "a file with a neck" if is_sam else "a file without a neck"
    else:
        title = LAYOUTS[family].title
    return values, f"strides {shown} assumed: no tensor shows strides, and {title} is {kind}"


def _variant(sizes: Architecture | None, is_sam: bool) -> Variant | None:
    """The catalog's variant with exactly these sizes; head and class number do not matter."""
    if sizes is None:
        return None
    ratios = (sizes.mlp_ratio, sizes.mbconv_expand_ratio, sizes.local_conv_size, sizes.in_chans)
    if ratios != (4.0, 4.0, 3, 3):
        return None
    for row in VARIANTS:
        if (
            (row.task == "sam") == is_sam
            and (row.embed_dims, row.depths, row.stem)
            == (sizes.embed_dims, sizes.depths, sizes.stem)
            and row.num_heads[1:] == sizes.num_heads[1:]
            and row.window_sizes[1:] == sizes.window_sizes[1:]
            and sizes.neck_dim in (None, row.neck_dim)
        ):
            return row
    return None


def _img_size(sizes: Architecture | None, is_sam: bool) -> int:
    """An image side for sizes of no variant: SAM's usual one, or the last stage in one window."""
    if is_sam or sizes is None:
        return 1024
    return 32 * sizes.window_sizes[-1]


def _expected(
    family: Family,
    parts: tuple[Part, ...],
    sizes: Architecture | None,
    found: Mapping[str, Shape],
) -> dict[str, Shape]:
    """Canonical key -> shape of everything a complete file of this family and size holds."""
    layout = LAYOUTS[family]
    wanted = {*layout.required, *parts}
    shapes: dict[str, Shape] = {}
    embeddings = ("prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight")
    width = next((found[key][-1] for key in embeddings if found.get(key)), 256)
    vit_dim = 160
    if sizes is not None:
        shapes.update(encoder_shapes(sizes, "head" in wanted, "neck" in wanted))
        width = sizes.neck_dim if sizes.neck_dim is not None else width
        vit_dim = sizes.embed_dims[min(2, len(sizes.embed_dims) - 1)]
    if "prompt_encoder" in wanted:
        shapes.update(prompt_encoder_shapes(width))
    if "mask_decoder" in wanted:
        shapes.update(mask_decoder_shapes(width))
    if "hq_decoder" in wanted:
        shapes.update(hq_decoder_shapes(width, vit_dim))
    return shapes


def _is_buffer(key: str) -> bool:
    """Whether a canonical key is a buffer and no parameter."""
    return key.endswith(
        (
            "running_mean",
            "running_var",
            "num_batches_tracked",
            "positional_encoding_gaussian_matrix",
        )
    )
