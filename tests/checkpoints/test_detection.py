from __future__ import annotations

import pytest
import torch

from checkpoints.families import FAMILIES, SMALL, blank, full, small, table, values
from tinyvit.catalog import get_variant
from tinyvit.checkpoints.detection import Architecture, detect, encoder_shapes
from tinyvit.errors import CheckpointError

MOBILE = ("mobile_sam", "tinysam", "ultralytics", "mobile_sam_v2")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recognised_from_its_key_list(family: str) -> None:
    found = detect(full(family))
    assert family == found.family or family in found.also
    assert found.is_complete
    assert not found.unexpected
    if family == "mobile_sam_v2_decoder":
        assert found.variant is None
        assert not found.has_encoder
    elif family in ("cream", "timm"):
        assert found.variant == "tiny_vit_5m_224"
        assert found.strides == (2, 2, 2)
        assert found.img_size == 224
    elif family == "litemedsam":
        assert found.variant == "tiny_vit_5m_litemedsam"
        assert not found.has_head
    else:
        assert found.variant == "tiny_vit_5m_sam"
        assert found.strides == (2, 2, 1)
        assert "assumed: no tensor shows strides" in found.strides_reason


def test_identical_key_sets_are_told_honestly() -> None:
    found = detect(full("mobile_sam"))
    assert found.family == "mobile_sam"
    assert set(found.also) == {
        "tinysam",
        "ultralytics",
        "mobile_sam_v2",
        "micro_sam",
        "tinyvit_sam",
    }
    named = detect(full("mobile_sam"), filename="weights/tinysam_42.3.pth")
    assert named.family == "tinysam"
    assert "mobile_sam" in named.also
    assert detect(full("mobile_sam"), filename="MobileSAM-v2.pt").family == "mobile_sam_v2"
    assert detect(full("cream")).also == ("tinyvit",)
    assert detect(full("cream"), filename="tinyvit.pth").family == "cream"
    assert detect(full("micro_sam")).also == ()


def test_the_header_settles_family_and_strides() -> None:
    header = {"tinyvit.family": "tinyvit", "tinyvit.strides": "2,2,1"}
    found = detect(full("cream"), metadata=header)
    assert (found.family, found.strides) == ("tinyvit", (2, 2, 1))
    assert found.strides_reason == "strides 2,2,1: written in the file's header"
    odd = {"tinyvit.family": "timm", "tinyvit.strides": "2,9"}
    found = detect(full("cream"), metadata=odd)
    assert (found.family, found.strides) == ("cream", (2, 2, 2))


def test_parts_and_counts() -> None:
    found = detect(full("hq_sam"))
    assert (found.has_encoder, found.has_head, found.has_neck) == (True, True, True)
    assert (found.has_prompt_encoder, found.has_mask_decoder) == (True, True)
    assert found.parts[-1] == "hq_decoder"
    # encoder 6 065 532, prompt encoder 6 220, mask decoder 4 058 340
    assert detect(full("mobile_sam")).parameters == 6_065_532 + 6_220 + 4_058_340
    assert detect(full("cream")).parameters == get_variant("tiny_vit_5m_224").parameters
    counters = [key for key in table("mobile_sam") if key.endswith("num_batches_tracked")]
    assert found.dtypes == {"int64": len(counters), "float32": 439 - len(counters) + 25}
    assert len(detect(full("cream")).ignored) == 10


def test_arguments_build_exactly_these_tensors() -> None:
    arguments = detect(full("mobile_sam")).arguments()
    wanted = get_variant("tiny_vit_5m_sam").arguments()
    assert {key: arguments[key] for key in wanted if key != "drop_path_rate"} == {
        key: value for key, value in wanted.items() if key != "drop_path_rate"
    }
    assert arguments["mlp_ratio"] == 4.0
    assert detect(full("litemedsam")).arguments()["stem"] == "pointwise"
    with pytest.raises(CheckpointError, match="holds no image encoder"):
        detect(full("mobile_sam_v2_decoder")).arguments()


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("encoder_11m", "tiny_vit_11m_sam"),
        ("encoder_21m", "tiny_vit_21m_sam"),
        ("encoder_21m_384", None),
    ],
)
def test_encoders_alone(name: str, variant: str | None) -> None:
    found = detect(blank(table(name)))
    assert (found.family, found.variant) == ("tinyvit", variant)


