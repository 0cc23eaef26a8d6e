from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyvit.errors import MissingExtraError
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Backend, Engine, LogitsBackend, OpenVINOBackend, OpenVINOGraph
from tinyvit.inference.graphs import kept_core, load_library
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]

# fp32: other orders of summing; bf16 keeps 8 bits, see test_torch_backend.py
TOLERANCE = {"fp32": {"rtol": 1e-4, "atol": 1e-4}, "bf16": {"rtol": 0.05, "atol": 0.15}}

CAPABLE = kept_core(load_library("openvino", "OpenVINO")).get_property(
    "CPU", "OPTIMIZATION_CAPABILITIES"
)
needs_bf16 = pytest.mark.skipif("BF16" not in CAPABLE, reason="this CPU does not compute bf16")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_right(out: Tensor, model: TinyViT, x: Tensor, precision: str = "fp32") -> None:
    with torch.inference_mode():
        torch.testing.assert_close(out, model(x), **TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_it_gives_what_the_model_gives(
    precision: str, make_tiny_vit: MakeModel, image: MakeImage, cache: Path
) -> None:
    model = make_tiny_vit()
    backend = OpenVINOBackend(model, precision=precision, threads=1)
    assert isinstance(backend, Backend)
    assert (backend.name, backend.device, backend.precision) == ("openvino", "cpu", precision)
    for shape in ((1, 250, 33), (2, 48, 64), (1, 1, 1)):
        assert_right(backend(image(*shape)), model, image(*shape), precision)
    assert backend.graph_file is not None
    assert backend.graph_file.parent == cache / "graphs"
    again = OpenVINOGraph(backend.graph_file, precision=precision, threads=1)  # type: ignore[arg-type]
    x = image(2, 48, 64)
    torch.testing.assert_close(torch.from_numpy(again(x.numpy())), backend(x))
    backend.close()


def test_it_follows_the_model(make_tiny_vit: MakeModel, image: MakeImage, cache: Path) -> None:
    model, x = make_tiny_vit(), image(1, 48, 64)
    backend = OpenVINOBackend(model, threads=1)
    before = backend(x)
    kept = backend.graph_file
    with torch.no_grad():
        model.neck[3].bias.add_(1)
    assert not torch.allclose(backend(x), before)
    assert_right(backend(x), model, x)
    assert backend.graph_file is None
    backend.refresh()
    assert_right(backend(x), model, x)
    assert list((cache / "graphs").glob("*.onnx")) == [kept]


def test_an_engine_with_openvino(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(neck_dim=None)
    model.image_spec = ImageSpec.sam(64, pad=False)
    images = [np.full((40, 56, 3), 9, np.uint8), np.full((64, 20, 3), 200, np.uint8)]
    with Engine(model, backend="openvino", threads=1) as engine:
        assert engine.explain().startswith("openvino 20")
        assert " on cpu, fp32 (exact; the default); images " in engine.explain()
        assert isinstance(engine.backend, LogitsBackend)
        wanted = Engine(model, device="cpu").classify(images)
        torch.testing.assert_close(engine.classify(images), wanted, **TOLERANCE["fp32"])
        torch.testing.assert_close(engine.embed(images), wanted, **TOLERANCE["fp32"])
        with pytest.raises(ValueError, match="'openvino' gives no stages; use 'torch'"):
            engine.stages(images[0])


def test_an_encoder_gives_no_logits(make_tiny_vit: MakeModel) -> None:
    with pytest.raises(ValueError, match="gives features and no logits; use backend='torch'"):
        OpenVINOBackend(make_tiny_vit()).logits(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda"}, "backend 'openvino' runs on device 'cpu', got 'cuda'"),
        ({"precision": "fp16"}, "precision 'fp16' is refused: it ends at 65504"),
        ({"precision": "int8"}, "precision must be one of "),
        ({"threads": 0}, "threads must be at least 1, or None for the default, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, make_tiny_vit: MakeModel) -> None:
    with pytest.raises(ValueError, match=words):
        OpenVINOBackend(make_tiny_vit(), **arguments)


def test_without_openvino(make_tiny_vit: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[openvino\]'$"):
        Engine(make_tiny_vit(), backend="openvino", image_spec=ImageSpec.sam(64))
