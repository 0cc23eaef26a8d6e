"""What a state dict is: family, sizes, and what is missing, left over or misshapen.

Sizes are read off the shapes of the tensors, each from every tensor that shows it; the majority
wins, so that one damaged tensor is later named instead of believed. Strides leave no trace in any
shape. The shapes of a SAM's heads are those of the networks themselves, built on torch's meta
device; everything else here takes tensors of torch or numpy and imports no torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tinyvit.catalog import VARIANTS, Family, Variant
from tinyvit.errors import CheckpointError

from .families import IDENTICAL_KEYS, LAYOUTS, Part, group_by_part, key_from_canonical, to_canonical

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from .files import StateFile

Shape: TypeAlias = tuple[int, ...]


_STAGE_KEY = re.compile(r"^layers\.(\d+)\.(?:blocks\.(\d+)\.)?(.+)$")
_HEAD_DIM = 32  # the family's channels per attention head, used only where no bias table is left
_STEM = ("patch_embed.seq.0.c.weight", "patch_embed.seq.2.c.weight")
_STUDENT_NECK = frozenset(("neck.1.running_mean", "neck.1.running_var"))
_NECK = ("neck.0.weight", "neck.1.weight", "neck.2.weight", "neck.3.weight")

# Which dimension of which tensor of a stage shows its channels: (rank, axis).
_DIM_SHOWN_BY = {
    "conv1.c.weight": (4, 1),
    "conv3.c.weight": (4, 0),
    "attn.norm.weight": (1, 0),
    "attn.qkv.weight": (2, 1),
    "attn.proj.weight": (2, 0),
    "mlp.norm.weight": (1, 0),
    "mlp.fc1.weight": (2, 1),
    "mlp.fc2.weight": (2, 0),
    "downsample.conv1.c.weight": (4, 1),
}


@dataclass(frozen=True)
class Architecture:
    """The arguments of ``TinyViT`` that its tensors show.

    The first stage has no attention: its heads are its channels over 32, its window is the second
    stage's. ``num_classes`` and ``neck_dim`` are None without them; ``neck_size`` is 72 for
    EfficientSAM3's neck, as published, since no tensor shows it.
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
    neck_size: int | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``TinyViT`` that these sizes decide."""
        classes = 1000 if self.num_classes is None else self.num_classes
        return {**asdict(self), "num_classes": classes}


def read_architecture(shapes: Mapping[str, Shape]) -> Architecture:
    """Read the sizes of an encoder off its tensors' shapes (canonical key -> shape)."""
    depths: defaultdict[int, int] = defaultdict(int)
    found: defaultdict[tuple[int, str], list[Shape]] = defaultdict(list)
    for key, shape in shapes.items():
        if match := _STAGE_KEY.match(key):
            stage = int(match[1])
            depths[stage] = max(depths[stage], int(match[2] or -1) + 1)
            found[stage, match[3]].append(shape)
    if not depths:
        raise CheckpointError("no tensor of a TinyViT stage (layers.0 … layers.3) is in the file")

    def seen(stage: int, name: str, rank: int, axis: int) -> list[int]:
        return [shape[axis] for shape in found[stage, name] if len(shape) == rank]

    stages = range(max(depths) + 1)
    attention = stages[1:]
    dims = []
    for stage in stages:
        votes = [dim for name, at in _DIM_SHOWN_BY.items() for dim in seen(stage, name, *at)]
        votes += seen(stage - 1, "downsample.conv3.c.weight", 4, 0)
        dims.append(_majority(votes))
        if dims[-1] < 1:
            raise CheckpointError(
                f"nothing shows the channels of stage {stage + 1} (layers.{stage})"
            )
    heads = [
        _majority(seen(stage, "attn.attention_biases", 2, 0), max(1, dims[stage] // _HEAD_DIM))
        for stage in attention
    ]
    windows = [_window(stage, seen(stage, "attn.attention_biases", 2, 1)) for stage in attention]
    hidden = [(dims[stage], _majority(seen(stage, "mlp.fc1.weight", 2, 0))) for stage in attention]
    local = [side for stage in attention for side in seen(stage, "local_conv.c.weight", 4, -1)]
    stem = [shapes[key] for key in _STEM if len(shapes.get(key, ())) == 4]
    first = shapes.get(_STEM[0], ())
    return Architecture(
        embed_dims=tuple(dims),
        depths=tuple(depths[stage] for stage in stages),
        num_heads=(max(1, dims[0] // _HEAD_DIM), *heads),
        window_sizes=(windows[0] if windows else 7, *windows),
        mlp_ratio=_ratio(hidden),
        mbconv_expand_ratio=_ratio([(dims[0], _majority(seen(0, "conv1.c.weight", 4, 0)))]),
        local_conv_size=_majority(local, 3),
        in_chans=first[1] if len(first) == 4 else 3,
        stem="pointwise" if _majority((s[-1] for s in stem), 3) == 1 else "conv",
        num_classes=_first(shapes, "head.weight", "head.bias"),
        neck_dim=_first(shapes, *_NECK),
        neck_size=72 if not _STUDENT_NECK.isdisjoint(shapes) else None,
    )


def _window(stage: int, areas: list[int]) -> int:
    area = _majority(areas)
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


def _majority(votes: Iterable[int], fallback: int = 0) -> int:
    """The most frequent value (the first of equals), or the fallback."""
    counted = Counter(votes).most_common(1)
    return counted[0][0] if counted else fallback


def _first(shapes: Mapping[str, Shape], *keys: str) -> int | None:
    """The first dimension of the first of these tensors that is there."""
    return next((shapes[key][0] for key in keys if shapes.get(key)), None)


@lru_cache(maxsize=16)
def encoder_shapes(sizes: Architecture) -> Mapping[str, Shape]:
    """Canonical key -> shape of an encoder with head and neck, in a state dict's order."""
    shapes: dict[str, Shape] = {}
    dims = sizes.embed_dims
    stem, mid = (3 if sizes.stem == "conv" else 1), dims[0] // 2
    _add_conv(shapes, "patch_embed.seq.0", (mid, sizes.in_chans, stem, stem))
    _add_conv(shapes, "patch_embed.seq.2", (dims[0], mid, stem, stem))
    for i, (dim, depth) in enumerate(zip(dims, sizes.depths, strict=True)):
        for name in (f"layers.{i}.blocks.{block}" for block in range(depth)):
            if i:
                _add_tokens(shapes, name, sizes, i)
            else:
                _add_bottleneck(shapes, name, dim, int(dim * sizes.mbconv_expand_ratio), dim)
        if i + 1 < len(dims):
            _add_bottleneck(shapes, f"layers.{i}.downsample", dim, dims[i + 1], dims[i + 1])
    _add_affine(shapes, "norm_head", (dims[-1],))
    _add_affine(shapes, "head", (sizes.arguments()["num_classes"], dims[-1]))
    width = 256 if sizes.neck_dim is None else sizes.neck_dim
    shapes["neck.0.weight"] = width, dims[-1], 1, 1
    if sizes.neck_size is not None:
        _add_batch_norm(shapes, "neck.1", width)
        _add_affine(shapes, "neck.3", (width, width, 3, 3))
        return shapes
    _add_affine(shapes, "neck.1", (width,))
    shapes["neck.2.weight"] = width, width, 3, 3
    _add_affine(shapes, "neck.3", (width,))
    return shapes


def _add_affine(shapes: dict[str, Shape], name: str, weight: Shape) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]


def _add_batch_norm(shapes: dict[str, Shape], name: str, channels: int) -> None:
    _add_affine(shapes, name, (channels,))
    shapes[f"{name}.running_mean"] = shapes[f"{name}.running_var"] = (channels,)
    shapes[f"{name}.num_batches_tracked"] = ()


def _add_conv(shapes: dict[str, Shape], name: str, weight: Shape) -> None:
    shapes[f"{name}.c.weight"] = weight
    _add_batch_norm(shapes, f"{name}.bn", weight[0])


def _add_bottleneck(
    shapes: dict[str, Shape], name: str, first: int, hidden: int, last: int
) -> None:
    _add_conv(shapes, f"{name}.conv1", (hidden, first, 1, 1))
    _add_conv(shapes, f"{name}.conv2", (hidden, 1, 3, 3))
    _add_conv(shapes, f"{name}.conv3", (last, hidden, 1, 1))


def _add_tokens(shapes: dict[str, Shape], name: str, sizes: Architecture, stage: int) -> None:
    """A block of attention, a depthwise convolution and an MLP."""
    dim, heads, side = sizes.embed_dims[stage], sizes.num_heads[stage], sizes.local_conv_size
    if heads < 1 or dim % heads or side % 2 == 0:
        wrong = f"num_heads must divide dim, got dim={dim}, num_heads={heads}"
        wrong = wrong if side % 2 else f"local_conv_size must be odd, got {side}"
        raise CheckpointError(f"the shapes in this file make no TinyViT: {wrong}")
    hidden = int(dim * sizes.mlp_ratio)
    shapes[f"{name}.attn.attention_biases"] = heads, sizes.window_sizes[stage] ** 2
    _add_affine(shapes, f"{name}.attn.norm", (dim,))
    _add_affine(shapes, f"{name}.attn.qkv", (3 * dim, dim))
    _add_affine(shapes, f"{name}.attn.proj", (dim, dim))
    _add_affine(shapes, f"{name}.mlp.norm", (dim,))
    _add_affine(shapes, f"{name}.mlp.fc1", (hidden, dim))
    _add_affine(shapes, f"{name}.mlp.fc2", (dim, hidden))
    _add_conv(shapes, f"{name}.local_conv", (dim, 1, side, side))


@lru_cache(maxsize=16)
def sam_shapes(width: int = 256, vit_dim: int = 160) -> Mapping[str, Shape]:
    """Key -> shape of a prompt encoder and Light HQ-SAM's mask decoder, which has all of SAM's.

    ``width`` is that of the embedding, ``vit_dim`` that after the encoder's second stage and merge.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, TwoWayTransformer
    from tinyvit.modules.sam.prompt_encoder import PromptEncoder

    class SkipInit(TorchFunctionMode):
        """Without first values: the first on the meta device makes torch import 822 modules."""

        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if getattr(function, "__module__", None) == "torch.nn.init":
                return kwargs["tensor"] if "tensor" in kwargs else args[0]
            return function(*args, **kwargs)

    with torch.device("meta"), SkipInit():
        transformer = TwoWayTransformer(2, width, 8, 2048)
        modules = {
            "prompt_encoder.": PromptEncoder(width, (1, 1), (16, 16), 16),
            "mask_decoder.": HQMaskDecoder(
                transformer_dim=width,
                transformer=transformer,
                iou_head_hidden_dim=width,
                vit_dim=vit_dim,
            ),
        }
    return {
        prefix + key: tuple(tensor.shape)
        for prefix, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


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
        img_size: Side of the square image the weights were probably trained for, in pixels.
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
        """The arguments with which ``TinyViT`` has exactly these tensors, as plain data.

        Raises:
            CheckpointError: The file holds no encoder.
        """
        if self.architecture is None:
            raise CheckpointError(
                f"a {self.family} file holds no image encoder to build; give the encoder's file too"
            )
        return {
            **self.architecture.arguments(),
            "img_size": self.img_size,
            "strides": self.strides,
            "head": self.has_head,
        }


def detect(
    tensors: Mapping[str, Tensor | NDArray[Any]],
    filename: str | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    compare: bool = True,
) -> Detection:
    """Say what a state dict is.

    Args:
        tensors: Key -> tensor of torch (the meta device will do) or array of numpy, as read from
            a file.
        filename: The file's name; tells apart projects whose files are identical.
        metadata: The file's header texts; ``tinyvit.family`` there tells such projects apart too,
            and ``tinyvit.strides`` settles the strides.
        compare: Compare a SAM's heads too with the shapes of their networks, which needs torch;
            without that nothing of them is missing, unexpected or wrong.

    Returns:
        Family, variant, sizes and parts, with everything missing or left over at once.

    Raises:
        CheckpointError: It is no TinyViT; the text says what is missing and what it looks like.
    """
    metadata = metadata or {}
    family = _family_of(tensors.keys())
    spelt = to_canonical({key: key for key in tensors}, family)  # canonical key -> the file's
    there = group_by_part(spelt)
    shapes = {key: tuple(tensors[name].shape) for key, name in spelt.items()}
    parts = tuple(part for part in there if part != "unknown")
    sizes = read_architecture(shapes) if "trunk" in parts else None
    candidates = _candidates(family, parts, sizes)
    family = _named(filename, metadata, candidates) or candidates[0]
    is_student = sizes is not None and sizes.neck_size is not None
    is_sam = LAYOUTS[family].strides[-1] == 1 and (family != "tinyvit" or "neck" in parts)
    is_sam = is_sam and not is_student
    strides, reason = _strides(family, is_sam, sizes, metadata)
    variant = _variant(sizes, is_sam)
    embeddings = ("prompt_encoder.no_mask_embed.weight", "mask_decoder.iou_token.weight")
    width = next((shapes[key][-1] for key in embeddings if shapes.get(key)), 256)
    wanted = frozenset((*LAYOUTS[family].required, *parts))
    expected = dict(_expected(wanted if compare else wanted - _HEADS, sizes, width))
    if not compare:
        expected |= {key: shapes[key] for part in _HEADS & {*there} for key in there[part]}
    missing = [
        key for key in expected if key not in shapes and not key.endswith("num_batches_tracked")
    ]
    side = 32 * sizes.window_sizes[-1] if sizes and not is_sam else 1024  # the last map: one window
    side = 1008 if is_student else side
    used = {*there.get("decoder_state", ()), *expected}
    loaded = {*spelt.values()}
    return Detection(
        family=family,
        also=tuple(name for name in candidates if name != family),
        variant=variant.name if variant else None,
        architecture=sizes,
        parts=parts,
        strides=strides,
        strides_reason=reason,
        img_size=variant.img_size if variant else side,
        parameters=sum(math.prod(s) for key, s in shapes.items() if not key.endswith(_BUFFERS)),
        dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        missing=tuple(key_from_canonical(key, LAYOUTS[family]) for key in missing),
        unexpected=tuple(name for key, name in spelt.items() if key not in used),
        wrong_shapes={
            spelt[key]: (shape, shapes[key])
            for key, shape in expected.items()
            if key in shapes and shapes[key] != shape and not key.endswith("num_batches_tracked")
        },
        ignored=tuple(name for name in tensors if name not in loaded),
    )


def detect_in(file: StateFile, compare: bool = True) -> Detection:
    """``detect`` for a file; it is named where it holds no TinyViT."""
    try:
        return detect(file.tensors, file.path.name, file.metadata, compare=compare)
    except CheckpointError as err:
        raise CheckpointError(f"{file.path}: {err}") from err


_HEADS: frozenset[Part] = frozenset(("prompt_encoder", "mask_decoder", "hq_decoder"))
_BUFFERS = (
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "positional_encoding_gaussian_matrix",
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


# How keys of TinyViT start; the first that some key matches tells the spelling.
_SPELLINGS: tuple[tuple[str, Family], ...] = (
    (r"image_encoder\.layers\.", "mobile_sam"),
    (r"layers\.(?:0\.blocks\.0\.conv1\.c\.|.*attn\.attention_biases$)", "cream"),
    (r".*stages\..*\.conv2d\.", "mmpretrain"),
    (r"backbone\.model\.layers\.", "efficientsam3"),
    (r"stages\.(?:0\.blocks\.0\.conv1\.conv\.|.*attn\.attention_biases$)", "timm"),
)


def _family_of(keys: Collection[str]) -> Family:
    """A family that spells the stages' keys in this way."""
    for pattern, family in _SPELLINGS:
        if any(re.match(pattern, key) for key in keys):
            return family
    starts = {key.partition(".")[0] for key in keys}
    if starts and starts <= {"prompt_encoder", "mask_decoder"}:
        return "mobile_sam_v2_decoder"
    what = next((w for start, w in _OTHERS if any(key.startswith(start) for key in keys)), None)
    seen = (
        f"it looks like {what}" if what else f"its keys begin with {', '.join(sorted(starts)[:6])}"
    )
    raise CheckpointError(
        f"these {len(keys)} tensors are no TinyViT: {seen}; wanted were the keys of a TinyViT "
        "stage, 'layers.0.blocks…', 'image_encoder.layers.0.blocks…' or 'stages.0.blocks…'"
    )


def _candidates(
    family: Family, parts: Sequence[Part], sizes: Architecture | None
) -> tuple[Family, ...]:
    """The families of a spelling whose files have these very keys and shapes, likeliest first."""
    is_pointwise = sizes is not None and sizes.stem == "pointwise"
    if family == "cream":
        is_cream = "head" in parts and "neck" not in parts and not is_pointwise
        return ("cream", "tinyvit") if is_cream else ("tinyvit",)
    if family != "mobile_sam":
        return (family,)
    if "decoder_state" in parts:
        return ("micro_sam",)
    if "hq_decoder" in parts:
        return "hq_sam", "tinyvit_sam"
    if "head" in parts:
        return *IDENTICAL_KEYS, "tinyvit_sam"
    return ("litemedsam", "tinyvit_sam") if is_pointwise else ("tinyvit_sam",)


def _named(
    filename: str | None, metadata: Mapping[str, str], candidates: tuple[Family, ...]
) -> Family | None:
    """The candidate that the file's header or else its name names, if any."""
    plain = PurePath(filename or "").stem.lower().replace("_", "").replace("-", "")
    foreign = [name for name in candidates if not name.startswith("tinyvit")]
    by_name = [n for n in sorted(foreign, key=len, reverse=True) if n.replace("_", "") in plain]
    written = [name for name in candidates if name == metadata.get("tinyvit.family")]
    return next(iter([*written, *by_name]), None)


def _strides(
    family: Family, is_sam: bool, sizes: Architecture | None, metadata: Mapping[str, str]
) -> tuple[tuple[int, ...], str]:
    merges = len(sizes.embed_dims) - 1 if sizes else 3
    written = metadata.get("tinyvit.strides", "")
    values = tuple(int(text) for text in written.split(",") if text.strip() in ("1", "2"))
    if len(values) == merges:
        return values, f"strides {written}: written in the file's header"
    values = (2,) * (merges - 1) + (1 if is_sam else 2,) if merges else ()
    shown = ",".join(str(value) for value in values)
    title, kind = LAYOUTS[family].title, "a SAM encoder" if is_sam else "a classification network"
    if family == "efficientsam3":
        kind = "an image encoder of 1/32"
    elif family == "tinyvit" and sizes is not None and sizes.neck_size is not None:
        title, kind = "a file with such a neck", "an image encoder of EfficientSAM3"
    elif family == "tinyvit":
        title = "a file with a neck" if is_sam else "a file without a neck"
    return values, f"strides {shown} assumed: no tensor shows strides, and {title} is {kind}"


def _variant(sizes: Architecture | None, is_sam: bool) -> Variant | None:
    """The catalog's variant with exactly these sizes; the number of classes does not matter."""
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
            and (sizes.neck_size is None or sizes.neck_size == row.neck_size)
        ):
            return row
    return None


@lru_cache(maxsize=16)
def _expected(
    wanted: frozenset[Part], sizes: Architecture | None, width: int
) -> Mapping[str, Shape]:
    """Canonical key -> shape of everything in these parts of a model; ``width`` without a neck."""
    shapes: dict[str, Shape] = {}
    vit_dim = 160
    if sizes is not None:
        shapes.update(encoder_shapes(sizes))
        width = sizes.neck_dim if sizes.neck_dim is not None else width
        vit_dim = sizes.embed_dims[min(2, len(sizes.embed_dims) - 1)]
    if not wanted.isdisjoint(_HEADS):
        shapes.update(sam_shapes(width, vit_dim))
    groups = group_by_part(shapes)
    return {key: shapes[key] for part in groups if part in wanted for key in groups[part]}
