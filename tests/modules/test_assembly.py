"""assembly.py: strides, stages, neck and first weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules import BasicLayer, ConvLayer, LayerNorm2d, PatchMerging, TinyViT
from tinyvit.modules.tiny_vit import check_strides, init_weights, make_neck


@pytest.mark.parametrize(
    "stages, strides", [(1, ()), (2, (2,)), (3, (2, 2)), (4, (2, 2, 1)), (5, (2, 2, 1, 2))]
)
def test_strides_left_out_are_sam_s(stages, strides):
    assert check_strides(None, stages) == strides


def test_strides_become_a_tuple():
    assert check_strides([2, 1, 2], 4) == (2, 1, 2)


@pytest.mark.parametrize("strides", [(), (2, 2), (2, 2, 3), (0, 2, 2), (2, 2, 1, 1)])
def test_bad_strides(strides):
    with pytest.raises(ValueError) as caught:
        check_strides(strides, 4)
    assert str(caught.value) == (
        f"strides wants 3 numbers (1 or 2), one for each merge between 4 stages, got {strides}"
    )


def test_at_least_one_stage():
    with pytest.raises(ValueError, match="depths must name at least one stage, got none"):
        check_strides(None, 0)


@pytest.mark.parametrize("name", ["embed_dims", "num_heads", "window_sizes"])
@pytest.mark.parametrize("values", [(4, 4, 4), (4, 4, 4, 4, 4)])
def test_every_stage_is_named_once(make_tiny_vit, name, values):
    with pytest.raises(ValueError) as caught:
        make_tiny_vit(**{name: values})
    words = f"{name} wants 4 numbers, one for each stage of depths, got {values}"
    assert str(caught.value) == words


def test_empty_embed_dims(make_tiny_vit):
    with pytest.raises(ValueError, match="embed_dims wants 4 numbers"):
        make_tiny_vit(embed_dims=())


@given(
    depths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    rate=st.floats(0, 1),
)
def test_drop_path_rises_linearly_over_all_blocks(depths, rate):
    stages = len(depths)
    with torch.device("meta"):
        model = TinyViT(
            embed_dims=[4] * stages,
            depths=depths,
            num_heads=[1] * stages,
            window_sizes=[2] * stages,
            drop_path_rate=rate,
        )
    rates = [block.drop_path.drop_prob for layer in model.layers for block in layer.blocks]
    wanted = torch.linspace(0, rate, sum(depths), dtype=torch.float64)
    assert rates == pytest.approx(wanted.tolist(), abs=1e-12)


def test_default_drop_path_rate():
    with torch.device("meta"):
        model = TinyViT()
    assert model.layers[3].blocks[1].drop_path.drop_prob == pytest.approx(0.1)


def test_stages(make_tiny_vit):
    model = make_tiny_vit(strides=(2, 1, 2), mlp_ratio=3.0, drop_rate=0.2, local_conv_size=5)
    assert [type(layer) for layer in model.layers] == [ConvLayer] + 3 * [BasicLayer]
    merges = [layer.downsample for layer in model.layers]
    assert [type(merge) for merge in merges[:3]] == 3 * [PatchMerging]
    assert [merge.stride for merge in merges[:3]] == [2, 1, 2]
    assert [merge.out_dim for merge in merges[:3]] == [12, 16, 24]
    assert merges[3] is None
    block = model.layers[2].blocks[1]
    assert (block.dim, block.num_heads, block.window_size) == (16, 2, 5)
    assert (block.mlp.fc1.out_features, block.mlp.drop.p) == (48, 0.2)
    assert block.local_conv.c.kernel_size == (5, 5)
    assert not any(layer.use_checkpoint for layer in model.layers)
    assert all(layer.use_checkpoint for layer in make_tiny_vit(use_checkpoint=True).layers)


def test_neck():
    neck = make_neck(12, 8)
    assert [type(part) for part in neck] == [nn.Conv2d, LayerNorm2d, nn.Conv2d, LayerNorm2d]
    assert {k: tuple(v.shape) for k, v in neck.state_dict().items()} == {
        "0.weight": (8, 12, 1, 1),
        "1.weight": (8,),
        "1.bias": (8,),
        "2.weight": (8, 8, 3, 3),
        "3.weight": (8,),
        "3.bias": (8,),
    }
    assert neck[1].eps == neck[3].eps == 1e-6
    assert neck(torch.zeros(2, 12, 3, 5)).shape == (2, 8, 3, 5)


def test_first_weights():
    model = TinyViT(img_size=32, embed_dims=(8, 16, 64, 128), num_heads=(1, 1, 2, 4))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        if isinstance(module, nn.LayerNorm | LayerNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
    assert torch.equal(model.layers[0].blocks[0].conv3.bn.weight, torch.zeros(8))


def test_init_weights_leaves_other_modules_alone():
    conv = nn.Conv2d(2, 3, 1)
    before = conv.weight.clone()
    init_weights(conv)
    assert torch.equal(conv.weight, before)
