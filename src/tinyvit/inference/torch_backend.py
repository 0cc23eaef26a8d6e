"""The PyTorch backend: the model itself, or a frozen copy where precision or device differ.

Shapes: N pictures, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

import copy
import threading
from typing import Literal

import torch
from torch import Tensor

from tinyvit.modules import TinyViT

from .backend import DTYPES

__all__ = ["TorchBackend"]


class TorchBackend:
    """Runs a TinyViT by PyTorch, without gradients.

    The model given is never changed. It is used as it stands where that is possible; else a copy
    is made (eval mode, on the device, in the precision), and made anew when the model's tensors
    have changed: optimiser steps, ``load_state_dict``, in-place operations. Writes through
    ``.data``, which torch does not count, need ``refresh()``.

    Args:
        model: The model.
        device: A torch device.
        precision: "fp32" or "bf16".
    """

    name = "torch"

    def __init__(
        self, model: TinyViT, device: str = "cpu", precision: Literal["fp32", "bf16"] = "fp32"
    ) -> None:
        self.device = device
        self.precision = precision
        self._source = model
        self._lock = threading.Lock()
        self._copy: TinyViT | None = None
        self._copied_from: tuple[tuple[int, int], ...] = ()

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> the network's output, float32, on the CPU."""
        with torch.inference_mode():
            model = self._model()
            return _to_host(model(self._to_device(batch)))

    def logits(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> logits [N, classes], float32, on the CPU.

        Raises:
            ValueError: The model has no classification head.
        """
        with torch.inference_mode():
            return _to_host(self._model().classify(self._to_device(batch)))

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[N, 3, H, W] float32 -> the map of each stage, [N, C, h, w] float32, on the CPU."""
        with torch.inference_mode():
            maps = self._model().forward_intermediates(
                self._to_device(batch), intermediates_only=True
            )
            return [_to_host(stage) for stage in maps if isinstance(stage, Tensor)]

    def refresh(self) -> None:
        """Copy the model's weights anew at the next call."""
        with self._lock:
            self._copy, self._copied_from = None, ()

    def close(self) -> None:
        """Let go of the copy."""
        self.refresh()

    def _to_device(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, DTYPES[self.precision])

    def _model(self) -> TinyViT:
        source = self._source
        first = next(source.parameters())
        wanted = torch.empty(0, device=self.device).device
        if (
            first.dtype == DTYPES[self.precision]
            and first.device == wanted
            and not any(module.training for module in source.modules())
        ):
            return source
        with self._lock:
            state = _fingerprint(source)
            if self._copy is None or state != self._copied_from:
                fresh = copy.deepcopy(source).eval().requires_grad_(False)
                self._copy = fresh.to(self.device, DTYPES[self.precision])
                self._copied_from = state
            return self._copy


def _fingerprint(model: TinyViT) -> tuple[tuple[int, int], ...]:
    """Address and version of every tensor: changes when torch counts a change."""
    tensors = (*model.parameters(), *model.buffers())
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def _to_host(output: Tensor) -> Tensor:
    return output.to("cpu", torch.float32)
