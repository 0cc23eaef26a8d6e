from __future__ import annotations

import pytest

from checkpoints.families import FAMILIES, full, table
from tinyvit.checkpoints.families import from_canonical, to_canonical
from tinyvit.errors import CheckpointError


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
