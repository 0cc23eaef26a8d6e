"""drop.py: DropPath and its rates."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.modules import DropPath
from tinyvit.modules.layers import drop_path_rates


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


def test_repr():
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
