"""Whose files hold what: one row for each family of checkpoint files, and its names of tensors.

*Canonical* keys are those of ``tinyvit.modules.TinyViT`` for the encoder (``patch_embed``,
``layers``, ``norm_head``, ``head``, ``neck``, without a prefix) and those of Segment Anything for
the rest (``prompt_encoder``, ``mask_decoder``). A row says how a family's own files differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, TypeVar, cast, get_args

from tinyvit.catalog import Family
from tinyvit.errors import CheckpointError

T = TypeVar("T")

Part: TypeAlias = Literal[
    "trunk",
    "head",
    "neck",
    "prompt_encoder",
    "mask_decoder",
    "hq_decoder",
    "decoder_state",
    "bias_indices",
    "unknown",
]
"""A part of a model that a file holds or lacks as a whole."""

Naming: TypeAlias = Literal["canonical", "timm", "mmpretrain", "student"]
"""How a family spells the keys of an encoder; ``student`` is EfficientSAM3's way."""

ORDER: tuple[Part, ...] = get_args(Part)
"""The order in which parts are reported."""


@dataclass(frozen=True)
class Layout:
    """How one family's files look."""

    title: str  # the family in words
    required: tuple[Part, ...]  # without which the family's own loader refuses the file
    optional: tuple[Part, ...] = ()  # what the file may hold, too
    prefix: str = "image_encoder."  # before the encoder's canonical keys
    naming: Naming = "canonical"
    container: Literal["safetensors", "torch"] = "torch"
    wrapper: str | None = None  # name of the state dict inside the torch file; None: a plain dict
    stem: Literal["conv", "pointwise"] | None = "conv"  # the network's only one; None: any
    strides: tuple[int, ...] = (2, 2, 1)  # of the merges of the network
    neck_size: int | None = None  # side of the map of EfficientSAM3's neck


_CLASSIFIER: tuple[Part, ...] = ("trunk", "head")
HEADS: tuple[Part, ...] = ("prompt_encoder", "mask_decoder")
_SAM: tuple[Part, ...] = ("trunk", "head", "neck", *HEADS)
_HEADLESS: tuple[Part, ...] = ("trunk", "neck", *HEADS)
_TO_32 = (2, 2, 2)

LAYOUTS: MappingProxyType[Family, Layout] = MappingProxyType(
    {
        "cream": Layout("Cream TinyViT", _CLASSIFIER, prefix="", wrapper="model", strides=_TO_32),
        "timm": Layout(
            "timm", _CLASSIFIER, (), "", naming="timm", container="safetensors", strides=_TO_32
        ),
        "mobile_sam": Layout("MobileSAM", _SAM),
        "mobile_sam_v2": Layout("MobileSAMv2", _SAM, wrapper="model"),
        "mobile_sam_v2_decoder": Layout(
            "MobileSAMv2's decoder file", HEADS, wrapper="PromtEncoder"
        ),
        "hq_sam": Layout("Light HQ-SAM", (*_SAM, "hq_decoder")),
        "tinysam": Layout("TinySAM", _SAM),
        "litemedsam": Layout("LiteMedSAM", _HEADLESS, stem="pointwise"),
        "ultralytics": Layout("ultralytics' mobile_sam.pt", _SAM),
        "micro_sam": Layout("micro_sam", _SAM, ("decoder_state",), wrapper="model_state"),
        "mmpretrain": Layout(
            "mmpretrain", _CLASSIFIER, (), "backbone.", "mmpretrain", "torch", "state_dict",
            strides=_TO_32,
        ),
        "efficientsam3": Layout(
            "EfficientSAM3's student", ("trunk", "neck"), (), "backbone.model.", "student",
            strides=_TO_32, neck_size=72,
        ),
        "tinyvit": Layout(
            "tinyvit (encoder or classifier)", ("trunk",), ("head", "neck"), "",
            container="safetensors", stem=None,
        ),
        "tinyvit_sam": Layout(
            "tinyvit (whole SAM)", _HEADLESS, ("head", "hq_decoder"),
            container="safetensors", stem=None,
        ),
    }
)  # fmt: skip
"""One row for each family."""

IDENTICAL_KEYS: tuple[Family, ...] = (
    "mobile_sam",
    "tinysam",
    "ultralytics",
    "mobile_sam_v2",
    "micro_sam",
)
"""Families whose files hold the very same keys and shapes: only their origin differs."""

_PREFIXES: tuple[tuple[str, Part], ...] = (
    ("patch_embed.", "trunk"),
    ("layers.", "trunk"),
    ("norm_head.", "head"),
    ("head.", "head"),
    ("neck.", "neck"),
    ("prompt_encoder.", "prompt_encoder"),
    ("mask_decoder.hf_", "hq_decoder"),
    ("mask_decoder.compress_vit_feat.", "hq_decoder"),
    ("mask_decoder.embedding_", "hq_decoder"),
    ("mask_decoder.", "mask_decoder"),
    ("decoder_state.", "decoder_state"),
)


