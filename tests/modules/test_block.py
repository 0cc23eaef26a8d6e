"""block.py: TinyViTBlock against a plain form that visits one window after the other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules import TinyViTBlock


def naive_block(block, x, size, mask_padding=False):
    """The published rule: zeros at the bottom and right, norm, softmax over all of them, crop.

    ``mask_padding`` is the other thing one could do; used to show that it is not the same.
    """
    height, width = size
    side, heads = block.window_size, block.num_heads
    attention = block.attn
    kd = block.dim // heads
    out = x.clone()
    for b in range(x.shape[0]):
        for top in range(0, height, side):
            for left in range(0, width, side):
                places = [(top + i, left + j) for i in range(side) for j in range(side)]
                real = [y < height and z < width for y, z in places]
                rows = [
                    x[b, y * width + z] if inside else torch.zeros_like(x[b, 0])
                    for (y, z), inside in zip(places, real, strict=True)
                ]
                qkv = attention.qkv(attention.norm(torch.stack(rows)))
                values = []
                for head in range(heads):
                    q, k, v = qkv[:, head * 3 * kd : (head + 1) * 3 * kd].split(kd, 1)
                    scores = q @ k.T * kd**-0.5
                    for p, (y, z) in enumerate(places):
                        for r, (s, t) in enumerate(places):
                            entry = abs(y - s) * side + abs(z - t)
                            scores[p, r] += attention.attention_biases[head, entry]
                    if mask_padding:
                        scores[:, ~torch.tensor(real)] = -torch.inf
                    values.append(scores.softmax(1) @ v)
                window = attention.proj(torch.cat(values, 1))
                for p, (y, z) in enumerate(places):
                    if real[p]:
                        out[b, y * width + z] += window[p]
    x = out.transpose(1, 2).unflatten(2, size)
    kernel = block.local_conv.c.weight
    x = F.conv2d(x, kernel, padding=kernel.shape[-1] // 2, groups=block.dim)
    x = block.local_conv.bn(x).flatten(2).transpose(1, 2)
    mlp = block.mlp
    return x + mlp.fc2(mlp.act(mlp.fc1(mlp.norm(x))))


def make(randomise, *args, **kwargs):
    return randomise(TinyViTBlock(*args, **kwargs)).double().eval()


def test_arguments(describe_arguments):
    assert describe_arguments(TinyViTBlock) == (
        "dim, input_resolution, num_heads, window_size=7, mlp_ratio=4.0, drop=0.0, drop_path=0.0, "
        "local_conv_size=3, activation=GELU",
        "",
    )


def test_children_and_repr():
    block = TinyViTBlock(192, (14, 14), 3)
    names = {name for name, _ in block.named_children()}
    assert names == {"attn", "mlp", "local_conv", "drop_path"}
    assert block.extra_repr() == (
        "dim=192, input_resolution=(14, 14), num_heads=3, window_size=7, mlp_ratio=4.0"
    )
    assert (block.attn.key_dim, block.attn.d, block.attn.resolution) == (64, 64, (7, 7))


@settings(max_examples=12)
@given(
    heads=st.integers(1, 2),
    head_dim=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    window_size=st.integers(1, 4),
    mlp_ratio=st.sampled_from([1.0, 1.5, 4.0]),
    local_conv_size=st.sampled_from([1, 3, 5]),
    activation=st.sampled_from([nn.GELU, nn.ReLU]),
    batch=st.integers(0, 2),
)
def test_equals_the_loops(randomise, heads, head_dim, size, batch, **arguments):
    dim = heads * head_dim
    block = make(randomise, dim, size, heads, **arguments)
    x = torch.randn(batch, size[0] * size[1], dim, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x), naive_block(block, x, size))


def test_padding_takes_part_in_the_softmax(randomise):
    block = make(randomise, 4, (3, 5), 2, window_size=4)
    x = torch.randn(1, 15, 4, dtype=torch.float64)
    with torch.no_grad():
        got = block(x)
        torch.testing.assert_close(got, naive_block(block, x, (3, 5)))
        assert (got - naive_block(block, x, (3, 5), mask_padding=True)).abs().max() > 0.01


def test_a_padded_token_is_the_bias_of_the_norm(randomise):
    # a map of one token in a window of 2x2: its attention sees itself and three copies of the bias
    block = make(randomise, 4, 1, 1, window_size=2)
    x = torch.randn(1, 1, 4, dtype=torch.float64)
    attention = block.attn
    tokens = torch.cat([attention.norm(x[0]), attention.norm.bias.expand(3, 4)])
    q, k, v = attention.qkv(tokens).split(4, 1)
    weights = (q[0] @ k.T / 2 + attention.attention_biases[0]).softmax(0)
    seen = []
    block.local_conv.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block(x)
    torch.testing.assert_close(seen[0].flatten(), (x[0, 0] + attention.proj(weights @ v)))


def test_size_of_the_call_wins_over_the_declared_one(randomise):
    block = make(randomise, 4, (2, 6), 2, window_size=3)
    x = torch.randn(2, 12, 4, dtype=torch.float64)
    declared = block(x)
    turned = block(x, (6, 2))
    assert (declared - turned).abs().max() > 0.01
    assert torch.equal(block(x), declared)  # nothing is kept from the call before
    assert torch.equal(block(x, (2, 6)), declared)


def test_input_is_left_alone(randomise):
    block = make(randomise, 4, (3, 3), 2, window_size=2)
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    kept = x.clone()
    block(x)
    assert torch.equal(x, kept)


def test_drop_path_of_one_leaves_the_local_convolution(randomise):
    block = randomise(TinyViTBlock(4, (3, 3), 2, drop_path=1.0)).train()
    block.local_conv.bn.eval()
    x = torch.randn(2, 9, 4)
    wanted = block.local_conv(x.transpose(1, 2).unflatten(2, (3, 3))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(block(x), wanted)


def test_drop_goes_to_the_perceptron_and_activation_too():
    block = TinyViTBlock(4, 3, 2, drop=0.25, activation=nn.ReLU)
    assert block.mlp.drop.p == 0.25
    assert isinstance(block.mlp.act, nn.ReLU)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_heads": 3}, "num_heads must divide dim, got dim=4, num_heads=3"),
        ({"num_heads": 0}, "num_heads must divide dim, got dim=4, num_heads=0"),
        ({"window_size": 0}, "window_size must be positive, got 0"),
        ({"local_conv_size": 2}, "local_conv_size must be odd.*got 2"),
        ({"local_conv_size": -1}, "local_conv_size must be odd.*got -1"),
        ({"drop_path": 1.5}, "between 0 and 1, got 1.5"),
        ({"input_resolution": (0, 3)}, r"input_resolution must be positive.*got \(0, 3\)"),
    ],
)
def test_bad_arguments(change, words):
    arguments = {"dim": 4, "input_resolution": (3, 3), "num_heads": 2, **change}
    with pytest.raises(ValueError, match=words):
        TinyViTBlock(**arguments)


def test_tokens_that_do_not_fit():
    with pytest.raises(ValueError, match="10 tokens do not make a map of 3x3 = 9"):
        TinyViTBlock(4, (3, 3), 2)(torch.zeros(1, 10, 4))
