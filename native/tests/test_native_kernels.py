"""Each kernel of each ISA against the same computation in float64, with tails of every length."""

from __future__ import annotations

import math

import numpy as np
import pytest
from kernel_door import as_stored, by_parts, call, here, tolerance

KERNELS = list(here())
erf = np.vectorize(math.erf)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.mark.parametrize("seed", range(12))
def test_linear(kernel, seed):
    rng = np.random.default_rng(seed)
    tokens, inputs, outputs = rng.integers(1, 71, 3) if seed else (70, 96, 64)
    x, w, b = floats(rng, tokens, inputs), floats(rng, outputs, inputs), floats(rng, outputs)
    w /= math.sqrt(inputs)
    add = floats(rng, tokens, outputs) if seed % 2 else None
    with_gelu = seed % 3 == 0
    y = np.empty((tokens, outputs), np.float32)
    call("door_linear", kernel, *map(int, (tokens, inputs, outputs)), x, w, b, add, with_gelu, y)
    exact = as_stored(x, kernel) @ as_stored(w, kernel).T + b
    if add is not None:
        exact += as_stored(add, kernel)
    if with_gelu:
        exact = gelu(exact)
    assert np.abs(y - exact).max() <= tolerance(kernel, exact, inputs)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70, 96])
@pytest.mark.parametrize("inputs", [32, 70, 256, 544])
@pytest.mark.parametrize("with_gelu", [False, True])
def test_linear_by_parts(tokens, inputs, with_gelu):
    rng = np.random.default_rng(tokens)
    x, w, b = floats(rng, tokens, inputs), floats(rng, 70, inputs), floats(rng, 70)
    w /= math.sqrt(inputs)
    x[0] *= 1e20
    x[-1] *= 1e-20
    add, y = floats(rng, tokens, 70), np.empty((tokens, 70), np.float32)
    if not by_parts(tokens, inputs, 70, x, w, b, add, with_gelu, y):
        pytest.skip("this processor has no AMX, or TINYVIT_ISA lowers it")
    exact = x.astype(np.float64) @ w.astype(np.float64).T + b + add
    exact = gelu(exact) if with_gelu else exact
    sizes = np.abs(x) @ np.abs(w).T + np.abs(b + add)  # 2^-16 of each product, at most
    assert (np.abs(y - exact) <= 2e-5 * sizes).all()


def test_every_number_of_tokens_gives_the_same_bits(kernel):
    rng = np.random.default_rng(0)
    x, w, b = floats(rng, 70, 40), floats(rng, 33, 40), floats(rng, 33)
    whole = np.empty((70, 33), np.float32)
    call("door_linear", kernel, 70, 40, 33, x, w, b, None, 1, whole)
    for tokens in range(1, 71):
        y = np.empty((tokens, 33), np.float32)
        call("door_linear", kernel, tokens, 40, 33, x[:tokens].copy(), w, b, None, 1, y)
        assert np.array_equal(y, whole[:tokens])


