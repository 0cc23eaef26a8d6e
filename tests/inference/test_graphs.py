from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tinyvit.errors import MissingExtraError
from tinyvit.inference.graph_backend import export_onnx
from tinyvit.inference.graphs import OpenVINOGraph, kept_core, load_library
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]
MakeImage = Callable[..., Tensor]
Array = NDArray[np.float32]

# fp32: other orders of summing; bf16 keeps 8 bits, see test_torch_backend.py
TOLERANCE = {"fp32": {"rtol": 1e-4, "atol": 1e-4}, "bf16": {"rtol": 0.05, "atol": 0.15}}

CAPABLE = kept_core(load_library("openvino", "OpenVINO")).get_property(
    "CPU", "OPTIMIZATION_CAPABILITIES"
)
needs_bf16 = pytest.mark.skipif("BF16" not in CAPABLE, reason="this CPU does not compute bf16")


@pytest.fixture(scope="module")
def model(make_tiny_vit: MakeModel) -> TinyViT:
    return make_tiny_vit()


@pytest.fixture(scope="module")
def file(model: TinyViT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "encoder.onnx"
    path.write_bytes(export_onnx(model))
    return path


@pytest.fixture(scope="module")
def graph(file: Path) -> OpenVINOGraph:
    return OpenVINOGraph(file, threads=1)


def assert_right(out: Array, model: TinyViT, x: Tensor, precision: str = "fp32") -> None:
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(out), model(x), **TOLERANCE[precision])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 17, 33), (2, 75, 58), (1, 64, 64)])
def test_any_size_and_batch(
    shape: tuple[int, int, int], graph: OpenVINOGraph, model: TinyViT, image: MakeImage
) -> None:
    x = image(*shape)
    out = graph(x.numpy())
    assert_right(out, model, x)
    out[...] = 0  # it is the caller's own
    assert_right(graph(x.numpy()), model, x)
    assert_right(graph(x.contiguous(memory_format=torch.channels_last).numpy()), model, x)


def test_a_shape_that_comes_again_gets_a_form_of_its_own(
    file: Path, model: TinyViT, image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyvit.inference.graphs._OWN_FORMS", 1)
    monkeypatch.setattr("tinyvit.inference.graphs._SHAPES_COUNTED", 3)
    graph = OpenVINOGraph(file, threads=1)
    compiled: list[object] = []
    really = graph._compile
    monkeypatch.setattr(graph, "_compile", lambda *a: compiled.append(a) or really(*a))
    first, second = image(1, 33, 17), image(2, 48, 64)
    for calls, x in ((2, first), (2, second), (2, first), (3, second), (1, second)):
        for _ in range(calls):
            assert_right(graph(x.numpy()), model, x)
    assert [tuple(shape) for shape in graph._own] == [(2, 3, 48, 64)]
    assert len(compiled) == 2
    for size in range(20, 30):  # shapes that never come again are forgotten
        graph(image(1, size, size).numpy())
    assert len(compiled) == 2
    assert len(graph._counts) <= 3


@needs_bf16
def test_bf16_is_bf16_and_fp32_is_fp32_whatever_is_kept(
    file: Path, model: TinyViT, image: MakeImage
) -> None:
    x = image(1, 75, 58)
    for precision in ("fp32", "bf16", "fp32", "bf16"):  # twice: compiled, and kept beside the file
        graph = OpenVINOGraph(file, precision=precision, threads=1)  # type: ignore[arg-type]
        out = graph(x.numpy())
        assert_right(out, model, x, precision)
        with torch.inference_mode():
            is_exact = torch.allclose(torch.from_numpy(out), model(x), atol=1e-4)
        assert is_exact == (precision == "fp32")
    assert len(list(file.with_suffix(".compiled").glob("*/*.blob"))) == 2


def test_a_file_with_other_weights_is_compiled_anew(
    make_tiny_vit: MakeModel, image: MakeImage, tmp_path: Path
) -> None:
    x, path, cache = image(1, 32, 32), tmp_path / "graph.onnx", tmp_path / "kept"
    for seed in (1, 2):
        model = make_tiny_vit(seed)
        path.write_bytes(export_onnx(model))
        assert_right(OpenVINOGraph(path, cache_dir=cache)(x.numpy()), model, x)
    assert len(list(cache.iterdir())) == 2
    out = OpenVINOGraph(export_onnx(model), threads=2)(x.numpy())
    assert_right(out, model, x)


def test_threads_give_what_one_gives(graph: OpenVINOGraph, image: MakeImage) -> None:
    inputs = [image(1, 32, 32 + 16 * i).numpy() for i in range(3)]
    wanted = [graph(x) for x in inputs]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for step in range(6):
            i = (step + offset) % 3
            if not np.allclose(graph(inputs[i]), wanted[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


START = """
import sys
import numpy as np
from tinyvit.inference import OpenVINOGraph

out = OpenVINOGraph(sys.argv[1], threads=1)(np.zeros((1, 3, 40, 56), np.float32))
print(out.shape, "torch" in sys.modules, "onnx" in sys.modules)
"""


def test_it_starts_without_torch(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START, str(file)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "(1, 16, 3, 4) False False\n", done.stderr


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (
            np.zeros((3, 8, 8), np.float32),
            r"wants images \[batch, 3, height, width\] .*\[3, 8, 8",
        ),
        (np.zeros((1, 4, 8, 8), np.float32), r"got \[1, 4, 8, 8\]"),
        (np.zeros((0, 3, 8, 8), np.float32), r"got \[0, 3, 8, 8\]"),
        (np.zeros((1, 3, 8, 8), np.uint8), "wants images in float32, got uint8"),
    ],
)
def test_arrays_of_another_form(array: Any, words: str, graph: OpenVINOGraph) -> None:
    with pytest.raises(ValueError, match=words):
        graph(array)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": "nothing.onnx"}, "there is no graph nothing.onnx"),
        ({"source": b"nothing"}, "OpenVINO cannot read these bytes as a graph: "),
        ({"precision": "fp16"}, r"precision must be one of \('fp32', 'bf16'\), got 'fp16'"),
        ({"threads": 0}, "threads must be at least 1, or None for the default, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, file: Path) -> None:
    with pytest.raises(ValueError, match=words):
        OpenVINOGraph(**{"source": file, **arguments})


def test_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\x08" * 100)
    with pytest.raises(ValueError, match=r"OpenVINO cannot read .*graph\.onnx as a graph: "):
        OpenVINOGraph(path)


def test_a_precision_that_this_machine_lacks(
    graph: OpenVINOGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "precision", "bf16")  # the settings still say f32
    with pytest.raises(ValueError, match="computes f32 on this machine where bf16 was asked for"):
        graph._compile(graph._model, {})


def test_a_closed_graph(file: Path) -> None:
    graph = OpenVINOGraph(file, threads=1)
    graph.close()
    with pytest.raises(RuntimeError, match="was closed"):
        graph(np.zeros((1, 3, 8, 8), np.float32))


def test_without_openvino(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tinyvit\[openvino\]'$"):
        OpenVINOGraph(file)


def test_a_signal_after_a_graph_was_dropped_in_a_thread(file: Path) -> None:
    """OpenVINO leaves a signal stack behind that is unmapped, unless one core is kept."""
    code = """
import gc, signal, sys, threading
from tinyvit.inference.graphs import OpenVINOGraph

graphs = [OpenVINOGraph(sys.argv[1], cache_dir=None)]
thread = threading.Thread(target=graphs.clear)
thread.start()
thread.join()
gc.collect()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")
