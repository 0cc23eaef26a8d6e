"""Notice that a model has changed since something was derived from it.

What is kept of a model (folded weights, a copy in another precision) must be dropped when the
model changes. Cheap enough for every call: objects are compared by identity, tensors by torch's
own count of in-place changes, and, since writes through ``.data`` are not counted, by a few of
their bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLE = 16


class ModelWatch:
    """Remembers the state of a model; ``has_changed`` compares.

    A change is any of: a submodule, parameter, buffer or hook added, removed or replaced; an
    in-place change that torch counts (optimiser steps, ``load_state_dict``, EMA updates); a write
    through ``.data`` to a whole tensor on the CPU. A write through ``.data`` to single elements, or
    on another device, is not noticed.

    Args:
        model: The model; it is referred to, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        self._members = [
            (members, tuple(map(id, members.values())))
            for module in model.modules()
            for members in _dicts(module)
        ]
        tensors = (*model.parameters(), *model.buffers())
        self._tensors = [
            (tensor, tensor.data_ptr(), _version(tensor), list(_samples(tensor)))
            for tensor in tensors
        ]

    def has_changed(self) -> bool:
        """Whether the model is no longer what it was when this watch was made."""
        for members, kept in self._members:
            if tuple(map(id, members.values())) != kept:
                return True
        return any(
            tensor.data_ptr() != address
            or _version(tensor) != version
            or any(bytes(place) != seen for place, seen in samples)
            for tensor, address, version, samples in self._tensors
        )


def _dicts(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """Where a module keeps what it consists of, and what may change what it computes."""
    return (
        module._modules,
        module._parameters,
        module._buffers,
        module._forward_hooks,
        module._forward_pre_hooks,
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _samples(tensor: Tensor) -> Iterator[tuple[memoryview, bytes]]:
    """Windows into the tensor's memory, and what they show now."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.numel() == 0:
        return
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    for start in sorted({0, len(raw) // 2, max(len(raw) - _SAMPLE, 0)}):
        place = raw[start : start + _SAMPLE]
        yield place, bytes(place)
