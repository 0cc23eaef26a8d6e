"""Conv2d_BN, DropPath, Mlp, Attention: against loops over tokens, and the life of its bias."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules import (
    MLP,
    Attention,
    Conv2d_BN,
    DropPath,
    LayerNorm2d,
    Mlp,
    freeze_batch_stats,
)
from tinyvit.modules.stage import drop_path_rates, pause_batch_stats


def statistics(module):
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "num_b" in k}


class TestConv2dBN:
    def test_mlp_arguments(self, describe_arguments):
        assert describe_arguments(Conv2d_BN) == (
            "a, b, ks=1, stride=1, pad=0, dilation=1, groups=1, bn_weight_init=1",
            "",
        )

    def test_children_and_settings(self):
        layer = Conv2d_BN(4, 6, bn_weight_init=0.25)
        assert isinstance(layer, nn.Sequential)
        assert [name for name, _ in layer.named_children()] == ["c", "bn"]
        assert layer.c.bias is None
        assert (layer.bn.eps, layer.bn.momentum) == (1e-5, 0.1)
        assert torch.equal(layer.bn.weight, torch.full((6,), 0.25))
        assert torch.equal(layer.bn.bias, torch.zeros(6))

    @given(
        ks=st.integers(1, 3),
        stride=st.integers(1, 3),
        pad=st.integers(0, 2),
        dilation=st.integers(1, 2),
        groups=st.sampled_from([1, 2, 4]),
    )
    def test_equals_convolution_then_the_formula(
        self, randomise, ks, stride, pad, dilation, groups
    ):
        layer = randomise(Conv2d_BN(4, 8, ks, stride, pad, dilation, groups)).double().eval()
        x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
        y = F.conv2d(x, layer.c.weight, None, stride, pad, dilation, groups)
        bn = layer.bn
        centred = y - bn.running_mean[:, None, None]
        wanted = centred / (bn.running_var[:, None, None] + 1e-5).sqrt()
        wanted = wanted * bn.weight[:, None, None] + bn.bias[:, None, None]
        torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)  # float64 rounding


class TestLayerNorm2d:
    def test_normalises_each_position_over_its_channels(self, randomise):
        norm = randomise(LayerNorm2d(5)).double()
        x = torch.randn(2, 5, 3, 4, dtype=torch.float64) * 3 + 1
        got = norm(x)
        assert got.shape == x.shape
        for b, y, x_ in ((0, 0, 0), (1, 2, 3), (0, 1, 2)):
            vector = x[b, :, y, x_]
            centred = vector - vector.mean()
            wanted = centred / (centred.square().mean() + 1e-6).sqrt() * norm.weight + norm.bias
            torch.testing.assert_close(got[b, :, y, x_], wanted)

    def test_eps_counts(self):
        x = torch.zeros(1, 2, 1, 1)
        x[0, 0] = 1e-3
        assert LayerNorm2d(2, eps=1.0)(x).abs().max() < 1e-3 < LayerNorm2d(2)(x).abs().max()

    def test_drop_path_repr(self):
        assert repr(LayerNorm2d(7)) == "LayerNorm2d(7, eps=1e-06)"


class TestFreezeBatchStats:
    def make(self, randomise):
        return randomise(nn.Sequential(Conv2d_BN(3, 4, 3), nn.Sequential(Conv2d_BN(4, 2))))

    def test_ordinary_training_moves_them(self, randomise):
        model = self.make(randomise).train()
        before = statistics(model)
        model(torch.randn(2, 3, 5, 5))
        assert all(not torch.equal(v, before[k]) for k, v in statistics(model).items())

    def test_train_leaves_frozen_ones_alone(self, randomise):
        model = self.make(randomise)
        assert freeze_batch_stats(model) is model
        before = statistics(model)
        x = torch.randn(2, 3, 5, 5)
        wanted = model.eval()(x)
        assert torch.equal(model.train()(x), wanted)
        assert model.training and model[0].training
        assert all(torch.equal(v, before[k]) for k, v in statistics(model).items())

    def test_takes_effect_without_another_train_call(self, randomise):
        model = self.make(randomise).train()
        freeze_batch_stats(model)
        assert not model[0].bn.training
        freeze_batch_stats(model, False)
        assert model[0].bn.training

    def test_norms_still_learn(self, randomise):
        model = freeze_batch_stats(self.make(randomise)).train()
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
    def test_copies_stay_frozen_and_can_be_thawed(self, randomise, copied):
        model = copied(freeze_batch_stats(self.make(randomise))).train()
        assert not model[0].bn.training
        assert freeze_batch_stats(model, frozen=False).train()[1][0].bn.training

    def test_thawing_in_eval_mode_stays_in_eval_mode(self, randomise):
        model = freeze_batch_stats(self.make(randomise).eval())
        assert not freeze_batch_stats(model, False)[0].bn.training


class TestPauseBatchStats:
    def test_same_output_and_no_update(self, randomise):
        layer = randomise(Conv2d_BN(3, 4, 3)).train()
        x = torch.randn(2, 3, 6, 6)
        before = statistics(layer)
        with pause_batch_stats(layer):
            paused = layer(x)
        assert all(torch.equal(v, before[k]) for k, v in statistics(layer).items())
        assert torch.equal(paused, layer(x))
        assert not torch.equal(layer.bn.running_mean, before["bn.running_mean"])

    def test_keeps_the_very_buffers_also_after_an_error(self):
        layer = Conv2d_BN(3, 4).train()
        buffer = layer.bn.running_mean
        with pytest.raises(RuntimeError, match="stop"), pause_batch_stats(layer):
            assert layer.bn.running_mean is not buffer
            raise RuntimeError("stop")
        assert layer.bn.running_mean is buffer

    def test_eval_mode_needs_no_copies(self):
        layer = Conv2d_BN(3, 4).eval()
        buffer = layer.bn.running_mean
        with pause_batch_stats(layer):
            assert layer.bn.running_mean is buffer

    def test_covers_synchronised_batch_norm(self):
        layer = nn.SyncBatchNorm.convert_sync_batchnorm(Conv2d_BN(3, 4)).train()
        buffer = layer.bn.running_mean
        with pause_batch_stats(layer):
            assert layer.bn.running_mean is not buffer


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_drops_whole_samples_at_the_rate_and_keeps_the_expectation(rate):
    samples = 4000
    x = torch.ones(samples, 3, 2, dtype=torch.float64)
    y = DropPath(rate).train()(x).flatten(1)
    assert torch.equal(y, y[:, :1].expand_as(y))  # one decision for a sample
    kept = y[:, 0] != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - rate)))
    sigma = math.sqrt(rate * (1 - rate) / samples)
    assert abs(kept.double().mean().item() - (1 - rate)) < 5 * sigma


def test_zero_and_eval_return_the_input_itself():
    x = torch.randn(2, 3)
    assert DropPath(0.0).train()(x) is x
    assert DropPath().train()(x) is x
    assert DropPath(0.7).eval()(x) is x
    assert DropPath(1.0).eval()(x) is x


def test_one_drops_everything_and_stays_differentiable():
    x = torch.randn(5, 3, requires_grad=True)
    y = DropPath(1.0).train()(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(5, 3))
    assert torch.equal(x.grad, torch.zeros(5, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 3), (4,), (2, 3, 4, 5)])
def test_keeps_shape_and_dtype(shape, dtype):
    y = DropPath(0.5).train()(torch.ones(shape, dtype=dtype))
    assert (y.shape, y.dtype) == (shape, dtype)


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
def test_refuses_what_is_no_probability(rate):
    with pytest.raises(ValueError, match=f"probability between 0 and 1, got {rate}"):
        DropPath(rate)


def test_attention_repr():
    assert repr(DropPath(0.25)) == "DropPath(drop_prob=0.25)"


@given(st.lists(st.floats(0, 1), max_size=6))
def test_a_sequence_gives_each_block_its_own(rates):
    assert drop_path_rates(rates, len(rates)) == rates
    assert drop_path_rates(tuple(rates), len(rates)) == rates


@given(st.floats(0, 1), st.integers(0, 6))
def test_one_number_serves_every_block(rate, depth):
    assert drop_path_rates(rate, depth) == [rate] * depth


@pytest.mark.parametrize("rates", [[], [0.1], [0.1, 0.2, 0.3]])
def test_a_sequence_of_another_length_is_refused(rates):
    with pytest.raises(
        ValueError, match=rf"each of the 2 blocks, got {len(rates)}: .*pass 2 rates"
    ):
        drop_path_rates(rates, 2)


def test_attention_arguments(describe_arguments):
    assert describe_arguments(Mlp) == (
        "in_features, hidden_features=None, out_features=None, act_layer=GELU, drop=0.0",
        "activation=None",
    )


def test_children():
    assert {name for name, _ in Mlp(4).named_children()} == {"norm", "fc1", "act", "fc2", "drop"}
    assert Mlp(4).norm.eps == 1e-5


def test_is_the_formula(randomise):
    mlp = randomise(Mlp(6, 10, 4)).double().eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    y = x - x.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mlp.norm.weight + mlp.norm.bias
    y = y @ mlp.fc1.weight.T + mlp.fc1.bias
    y = 0.5 * y * (1 + torch.erf(y / 2**0.5))  # the exact GELU, not tanh's
    y = y @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), y)


@pytest.mark.parametrize(
    "given, widths",
    [({}, (6, 6)), ({"hidden_features": 9}, (9, 6)), ({"out_features": 2}, (6, 2))],
)
def test_widths_left_out_are_the_input_s(given, widths):
    mlp = Mlp(6, **given)
    assert (mlp.fc1.out_features, mlp.fc2.out_features) == widths
    assert mlp(torch.zeros(0, 6)).shape == (0, widths[1])


@pytest.mark.parametrize("hidden_features", [0, -3])
def test_some_hidden_feature_must_be_left(hidden_features):
    words = f"hidden_features must be at least 1, got {hidden_features}"
    with pytest.raises(ValueError, match=words):
        Mlp(4, hidden_features)


def test_both_spellings():
    assert MLP is Mlp
    assert isinstance(Mlp(4, act_layer=nn.ReLU).act, nn.ReLU)
    assert isinstance(MLP(4, activation=nn.ReLU).act, nn.ReLU)
    assert isinstance(Mlp(4, None, None, nn.ReLU).act, nn.ReLU)
    assert isinstance(Mlp(4).act, nn.GELU)


def test_drop_acts_in_training_only():
    mlp = Mlp(8, drop=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(mlp.train()(x), mlp(x))
    assert torch.equal(mlp.eval()(x), mlp(x))
    assert torch.equal(Mlp(8, drop=1.0).train()(x), torch.zeros(4, 8))


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
