"""attention.py: Attention, against loops over tokens, and the life of its bias."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.modules import Attention


def naive_bias(attention):
    height, width = attention.resolution
    places = [(y, x) for y in range(height) for x in range(width)]
    bias = torch.zeros(attention.num_heads, len(places), len(places), dtype=torch.float64)
    for p, (y, x) in enumerate(places):
        for q, (v, u) in enumerate(places):
            bias[:, p, q] = attention.attention_biases[:, abs(y - v) * width + abs(x - u)]
    return bias


def naive_attention(attention, x):
    """One batch entry, one head, one token at a time; no library attention."""
    x = attention.norm(x)
    bias = naive_bias(attention)
    kd, d = attention.key_dim, attention.d
    out = torch.zeros(*x.shape[:2], attention.num_heads * d, dtype=x.dtype)
    for b in range(x.shape[0]):
        qkv = x[b] @ attention.qkv.weight.T + attention.qkv.bias
        for head in range(attention.num_heads):
            own = qkv[:, head * (2 * kd + d) :]
            q, k, v = own[:, :kd], own[:, kd : 2 * kd], own[:, 2 * kd : 2 * kd + d]
            for p in range(x.shape[1]):
                score = torch.stack([q[p] @ k[r] for r in range(x.shape[1])]) * kd**-0.5
                weight = torch.softmax(score + bias[head, p], 0)
                out[b, p, head * d : (head + 1) * d] = weight @ v
    return out @ attention.proj.weight.T + attention.proj.bias


def test_arguments(describe_arguments):
    wanted = "dim, key_dim, num_heads=8, attn_ratio=4, resolution=(14, 14)"
    assert describe_arguments(Attention) == (wanted, "")


def test_keys_and_shapes():
    attention = Attention(12, 4, 3, attn_ratio=1.5, resolution=(2, 5))
    assert {k: tuple(v.shape) for k, v in attention.state_dict().items()} == {
        "attention_biases": (3, 10),
        "norm.weight": (12,),
        "norm.bias": (12,),
        "qkv.weight": (3 * (4 + 4 + 6), 12),
        "qkv.bias": (42,),
        "proj.weight": (12, 18),
        "proj.bias": (12,),
    }
    assert attention.norm.eps == 1e-5
    assert torch.equal(attention.attention_biases, torch.zeros(3, 10))


@given(height=st.integers(1, 5), width=st.integers(1, 5))
def test_bias_index_is_the_formula(height, width):
    attention = Attention(4, 2, 2, resolution=(height, width)).double()
    table = torch.arange(2.0 * height * width, dtype=torch.float64).view(2, -1)
    attention.attention_biases.data = table
    assert torch.equal(attention.bias(), naive_bias(attention))


@given(
    heads=st.integers(1, 3),
    key_dim=st.integers(1, 4),
    attn_ratio=st.sampled_from([1, 1.5, 4]),
    resolution=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    batch=st.integers(0, 2),
)
def test_equals_the_loops(randomise, heads, key_dim, attn_ratio, resolution, batch):
    attention = Attention(6, key_dim, heads, attn_ratio, resolution)
    randomise(attention).double().eval()
    x = torch.randn(batch, math.prod(resolution), 6, dtype=torch.float64)
    with torch.no_grad():
        got = attention(x)
        assert got.shape == x.shape
        torch.testing.assert_close(got, naive_attention(attention, x))


def test_whole_number_resolution_is_a_square():
    assert Attention(4, 2, 2, resolution=3).resolution == (3, 3)


def test_wrong_number_of_tokens():
    attention = Attention(4, 2, 2, resolution=(2, 3))
    words = r"window of 2x3 wants 6 tokens, got 5 in an input of shape \(1, 5, 4\)"
    with pytest.raises(ValueError, match=words):
        attention(torch.zeros(1, 5, 4))


@pytest.mark.parametrize("training", [True, False])
def test_bias_gets_gradients_in_every_mode(randomise, training):
    attention = randomise(Attention(6, 3, 2, 1, (2, 2))).train(training)
    attention(torch.randn(2, 4, 6)).square().sum().backward()
    assert attention.attention_biases.grad.abs().min() > 0


def test_changes_of_the_bias_always_count(randomise):
    attention = randomise(Attention(6, 3, 2, 1, (2, 2))).eval()
    x = torch.randn(2, 4, 6)
    before = attention(x)
    other = copy.deepcopy(attention)
    with torch.no_grad():
        attention.attention_biases.copy_(torch.randn(2, 4))
    assert not torch.allclose(attention(x), before)
    assert torch.equal(other(x), before)
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))


def test_train_and_eval_return_self_and_store_nothing():
    attention = Attention(6, 3, 2, 1, (2, 2))
    attributes = set(vars(attention))
    assert attention.eval() is attention and attention.train() is attention
    attention(torch.randn(1, 4, 6))
    assert set(vars(attention)) == attributes
    assert list(attention.buffers()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(randomise, dtype):
    attention = randomise(Attention(6, 3, 2, 1, (2, 2))).eval()
    x = torch.randn(2, 4, 6)
    wanted = attention(x)
    got = attention.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    # bfloat16 keeps 8 bits: 2**-8 at each of a handful of steps
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


def test_under_autocast(randomise):
    attention = randomise(Attention(6, 3, 2, 1, (2, 2))).eval()
    x = torch.randn(2, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(x)
    torch.testing.assert_close(got.float(), attention(x), rtol=0.05, atol=0.05)


def test_the_form_for_training_equals_the_fused_one(randomise):
    attention = randomise(Attention(12, 4, 3, attn_ratio=1, resolution=(3, 5)))
    x = torch.randn(4, 15, 12)
    trained = attention(x)  # with gradients: spelt out
    with torch.no_grad():
        fused = attention(x)
    # float32 sums in another order
    assert torch.allclose(trained, fused, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention(x)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - fused).abs().max() < 0.05 * fused.abs().max()  # 8 bits a number


def test_meta_device():
    with torch.device("meta"):
        attention = Attention(6, 3, 2, 1, (2, 2))
        assert attention(torch.zeros(5, 4, 6)).shape == (5, 4, 6)


def test_repr():
    assert "num_heads=2, key_dim=3, resolution=(2, 2)" in repr(Attention(6, 3, 2, 1, (2, 2)))