@pytest.mark.parametrize("seed", range(6))
def test_convolution_by_taps(kernel, seed):
    rng = np.random.default_rng(seed)
    height, width, inputs, outputs = (int(n) for n in rng.integers(1, 40, 4))
    x = floats(rng, height + 2, width + 2, inputs)
    w, b = floats(rng, outputs, inputs, 3, 3) / math.sqrt(9 * inputs), floats(rng, outputs)
    y = np.empty((height, width, outputs), np.float32)
    call("door_conv", kernel, height, width, inputs, outputs, x, w, b, y)
    a, v = as_stored(x, kernel), as_stored(w, kernel)
    exact = sum(
        a[d : d + height, e : e + width] @ v[:, :, d, e].T for d in range(3) for e in range(3)
    )
    assert np.abs(y - (exact + b)).max() <= tolerance(kernel, exact, 9 * inputs)


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_depthwise(kernel, side, stride, count):
    rng = np.random.default_rng(count)
    channels, columns = int(rng.integers(1, 71)), (count - 1) * stride + side
    x = floats(rng, side, columns, channels)
    w, b = floats(rng, channels, side, side), floats(rng, channels)
    y = np.empty((count, channels), np.float32)
    call("door_depthwise", kernel, count, channels, side, stride, x, w, b, count % 2, y)
    a = as_stored(x, kernel)
    exact = np.stack(
        [
            np.einsum("rkc,crk->c", a[:, i * stride : i * stride + side], w.astype(np.float64))
            for i in range(count)
        ]
    )
    exact = exact + b
    if count % 2:
        exact = gelu(exact)
    assert np.abs(y - exact).max() <= tolerance(kernel, exact, side * side)


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 48, 64, 70, 160])
@pytest.mark.parametrize("is_affine", [False, True])
def test_normalize(kernel, channels, is_affine):
    rng = np.random.default_rng(channels)
    x = 3 * floats(rng, 5, channels) + 2
    gamma, beta = (floats(rng, channels), floats(rng, channels)) if is_affine else (None, None)
    y = np.empty_like(x)
    call("door_normalize", kernel, 5, channels, gamma, beta, x, y)
    a = as_stored(x, kernel)
    exact = (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-5)
    if is_affine:
        exact = exact * gamma + beta
    assert np.abs(y - exact).max() <= tolerance(kernel, exact, 16)


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 8, 12, 14])
def test_attention(kernel, side):
    rng = np.random.default_rng(side)
    heads, width, tokens = 2, int(rng.choice([8, 16, 24, 32, 40, 64])), side * side
    qkv = floats(rng, tokens, 3, heads, width)
    qkv[:, 0] /= math.sqrt(width)
    table = floats(rng, heads, tokens)
    positions = np.sort(rng.permutation(tokens)[: rng.integers(1, tokens + 1)]).astype(np.int32)
    y = np.empty((len(positions), heads, width), np.float32)
    scaled = qkv.copy()
    scaled[:, 0] *= math.log2(math.e)
    call(
        "door_attend", kernel, side, heads, width, len(positions), positions, scaled, table, y
    )  # fmt: skip
    q, k, v = as_stored(scaled, kernel).transpose(1, 2, 0, 3)
    row, column = np.divmod(np.arange(tokens), side)
    index = abs(row[:, None] - row) * side + abs(column[:, None] - column)
    scores = q @ k.transpose(0, 2, 1) + table[:, index] * math.log2(math.e)
    weights = np.exp2(scores - scores.max(2, keepdims=True))
    exact = (weights / weights.sum(2, keepdims=True)) @ v
    exact = exact.transpose(1, 0, 2)[positions]
    # bf16: the weights are rounded, too
    assert np.abs(y - exact).max() <= (2 if kernel[1] else 4) * tolerance(kernel, exact, width)


@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 17, 64, 70])
def test_planes(kernel, tokens):
    rng = np.random.default_rng(tokens)
    channels = int(rng.integers(1, 71))
    x = floats(rng, tokens, channels)
    y = np.empty((channels, tokens), np.float32)
    call("door_planes", kernel, tokens, channels, x, y)
    assert np.array_equal(y, as_stored(x, kernel).T.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_number_stays_in_its_token(kernel, value):
    rng = np.random.default_rng(0)
    x, w, b = floats(rng, 9, 40), floats(rng, 20, 40), floats(rng, 20)
    x[4, 7] = value
    y = np.empty((9, 20), np.float32)
    call("door_linear", kernel, 9, 40, 20, x, w, b, None, 0, y)
    assert np.isfinite(np.delete(y, 4, 0)).all()
    if np.isnan(value):
        assert np.isnan(y[4]).all()
    else:
        assert np.array_equal(y[4], value * np.sign(w[:, 7]))


def test_weights_that_are_no_numbers(kernel):
    rng = np.random.default_rng(0)
    x, w, b = floats(rng, 40, 40), floats(rng, 20, 40), floats(rng, 20)
    x = np.abs(x) + 1
    w[3, 5], w[4, 6] = np.inf, np.nan
    y = np.empty((40, 20), np.float32)
    call("door_linear", kernel, 40, 40, 20, x, w, b, None, 0, y)
    assert (y[:, 3] == np.inf).all() and np.isnan(y[:, 4]).all()
    assert np.isfinite(np.delete(y, (3, 4), 1)).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1e5, 1e30])
def test_linear_of_any_size(kernel, scale):
    rng = np.random.default_rng(1)
    x, w, b = floats(rng, 33, 70) * np.float32(scale), floats(rng, 33, 70), np.zeros(33, np.float32)
    y = np.empty((33, 33), np.float32)
    call("door_linear", kernel, 33, 70, 33, x, w, b, None, 0, y)
    exact = as_stored(x, kernel) @ as_stored(w, kernel).T
    assert np.abs(y - exact).max() <= scale * tolerance(kernel, exact / scale, 70)
