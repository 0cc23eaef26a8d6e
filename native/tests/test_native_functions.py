"""GELU and 2^x of every ISA: errors over all bf16 numbers and 2^24 fp32 numbers, and the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from kernel_door import call, here

KERNELS = list(here())


def run(name: str, kernel: tuple[str, int], x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    call(name, kernel, x, y, x.size)
    return y


def exact_gelu(x: np.ndarray) -> np.ndarray:
    t = torch.from_numpy(x.astype(np.float64))
    return (t * 0.5 * torch.erfc(-t / math.sqrt(2))).numpy()


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def every_bf16() -> np.ndarray:
    x = (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(np.where(np.isfinite(x), x, 0))


def many_fp32() -> np.ndarray:
    """2^24 numbers: every 2^8th of all of fp32."""
    x = (np.arange(1 << 24, dtype=np.uint32) << 8).view(np.float32)
    return np.ascontiguousarray(np.where(np.isfinite(x), x, 0))


def test_gelu(kernel):
    is_bf16 = kernel[1]
    for x in (every_bf16(), *(() if is_bf16 else (many_fp32(),))):
        y, exact = run("door_gelu", kernel, x), exact_gelu(x)
        error = np.abs(y - exact) - 1.2e-7 * np.abs(exact)  # and the rounding of the result
        if is_bf16:  # half a step of bf16, for results of 1/64 and more
            assert error.max() <= 7.1e-5
            large = np.abs(exact) >= 1 / 64
            step = 2.0 ** (np.floor(np.log2(np.abs(exact[large]))) - 7)
            assert (np.abs(y[large] - exact[large]) <= 0.6 * step).all()
        else:
            assert error.max() <= 1e-6


def test_gelu_at_the_edges(kernel):
    x = np.array([-1e30, -100, -5.25, -0.0, 0.0, 1e30, 1e-40, -1e-40] * 2, np.float32)
    y = run("door_gelu", kernel, x)
    assert np.array_equal(y[:3], np.zeros(3)) and np.signbit(y[:3]).all()
    assert np.array_equal(y[5], x[5]) and np.allclose(y[6:8], x[6:8] / 2, atol=1e-44)
    z = run("door_gelu", kernel, np.array([np.inf, -np.inf, np.nan, 1] * 4, np.float32))
    assert z[0] == np.inf and np.isnan(z[1]) and np.isnan(z[2])
    assert torch.nn.functional.gelu(torch.tensor(-math.inf)).isnan()


def test_exp2(kernel):
    x = np.linspace(-99, 0, 1 << 20, dtype=np.float32)
    y = run("door_exp2", kernel, x)
    assert np.abs(y / np.exp2(x.astype(np.float64)) - 1).max() <= (8e-5 if kernel[1] else 4e-7)


def test_exp2_does_not_come_near_the_denormals(kernel):
    x = np.array([-126, -150, -1e30, -np.inf, np.nan, 0, -0.5, -1] * 2, np.float32)
    y = run("door_exp2", kernel, x)
    assert (y[:4] > 0).all() and (y[:4] < 1e-30).all() and (y[:4] > 1e-31).all()
    assert np.isnan(y[4]) and abs(y[5] - 1) < 1e-4
