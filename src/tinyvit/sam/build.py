"""From a variant or a checkpoint to a whole ``Sam``.

The file is read once; prompt encoder and mask decoder are built to the encoder's width, grid and
strides, and filled. The heads' numbers are Segment Anything's (Kirillov et al., 2023), as in
MobileSAM.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType

from torch import nn

from tinyvit.catalog import DEFAULT_CHECKPOINT, VARIANTS, get_checkpoint, get_variant
from tinyvit.checkpoints.open import OpenedCheckpoint, check_parts, open_checkpoint
from tinyvit.factory import create_model, load_exactly
from tinyvit.image_spec import ImageSpec
from tinyvit.modules import TinyViT
from tinyvit.modules.sam.mask_decoder import HQMaskDecoder, MaskDecoder
from tinyvit.modules.sam.prompt_encoder import PromptEncoder
from tinyvit.modules.sam.transformer import TwoWayTransformer

from .model import Sam

Size = tuple[int, int]

_SAMS = [row.name for row in VARIANTS if row.task == "sam"]
_UNTRAINED = "tiny_vit_5m_sam"
_MASK_IN_CHANS = 16
_DEPTH, _HEADS, _MLP_DIM = 2, 8, 2048  # of the transformer


def build_sam(
    checkpoint: str | os.PathLike[str] | None = None,
    variant: str | None = None,
    *,
    img_size: int | Size | None = None,
    is_hq: bool = False,
    sha256: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> Sam:
    """Build a promptable model, in eval mode on the CPU.

    Args:
        checkpoint: A name of ``tinyvit.list_checkpoints()``, or the path of a file of any family
            that holds a whole SAM. None gives an untrained model, as segment-anything does.
        variant: A SAM variant of ``tinyvit.list_models()``. None takes the checkpoint's sizes, or
            without one those of MobileSAM.
        img_size: Side of the model's input in pixels, or its (height, width); None takes the
            checkpoint's or variant's. The weights fit every size.
        is_hq: Give an untrained model Light HQ-SAM's mask decoder; a checkpoint shows it.
        sha256: Hash that a downloaded file must have.
        progress: Called with (bytes there, bytes in all or None) during a download.

    Returns:
        The model. With Light HQ-SAM's weights its mask decoder is an ``HQMaskDecoder``.

    Raises:
        ValueError: An unknown variant, or one that is no SAM.
        CheckpointError: The file cannot be read, holds no prompt encoder or mask decoder, or does
            not fit; every missing and unexpected key and every wrong shape is named.
        DownloadError: The checkpoint cannot be fetched.

    Warns:
        UserWarning: Neither checkpoint nor variant is given, so the model is untrained.

    Examples:
        >>> from tinyvit.sam import build_sam
        >>> sam = build_sam("tinyvit_starter")
        >>> sam.prompt_encoder.image_embedding_size, sam.prompt_encoder.mask_input_size
        ((16, 16), (64, 64))
    """
    if variant is not None and get_variant(variant).task != "sam":
        raise ValueError(f"{variant!r} is a classifier; a SAM is one of {', '.join(_SAMS)}")
    opened = None
    if checkpoint is None:
        if variant is None:
            warnings.warn(
                "this SAM is untrained, and its masks mean nothing until weights are loaded; for "
                f"trained ones give a checkpoint, such as build_sam({DEFAULT_CHECKPOINT!r})",
                stacklevel=2,
            )
        encoder = create_model(variant if variant is not None else _UNTRAINED)
    else:
        opened = open_checkpoint(checkpoint, sha256, progress)
        check_parts(opened.found.parts, opened.path, opened.found.family)
        encoder = create_model(variant, opened)
        is_hq = "hq_decoder" in opened.found.parts
    if img_size is not None:
        encoder.set_imgsz(img_size)
    sam = _assemble(encoder, is_hq)
    if opened is not None:
        _fill_heads(sam, opened)
        sam.thresholds = dict(opened.thresholds)
        sam.mask_threshold = sam.thresholds.get("mask_threshold", sam.mask_threshold)
    return sam.eval()


def as_sam(given: Sam | str | os.PathLike[str] | None, wanted_by: str) -> Sam:
    """A ``Sam``, or one from a checkpoint's name, file or folder; None: the embedded weights."""
    if isinstance(given, Sam):
        return given
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise TypeError(
            f"{wanted_by} wants a Sam, as build_sam makes it, or the name or path of a checkpoint; "
            f"came {type(given).__name__}"
        )
    return build_sam(DEFAULT_CHECKPOINT if given is None else given)


