"""Folding: the same function with fewer operations, checked in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyvit.inference.fast_encoder import arrays_of
from tinyvit.inference.fold import fold_attention, fold_bare, fold_conv, fold_linear
from tinyvit.inference.torch_backend import reason_against
from tinyvit.modules import Attention, Conv2d_BN

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # weights are rounded to float32 once


def lively(module):
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor).abs() + 0.1)
            if name.endswith("bias") or name.endswith("running_mean"):
                tensor.sub_(0.8)
            if tensor.ndim == 2:
                tensor.sub_(0.8).mul_(0.5)  # values stay near 1, where 1e-5 is many ulps
    return module.eval()


def arrays(**modules):
    return arrays_of(nn.ModuleDict(modules))


def tensors(weights):
    return torch.from_numpy(weights.weight), torch.from_numpy(weights.bias)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_and_batch_norm_become_one(groups):
    layer = lively(Conv2d_BN(4, 4, 3, stride=2, pad=1, groups=groups))
    folded = fold_conv(arrays(a=layer), "a", 2, depthwise=groups > 1)
    x = torch.randn(2, 4, 9, 6)
    got = F.conv2d(x, *tensors(folded), folded.stride, folded.pad, groups=folded.groups)
    torch.testing.assert_close(got, layer(x), **CLOSE)


def test_a_batch_norm_without_statistics_is_refused():
    layer = Conv2d_BN(4, 4)
    layer.bn = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="without running statistics"):
        fold_conv(arrays(a=layer), "a")


def test_a_bare_convolution_gets_a_zero_bias_or_keeps_its_own():
    x = torch.randn(1, 4, 5, 5)
    for bias in (True, False):
        conv = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
        folded = fold_bare(arrays(a=conv), "a")
        got = F.conv2d(x, *tensors(folded), padding=folded.pad)
        torch.testing.assert_close(got, conv(x), **CLOSE)


def test_the_affine_of_a_layer_norm_goes_into_the_linear_layer():
    norm, linear = lively(nn.LayerNorm(6)), lively(nn.Linear(6, 5))
    folded = fold_linear(arrays(norm=norm, linear=linear), "linear", "norm")
    x = torch.randn(3, 6)
    got = F.linear(F.layer_norm(x, (6,)), *tensors(folded))
    torch.testing.assert_close(got, linear(norm(x)), **CLOSE)


@pytest.mark.parametrize("attn_ratio", [1, 4])
def test_attention_by_its_folded_parts(attn_ratio):
    layer = lively(Attention(12, 4, 3, attn_ratio=attn_ratio, resolution=(2, 3)))
    qkv, proj, bias = fold_attention(arrays(a=layer), "a", 4, (2, 3))
    x = torch.randn(5, 6, 12)
    y = F.linear(F.layer_norm(x, (12,)), *tensors(qkv))
    q, k, v = (
        part.unflatten(2, (3, -1)).transpose(1, 2)
        for part in y.split([12, 12, 12 * attn_ratio], dim=2)
    )
    y = (q @ k.mT + torch.from_numpy(bias)).softmax(-1) @ v
    y = F.linear(y.transpose(1, 2).flatten(2), *tensors(proj))
    torch.testing.assert_close(y, layer(x), **CLOSE)


def test_what_cannot_be_folded_is_named(make_tiny_vit):
    model = make_tiny_vit()
    assert reason_against(model) is None
    handle = model.layers[1].register_forward_hook(lambda *_: None)
    assert reason_against(model) == "layers.1 has a forward hook"
    handle.remove()
    model.layers[0].blocks[0].act1 = nn.ReLU()
    assert "layers.0.blocks.0.act1 is a torch.nn.modules.activation.ReLU" in reason_against(model)
    model.layers[0].blocks[0].act1 = nn.GELU("tanh")
    assert reason_against(model) == "layers.0.blocks.0.act1 is an approximate GELU"
