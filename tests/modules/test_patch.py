"""patch.py: PatchEmbed and PatchMerging."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules import PatchEmbed, PatchMerging

sides = st.integers(1, 40)


def ceil(number, by):
    return -(-number // by)


class TestPatchEmbed:
    def test_arguments(self, describe_arguments):
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
