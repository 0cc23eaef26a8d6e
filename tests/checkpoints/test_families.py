from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from checkpoints.families import FAMILIES, full
from tinyvit.catalog import Family
from tinyvit.checkpoints.families import (
    IDENTICAL_KEYS,
    LAYOUTS,
    ORDER,
    Layout,
    Part,
    get_layout,
    part_of,
    to_canonical,
)
from tinyvit.errors import CheckpointError


def test_every_family_and_every_part_has_its_place() -> None:
    assert set(LAYOUTS) == set(get_args(Family))
    assert get_args(Part) == ORDER


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_says_which_parts_the_published_files_hold(family: str) -> None:
    layout = get_layout(family)
    assert layout is LAYOUTS[family]
    held = {part_of(key) for key in to_canonical(full(family), family)} - {"bias_indices"}
    assert set(layout.required) <= held <= {*layout.required, *layout.optional}


def test_a_torch_wrapper_is_only_for_torch_files() -> None:
    wrapped = {name: row.wrapper for name, row in LAYOUTS.items() if row.wrapper is not None}
    assert wrapped == {
        "cream": "model",
        "mobile_sam_v2": "model",
        "mobile_sam_v2_decoder": "PromtEncoder",
        "micro_sam": "model_state",
    }
    assert {LAYOUTS[name].container for name in wrapped} == {"torch"}


def test_identical_families_differ_in_nothing_their_keys_show() -> None:
    def shown(layout: Layout) -> Layout:
        return replace(layout, title="", wrapper=None, optional=())

    same = {name for name, row in LAYOUTS.items() if shown(row) == shown(LAYOUTS["mobile_sam"])}
    assert same == set(IDENTICAL_KEYS)


def test_an_unknown_family_is_told_all_names() -> None:
    with pytest.raises(CheckpointError) as caught:
        get_layout("sam2")
    names = ", ".join(FAMILIES)
    assert str(caught.value) == f"unknown checkpoint family 'sam2'; choose one of {names}"


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("patch_embed.seq.0.c.weight", "trunk"),
        ("layers.0.blocks.0.conv1.c.weight", "trunk"),
        ("layers.1.blocks.0.attn.attention_biases", "trunk"),
        ("layers.1.blocks.0.attn.attention_bias_idxs", "bias_indices"),
        ("norm_head.weight", "head"),
        ("head.bias", "head"),
        ("neck.0.weight", "neck"),
        ("prompt_encoder.no_mask_embed.weight", "prompt_encoder"),
        ("mask_decoder.iou_token.weight", "mask_decoder"),
        ("mask_decoder.hf_token.weight", "hq_decoder"),
        ("mask_decoder.hf_mlp.layers.0.weight", "hq_decoder"),
        ("mask_decoder.compress_vit_feat.0.weight", "hq_decoder"),
        ("mask_decoder.embedding_encoder.0.weight", "hq_decoder"),
        ("mask_decoder.embedding_maskfeature.0.weight", "hq_decoder"),
        ("decoder_state.out_conv.weight", "decoder_state"),
        ("optimizer", "unknown"),
        ("header.weight", "unknown"),
        ("image_encoder.neck.0.weight", "unknown"),
        ("", "unknown"),
    ],
)
def test_parts(key: str, part: str) -> None:
    assert part_of(key) == part
