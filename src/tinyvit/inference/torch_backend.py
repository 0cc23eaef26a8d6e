"""The PyTorch backend: what it makes of a model on a CPU, on a CUDA device and elsewhere.

Shapes: N images, C channels, H W height and width of the input, h w of a map.
"""

from __future__ import annotations

import threading
from typing import Literal, cast

import torch
from torch import Tensor

from tinyvit.modules import TinyViT

from .backend import Network
from .cuda_graphs import Capture, GraphedNetwork, choose_capture
from .derived import ModelWatch
from .fast_encoder import DeployedTinyViT
from .fold import folded_copy, frozen_copy, reason_against
from .kernels import choose_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
"""Largest error of the self-check, relative to the largest output. Folding changes only rounding:
1e-6 in fp32 and up to 3e-2 in bf16 were measured; a mistake gives 1."""


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
        self._made: tuple[Network, ModelWatch, str] | None = None

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
            network = self._network()
        words = "" if self._made is None else self._made[2]
        if isinstance(network, GraphedNetwork) and network.failure is not None:
            words += f"; without CUDA graphs: {network.failure}"
        return words

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

    def _network(self) -> Network:
        with self._lock:
            if self._made is None or self._made[1].has_changed():
                watch = ModelWatch(self._model)
                network, words = self._make()
                self._made = network, watch, words
            return self._made[0]

    def _make(self) -> tuple[Network, str]:
        """The folded network if it can be had and passes its check, else a copy of the model."""
        dtype, capture = DTYPES[self.precision], choose_capture(self.device)
        reason = reason_against(self._model)
        if reason is None and capture is None and torch.device(self.device).type != "cpu":
            reason = f"{self.device} is no CPU and no CUDA device"
        if reason is None:
            network, words = self._fold(dtype, capture)
            error = self._error_of(network)
            if error <= _TOLERANCE[self.precision]:
                return network, f"folded, {words} (checked: error {error:.0e})"
            reason = f"the folded form differs by {error:.1e}"
        plain = frozen_copy(self._model).to(self.device, dtype)
        return _Plain(plain), f"the model as it is ({reason})"

    def _fold(self, dtype: torch.dtype, capture: Capture | None) -> tuple[Network, str]:
        """The folded network for a CPU, or for where something captures, and its name."""
        if capture is not None:
            plain = _Plain(folded_copy(self._model).to(self.device, dtype))
            graphed = GraphedNetwork(plain, capture, is_exact=self.precision == "fp32")
            return graphed, "one CUDA graph for each shape that comes again"
        _settle_allocator()
        kernels = choose_kernels(dtype)
        return DeployedTinyViT(self._model, kernels), kernels.name

    def _error_of(self, network: Network) -> float:
        """The folded network against the model, on a small image of no convenient size."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, self._model.in_chans, 75, 58, generator=generator)
        plain = self._model if _runs_as_it_is(self._model) else frozen_copy(self._model)
        wanted = plain.forward_backbone(x)
        got = network.stages(self._to_device(x))[-1].float().cpu()
        scale = float(wanted.abs().max().clamp_min(1e-12))
        return float((got - wanted).abs().max()) / scale


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


def _runs_as_it_is(model: TinyViT) -> bool:
    """Whether a call would leave the model as it is and compute in float32 on the CPU."""
    tensors = (*model.parameters(), *model.buffers())
    return not any(module.training for module in model.modules()) and all(
        tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.int64)
        for tensor in tensors
    )


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
    """A tensor of its own in float32, which may be written to and take part in autograd."""
    if output.ndim != 4 or not output.is_contiguous(memory_format=torch.channels_last):
        return output.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    images, channels, height, width = output.shape
    host = torch.empty(images, channels, height, width)
    for image, target in zip(output, host, strict=True):  # torch transposes matrices quickly
        cells = image.permute(1, 2, 0).reshape(height * width, channels)
        target.view(channels, height * width).copy_(cells.to("cpu", torch.float32).T)
    return host