def test_variants_by_their_windows() -> None:
    rows = {k: row for k, row in table("encoder_21m_384").items() if not k.startswith("neck.")}
    assert detect(blank(rows)).variant == "tiny_vit_21m_384"


def test_head_of_another_size() -> None:
    rows = dict(table("timm_5m"))
    rows["head.fc.weight"] = ((21841, 320), torch.float32)
    rows["head.fc.bias"] = ((21841,), torch.float32)
    found = detect(blank(rows))
    assert found.variant == "tiny_vit_5m_224"
    assert found.arguments()["num_classes"] == 21841
    assert found.is_complete


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_its_own(family: str) -> None:
    found = detect(small(family))
    assert found.is_complete
    assert not found.unexpected
    assert found.variant is None
    if found.architecture is not None:
        assert found.architecture.embed_dims == SMALL.embed_dims
        assert found.architecture.window_sizes == SMALL.window_sizes


def test_custom_classification_size_and_other_ratios() -> None:
    sizes = Architecture(**{**vars(SMALL), "in_chans": 1, "neck_dim": None})
    found = detect(values(encoder_shapes(sizes, True, False)))
    assert found.img_size == 32 * 3
    assert found.arguments()["in_chans"] == 1
    assert found.arguments()["neck_dim"] is None


def test_a_missing_tensor_and_a_wrong_shape_are_named_in_the_files_spelling() -> None:
    state = full("timm")
    del state["stages.2.downsample.conv1.conv.weight"]
    del state["stages.1.blocks.0.attn.qkv.bias"]
    del state["head.fc.bias"]
    state["stages.3.blocks.1.mlp.fc2.weight"] = torch.zeros(320, 99)
    state["surprise.weight"] = torch.zeros(1)
    found = detect(state)
    assert set(found.missing) == {
        "stages.2.downsample.conv1.conv.weight",
        "stages.1.blocks.0.attn.qkv.bias",
        "head.fc.bias",
    }
    assert found.wrong_shapes == {"stages.3.blocks.1.mlp.fc2.weight": ((320, 1280), (320, 99))}
    assert found.unexpected == ("surprise.weight",)
    assert not found.is_complete


def test_leftovers_keep_their_spelling_and_counters_may_be_missing() -> None:
    state = {k: t for k, t in full("mobile_sam").items() if "num_batches_tracked" not in k}
    state["image_encoder.extra.weight"] = torch.zeros(1)
    found = detect(state)
    assert not found.missing
    assert found.unexpected == ("image_encoder.extra.weight",)


def test_a_sam_file_without_decoder_says_so() -> None:
    state = {k: t for k, t in full("mobile_sam").items() if k.startswith("image_encoder.")}
    found = detect(state)
    assert len(found.missing) == 137
    assert found.variant == "tiny_vit_5m_sam"


@pytest.mark.parametrize("family", ["cream", "timm"])
def test_recognised_by_its_bias_tables_when_the_first_stage_is_gone(family: str) -> None:
    gone = ("layers.0.blocks.0", "stages.0.blocks.0")
    state = {k: t for k, t in full(family).items() if not k.startswith(gone)}
    found = detect(state)
    assert found.family == family
    assert len(found.missing) == 15


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("image_encoder.blocks.0.attn.qkv.weight", "Segment Anything with a ViT-B, -L or -H"),
        ("image_encoder.trunk.blocks.0.norm1.weight", "SAM 2"),
        ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
        ("layer1.0.conv1.weight", "a ResNet"),
        ("quux.weight", "its keys begin with quux"),
    ],
)
def test_other_networks(key: str, words: str) -> None:
    with pytest.raises(CheckpointError, match="1 tensors are no TinyViT") as caught:
        detect({key: torch.zeros(1)})
    assert words in str(caught.value)
    assert "wanted were the keys of a TinyViT stage" in str(caught.value)
