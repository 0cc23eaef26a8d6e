"""The engine on every backend: several engines in several threads, and memory for long."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import noise
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Engine
from tinyvit.inference.backend import BackendName
from tinyvit.modules import TinyViT

MakeModel = Callable[..., TinyViT]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("backend", ["torch", "openvino", "onnx"])
def test_two_engines_in_two_threads(backend: BackendName, make_tiny_vit: MakeModel) -> None:
    engines = []
    for seed in range(2):
        model = make_tiny_vit(seed=seed)
        model.image_spec = ImageSpec.sam(64)
        threads = None if backend == "torch" else 1
        engines.append(Engine(model, backend=backend, device="cpu", threads=threads))
    images = [noise(40, 56, seed) for seed in range(3)]
    alone = [engine.embed(images) for engine in engines]
    assert not torch.allclose(*alone, atol=0.1)
    with ThreadPoolExecutor(4) as workers:
        together = list(workers.map(lambda i: engines[i % 2].embed(images), range(6)))
    for i, features in enumerate(together):
        # OpenVINO may sum in another order in the form that a shape gets at its third call
        torch.testing.assert_close(features, alone[i % 2], rtol=1e-5, atol=1e-5)


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("backend", ["torch", "openvino", "onnx"])
def test_memory_does_not_grow(
    backend: BackendName, make_tiny_vit: MakeModel, tmp_path: Path
) -> None:
    paths = []
    for i in range(25):
        paths.append(tmp_path / f"{i}.jpg")
        Image.fromarray(noise(300 + 8 * i, 500 - 4 * i, i)).save(paths[-1])
    spec = ImageSpec.sam(256, pad=backend == "openvino")  # which compiles for minutes for 25 shapes
    engine = Engine(
        make_tiny_vit(), backend=backend, device="cpu", image_spec=spec, batch_size=4, workers=2
    )

    def run(times: int) -> int:
        for _ in range(times):
            for encoded in engine.stream(paths, stages=backend == "torch"):
                assert np.isfinite(encoded.features).all()
        gc.collect()
        return resident_bytes()

    after_100 = run(4)
    after_600 = run(20)
    # An image's tensors are 1.5 MB: one kept in a hundred would be 8 MB; the allocator moves by 10
    assert after_600 - after_100 < 24 << 20
