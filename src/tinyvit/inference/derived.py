"""What is derived from a model's weights and kept: made once, made again when the model changes.

Noticing a change is cheap enough for every call: objects are compared by identity, tensors by
torch's own count of in-place changes, and, since writes through ``.data`` are not counted, by a few
of their bytes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

_SAMPLE = 16
_MEMBERS = ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")
"""Where a module keeps what it consists of, and what may change what it computes."""

TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest ``error_of`` at which a fast form passes for its model. In fp32 1e-6 to 3e-6 were
measured, in bf16 2e-2 to 3e-2; a mistake gives 1."""


def error_of(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The largest error relative to the largest value wanted; infinite for another shape."""
    if got.shape != wanted.shape:
        return float("inf")
    scale = max(float(np.abs(wanted).max(initial=0)), 1e-12)
    return float(np.abs(got - wanted).max(initial=0)) / scale


class Derived(Generic[T]):
    """A value made from modules; made again when one of them has changed or was replaced.

    May be used by several threads. A copy (``copy.deepcopy``, ``pickle``) makes its value again
    from the copied modules, if the two functions are bound methods or partials of what is copied.
    ``modules`` gives the modules that the value depends on, as they are now, at every ``get``.
    """

    def __init__(self, modules: Callable[[], Sequence[nn.Module]], make: Callable[[], T]) -> None:
        self._modules, self._make = modules, make
        self._lock = threading.Lock()
        self._kept: tuple[list[ModelWatch], T] | None = None

    def get(self) -> T:
        """The value for the modules as they are."""
        with self._lock:
            modules = self._modules()
            if self._kept is None or _differs(modules, self._kept[0]):
                self._kept = None  # frees the memory of the old value first
                watches = [ModelWatch(module) for module in modules]
                self._kept = watches, self._make()
            return self._kept[1]

    def drop(self) -> T | None:
        """Forget the value, so that the next ``get`` makes it again; gives the old one, if any."""
        with self._lock:
            kept, self._kept = self._kept, None
            return None if kept is None else kept[1]

    def __getstate__(self) -> dict[str, object]:
        return {"_modules": self._modules, "_make": self._make}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_modules"], state["_make"])  # type: ignore[misc]


def _differs(modules: Sequence[nn.Module], watches: Sequence[ModelWatch]) -> bool:
    return len(modules) != len(watches) or any(
        module is not watch.model or watch.has_changed()
        for module, watch in zip(modules, watches, strict=True)
    )


class ModelWatch:
    """Remembers the state of a model; ``has_changed`` compares.

    A change is any of: a submodule, parameter, buffer or hook added, removed or replaced; an
    in-place change that torch counts (optimiser steps, ``load_state_dict``, EMA updates); a write
    through ``.data`` to a whole tensor on the CPU. A write through ``.data`` to single elements, or
    on another device, is not noticed. The model is referred to, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._members = [
            (members, tuple(map(id, members.values())))
            for module in model.modules()
            for members in (getattr(module, name) for name in _MEMBERS)
        ]
        tensors = (*model.parameters(), *model.buffers())
        self._tensors = [
            (tensor, tensor.data_ptr(), version_of(tensor), list(_samples(tensor)))
            for tensor in tensors
        ]

    def has_changed(self) -> bool:
        """Whether the model is no longer what it was when this watch was made."""
        for members, kept in self._members:
            if tuple(map(id, members.values())) != kept:
                return True
        return any(
            tensor.data_ptr() != address
            or version_of(tensor) != version
            or any(bytes(place) != seen for place, seen in samples)
            for tensor, address, version, samples in self._tensors
        )


def version_of(tensor: Tensor) -> int:
    """Torch's count of in-place changes; inference tensors have none."""
    return 0 if tensor.is_inference() else tensor._version


def _samples(tensor: Tensor) -> Iterator[tuple[memoryview, bytes]]:
    """Windows into the tensor's memory, and what they show now."""
    import torch

    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
        return
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    for start in sorted({0, len(raw) // 2, max(len(raw) - _SAMPLE, 0)}):
        place = raw[start : start + _SAMPLE]
        yield place, bytes(place)
