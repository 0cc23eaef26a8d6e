from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.families import FAMILIES, SMALL, blank, full, small, table, values
from tinyvit.catalog import get_variant
from tinyvit.checkpoints.detection import (
    Architecture,
    detect,
    encoder_shapes,
    read_architecture,
    sam_shapes,
)
from tinyvit.checkpoints.families import part_of
from tinyvit.errors import CheckpointError
from tinyvit.modules import TinyViT


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in table(name).items()}


@pytest.mark.parametrize(
    "name", ["encoder_5m", "encoder_11m", "encoder_21m", "encoder_21m_384", "encoder_litemedsam"]
)
def test_lists_exactly_the_tensors_of_the_published_encoders(name: str) -> None:
    shapes = shapes_of(name)
    wanted = encoder_shapes(read_architecture(shapes))
    if "head.weight" not in shapes:
        wanted = {k: s for k, s in wanted.items() if part_of(k) != "head"}
    assert list(wanted.items()) == list(shapes.items())


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    stages = draw(st.integers(2, 5))
    heads = [1, *draw(st.lists(st.integers(1, 4), min_size=stages - 1, max_size=stages - 1))]
    widths = draw(st.lists(st.sampled_from([4, 8, 12]), min_size=stages, max_size=stages))
    dims = [h * w for h, w in zip(heads, widths, strict=True)]
    windows = draw(st.lists(st.integers(2, 9), min_size=stages - 1, max_size=stages - 1))
    return Architecture(
        embed_dims=tuple(dims),
        depths=tuple(draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))),
        num_heads=tuple(heads),
        window_sizes=(windows[0], *windows),
        mlp_ratio=draw(st.sampled_from([1.0, 2.0, 2.5, 2.7, 4.0])),
        mbconv_expand_ratio=draw(st.sampled_from([1.0, 3.0, 4.0, 6.0])),
        local_conv_size=draw(st.sampled_from([1, 3, 5])),
        in_chans=draw(st.integers(1, 5)),
        stem=draw(st.sampled_from(["conv", "pointwise"])),
        num_classes=draw(st.sampled_from([2, 10])),
        neck_dim=draw(st.sampled_from([16, 32])),
    )


@given(architectures())
def test_sizes_survive_being_written_as_shapes(sizes: Architecture) -> None:
    shapes = encoder_shapes(sizes)
    found = read_architecture(shapes)
    assert encoder_shapes(found) == shapes
    assert found.embed_dims == sizes.embed_dims
    assert found.num_heads[1:] == sizes.num_heads[1:]
    assert found.window_sizes[1:] == sizes.window_sizes[1:]


@given(architectures(), st.sampled_from([None, 5]))
def test_shapes_are_the_networks_own(sizes: Architecture, neck_size: int | None) -> None:
    sizes = replace(sizes, neck_size=neck_size)
    with torch.device("meta"):
        model = TinyViT(**sizes.arguments(), strides=(2,) * (len(sizes.depths) - 1))
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert list(encoder_shapes(sizes).items()) == list(own.items())


@given(st.data())
def test_one_wrong_tensor_is_not_believed(data: st.DataObject) -> None:
    shapes = encoder_shapes(SMALL)
    # sizes that only one tensor shows cannot be outvoted
    alone = ("patch_embed", "head.", "neck.", "layers.0.blocks", "layers.0.downsample", "biases")
    keys = [k for k in shapes if len(shapes[k]) > 1 and not any(a in k for a in alone)]
    keys = [k for k in keys if "fc1" not in k and "local_conv" not in k]
    key = data.draw(st.sampled_from(keys))
    broken = {**shapes, key: tuple(n + 3 for n in shapes[key])}
    found = read_architecture(broken)
    assert encoder_shapes(found) == shapes


