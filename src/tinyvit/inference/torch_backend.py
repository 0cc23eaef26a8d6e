"""The PyTorch backend: a folded network on a CPU, a frozen copy of the model elsewhere.

Shapes: N pictures, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

import copy
import threading
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from tinyvit.modules import TinyViT

from .backend import DTYPES
from .deploy import DeployedTinyViT
from .fuse import reason_against
from .kernels import choose_kernels
from .watch import ModelWatch

__all__ = ["TorchBackend"]

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest error of the self-check, relative to the largest output. Folding changes only rounding:
1e-6 in fp32 and up to 3e-2 in bf16 were measured; a mistake gives 1."""


class _Network(Protocol):
    """What runs: the folded network, or the plain model in the same shape."""

    def features(self, batch: Tensor) -> Tensor: ...

    def logits(self, batch: Tensor) -> Tensor: ...

    def stages(self, batch: Tensor) -> list[Tensor]: ...

    def with_stages(
        self, batch: Tensor, as_logits: bool = False
    ) -> tuple[Tensor, list[Tensor]]: ...


class TorchBackend:
    """Runs a TinyViT by PyTorch, without gradients.

    The model given is never changed. What runs is made from it at the first call, and made anew
    when the model has changed since (see ``ModelWatch``).

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
        self._model = model
        self._lock = threading.Lock()
        self._made: tuple[_Network, ModelWatch, str] | None = None

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> the network's output, float32, on the CPU."""
        if self._gives_logits():
            return self.logits(batch)
        with torch.inference_mode():
            features = self._network().features(self._to_device(batch))
        return _to_host(features)

    def logits(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> logits [N, classes], float32, on the CPU.

        Raises:
            ValueError: The model has no classification head.
        """
        with torch.inference_mode():
            logits = self._network().logits(self._to_device(batch))
        return _to_host(logits)

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[N, 3, H, W] float32 -> the map of each stage, [N, C, h, w] float32, on the CPU."""
        with torch.inference_mode():
            maps = self._network().stages(self._to_device(batch))
        return [_to_host(stage) for stage in maps]

    def with_stages(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What a call and ``stages`` give, in one pass."""
        with torch.inference_mode():
            network, x = self._network(), self._to_device(batch)
            output, maps = network.with_stages(x, as_logits=self._gives_logits())
        return _to_host(output), [_to_host(stage) for stage in maps]

    def explain(self) -> str:
        """What runs, and why, in words."""
        with torch.inference_mode():
            self._network()
        return "" if self._made is None else self._made[2]

    def refresh(self) -> None:
        """Make what runs anew at the next call."""
        with self._lock:
            self._made = None

    def close(self) -> None:
        """Let go of what was made."""
        self.refresh()

    def _gives_logits(self) -> bool:
        return self._model.neck is None and self._model.head is not None

    def _to_device(self, batch: Tensor) -> Tensor:
        return batch.to(self.device, DTYPES[self.precision])

    def _network(self) -> _Network:
        with self._lock:
            if self._made is None or self._made[1].has_changed():
                watch = ModelWatch(self._model)
                network, words = self._make()
                self._made = network, watch, words
            return self._made[0]

    def _make(self) -> tuple[_Network, str]:
        """The folded network if it can be had and passes its check, else a copy of the model."""
        reason = f"{self.device} is no CPU" if self.device != "cpu" else reason_against(self._model)
        if reason is None:
            _settle_allocator()
            kernels = choose_kernels(DTYPES[self.precision])
            deployed = DeployedTinyViT(self._model, kernels)
            error = self._error_of(deployed)
            if error <= _TOLERANCE[self.precision]:
                return deployed, f"folded, {kernels.name} (checked: error {error:.0e})"
            reason = f"the folded form differs by {error:.1e}"
        plain = _frozen_copy(self._model).to(self.device, DTYPES[self.precision])
        return _Plain(plain), f"the model as it is ({reason})"

    def _error_of(self, deployed: DeployedTinyViT) -> float:
        """The folded network against the model, on a small picture of no convenient size."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, self._model.in_chans, 75, 58, generator=generator)
        plain = _frozen_copy(self._model).to("cpu", torch.float32)
        wanted = plain.forward_backbone(x)
        got = deployed.stages(x.to(deployed.dtype))[-1]
        scale = float(wanted.abs().max().clamp_min(1e-12))
        return float((got.float() - wanted).abs().max()) / scale


class _Plain:
    """A TinyViT in the shape of a deployed one."""

    def __init__(self, model: TinyViT) -> None:
        self.model = model
        self.logits = model.classify
        self.features = model.forward_features

    def stages(self, batch: Tensor) -> list[Tensor]:
        maps = self.model.forward_intermediates(batch, intermediates_only=True)
        return maps if isinstance(maps, list) else maps[1]

    def with_stages(self, batch: Tensor, as_logits: bool = False) -> tuple[Tensor, list[Tensor]]:
        given = self.model.forward_intermediates(batch)
        features, maps = cast("tuple[Tensor, list[Tensor]]", given)
        return (self.model.forward_head(maps[-1]) if as_logits else features), maps


def _frozen_copy(model: TinyViT) -> TinyViT:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _settle_allocator() -> None:
    """Make and free one block a little below 32 MiB, without touching it.

    glibc asks the system afresh for every block above a threshold, and gives free memory at the
    end of its heap back above twice that threshold. It raises the threshold by itself to the
    largest block it has seen freed, up to 32 MiB. A network whose blocks are all smaller would
    stay below, and pay page faults at every call (8000 at 1024 px, 0 after this). Elsewhere this
    does nothing. ``tinyvit.tune_allocator`` goes further.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


def _to_host(output: Tensor) -> Tensor:
    """A tensor of its own, which may be written to and take part in autograd."""
    return output.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
