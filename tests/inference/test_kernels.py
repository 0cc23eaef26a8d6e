"""Packed kernels against public ones, and the choice between them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tinyvit.inference import fast_encoder
from tinyvit.inference.fast_encoder import PackedKernels, PlainKernels, choose_kernels
from tinyvit.inference.fold import Weights

# both accumulate in float32; bf16 results may then round to neighbouring values of 8 bits
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 2e-2},
}


def random_weights(*shape, **settings):
    noise = np.random.default_rng(0)
    weight, bias = noise.standard_normal(shape), noise.standard_normal(shape[0])
    return Weights(weight.astype(np.float32), bias.astype(np.float32), **settings)


def tensors(weights):
    return torch.from_numpy(weights.weight), torch.from_numpy(weights.bias)


@pytest.fixture(autouse=True)
def forget_choices():
    choose_kernels.cache_clear()
    yield
    choose_kernels.cache_clear()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_and_public_kernels_agree(dtype):
    try:
        packed = fast_encoder._trial(PackedKernels(dtype))
    except (RuntimeError, AttributeError) as err:
        pytest.skip(f"this torch has no packed operators: {err}")
    for ours, theirs in zip(packed, fast_encoder._trial(PlainKernels(dtype)), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])


def test_public_kernels_are_the_textbook():
    kernels = PlainKernels(torch.float32)
    weights = random_weights(6, 4)
    x, add = torch.randn(2, 3, 4), torch.randn(2, 3, 6)
    wanted = F.linear(x, *tensors(weights))
    torch.testing.assert_close(kernels.linear(weights)(x), wanted)
    torch.testing.assert_close(kernels.linear(weights, "gelu")(x), F.gelu(wanted))
    torch.testing.assert_close(kernels.linear(weights)(x, add), wanted + add)
    conv = random_weights(4, 1, 3, 3, stride=2, pad=1, groups=4)
    image = torch.randn(1, 4, 7, 6)
    wanted = F.conv2d(image, *tensors(conv), 2, 1, groups=4)
    torch.testing.assert_close(kernels.conv(conv, "gelu")(image), F.gelu(wanted))
    wanted = F.conv2d(image, *tensors(conv), 2, (0, 1), groups=4)
    torch.testing.assert_close(kernels.conv(conv)(image, pad_rows=0), wanted)


def test_the_residual_is_not_written_to():
    for kernels in (PlainKernels(torch.float32), choose_kernels(torch.float32)):
        weights = random_weights(4, 4)
        x, add = torch.randn(5, 4), torch.randn(5, 4)
        before = add.clone()
        kernels.linear(weights)(x, add)
        assert torch.equal(add, before)


def test_missing_operators_mean_public_ones(monkeypatch):
    def missing(self, weights, after="none"):
        raise AttributeError("no such operator")

    monkeypatch.setattr(PackedKernels, "linear", missing)
    assert choose_kernels(torch.float32).name == "public operators"


def test_operators_that_give_something_else_are_not_used(monkeypatch):
    def wrong(self, weights, after="none"):
        return PlainKernels(self.dtype).linear(weights)  # leaves the GELU out

    monkeypatch.setattr(PackedKernels, "linear", wrong)
    assert choose_kernels(torch.float32).name == "public operators"


def test_the_choice_is_made_once(monkeypatch):
    first = choose_kernels(torch.bfloat16)
    monkeypatch.setattr(fast_encoder, "_trial", None)  # would fail if it were asked again
    assert choose_kernels(torch.bfloat16) is first
