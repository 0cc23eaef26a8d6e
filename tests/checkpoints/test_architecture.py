from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.families import SMALL, table
from tinyvit.checkpoints.detection import Architecture, encoder_shapes, read_architecture
from tinyvit.errors import CheckpointError


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, (shape, _) in table(name).items()}


@pytest.mark.parametrize(
    "name", ["encoder_5m", "encoder_11m", "encoder_21m", "encoder_21m_384", "encoder_litemedsam"]
)
def test_lists_exactly_the_tensors_of_the_published_encoders(name: str) -> None:
    shapes = shapes_of(name)
    found = read_architecture(shapes)
    assert list(encoder_shapes(found, found.num_classes is not None, True).items()) == list(
        shapes.items()
    )


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
        num_classes=draw(st.sampled_from([None, 2, 10])),
        neck_dim=draw(st.sampled_from([None, 16])),
    )


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_sizes_survive_being_written_as_shapes(sizes: Architecture) -> None:
    has_head, has_neck = sizes.num_classes is not None, sizes.neck_dim is not None
    shapes = encoder_shapes(sizes, has_head, has_neck)
    found = read_architecture(shapes)
    assert encoder_shapes(found, has_head, has_neck) == shapes
    assert found.embed_dims == sizes.embed_dims
    assert found.num_heads[1:] == sizes.num_heads[1:]
    assert found.window_sizes[1:] == sizes.window_sizes[1:]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_wrong_tensor_is_not_believed(data: st.DataObject) -> None:
    shapes = encoder_shapes(SMALL, has_head=True, has_neck=True)
    # sizes that only one tensor shows cannot be outvoted
    alone = ("patch_embed", "head.", "neck.", "layers.0.blocks", "layers.0.downsample", "biases")
    keys = [k for k in shapes if len(shapes[k]) > 1 and not any(a in k for a in alone)]
    keys = [k for k in keys if "fc1" not in k and "local_conv" not in k]
    key = data.draw(st.sampled_from(keys))
    broken = {**shapes, key: tuple(n + 3 for n in shapes[key])}
    found = read_architecture(broken)
    assert encoder_shapes(found, True, True) == shapes


def test_what_cannot_be_known() -> None:
    shapes = encoder_shapes(SMALL, has_head=False, has_neck=False)
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
    shapes = encoder_shapes(sizes, False, False)
    found = read_architecture(shapes)
    assert encoder_shapes(found, False, False) == shapes
    assert found.mlp_ratio == pytest.approx(4 / 3, abs=0.05)
