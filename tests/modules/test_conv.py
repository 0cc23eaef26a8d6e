"""conv.py: Conv2d_BN, LayerNorm2d, frozen and paused batch statistics."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules import Conv2d_BN, LayerNorm2d, freeze_batch_stats
from tinyvit.modules.layers import pause_batch_stats


def statistics(module):
    return {k: v.clone() for k, v in module.state_dict().items() if "running" in k or "num_b" in k}


class TestConv2dBN:
    def test_arguments(self, describe_arguments):
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

    def test_repr(self):
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
