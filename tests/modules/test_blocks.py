"""MBConv, PatchEmbed, PatchMerging; TinyViTBlock against one window after the other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules import MBConv, PatchEmbed, PatchMerging, TinyViTBlock


def test_mbconv_arguments(describe_arguments):
    wanted = "in_chans, out_chans, expand_ratio, activation, drop_path"
    assert describe_arguments(MBConv) == (wanted, "")


def test_children_and_widths():
    block = MBConv(5, 5, 2.5, nn.ReLU, 0.0)
    names = {"conv1", "act1", "conv2", "act2", "conv3", "act3", "drop_path"}
    assert {name for name, _ in block.named_children()} == names
    assert (block.in_chans, block.hidden_chans, block.out_chans) == (5, 12, 5)  # int(12.5)
    assert block.conv2.c.groups == 12
    assert all(isinstance(getattr(block, f"act{i}"), nn.ReLU) for i in (1, 2, 3))


def test_starts_as_activation_of_the_identity():
    block = MBConv(4, 4, 4.0, nn.GELU, 0.0).eval()
    assert torch.equal(block.conv3.bn.weight, torch.zeros(4))
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(block(x), F.gelu(x))


def test_is_the_sum_of_its_parts(randomise):
    block = randomise(MBConv(4, 4, 2.0, nn.GELU, 0.3)).double().eval()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    kept = x.clone()
    wanted = F.gelu(x + block.conv3(F.gelu(block.conv2(F.gelu(block.conv1(x))))))
    torch.testing.assert_close(block(x), wanted)
    assert torch.equal(x, kept)


def test_drop_path_acts_in_training(randomise):
    block = randomise(MBConv(4, 4, 2.0, nn.ReLU, 1.0)).train()
    x = torch.randn(2, 4, 5, 6)
    assert torch.equal(block(x), F.relu(x))
    assert not torch.equal(block.eval()(x), F.relu(x))


def test_channels_must_agree():
    with pytest.raises(ValueError, match=r"must equal in_chans; got in_chans=4, out_chans=8"):
        MBConv(4, 8, 4.0, nn.GELU, 0.0)


def test_some_hidden_channel_must_be_left():
    assert MBConv(4, 4, 0.25, nn.GELU, 0.0).hidden_chans == 1
    with pytest.raises(ValueError, match=r"at least 1 hidden channel, got 0\.2 for in_chans=4"):
        MBConv(4, 4, 0.2, nn.GELU, 0.0)


def test_refuses_a_bad_drop_path():
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        MBConv(4, 4, 4.0, nn.GELU, 2)


sides = st.integers(1, 40)


def ceil(number, by):
    return -(-number // by)


class TestPatchEmbed:
    def test_block_arguments(self, describe_arguments):
        wanted = "in_chans, embed_dim, resolution, activation, stem='conv'"
        assert describe_arguments(PatchEmbed) == (wanted, "")

    @pytest.mark.parametrize(
        "stem, size, resolution, kernels",
        [
            ("conv", 224, (56, 56), (3, 3)),
            ("conv", (33, 50), (9, 13), (3, 3)),
            ("pointwise", (33, 50), (33, 50), (1, 1)),
        ],
    )
    def test_attributes(self, stem, size, resolution, kernels):
        embed = PatchEmbed(4, 10, size, nn.ReLU, stem)
        assert embed.patches_resolution == resolution
        assert embed.num_patches == resolution[0] * resolution[1]
        assert (embed.in_chans, embed.embed_dim) == (4, 10)
        assert isinstance(embed.seq[1], nn.ReLU)
        shapes = [tuple(embed.seq[i].c.weight.shape) for i in (0, 2)]
        assert shapes == [(5, 4, *[kernels[0]] * 2), (10, 5, *[kernels[1]] * 2)]

    @given(height=sides, width=sides, batch=st.integers(0, 2))
    def test_any_size_is_quartered_and_rounded_up(self, height, width, batch):
        embed = PatchEmbed(3, 4, 64, nn.GELU).eval()
        y = embed(torch.zeros(batch, 3, height, width))
        assert y.shape == (batch, 4, ceil(height, 4), ceil(width, 4))
        y = PatchEmbed(3, 4, 64, nn.GELU, "pointwise").eval()(torch.zeros(batch, 3, height, width))
        assert y.shape == (batch, 4, height, width)

    def test_is_two_convolutions(self, randomise):
        embed = randomise(PatchEmbed(3, 4, 64, nn.GELU)).double().eval()
        x = torch.randn(1, 3, 11, 8, dtype=torch.float64)
        y = embed.seq[0].bn(F.conv2d(x, embed.seq[0].c.weight, stride=2, padding=1))
        y = embed.seq[2].bn(F.conv2d(F.gelu(y), embed.seq[2].c.weight, stride=2, padding=1))
        torch.testing.assert_close(embed(x), y)

    def test_unknown_stem(self):
        with pytest.raises(ValueError, match="'conv' or 'pointwise', got 'patchify'"):
            PatchEmbed(3, 4, 64, nn.GELU, "patchify")

    def test_bad_resolution(self):
        with pytest.raises(ValueError, match=r"resolution must be positive.*got 0"):
            PatchEmbed(3, 4, 0, nn.GELU)


class TestPatchMerging:
    def test_arguments(self, describe_arguments):
        wanted = "input_resolution, dim, out_dim, activation, stride=None"
        assert describe_arguments(PatchMerging) == (wanted, "")

    def test_children(self):
        merge = PatchMerging((4, 4), 3, 6, nn.ReLU)
        assert {name for name, _ in merge.named_children()} == {"act", "conv1", "conv2", "conv3"}
        assert merge.conv2.c.groups == 6
        assert (merge.dim, merge.out_dim, merge.input_resolution) == (3, 6, (4, 4))

    @pytest.mark.parametrize(
        "out_dim, stride", [(320, 1), (448, 1), (576, 1), (319, 2), (384, 2), (64, 2)]
    )
    def test_stride_left_out_follows_the_published_rule(self, out_dim, stride):
        with torch.device("meta"):
            assert PatchMerging((4, 4), 8, out_dim, nn.GELU).stride == stride
            assert PatchMerging((4, 4), 8, out_dim, nn.GELU, 3 - stride).stride == 3 - stride

    @given(height=sides, width=sides, batch=st.integers(0, 2), stride=st.sampled_from([1, 2]))
    def test_map_and_tokens_give_the_same(self, height, width, batch, stride):
        merge = PatchMerging((1, 1), 3, 4, nn.GELU, stride).eval()
        x = torch.randn(batch, 3, height, width)
        rows, columns = ceil(height, stride), ceil(width, stride)
        y = merge(x)
        assert merge.output_size((height, width)) == (rows, columns)
        assert y.shape == (batch, rows * columns, 4)
        tokens = x.flatten(2).transpose(1, 2)
        # the convolution may take another path for another memory format
        torch.testing.assert_close(merge(tokens, (height, width)), y, rtol=1e-5, atol=1e-5)
        merge.input_resolution = (height, width)
        torch.testing.assert_close(merge(tokens), y, rtol=1e-5, atol=1e-5)

    def test_order_of_the_parts(self, randomise):
        merge = randomise(PatchMerging((5, 7), 3, 4, nn.GELU)).double().eval()
        x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
        y = merge.conv3(F.gelu(merge.conv2(F.gelu(merge.conv1(x)))))
        torch.testing.assert_close(merge(x), y.flatten(2).transpose(1, 2))

    def test_tokens_that_do_not_fit(self):
        merge = PatchMerging((5, 7), 3, 4, nn.GELU)
        with pytest.raises(ValueError, match=r"36 tokens do not make a map of 5x7 = 35; pass size"):
            merge(torch.zeros(1, 36, 3))


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
