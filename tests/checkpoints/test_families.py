from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from checkpoints.families import FAMILIES, full, table
from tinyvit.catalog import Family
from tinyvit.checkpoints.families import (
    IDENTICAL_KEYS,
    LAYOUTS,
    ORDER,
    Layout,
    Part,
    from_canonical,
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
        "mmpretrain": "state_dict",
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


def test_timm_is_one_to_one_with_the_canonical_encoder() -> None:
    timm = {key: row for key, row in table("timm_5m").items()}
    canonical = {k: row for k, row in table("encoder_5m").items() if not k.startswith("neck.")}
    assert len(timm) == len(canonical) == 296
    assert to_canonical(timm, "timm") == canonical
    assert from_canonical(canonical, "timm") == timm


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_gives_the_very_same_objects(family: str) -> None:
    state = {k: t for k, t in full(family).items() if not k.endswith("attention_bias_idxs")}
    back = from_canonical(to_canonical(state, family), family)
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)


def test_index_tables_are_left_out() -> None:
    state = full("cream")
    assert len(state) == 306
    assert to_canonical(state, "cream").keys() == to_canonical(full("timm"), "timm").keys()


def test_merges_move_between_stages() -> None:
    state = {"stages.3.downsample.conv2.bn.weight": 1, "stages.3.blocks.0.mlp.fc1.bias": 2}
    assert to_canonical(state, "timm") == {
        "layers.2.downsample.conv2.bn.weight": 1,
        "layers.3.blocks.0.mlp.fc1.bias": 2,
    }


def test_keys_of_nothing_keep_their_name() -> None:
    assert to_canonical({"epoch": 1}, "timm") == {"epoch": 1}
    assert to_canonical({"pixel_mean": 1}, "mobile_sam") == {"pixel_mean": 1}


def test_a_part_the_family_cannot_hold() -> None:
    with pytest.raises(CheckpointError, match=r"no place for 2 of these .*neck\.0\.weight, foo"):
        from_canonical({"neck.0.weight": 1, "foo": 2, "head.bias": 3}, "timm")


def test_two_spellings_in_one_file() -> None:
    with pytest.raises(CheckpointError, match=r"both be called 'head\.weight'"):
        to_canonical({"head.fc.weight": 1, "head.weight": 2}, "timm")


def test_unknown_family() -> None:
    with pytest.raises(CheckpointError, match="unknown checkpoint family 'sam2'; choose one of"):
        to_canonical({}, "sam2")


def test_timm_spells_parts_of_a_key_differently() -> None:
    assert from_canonical({"layers.0.x.c.weight": 1, "patch_embed.seq.0.c.weight": 2}, "timm") == {
        "stages.0.x.conv.weight": 1,
        "patch_embed.conv1.conv.weight": 2,
    }


def test_mmpretrain_and_students_keep_their_heads_beside_the_backbone() -> None:
    theirs = {
        "backbone.patch_embed.seq.0.conv2d.weight": 1,
        "backbone.stages.0.downsample.conv1.bn2d.running_var": 2,
        "backbone.stages.1.blocks.0.local_conv.bn2d.weight": 3,
        "backbone.norm3.weight": 4,
        "head.fc.bias": 5,
    }
    assert to_canonical(theirs, "mmpretrain") == {
        "patch_embed.seq.0.c.weight": 1,
        "layers.0.downsample.conv1.bn.running_var": 2,
        "layers.1.blocks.0.local_conv.bn.weight": 3,
        "norm_head.weight": 4,
        "head.bias": 5,
    }
    student = {"backbone.model.layers.0.blocks.0.conv1.c.weight": 1, "head.1.running_mean": 2}
    assert to_canonical(student, "efficientsam3") == {
        "layers.0.blocks.0.conv1.c.weight": 1,
        "neck.1.running_mean": 2,
    }
