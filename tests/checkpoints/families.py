"""Builders of every family's state dict, from the key tables in tests/data/keys.

``full`` gives the published sizes as tensors without memory of their own (for names and shapes);
``small`` gives a tiny network of the same family with real values (for files).
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import torch
from torch import Tensor

from tinyvit.checkpoints.detection import (
    Architecture,
    encoder_shapes,
    sam_shapes,
)
from tinyvit.checkpoints.families import LAYOUTS, key_from_canonical, part_of

KEYS = Path(__file__).parents[1] / "data" / "keys"
FAMILIES = tuple(LAYOUTS)

SMALL = Architecture(
    embed_dims=(8, 16, 16, 32),
    depths=(1, 1, 2, 1),
    num_heads=(1, 2, 2, 4),
    window_sizes=(3, 3, 4, 3),
    mlp_ratio=2.0,
    mbconv_expand_ratio=2.0,
    local_conv_size=3,
    in_chans=3,
    stem="conv",
    num_classes=7,
    neck_dim=16,
)


@functools.cache
def table(name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """One key table: key -> (shape, dtype)."""
    rows = [line.split("\t") for line in (KEYS / f"{name}.tsv").read_text().splitlines()]
    return {key: (ast.literal_eval(shape), getattr(torch, dtype)) for key, shape, dtype in rows}


def blank(rows: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """Tensors of these shapes that share one element each."""
    return {key: torch.zeros((), dtype=dtype).expand(shape) for key, (shape, dtype) in rows.items()}


def full(family: str) -> dict[str, Tensor]:
    """A published file's state dict, in the family's spelling."""
    sam_parts = table("prompt_encoder_and_mask_decoder")
    rows = {
        "cream": table("cream_5m"),
        "timm": table("timm_5m"),
        "mobile_sam_v2_decoder": sam_parts,
        "hq_sam": {**table("mobile_sam"), **table("hq_decoder")},
        "litemedsam": {
            **{f"image_encoder.{k}": row for k, row in table("encoder_litemedsam").items()},
            **sam_parts,
        },
        "micro_sam": {
            **table("mobile_sam"),
            "decoder_state.out_conv.weight": ((3, 16, 1, 1), torch.float32),
        },
        "tinyvit": table("encoder_5m"),
        "efficientsam3": table("efficientsam3_5m"),
        "mmpretrain": {
            key_from_canonical(key, LAYOUTS["mmpretrain"]): row
            for key, row in table("cream_5m").items()
            if not key.endswith("attention_bias_idxs")
        },
        "tinyvit_sam": {
            key: row
            for key, row in table("mobile_sam").items()
            if not key.startswith(("image_encoder.head", "image_encoder.norm_head"))
        },
    }.get(family, table("mobile_sam"))
    return blank(rows)


def values(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random values; counters are whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randint(0, 1000, shape, generator=generator)
        if key.endswith("num_batches_tracked")
        else torch.randn(shape, generator=generator)
        for key, shape in shapes.items()
    }


@functools.cache
def _small_canonical(stem: str, neck_size: int | None) -> dict[str, Tensor]:
    architecture = Architecture(**{**vars(SMALL), "stem": stem, "neck_size": neck_size})
    shapes = {
        **encoder_shapes(architecture),
        **sam_shapes(16, 16),
        "decoder_state.out_conv.weight": (3, 16, 1, 1),
    }
    return values(shapes)


def small(family: str) -> dict[str, Tensor]:
    """A tiny network's state dict with random values, in the family's spelling."""
    layout = LAYOUTS[family]
    parts = (*layout.required, *layout.optional)
    if family == "tinyvit_sam":
        parts = layout.required
    return {
        key_from_canonical(key, layout): tensor
        for key, tensor in _small_canonical(layout.stem or "conv", layout.neck_size).items()
        if part_of(key) in parts
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit for bit the same tensors under the same keys."""
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key
