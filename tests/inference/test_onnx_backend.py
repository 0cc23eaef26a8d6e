from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyvit.errors import MissingExtraError
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Backend, Engine, LogitsBackend, OnnxBackend, OnnxGraph
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # other orders of summing


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_right(out: Tensor, model: TinyViT, x: Tensor) -> None:
    with torch.inference_mode():
        torch.testing.assert_close(out, model(x), **CLOSE)


def test_it_gives_what_the_model_gives(
    make_tiny_vit: MakeModel, image: MakeImage, cache: Path
) -> None:
    model = make_tiny_vit()
    backend = OnnxBackend(model, precision="auto", threads=1)
    assert isinstance(backend, Backend)
    assert (backend.name, backend.device, backend.precision) == ("onnx", "cpu", "fp32")
    for shape in ((1, 250, 33), (2, 48, 64), (1, 1, 1), (3, 17, 33)):
        out = backend(image(*shape))
        assert_right(out, model, image(*shape))
        out.zero_()  # it is the caller's own
        assert_right(backend(image(*shape)), model, image(*shape))
    assert backend.graph_file is not None
    assert backend.graph_file.parent == cache / "graphs"


def test_hooks_and_foreign_modules_run(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model, x = make_tiny_vit(), image(1, 33, 48)
    model.neck = torch.nn.Sequential(model.neck[0], torch.nn.Tanh())
    model.layers[1].register_forward_hook(lambda module, args, out: out * 2)
    backend = OnnxBackend(model)
    assert_right(backend(x), model, x)
    assert backend.graph_file is None


def test_it_follows_the_model(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model, x = make_tiny_vit(drop_path_rate=0.5).train(), image(2, 48, 64)
    backend = OnnxBackend(model, threads=1)
    before = backend(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    after = backend(x)
    assert not torch.allclose(after, before, atol=1e-3)
    assert model.training
    assert_right(after, model.eval(), x)


def test_threads_give_what_one_gives(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    backend = OnnxBackend(make_tiny_vit(), threads=1)
    inputs = [image(1, 32, 32 + 16 * i) for i in range(3)]
    wanted = [backend(x) for x in inputs]
    backend.refresh()
    wrong: list[int] = []

    def work(offset: int) -> None:
        for step in range(6):
            i = (step + offset) % 3
            if not torch.equal(backend(inputs[i]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_engine_with_onnx(make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit(neck_dim=None)
    model.image_spec = ImageSpec.sam(64, pad=False)
    images = [np.full((40, 56, 3), 9, np.uint8), np.full((64, 20, 3), 200, np.uint8)]
    with Engine(model, backend="onnx", threads=1) as engine:
        assert engine.explain().startswith("onnxruntime ")
        assert "fp32 (the only precision of this backend)" in engine.explain()
        assert isinstance(engine.backend, LogitsBackend)
        wanted = Engine(model, device="cpu").classify(images)
        torch.testing.assert_close(engine.classify(images), wanted, **CLOSE)
        with pytest.raises(ValueError, match="'onnx' gives no stages; use 'torch'"):
            engine.stages(images[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda"}, "backend 'onnx' runs on device 'cpu', got 'cuda'"),
        ({"precision": "bf16"}, "backend 'onnx' computes in precision 'fp32' only, got 'bf16'; "),
        ({"precision": "fp16"}, "precision 'fp16' is refused: it ends at 65504"),
        ({"precision": "int8"}, "precision must be one of "),
        ({"threads": 0}, "threads must be at least 1, or None for the default, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, make_tiny_vit: MakeModel) -> None:
    with pytest.raises(ValueError, match=words):
        OnnxBackend(make_tiny_vit(), **arguments)


def test_a_damaged_graph(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\x08" * 100)
    with pytest.raises(ValueError, match=r"ONNX Runtime cannot read .*graph\.onnx as a graph: "):
        OnnxGraph(path)
    with pytest.raises(ValueError, match="ONNX Runtime cannot read these bytes as a graph: "):
        OnnxGraph(b"nothing")


def test_a_damaged_graph_in_the_cache_is_made_anew(
    make_tiny_vit: MakeModel, image: MakeImage
) -> None:
    model, x = make_tiny_vit(), image(1, 33, 48)
    first = OnnxBackend(model)
    file = first.graph_file
    assert file is not None
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    second = OnnxBackend(model)
    assert_right(second(x), model, x)
    assert second.graph_file == file
    assert len(file.read_bytes()) == len(whole)


def test_a_closed_backend_makes_what_it_needs(make_tiny_vit: MakeModel, image: MakeImage) -> None:
    model, x = make_tiny_vit(), image(1, 33, 48)
    backend = OnnxBackend(model)
    runner, _ = backend._derived.get()
    backend.close()
    with pytest.raises(RuntimeError, match="this OnnxGraph was closed"):
        runner(x.numpy())
    assert_right(backend(x), model, x)


def test_without_onnxruntime(make_tiny_vit: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[onnx\]'$"):
        Engine(make_tiny_vit(), backend="onnx", image_spec=ImageSpec.sam(64))
