"""Whose file holds what: one row for each family of checkpoint files, and the parts of a model.

Plain data and one function. *Canonical* keys are those of ``tinyvit.modules.TinyViT`` for the
encoder (``patch_embed``, ``layers``, ``norm_head``, ``head``, ``neck``, without a prefix) and those
of Segment Anything for the rest (``prompt_encoder``, ``mask_decoder``). A family's row says how its
own files differ from that. Nothing here knows tensors or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from tinyvit.catalog import Family
from tinyvit.errors import CheckpointError

__all__ = ["IDENTICAL_KEYS", "LAYOUTS", "ORDER", "Layout", "Part", "get_layout", "part_of"]

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

ORDER: tuple[Part, ...] = (
    "trunk",
    "head",
    "neck",
    "prompt_encoder",
    "mask_decoder",
    "hq_decoder",
    "decoder_state",
    "bias_indices",
    "unknown",
)
"""The order in which parts are reported."""


@dataclass(frozen=True)
class Layout:
    """How one family's files look.

    Attributes:
        title: The family in words.
        required: Parts without which the family's own loader refuses the file.
        optional: Further parts the file may hold.
        prefix: What stands before the encoder's canonical keys.
        naming: ``"canonical"`` or ``"timm"`` spelling of the encoder's keys.
        container: What the family's files are: ``"safetensors"`` or ``"torch"``.
        wrapper: Name the state dict has inside the torch file, or None for a plain dict.
        stem: The only stem the family's network knows, or None for any.
        strides: Strides of the merges of the family's network.
    """

    title: str
    required: tuple[Part, ...]
    optional: tuple[Part, ...] = ()
    prefix: str = "image_encoder."
    naming: Literal["canonical", "timm"] = "canonical"
    container: Literal["safetensors", "torch"] = "torch"
    wrapper: str | None = None
    stem: Literal["conv", "pointwise"] | None = "conv"
    strides: tuple[int, ...] = (2, 2, 1)


_SAM: tuple[Part, ...] = ("trunk", "head", "neck", "prompt_encoder", "mask_decoder")
_HEADLESS: tuple[Part, ...] = ("trunk", "neck", "prompt_encoder", "mask_decoder")

LAYOUTS: MappingProxyType[Family, Layout] = MappingProxyType(
    {
        "cream": Layout(
            "Cream TinyViT", ("trunk", "head"), prefix="", wrapper="model", strides=(2, 2, 2)
        ),
        "timm": Layout(
            "timm",
            ("trunk", "head"),
            prefix="",
            naming="timm",
            container="safetensors",
            strides=(2, 2, 2),
        ),
        "mobile_sam": Layout("MobileSAM", _SAM),
        "mobile_sam_v2": Layout("MobileSAMv2", _SAM, wrapper="model"),
        "mobile_sam_v2_decoder": Layout(
            "MobileSAMv2's decoder file",
            ("prompt_encoder", "mask_decoder"),
            wrapper="PromtEncoder",
        ),
        "hq_sam": Layout("Light HQ-SAM", (*_SAM, "hq_decoder")),
        "tinysam": Layout("TinySAM", _SAM),
        "litemedsam": Layout("LiteMedSAM", _HEADLESS, stem="pointwise"),
        "ultralytics": Layout("ultralytics' mobile_sam.pt", _SAM),
        "micro_sam": Layout("micro_sam", _SAM, ("decoder_state",), wrapper="model_state"),
        "tinyvit": Layout(
            "tinyvit (encoder or classifier)",
            ("trunk",),
            ("head", "neck"),
            prefix="",
            container="safetensors",
            stem=None,
        ),
        "tinyvit_sam": Layout(
            "tinyvit (whole SAM)",
            _HEADLESS,
            ("head", "hq_decoder"),
            container="safetensors",
            stem=None,
        ),
    }
)
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
    ("mask_decoder.hf_token.", "hq_decoder"),
    ("mask_decoder.hf_mlp.", "hq_decoder"),
    ("mask_decoder.compress_vit_feat.", "hq_decoder"),
    ("mask_decoder.embedding_encoder.", "hq_decoder"),
    ("mask_decoder.embedding_maskfeature.", "hq_decoder"),
    ("mask_decoder.", "mask_decoder"),
    ("decoder_state.", "decoder_state"),
)


def part_of(key: str) -> Part:
    """Return the part of a model that a canonical key belongs to.

    Args:
        key: A canonical key, for example ``"neck.0.weight"``.

    Returns:
        Its part; ``"unknown"`` for a key of no TinyViT model.

    Example:
        >>> part_of("mask_decoder.hf_token.weight")
        'hq_decoder'
    """
    if key.endswith(".attention_bias_idxs"):
        return "bias_indices"
    return next((part for prefix, part in _PREFIXES if key.startswith(prefix)), "unknown")


def get_layout(family: str) -> Layout:
    """Return the row of a family.

    Args:
        family: Name of a family.

    Returns:
        Its layout.

    Raises:
        CheckpointError: If there is no family of that name; the text lists all.
    """
    for name, layout in LAYOUTS.items():
        if name == family:
            return layout
    raise CheckpointError(
        f"unknown checkpoint family {family!r}; choose one of {', '.join(LAYOUTS)}"
    )