def test_what_cannot_be_known() -> None:
    shapes = encoder_shapes(SMALL)
    with pytest.raises(CheckpointError, match=r"no tensor of a TinyViT stage"):
        read_architecture({"foo": (1,)})
    with pytest.raises(CheckpointError, match=r"channels of stage 3 \(layers\.2\)"):
        read_architecture(
            {"layers.2.x": (1,), "layers.0.blocks.0.conv1.c.weight": (16, 8, 1, 1)}
            | {k: s for k, s in shapes.items() if "layers.1" in k and "down" not in k}
        )
    with pytest.raises(CheckpointError, match=r"no attention_biases of stage 2"):
        read_architecture({k: s for k, s in shapes.items() if "1.blocks.0.attn.attention" not in k})
    odd = {**shapes, "layers.3.blocks.0.attn.attention_biases": (4, 12)}
    with pytest.raises(CheckpointError, match=r"12 entries, which is no square window"):
        read_architecture(odd)
    assert read_architecture({k: s for k, s in shapes.items() if "fc1" not in k}).mlp_ratio == 4.0


def test_a_ratio_no_short_decimal_gives() -> None:
    sizes = Architecture(**{**vars(SMALL), "mlp_ratio": 1 + 1 / 3})
    shapes = encoder_shapes(sizes)
    found = read_architecture(shapes)
    assert encoder_shapes(found) == shapes
    assert found.mlp_ratio == pytest.approx(4 / 3, abs=0.05)


def test_lists_exactly_the_tensors_of_the_published_heads() -> None:
    assert sam_shapes() == shapes_of("prompt_encoder_and_mask_decoder") | shapes_of("hq_decoder")
    parts = {part_of(key) for key in sam_shapes()}
    assert parts == {"prompt_encoder", "mask_decoder", "hq_decoder"}


def test_sizes_of_no_network_are_named() -> None:
    odd = Architecture(**{**vars(SMALL), "num_heads": (1, 3, 2, 4)})
    with pytest.raises(CheckpointError, match="make no TinyViT: num_heads must divide dim"):
        encoder_shapes(odd)
    with pytest.raises(CheckpointError, match="make no TinyViT: local_conv_size must be odd"):
        encoder_shapes(replace(SMALL, local_conv_size=4))


def test_shapes_cost_no_memory_and_no_compiler() -> None:
    """A first value on the meta device would make torch import its decompositions (1 to 2 s)."""
    code = (
        "import sys\n"
        "from tinyvit.checkpoints.detection import detect, sam_shapes\n"
        "sam_shapes()\n"
        "assert 'sympy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_width_changes_shapes_and_no_keys() -> None:
    every = sam_shapes(32, 24)
    assert every.keys() == sam_shapes().keys()
    expected: dict[str, tuple[int, ...]] = {
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 16),
        "prompt_encoder.point_embeddings.3.weight": (1, 32),
        "prompt_encoder.mask_downscaling.3.weight": (16, 4, 2, 2),
        "prompt_encoder.mask_downscaling.6.weight": (32, 16, 1, 1),
        "prompt_encoder.mask_downscaling.6.bias": (32,),
        "mask_decoder.transformer.layers.1.self_attn.q_proj.weight": (32, 32),
        "mask_decoder.transformer.layers.1.cross_attn_token_to_image.k_proj.weight": (16, 32),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.out_proj.weight": (32, 16),
        "mask_decoder.transformer.layers.1.mlp.lin2.weight": (32, 2048),
        "mask_decoder.mask_tokens.weight": (4, 32),
        "mask_decoder.output_upscaling.0.weight": (32, 8, 2, 2),
        "mask_decoder.output_upscaling.0.bias": (8,),
        "mask_decoder.output_upscaling.3.weight": (8, 4, 2, 2),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (4, 32),
        "mask_decoder.iou_prediction_head.layers.2.bias": (4,),
        "mask_decoder.hf_mlp.layers.2.weight": (4, 32),
        "mask_decoder.compress_vit_feat.0.weight": (24, 32, 2, 2),
        "mask_decoder.compress_vit_feat.0.bias": (32,),
        "mask_decoder.embedding_encoder.3.weight": (8, 4, 2, 2),
        "mask_decoder.embedding_maskfeature.3.weight": (4, 8, 3, 3),
    }
    assert {key: every[key] for key in expected} == expected


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
    elif family == "efficientsam3":
        assert (found.variant, found.img_size) == ("tiny_vit_5m_sam3", 1008)
        assert found.strides == (2, 2, 2)
        assert found.arguments()["neck_size"] == 72
    elif family in ("cream", "timm", "mmpretrain"):
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
    shapes = {k: s for k, s in encoder_shapes(sizes).items() if part_of(k) != "neck"}
    found = detect(values(shapes))
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
