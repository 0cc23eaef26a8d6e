"""The PyTorch backend: what it makes of a model on a CPU, on a CUDA device and elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyvit.modules import Attention, Conv2d_BN, TinyViT

from .derived import TOLERANCE, Derived, error_of
from .fast_encoder import DeployedTinyViT, arrays_of, choose_kernels
from .fold import Array, Weights, fold_attention, fold_conv

if TYPE_CHECKING:
    from .cuda_graphs import Capture, Network, Output

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def exact_inference(device: str) -> Iterator[None]:
    """No gradients, and no autocast of a caller's: the precision is the one that was asked for."""
    kind = torch.device(device).type
    with (
        torch.inference_mode(),
        torch.autocast("cpu", enabled=False),
        torch.autocast(kind, enabled=False),
    ):
        yield


class TorchBackend:
    """Runs a TinyViT by PyTorch, without gradients and whatever autocast is on.

    The model given is never changed. What runs is made from it at the first call, and again when
    the model has changed since (see ``tinyvit.inference.derived``).

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
        self._derived = Derived(partial(list, [model]), self._make)

    def __call__(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> the network's output, float32, on the CPU."""
        return self._run(batch, self._output())[0]

    def logits(self, batch: Tensor) -> Tensor:
        """[N, 3, H, W] float32 -> logits [N, classes], float32, on the CPU.

        Raises:
            ValueError: The model has no classification head.
        """
        return self._run(batch, "logits")[0]

    def stages(self, batch: Tensor) -> list[Tensor]:
        """[N, 3, H, W] float32 -> the map of each stage, [N, C, h, w] float32, on the CPU."""
        return self._run(batch, None, stages=True)

    def with_stages(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What a call and ``stages`` give, in one pass."""
        output, *maps = self._run(batch, self._output(), stages=True)
        return output, maps

    def explain(self) -> str:
        """What runs, and why, in words."""
        with exact_inference(self.device):
            network, words = self._derived.get()
        if failure := getattr(network, "failure", None):
            words += f"; without CUDA graphs: {failure}"
        return words

    def refresh(self) -> None:
        """Let go of what runs; it is made again at the next call."""
        self._derived.drop()

    close = refresh

    def _output(self) -> Output:
        return "logits" if self._model.neck is None and self._model.head is not None else "features"

    def _run(self, batch: Tensor, output: Output | None, stages: bool = False) -> list[Tensor]:
        with exact_inference(self.device):
            given = batch.to(self.device, DTYPES[self.precision])
            results = self._derived.get()[0](given, output, stages)
        return [_to_host(result) for result in results]  # these may take part in autograd

    def _make(self) -> tuple[Network, str]:
        """The folded network if it can be had and passes its check, else a copy of the model."""
        dtype, capture = DTYPES[self.precision], choose_capture(self.device)
        reason = reason_against(self._model)
        if reason is None and capture is None and torch.device(self.device).type != "cpu":
            reason = f"{self.device} is no CPU and no CUDA device"
        if reason is None:
            network: Network
            if capture is not None:
                from .cuda_graphs import GraphedNetwork

                plain = _Plain(folded_copy(self._model).to(self.device, dtype))
                network = GraphedNetwork(plain, capture, is_exact=self.precision == "fp32")
                words = "one CUDA graph for each shape that comes again"
            else:
                _settle_allocator()
                kernels = choose_kernels(dtype)
                network, words = DeployedTinyViT(self._model, kernels), kernels.name
            error = self._error_of(network)
            if error <= TOLERANCE[self.precision]:
                return network, f"folded, {words} (checked: error {error:.0e})"
            reason = f"the folded form differs by {error:.1e}"
        copied = frozen_copy(self._model).to(self.device, dtype)
        return _Plain(copied), f"the model as it is ({reason})"

    def _error_of(self, network: Network) -> float:
        """The folded network against the model, on a small image."""
        x = small_image(self._model)
        plain = self._model if _runs_as_it_is(self._model) else frozen_copy(self._model)
        wanted = plain.forward_backbone(x)
        given = x.to(self.device, DTYPES[self.precision])
        return error_of(network(given, None, stages=True)[-1].float().cpu().numpy(), wanted.numpy())


def small_image(model: TinyViT) -> Tensor:
    """An input of no convenient size to compare by, always the same."""
    return torch.randn(1, model.in_chans, 75, 58, generator=torch.Generator().manual_seed(0))


def choose_capture(device: str) -> Capture | None:
    """What records on a device; None where nothing does."""
    if torch.device(device).type != "cuda":
        return None
    from .cuda_graphs import CudaCapture

    return CudaCapture(device)


class _Plain:
    """A TinyViT as a ``Network``."""

    def __init__(self, model: TinyViT) -> None:
        self.model = model

    def __call__(
        self, batch: Tensor, output: Output | None = "features", stages: bool = False
    ) -> list[Tensor]:
        found = self.model.forward_intermediates(batch, intermediates_only=True) if stages else []
        maps = cast("list[Tensor]", found)
        last = maps[-1] if stages else self.model.forward_backbone(batch)
        if output == "logits":
            return [self.model.forward_head(last), *maps]
        if output == "features":
            return [last if self.model.neck is None else self.model.neck(last), *maps]
        return maps


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
        rows = image.permute(1, 2, 0).reshape(height * width, channels)
        target.view(channels, height * width).copy_(rows.to("cpu", torch.float32).T)
    return host


# -- copies of a model ---------------------------------------------------------------------------


def reason_against(model: TinyViT) -> str | None:
    """Why a model cannot be folded, or None if it can.

    Only the network as this package builds it is folded: a module of another class, another
    activation or a hook changes what the model computes, and a folded copy would not follow.
    """
    plain = {nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm2d, nn.Dropout, nn.Identity}
    containers = {nn.Sequential, nn.ModuleList}
    for name, module in model.named_modules():
        kind = type(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a forward hook"
        if kind is nn.GELU:
            if module.approximate != "none":
                return f"{name} is an approximate GELU"
        elif not (
            kind in plain or kind in containers or kind.__module__.startswith("tinyvit.modules.")
        ):
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
    return None


def frozen_copy(model: TinyViT) -> TinyViT:
    """A copy of the model on the CPU, in eval mode and float32, without gradients."""
    with torch.inference_mode(False):
        return copy.deepcopy(model).eval().requires_grad_(False).to("cpu", torch.float32)


def folded_copy(model: TinyViT) -> TinyViT:
    """A frozen copy: batch norms in their convolutions, biases looked up, channels-last weights.

    The model must be one that ``reason_against`` has nothing against. The copy has the same values
    up to rounding and other keys: it is for running only.
    """
    frozen, arrays = frozen_copy(model), arrays_of(model)
    with torch.inference_mode(False), torch.no_grad():
        for parent, module in list(frozen.named_modules()):
            for child, old in list(module.named_children()):
                name = f"{parent}.{child}" if parent else child
                if isinstance(old, Conv2d_BN):
                    conv, eps = old.c, old.bn.eps
                    weights = fold_conv(
                        arrays, name, conv.stride[0], depthwise=conv.groups > 1, eps=eps
                    )
                    setattr(module, child, _convolution(weights))
                elif isinstance(old, Attention):
                    parts = fold_attention(arrays, name, old.key_dim, old.resolution)
                    setattr(module, child, _FixedAttention(old, *parts))
        for module in frozen.modules():
            if isinstance(module, nn.Conv2d):
                channels_last = module.weight.contiguous(memory_format=torch.channels_last)
                module.weight = nn.Parameter(channels_last)
    return frozen.eval().requires_grad_(False)


def _convolution(weights: Weights) -> nn.Conv2d:
    count, each, side, _ = weights.weight.shape
    conv = nn.Conv2d(
        each * weights.groups, count, side, weights.stride, weights.pad, groups=weights.groups
    )
    _fill(conv, weights)
    return conv


def _fill(layer: nn.Conv2d | nn.Linear, weights: Weights) -> None:
    layer.weight.copy_(torch.from_numpy(weights.weight))
    layer.bias = nn.Parameter(torch.from_numpy(weights.bias))


class _FixedAttention(nn.Module):
    """Attention with its norm's affine and its scale folded and its biases looked up, once."""

    bias: Tensor

    def __init__(self, like: Attention, qkv: Weights, proj: Weights, bias: Array) -> None:
        super().__init__()
        self.heads, self.eps = like.num_heads, like.norm.eps
        self.qkv, self.proj = (nn.Linear(*w.weight.shape[::-1]) for w in (qkv, proj))
        _fill(self.qkv, qkv)
        _fill(self.proj, proj)
        self.register_buffer("bias", torch.from_numpy(bias)[None])  # [1, h, T, T]

    def forward(self, x: Tensor) -> Tensor:
        """[W, T, C] -> [W, T, C]."""
        qkv = self.qkv(F.layer_norm(x, x.shape[-1:], None, None, self.eps))
        q, k, v = torch.unflatten(qkv, 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=1.0)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out
