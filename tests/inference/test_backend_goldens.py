"""The stored vectors of whole networks through every backend, at ten times the tolerance.

The tolerance of the plain form is ten times the error of the peers' own float32; these libraries
sum in other orders and fuse what the peers do not.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tinyvit.inference import Backend, OnnxBackend, OpenVINOBackend, StageBackend, TorchBackend
from tinyvit.modules import TinyViT

FOLDER = Path(__file__).parents[1] / "golden"
QUICK = {"small_96_neck", "small_96_logits", "mobilesam_64", "optional_any_size_250x333_neck"}
KINDS = {"encoder", "classifier", "anysize", "hq", "litemed", "efficientsam3"}
BACKENDS = {"torch": TorchBackend, "openvino": OpenVINOBackend, "onnx": OnnxBackend}
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
CASES = [
    pytest.param(
        name,
        backend,
        marks=[] if backend == "torch" or name in QUICK else pytest.mark.slow,
    )
    for name, case in MANIFEST.items()
    if case["kind"] in KINDS
    for backend in BACKENDS
]


def load(name: str) -> ModuleType:
    """One of the files beside the vectors, whatever the import mode of pytest."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


load("recipe")
verify = load("verify")


class Through:
    """A model as ``verify.py`` fills it, which runs on a backend."""

    def __init__(self, model: TinyViT, make: Callable[[TinyViT], Backend]) -> None:
        self.model, self.make = model, make
        self.set_imgsz = model.set_imgsz
        self.state_dict, self.load_state_dict = model.state_dict, model.load_state_dict

    def to(self, dtype: torch.dtype) -> Through:
        assert dtype == torch.float32
        return self

    def eval(self) -> Through:
        self.model.eval()
        return self

    def named_modules(self) -> list[Any]:
        return []  # nothing to tap: only outputs leave a backend

    def __call__(self, x: Tensor) -> Tensor:
        return self.make(self.model)(x)


class ThroughHQ(Through):
    """Light HQ-SAM's encoder: what its mask decoder takes from between the stages comes, too."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        backend = self.make(self.model)
        if not isinstance(backend, StageBackend):  # the others give outputs alone
            return backend(x), self.model.forward_hq(x)[1]
        features, maps = backend.with_stages(x)
        merge = self.model.layers[1].downsample
        return features, merge(maps[1]).unflatten(1, merge.output_size(maps[1].shape[2:]))


class ThroughStudent(Through):
    """EfficientSAM3's student, whose neck stands beside the encoder in its files."""

    def __init__(self, student: Any, make: Callable[[TinyViT], Backend]) -> None:
        self.model = encoder = student.backbone["model"]
        self.make, self.neck = make, student.head
        self.set_imgsz = encoder.set_imgsz
        self.state_dict, self.load_state_dict = student.state_dict, student.load_state_dict

    def __call__(self, x: Tensor) -> Tensor:
        self.model.neck = self.neck.eval()
        return super().__call__(x)


class Adapter(verify.Adapter):  # type: ignore[misc, name-defined]
    def __init__(self, make: Callable[[TinyViT], Backend]) -> None:
        self.make = make

    def encoder(self, ctor: dict[str, Any]) -> Through:
        return Through(TinyViT(**ctor), self.make)

    def classifier(self, ctor: dict[str, Any]) -> Through:
        strides = (2,) * (len(ctor["depths"]) - 1)
        return Through(TinyViT(**ctor, strides=strides, neck_dim=None), self.make)

    def hq(self, ctor: dict[str, Any]) -> Through:
        return ThroughHQ(TinyViT(**ctor), self.make)

    def efficientsam3(self, variant: str, img_size: int, embed_size: int) -> Through:
        return ThroughStudent(load("adapter").Student(variant, img_size, embed_size), self.make)

    def litemed(self, ctor: dict[str, Any]) -> Through:
        return Through(TinyViT(**ctor, stem="pointwise", head=False), self.make)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # verify.py leaves them open
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_golden(name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "manifest.json").write_text(json.dumps({name: MANIFEST[name]}))
    shutil.copy(FOLDER / f"{name}.npz", tmp_path)
    [(_, result, share, message)] = verify.check(
        Adapter(BACKENDS[backend]), str(tmp_path), slack=10.0, optional=True
    )
    assert result == "ok", f"{result}: {share:.3g} of the tolerance, {message}"
    print(f"{name} by {backend}: {share:.3g} of the tolerance, {message}")
