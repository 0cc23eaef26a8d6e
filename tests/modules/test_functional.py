"""Tokens and windows, each form of partition against plain loops; activations; attention."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tinyvit.modules.functional import (
    activate,
    attend,
    is_tracing,
    partition,
    to_map,
    to_tokens,
    unpartition,
)
from tinyvit.modules.layers import to_pair

shapes = st.tuples(
    st.integers(0, 3), st.integers(1, 17), st.integers(1, 17), st.integers(1, 3)
)  # B, H, W, C


def naive_partition(x, side):
    batch, height, width, channels = x.shape
    windows = []
    for b in range(batch):
        for top in range(0, height, side):
            for left in range(0, width, side):
                window = torch.zeros(side, side, channels, dtype=x.dtype)
                for i in range(side):
                    for j in range(side):
                        if top + i < height and left + j < width:
                            window[i, j] = x[b, top + i, left + j]
                windows.append(window.reshape(side * side, channels))
    return torch.stack(windows) if windows else x.new_zeros(0, side * side, channels)


@contextlib.contextmanager
def mode(name):
    """Take the branch of torch.export or of torch.jit.trace without exporting or tracing."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "export":
            patch.setattr(torch.compiler, "is_exporting", lambda: True)
        if name == "trace":
            patch.setattr(torch.jit, "is_tracing", lambda: True)
        yield


@pytest.mark.parametrize("branch", ["eager", "trace", "export"])
@given(shape=shapes, side=st.integers(1, 8))
def test_partition_equals_loops_and_unpartition_undoes_it(branch, shape, side):
    x = torch.randn(shape)
    wanted = naive_partition(x, side)
    with mode(branch):
        windows = partition(x, side)
        back = unpartition(windows, side, shape[0], shape[1:3])
    assert torch.equal(windows, wanted)
    assert torch.equal(back, x)


def test_a_map_that_divides_is_only_reordered():
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    assert partition(x, 2)[1].flatten().tolist() == [2, 3, 6, 7]


@given(shape=shapes)
def test_tokens_and_map(shape):
    x = torch.randn(shape)
    tokens = to_tokens(x.permute(0, 3, 1, 2))
    assert tokens.shape == (shape[0], shape[1] * shape[2], shape[3])
    assert torch.equal(to_map(tokens, shape[1:3]), x)


def test_tokens_of_channels_last_memory_are_a_view():
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert to_tokens(x).data_ptr() == x.data_ptr()
    assert to_tokens(x).is_contiguous()


def test_to_map_refuses_another_number_of_tokens():
    with pytest.raises(ValueError, match=r"12 tokens do not make a map of 3x5 = 15; pass size="):
        to_map(torch.zeros(2, 12, 4), (3, 5))


def test_nothing_is_being_traced_here():
    assert is_tracing() is False


@pytest.mark.parametrize(
    "size, pair", [(7, (7, 7)), ((3, 5), (3, 5)), ([3, 5], (3, 5)), ([4], (4, 4)), ((4,), (4, 4))]
)
def test_pairs(size, pair):
    assert to_pair(size, "size") == pair


@pytest.mark.parametrize("size", [0, -1, (0, 4), [4, -4], [], (1, 2, 3)])
def test_pairs_of_wrong_numbers(size):
    with pytest.raises(ValueError) as caught:
        to_pair(size, "imgsz")
    assert str(caught.value) == f"imgsz must be positive, as n or (height, width), got {size!r}"


@pytest.mark.parametrize("size", [1.5, "64", None, True, (2.0, 3), [True, 4], {4, 5}])
def test_pairs_of_wrong_types(size):
    with pytest.raises(TypeError) as caught:
        to_pair(size, "imgsz")
    words = "imgsz must be a whole number or a pair (height, width), got"
    assert str(caught.value) == f"{words} {size!r}"


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("activation", [nn.GELU(), nn.PReLU(3), nn.Hardswish()])
def test_any_activation_in_either_order(activation, order):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=order).requires_grad_()
    y = activate(activation, x)
    assert y.is_contiguous(memory_format=order)
    wanted = activation(x)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)  # another order of vectors
    weights = torch.randn(2, 3, 4, 5)
    (got,) = torch.autograd.grad((y * weights).sum(), x)
    (gradient,) = torch.autograd.grad((wanted * weights).sum(), x)
    torch.testing.assert_close(got, gradient, rtol=1e-6, atol=1e-6)


def test_gelu_sees_contiguous_memory():
    seen = []
    gelu = nn.GELU()
    gelu.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    activate(gelu, torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    assert seen == [True]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_learning", [False, True])
def test_the_definition(with_bias, is_learning):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (5, 7, 7))
    bias = torch.randn(1, 3, 5, 7, dtype=torch.float64) if with_bias else None
    with torch.set_grad_enabled(is_learning):
        found = attend(q, k, v, 0.3, bias)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3 + (0 if bias is None else bias)
    wanted = torch.einsum("bhqk,bhkd->bhqd", scores.softmax(-1), v)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_of_all_that_goes_in():
    torch.manual_seed(1)
    shapes = (1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 3, 5)
    q, k, v, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
    assert torch.autograd.gradcheck(lambda *x: attend(x[0], x[1], x[2], 0.5, x[3]), (q, k, v, bias))


def test_torch_does_it_where_nothing_learns(monkeypatch):
    called = []
    fused = F.scaled_dot_product_attention

    def watch(*args, **kwargs):
        called.append(kwargs["scale"])
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    x = torch.randn(1, 2, 3, 4)
    with torch.no_grad():
        attend(x, x, x, 0.5)
    assert called == [0.5]
    attend(x, x, x, 0.5)
    assert called == [0.5]


def test_bfloat16_stays_what_it_is_under_autocast():
    x = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(x, x, x, 0.5).dtype == torch.bfloat16
