"""mlp.py: Mlp and its two spellings."""

import pytest
import torch
from torch import nn

from tinyvit.modules import MLP, Mlp


def test_arguments(describe_arguments):
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
