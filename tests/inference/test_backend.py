from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Backend, StageBackend, TorchBackend
from tinyvit.inference.backend import Encoded, choose_device, choose_precision
from tinyvit.inference.torch_backend import DTYPES
from tinyvit.modules import TinyViT


def hardware(monkeypatch: pytest.MonkeyPatch, **answers: bool) -> None:
    """Let torch give these answers about what is there."""
    names = {
        "cuda": (torch.cuda, "is_available"),
        "mps": (torch.backends.mps, "is_available"),
        "cuda_bf16": (torch.cuda, "is_bf16_supported"),
        "cpu_bf16": (torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(*names[name], lambda answer=answer: answer)


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [
        (True, True, "cuda"),
        (True, False, "cuda"),
        (False, True, "mps"),
        (False, False, "cpu"),
    ],
)
def test_auto_takes_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, device: str
) -> None:
    hardware(monkeypatch, cuda=cuda, mps=mps)
    assert choose_device("auto") == device


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "meta"])
def test_a_device_that_is_there_stays(device: str) -> None:
    assert choose_device(device) == device


@pytest.mark.parametrize("device", ["gpu", "", "cuda:-1", "cuda:99", "xla:0", "Cpu"])
def test_a_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_device(device)
    start = f"device must be 'auto' or a device that torch can use here, got {device!r}: "
    assert str(caught.value).startswith(start)
    assert len(str(caught.value)) > len(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_precision_asked_for_is_taken(precision: str, device: str) -> None:
    chosen, reason = choose_precision(precision, device)
    assert chosen == precision
    assert reason == {"fp32": "exact; the default", "bf16": "asked for"}[precision]


@pytest.mark.parametrize(
    ("device", "cpu_bf16", "cuda_bf16", "precision"),
    [
        ("cpu", True, False, "bf16"),
        ("cpu", False, True, "fp32"),
        ("cuda", False, True, "bf16"),
        ("cuda:1", True, False, "fp32"),
        ("mps", True, True, "fp32"),
    ],
)
def test_auto_takes_bf16_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, device: str, cpu_bf16: bool, cuda_bf16: bool, precision: str
) -> None:
    hardware(monkeypatch, cpu_bf16=cpu_bf16, cuda_bf16=cuda_bf16)
    chosen, reason = choose_precision("auto", device)
    assert chosen == precision
    does = "computes" if precision == "bf16" else "does not compute"
    assert reason == f"this device {does} bf16 natively"


def test_auto_asks_the_real_processor() -> None:
    assert choose_precision("auto", "cpu")[0] in DTYPES


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_fp16_is_refused_with_the_reason(device: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_precision("fp16", device)
    assert str(caught.value) == (
        "precision 'fp16' is refused: it ends at 65504, and sums of squares in the neck's "
        "LayerNorm were measured above that; no file says how large its values get, and on a CPU "
        "it was no faster than 'fp32'; use 'bf16', which is fast and has the range of 'fp32'"
    )


@pytest.mark.parametrize("precision", ["half", "", "FP32", "float32"])
def test_an_unknown_precision(precision: str) -> None:
    with pytest.raises(ValueError) as caught:
        choose_precision(precision, "cpu")
    assert str(caught.value) == (
        f"precision must be one of ('fp32', 'bf16', 'auto'), got {precision!r}"
    )


class Plain:
    """The least that is a backend."""

    name = "plain"
    device = "cpu"

    def __call__(self, batch: Tensor) -> Tensor:
        return batch

    def close(self) -> None:
        pass


class Staged(Plain):
    def stages(self, batch: Tensor) -> list[Tensor]:
        return [batch]

    def with_stages(self, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
        return batch, [batch]


class NoClose:
    name = "open"
    device = "cpu"

    def __call__(self, batch: Tensor) -> Tensor:
        return batch


def test_the_protocols(make_tiny_vit: type[TinyViT]) -> None:
    assert isinstance(Plain(), Backend)
    assert not isinstance(Plain(), StageBackend)
    assert isinstance(Staged(), Backend)
    assert isinstance(Staged(), StageBackend)
    torch_backend = TorchBackend(make_tiny_vit())
    assert isinstance(torch_backend, Backend)
    assert isinstance(torch_backend, StageBackend)
    for nothing in (NoClose(), make_tiny_vit(), None, "torch", lambda batch: batch):
        assert not isinstance(nothing, Backend)


def test_a_result_is_shown_in_short() -> None:
    placement = ImageSpec.sam(64).place(30, 40)
    features = np.zeros((16, 4, 4), np.float32)
    assert repr(Encoded(features, placement)) == "Encoded([16, 4, 4], image 30x40)"
    stages = (features, features)
    assert repr(Encoded(features, placement, stages)).endswith("image 30x40, 2 stages)")
