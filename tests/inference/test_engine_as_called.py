"""``Engine`` as others call it: in other processes, in threads, on a busy machine, in autocast."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tiny import noise
from tinyvit.image_spec import ImageSpec
from tinyvit.inference import Engine
from tinyvit.inference.backend import BackendName

IMAGES = [noise(40, 56, seed) for seed in range(4)]
BACKENDS: list[BackendName] = ["torch", "openvino", "onnx"]
if find_spec("tinyvit_native") is not None:
    BACKENDS.append("native")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # OpenVINO may sum in another order at a shape's third call

MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(
    make_tiny_vit: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> MakeEngine:
    monkeypatch.setenv("TINYVIT_CACHE", str(tmp_path / "cache"))

    def make(backend: BackendName = "torch") -> Engine:
        threads = None if backend == "torch" else 1
        spec = ImageSpec.sam(64)
        return Engine(make_tiny_vit(), backend=backend, image_spec=spec, threads=threads)  # type: ignore[arg-type]

    return make


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_inference_mode_change_nothing(
    backend: BackendName, dtype: torch.dtype, make_engine: MakeEngine
) -> None:
    """As Lightning and Accelerate wrap a validation step; the first call makes what runs."""
    wanted = make_engine(backend).embed(IMAGES)
    engine = make_engine(backend)
    for _ in range(2):
        with torch.inference_mode(), torch.autocast("cpu", dtype):
            got = engine.embed(IMAGES)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_used", [False, True])
def test_copies_of_every_backend(
    is_used: bool, backend: BackendName, make_engine: MakeEngine
) -> None:
    engine = make_engine(backend)
    wanted = engine.embed(IMAGES)
    given = engine if is_used else make_engine(backend)
    for twin in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        torch.testing.assert_close(twin.embed(IMAGES), wanted, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_threads_share_an_engine(backend: BackendName, make_engine: MakeEngine) -> None:
    engine = make_engine(backend)
    wanted = make_engine(backend).embed(IMAGES)
    with ThreadPoolExecutor(4) as threads:
        for got in threads.map(lambda _: engine.embed(IMAGES), range(8)):
            torch.testing.assert_close(got, wanted, **CLOSE)


def test_a_process_that_is_spawned_takes_an_engine(make_engine: MakeEngine) -> None:
    """As DataLoader, Ray and Windows do, and Python 3.14 everywhere."""
    engine = make_engine()
    wanted = engine.embed(IMAGES)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as processes:
        got: Tensor = processes.submit(engine.embed, IMAGES).result(timeout=240)
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_joblib_takes_an_engine(make_engine: MakeEngine) -> None:
    joblib = pytest.importorskip("joblib")
    engine = make_engine()
    wanted = engine.embed(IMAGES)
    jobs = [joblib.delayed(engine.embed)(IMAGES)] * 2
    for got in joblib.Parallel(n_jobs=2, prefer="threads")(jobs):
        torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.fixture
def busy() -> Iterator[None]:
    """Six processes that do nothing but compute, at normal priority."""
    loop = "print(flush=True)\nwhile True: pass"
    others = [
        subprocess.Popen([sys.executable, "-c", loop], stdout=subprocess.PIPE) for _ in range(6)
    ]
    try:
        for other in others:
            assert other.stdout is not None
            other.stdout.readline()
        yield
    finally:
        for other in others:
            other.kill()
            other.communicate()


@pytest.mark.usefixtures("busy")
def test_readers_get_their_share_of_a_busy_machine(make_engine: MakeEngine, tmp_path: Path) -> None:
    """At nice 19 the readers starved: not one of two images in 380 s, against 17 s without them."""
    big = np.kron(noise(60, 90), np.ones((20, 20, 1), np.uint8))
    paths = [tmp_path / f"{i}.jpg" for i in range(4)]
    for path in paths:
        Image.fromarray(big).save(path)
    engine = make_engine()
    engine.embed(IMAGES)
    seconds = {}
    for workers in (0, 2):
        engine.workers = workers
        start = time.perf_counter()
        assert len(list(engine.stream(paths))) == len(paths)
        seconds[workers] = time.perf_counter() - start
    assert seconds[2] < 3 * seconds[0] + 2
