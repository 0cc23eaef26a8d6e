"""Say what a state dict is: whose file, which variant, which sizes, what is missing or left over.

Works from keys and shapes alone, for any sizes and not only those of the catalog. Where keys and
shapes cannot tell (strides; which of several projects with identical files), the guess and its
reason are part of the answer. Builds no model and opens no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from torch import Tensor

from tinyvit.catalog import VARIANTS, Family, Variant
from tinyvit.checkpoints.architecture import (
    Architecture,
    Shape,
    encoder_shapes,
    read_architecture,
)
from tinyvit.checkpoints.families import IDENTICAL_KEYS, LAYOUTS, ORDER, Part, part_of
from tinyvit.checkpoints.keymap import key_from_canonical, key_to_canonical, to_canonical
from tinyvit.checkpoints.sam_parts import (
    hq_decoder_shapes,
    mask_decoder_shapes,
    prompt_encoder_shapes,
)
from tinyvit.errors import CheckpointError

__all__ = ["Detection", "detect"]


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
        img_size: Side of the square picture the weights were probably trained for.
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
    """A picture side for sizes of no variant: SAM's usual one, or the last stage in one window."""
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
