"""mbconv.py: MBConv."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tinyvit.modules import MBConv


def test_arguments(describe_arguments):
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
