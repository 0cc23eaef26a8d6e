"""Single kernels of the library, on numpy arrays, and their twins in float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from conftest import BUILD

ISAS = ("generic", "avx2", "avx512", "avx512bf16", "amx")
_library = ctypes.CDLL(str(BUILD / "libtinyvit_kernels.so"))


def here() -> Iterator[Any]:
    """(isa, is_bf16) for everything that this processor runs, as pytest parameters."""
    for isa in ISAS:
        for is_bf16 in (0, 1):
            if _library.door_has(isa.encode(), is_bf16):
                yield pytest.param((isa, is_bf16), id=f"{isa}-{'bf16' if is_bf16 else 'fp32'}")


def call(name: str, kernel: tuple[str, int], *arguments: Any) -> None:
    isa, is_bf16 = kernel
    function = getattr(_library, name)
    function.restype = None
    function(isa.encode(), is_bf16, *map(_given, arguments))


def by_parts(*arguments: Any) -> bool:
    """``door_linear`` in fp32 by parts; whether they are to be had."""
    return bool(_library.door_linear_by_parts(*map(_given, arguments)))


def _given(a: Any) -> Any:
    if not isinstance(a, np.ndarray):
        return a
    assert a.flags.c_contiguous and a.dtype in (np.float32, np.int32)
    return ctypes.c_void_p(a.ctypes.data)


def as_stored(x: np.ndarray, kernel: tuple[str, int]) -> np.ndarray:
    """What a map of the kernel's precision holds of ``x``, as float64."""
    x = np.ascontiguousarray(x, np.float32)
    if kernel[1]:
        u = x.view(np.uint32)
        x = ((u + 0x7FFF + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x.astype(np.float64)


def tolerance(kernel: tuple[str, int], exact: np.ndarray, terms: int) -> float:
    """A rounding of the result, and of a sum of so many terms of its size."""
    size = float(np.abs(exact).max(initial=1.0))
    return size * (2.0**-8 + 1e-5 if kernel[1] else 2e-7 * (4 + terms**0.5))