def part_of(key: str) -> Part:
    """The part of a model that a canonical key belongs to; "unknown" for a key of no TinyViT."""
    if key.endswith(".attention_bias_idxs"):
        return "bias_indices"
    return next((part for prefix, part in _PREFIXES if key.startswith(prefix)), "unknown")


def group_by_part(keys: Iterable[str]) -> dict[Part, list[str]]:
    """The canonical keys of each part that is there, in the usual order of parts."""
    groups: dict[Part, list[str]] = {part: [] for part in ORDER}
    for key in keys:
        groups[part_of(key)].append(key)
    return {part: found for part, found in groups.items() if found}


def get_layout(family: str) -> Layout:
    """The row of a family."""
    if family in LAYOUTS:
        return LAYOUTS[cast(Family, family)]
    raise CheckpointError(
        f"unknown checkpoint family {family!r}; choose one of {', '.join(LAYOUTS)}"
    )


# How another spelling and the canonical one start a key.
_STARTS: dict[Naming, tuple[tuple[str, str], ...]] = {
    "canonical": (),
    "timm": (
        ("patch_embed.conv1.", "patch_embed.seq.0."),
        ("patch_embed.conv2.", "patch_embed.seq.2."),
        ("head.norm.", "norm_head."),
        ("head.fc.", "head."),
        ("stages.", "layers."),
    ),
    "mmpretrain": (("head.fc.", "head."), ("norm3.", "norm_head."), ("stages.", "layers.")),
    "student": (("head.", "neck."),),
}
# How they spell the convolution and the norm of a Conv2d_BN within a key.
_WITHIN: dict[Naming, tuple[tuple[str, str], ...]] = {
    "canonical": (),
    "timm": ((".conv.", ".c."),),
    "mmpretrain": ((".conv2d.", ".c."), (".bn2d.", ".bn.")),
    "student": (),
}
_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.(?=downsample\.)")


def to_canonical(state: Mapping[str, T], family: str) -> dict[str, T]:
    """Rename a family's keys to the canonical ones.

    ``*.attention_bias_idxs``, index tables that Cream's files may hold and no loader reads, are
    left out. Keys of no TinyViT part keep their name.

    Args:
        state: Key -> value, in the family's spelling.
        family: The family's name.

    Returns:
        A new dict in the same order.

    Raises:
        CheckpointError: The family is unknown, or two keys would get the same name.

    Examples:
        >>> to_canonical({"stages.1.downsample.conv1.conv.weight": 0}, "timm")
        {'layers.0.downsample.conv1.c.weight': 0}
    """
    layout = get_layout(family)
    renamed: dict[str, T] = {}
    for key, value in state.items():
        if key.endswith(".attention_bias_idxs"):
            continue
        new = _respell(key.removeprefix(layout.prefix), layout.naming)
        if new in renamed:
            raise CheckpointError(
                f"two tensors of this {family} file would both be called {new!r}; "
                "the file mixes two spellings, convert it from its original"
            )
        renamed[new] = value
    return renamed


def from_canonical(state: Mapping[str, T], family: str) -> dict[str, T]:
    """Rename canonical keys to a family's own; the inverse of ``to_canonical``.

    Args:
        state: Key -> value, in canonical spelling.
        family: The family's name.

    Returns:
        A new dict in the same order.

    Raises:
        CheckpointError: The family is unknown, or has no place for some of the keys (all of them
            are named).

    Examples:
        >>> from_canonical({"norm_head.bias": 0}, "mobile_sam")
        {'image_encoder.norm_head.bias': 0}
    """
    layout = get_layout(family)
    homeless = [key for key in state if part_of(key) not in (*layout.required, *layout.optional)]
    if homeless:
        raise CheckpointError(
            f"a {family} file has no place for {len(homeless)} of these tensors: "
            f"{', '.join(homeless)}; leave them out first"
        )
    return {key_from_canonical(key, layout): value for key, value in state.items()}


def key_from_canonical(key: str, layout: Layout) -> str:
    """The name that a canonical key has in a family's files."""
    part = part_of(key)
    if part not in ("trunk", "head", "neck", "bias_indices"):
        return key
    new = _respell(key, layout.naming, back=True)
    is_beside = layout.naming == "student" and part == "neck"
    is_beside |= layout.naming == "mmpretrain" and new.startswith("head.")
    return new if is_beside else layout.prefix + new


def _respell(key: str, naming: Naming, back: bool = False) -> str:
    """A key of another spelling in the canonical one, or ``back``."""
    if back and naming == "timm":  # which has a stage's downsample in the stage after
        key = _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) + 1}.", key)
    old, new = (1, 0) if back else (0, 1)
    for pair in _STARTS[naming]:
        if key.startswith(pair[old]):
            key = pair[new] + key.removeprefix(pair[old])
            break
    else:
        if naming == "timm" or not _STARTS[naming] or not key.startswith("patch_embed."):
            return key
    for pair in _WITHIN[naming]:
        key = key.replace(pair[old], pair[new])
    if not back and naming == "timm":
        key = _DOWNSAMPLE.sub(lambda match: f"layers.{int(match[1]) - 1}.", key)
    return key
