"""The two-way transformer against a slow form written from the paper's description."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyvit.modules.sam.mask_decoder import Attention, TwoWayAttentionBlock, TwoWayTransformer

# both sides are float64: only the order of additions differs
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def slow_attention(module, q, k, v):
    """One query of one head at a time."""
    q, k, v = module.q_proj(q), module.k_proj(k), module.v_proj(v)
    width = module.internal_dim // module.num_heads
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for head in range(module.num_heads):
            part = slice(head * width, (head + 1) * width)
            for t in range(q.shape[1]):
                scores = [float(q[b, t, part] @ key[part]) / math.sqrt(width) for key in k[b]]
                shares = [math.exp(s) for s in scores]
                total = sum(shares)
                for share, value in zip(shares, v[b], strict=True):
                    out[b, t, part] += share / total * value[part]
    return module.out_proj(out)


def slow_transformer(module, image, image_pe, tokens):
    batch, _, height, width = image.shape
    cells = torch.stack([image[:, :, y, x] for y in range(height) for x in range(width)], 1)
    where = torch.stack([image_pe[0, :, y, x] for y in range(height) for x in range(width)])
    where = where.expand(batch, -1, -1)
    queries = tokens
    for index, layer in enumerate(module.layers):
        if index == 0:
            queries = slow_attention(layer.self_attn, queries, queries, queries)
        else:
            q = queries + tokens
            queries = queries + slow_attention(layer.self_attn, q, q, queries)
        queries = layer.norm1(queries)
        across = layer.cross_attn_token_to_image
        queries = layer.norm2(
            queries + slow_attention(across, queries + tokens, cells + where, cells)
        )
        hidden = F.relu(layer.mlp.lin1(queries))
        queries = layer.norm3(queries + layer.mlp.lin2(hidden))
        back = layer.cross_attn_image_to_token
        looked = slow_attention(back, cells + where, queries + tokens, queries)
        cells = layer.norm4(cells + looked)
    last = module.final_attn_token_to_image
    looked = slow_attention(last, queries + tokens, cells + where, cells)
    return module.norm_final_attn(queries + looked), cells


@pytest.fixture
def transformer(randomise):
    return randomise(TwoWayTransformer(2, 16, 4, 24)).double()


@pytest.mark.parametrize("rate", [1, 2])
def test_attention_is_the_slow_one(randomise, rate):
    attention = randomise(Attention(16, 4, rate)).double()
    q, k, v = (torch.randn(2, n, 16).double() for n in (3, 5, 5))
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v), slow_attention(attention, q, k, v), **CLOSE)


@pytest.mark.parametrize("size", [(2, 3), (4, 1), (1, 1)])
def test_transformer_is_the_slow_one(transformer, size):
    image, image_pe = torch.randn(2, 16, *size).double(), torch.randn(1, 16, *size).double()
    tokens = torch.randn(2, 3, 16).double()
    with torch.no_grad():
        found = transformer(image, image_pe, tokens)
        wanted = slow_transformer(transformer, image, image_pe, tokens)
    torch.testing.assert_close(found, wanted, **CLOSE)


def test_no_prompts_give_no_tokens(transformer):
    image = torch.zeros(0, 16, 2, 3).double()
    tokens, cells = transformer(
        image, torch.zeros(1, 16, 2, 3).double(), torch.zeros(0, 4, 16).double()
    )
    assert tokens.shape == (0, 4, 16)
    assert cells.shape == (0, 6, 16)


def test_only_the_first_block_skips_positions(transformer):
    assert [layer.skip_first_layer_pe for layer in transformer.layers] == [True, False]


def test_gradients_reach_every_parameter(transformer):
    image = torch.randn(1, 16, 2, 3).double().requires_grad_()
    tokens, cells = transformer(
        image, torch.randn(1, 16, 2, 3).double(), torch.randn(1, 2, 16).double()
    )
    (tokens.square().sum() + cells.sin().sum()).backward()
    # a bias of the keys moves all scores of a row alike, and softmax does not see it
    grads = {
        name: float(parameter.grad.abs().max())
        for name, parameter in transformer.named_parameters()
        if not name.endswith("k_proj.bias")
    }
    assert {name for name, size in grads.items() if size == 0} == set()
    assert float(image.grad.abs().max()) > 0


def test_activation_and_rate_are_passed_on():
    block = TwoWayAttentionBlock(16, 4, 24, nn.GELU, attention_downsample_rate=4)
    assert isinstance(block.mlp.act, nn.GELU)
    assert block.cross_attn_image_to_token.internal_dim == 4
    assert block.self_attn.internal_dim == 16


def test_heads_must_divide_the_inner_width():
    with pytest.raises(ValueError, match=r"num_heads must divide .* = 8, got 3"):
        Attention(16, 3, 2)