def _assemble(encoder: TinyViT, is_hq: bool) -> Sam:
    """Heads for an encoder: of its width, and of its grid at the size it is declared for."""
    width = encoder.embed_dims[-1] if encoder.neck_dim is None else encoder.neck_dim
    declared = encoder.img_size
    size = (declared, declared) if isinstance(declared, int) else declared
    spec = encoder.image_spec if encoder.image_spec is not None else ImageSpec.sam(size)
    encoder.image_spec = spec = spec if spec.size == size else replace(spec, size=size)
    stride = encoder.patch_embed.reduction * math.prod(encoder.strides)
    grid = (-(-size[0] // stride), -(-size[1] // stride))
    # Whole strides: where the stride does not divide a side, a part of the last token is empty.
    covered = (grid[0] * stride, grid[1] * stride)
    kind = partial(HQMaskDecoder, vit_dim=encoder.embed_dims[2]) if is_hq else MaskDecoder
    transformer = TwoWayTransformer(_DEPTH, width, _HEADS, _MLP_DIM)
    decoder = kind(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=width)
    prompt_encoder = PromptEncoder(width, grid, covered, _MASK_IN_CHANS)
    return Sam(encoder, prompt_encoder, decoder, spec.mean, spec.std)


def _fill_heads(sam: Sam, opened: OpenedCheckpoint) -> None:
    """Load prompt encoder and mask decoder: all of both, or an error that names everything."""
    heads = nn.ModuleDict({"prompt_encoder": sam.prompt_encoder, "mask_decoder": sam.mask_decoder})
    state = {k: v for k, v in opened.tensors.items() if k.partition(".")[0] in heads}
    width = sam.prompt_encoder.embed_dim
    whose = f"{opened.path} ({opened.found.family})"
    load_exactly(heads, state, f"{whose} does not fit the heads of a SAM of width {width}")


def _build_default(
    checkpoint: str | os.PathLike[str] | None = DEFAULT_CHECKPOINT,
    *,
    img_size: int | Size | None = None,
) -> Sam:
    """The embedded weights, or any other checkpoint; None gives those sizes untrained."""
    variant = get_checkpoint(DEFAULT_CHECKPOINT).variant if checkpoint is None else None
    return build_sam(checkpoint, variant, img_size=img_size)


class UnknownModelError(KeyError):
    """A name that ``sam_model_registry`` does not have."""

    __str__ = Exception.__str__  # KeyError's puts quotation marks around


class _Registry(dict[str, Callable[..., Sam]]):
    def __missing__(self, name: str) -> Callable[..., Sam]:
        raise UnknownModelError(
            f"unknown SAM {name!r}; tinyvit reads SAMs with a TinyViT encoder only, such as "
            f"MobileSAM ('vit_t'), and not Segment Anything's ViT-B, L and H; there are "
            f"{', '.join(self)}"
        )


sam_model_registry: Mapping[str, Callable[..., Sam]] = MappingProxyType(
    _Registry(
        {
            "default": _build_default,
            "vit_t": partial(build_sam, variant="tiny_vit_5m_sam"),
            "tiny_vit_5m": partial(build_sam, variant="tiny_vit_5m_sam"),
            "tiny_vit_11m": partial(build_sam, variant="tiny_vit_11m_sam"),
            "tiny_vit_21m": partial(build_sam, variant="tiny_vit_21m_sam"),
            **{name: partial(build_sam, variant=name) for name in _SAMS},
        }
    )
)
"""Name -> builder, as in segment-anything: ``sam_model_registry["vit_t"](checkpoint="…")``.

``vit_t`` is MobileSAM. Every builder gives an untrained model without a checkpoint, but for
``default``, which takes the embedded one."""
