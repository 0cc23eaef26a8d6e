"""``Engine.stream``: reading ahead, batches, images without padding, stages, threads."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageSequence
from torch import Tensor

import tinyvit.inference.read_ahead as reading
from tiny import noise
from tinyvit.errors import ImageError
from tinyvit.image_spec import ImageSpec
from tinyvit.images.preprocess import PreparedImage, to_input
from tinyvit.inference import Engine
from tinyvit.inference.engine import run_in_batches
from tinyvit.modules import TinyViT

RGB = NDArray[np.uint8]
MakeModel = Callable[..., TinyViT]

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # other orders of summing and folded norms: ulps per layer
PLAIN = ImageSpec((4, 4), "squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class Mean:
    """A backend in ten lines: the mean of each channel."""

    name, device = "mean", "cpu"

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, batch: Tensor) -> Tensor:
        self.batches.append(tuple(batch.shape))
        return batch.mean((2, 3))

    def close(self) -> None:
        pass


@pytest.fixture
def model(make_tiny_vit: MakeModel) -> TinyViT:
    model = make_tiny_vit()
    model.image_spec = ImageSpec.sam(64)
    return model


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Nine JPEG files of three shapes."""
    paths = [tmp_path / f"{i}.jpg" for i in range(9)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(*((48, 64), (64, 48), (64, 64))[i % 3], i)).save(path)
    return paths


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


# --- reading ahead --------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_threads_change_nothing(
    pad: bool, batch_size: int, model: TinyViT, files: list[Path]
) -> None:
    images = [*files, files[0].read_bytes(), noise(40, 50), Image.open(files[1])]
    alone = list(Engine(model, pad=pad, batch_size=batch_size, workers=0).stream(iter(images)))
    ahead = list(Engine(model, pad=pad, batch_size=batch_size, workers=3).stream(iter(images)))
    assert len(alone) == len(ahead) == 12
    for one, other in zip(alone, ahead, strict=True):
        np.testing.assert_array_equal(one.features, other.features)
        assert one.placement == other.placement


def test_files_are_decoded_in_other_threads_while_the_backend_computes(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    second = threading.Event()
    waited: list[bool] = []

    class Patient(Mean):
        def __call__(self, batch: Tensor) -> Tensor:
            waited.append(second.wait(10))
            return super().__call__(batch)

    engine = Engine(backend=Patient(), image_spec=PLAIN, batch_size=1, workers=1)
    real = reading.prepare

    def prepare(image: Path, spec: ImageSpec) -> PreparedImage:
        decoded.append(threading.current_thread().name)
        if len(decoded) == 2:
            second.set()
        return real(image, spec)

    monkeypatch.setattr(reading, "prepare", prepare)
    assert len(list(engine.stream(files))) == 9
    assert all(waited)
    assert any(name.startswith("tinyvit-read-ahead") for name in decoded)


def test_one_image_starts_no_thread(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(backend=Mean(), image_spec=PLAIN, workers=3)
    monkeypatch.setattr(threading.Thread, "start", None)
    assert engine.embed(files[0]).shape == (1, 3)
    assert engine.embed(files[:1]).shape == (1, 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_change_once_the_next_is_taken(workers: int) -> None:
    """A camera's buffer, a file that is read on, the frames of one image."""
    buffer = np.zeros((6, 6, 3), np.uint8)
    frames = [Image.new("L", (6, 6), 60 + i) for i in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "TIFF", save_all=True, append_images=frames[1:])

    def images() -> Iterator[object]:
        for i in range(5):
            buffer[:] = i
            yield buffer
        for i in range(5, 10):
            buffer[:] = i
            yield torch.from_numpy(buffer).permute(2, 0, 1)
        yield from ImageSequence.Iterator(Image.open(stream))

    engine = Engine(backend=Mean(), image_spec=PLAIN, batch_size=4, workers=workers)
    features = engine.embed(images())  # type: ignore[arg-type]
    assert features[:, 0].int().tolist() == [*range(10), 60, 61, 62]


def test_memory_is_bounded_by_what_is_taken(files: list[Path]) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Path]:
        while True:
            taken.append(1)
            yield files[len(taken) % 9]

    spec = ImageSpec.sam(16, pad=False)
    engine = Engine(backend=Mean(), image_spec=spec, batch_size=2, workers=2)
    stream = engine.stream(endless())
    for i in range(40):
        next(stream)
        assert len(taken) <= i + 1 + 4 * 2 + engine.ahead
    stream.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_broken_file_comes_after_the_good_ones(workers: int, files: list[Path]) -> None:
    files[5].write_bytes(files[5].read_bytes()[:200])
    engine = Engine(backend=Mean(), image_spec=PLAIN, batch_size=4, workers=workers)
    stream = engine.stream(files)
    assert len([next(stream) for _ in range(5)]) == 5
    with pytest.raises(ImageError, match=r"5\.jpg"):
        next(stream)


def test_threads_end_when_the_backend_fails(files: list[Path]) -> None:
    class Fails(Mean):
        def __call__(self, batch: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory"):
        list(Engine(backend=Fails(), image_spec=PLAIN, workers=2).stream(files))
    assert threading.active_count() == before


def test_a_wrong_number_of_workers(model: TinyViT) -> None:
    with pytest.raises(ValueError, match=r"^workers must be at least 0, got -1$"):
        Engine(model, workers=-1)
    assert Engine(model).workers >= 1


# --- batches --------------------------------------------------------------------------------------


def test_large_images_go_alone_on_a_cpu() -> None:
    sizes = {1024: [1, 1, 1], 512: [2, 1], 256: [3]}
    for side, wanted in sizes.items():
        backend = Mean()
        engine = Engine(backend=backend, image_spec=ImageSpec.sam(side), batch_size=8, workers=0)
        engine.embed([noise(4, 4)] * 3)
        assert [batch[0] for batch in backend.batches] == wanted
    backend = Mean()
    backend.device = "cuda"
    Engine(backend=backend, image_spec=ImageSpec.sam(1024), workers=0).embed([noise(4, 4)] * 3)
    assert [batch[0] for batch in backend.batches] == [3]


# --- without padding ------------------------------------------------------------------------------


def test_without_padding_a_map_is_as_large_as_its_image(model: TinyViT) -> None:
    engine = Engine(model, pad=False)
    assert engine.image_spec == ImageSpec.sam(64, pad=False)
    assert "; images longest_side to 64x64, not padded; runs " in engine.explain()
    for height, width in ((64, 64), (64, 43), (43, 64), (200, 133), (1, 64), (33, 64)):
        image = noise(height, width)
        pixels, placement = to_input(image, engine.image_spec)
        encoded = next(engine.stream(image, stages=True))
        rows, columns = placement.resized_size
        assert pixels.shape == (3, rows, columns)
        assert encoded.features.shape == (16, -(-rows // 16), -(-columns // 16))
        assert encoded.placement == placement
        with torch.inference_mode():
            wanted = model(torch.from_numpy(pixels)[None])[0]
        np.testing.assert_allclose(encoded.features, wanted, **CLOSE)


def test_pad_and_image_spec(model: TinyViT) -> None:
    assert Engine(model).image_spec.pad is True
    loose = ImageSpec.sam(32, pad=False)
    assert Engine(model, image_spec=loose).image_spec == loose
    assert Engine(model, image_spec=loose, pad=True).image_spec == ImageSpec.sam(32)
    with pytest.raises(ValueError, match="pad=True goes with resize='longest_side'"):
        Engine(model, image_spec=PLAIN, pad=True)
    assert Engine(model, image_spec=PLAIN, pad=False).image_spec == PLAIN


# --- features and stages in one pass --------------------------------------------------------------


def hook(*given: object) -> None:
    """A model with hooks is run as it is, and not folded."""


@pytest.mark.parametrize("folded", [True, False])
def test_stages_come_with_the_features(folded: bool, make_tiny_vit: MakeModel) -> None:
    model = make_tiny_vit()
    if not folded:
        model.layers[1].register_forward_hook(hook)
    engine = Engine(model, image_spec=ImageSpec.sam(64, pad=False), batch_size=3)
    images = [noise(64, 40, 0), noise(64, 40, 1), noise(40, 64), noise(64, 40, 2)]
    out = list(engine.stream(images, stages=True))
    assert len(out) == 4
    for encoded, image in zip(out, images, strict=True):
        assert isinstance(encoded.stages, tuple)
        np.testing.assert_allclose(encoded.features, engine.embed(image)[0], **CLOSE)
        for got, wanted in zip(encoded.stages, engine.stages(image)[0], strict=True):
            np.testing.assert_allclose(got, wanted, **CLOSE)
    assert next(engine.stream(images)).stages is None


@pytest.mark.parametrize("folded", [True, False])
def test_stages_come_with_a_classifier_s_logits(folded: bool, make_tiny_vit: MakeModel) -> None:
    classifier = make_tiny_vit(neck_dim=None, strides=(2, 2, 2))
    if not folded:
        classifier.layers[1].register_forward_hook(hook)
    engine = Engine(classifier, image_spec=ImageSpec.timm(64))
    encoded = next(engine.stream(noise(50, 70), stages=True))
    np.testing.assert_allclose(encoded.features, engine.classify(noise(50, 70))[0], **CLOSE)
    assert encoded.stages is not None
    assert [tuple(s.shape)[1:] for s in encoded.stages] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_without_a_head_or_stages(make_tiny_vit: MakeModel) -> None:
    engine = Engine(make_tiny_vit(head=False, neck_dim=None), image_spec=ImageSpec.sam(64))
    encoded = next(engine.stream(noise(64, 64), stages=True))
    assert encoded.stages is not None
    np.testing.assert_array_equal(encoded.features, encoded.stages[-1])
    engine = Engine(backend=Mean(), image_spec=PLAIN)
    with pytest.raises(ValueError, match=r"^the backend 'mean' gives no stages; use 'torch'$"):
        next(engine.stream(noise(8, 8), stages=True))


def test_prepared_images(model: TinyViT) -> None:
    engine = Engine(model)
    images = [noise(40, 56), noise(64, 30)]
    out = list(engine.encode(engine.prepare(image) for image in images))
    np.testing.assert_allclose([e.features for e in out], engine.embed(images), **CLOSE)
    assert [e.placement.original_size for e in out] == [(40, 56), (64, 30)]


# --- threads of the caller's ----------------------------------------------------------------------


def test_two_engines_in_two_threads(make_tiny_vit: MakeModel, files: list[Path]) -> None:
    engines = []
    for seed in range(2):
        model = make_tiny_vit(seed=seed)
        model.image_spec = ImageSpec.sam(64, pad=False)
        engines.append(Engine(model, batch_size=2, workers=2))
    alone = [[e.features for e in engine.stream(files)] for engine in engines]
    with ThreadPoolExecutor(4) as threads:
        calls = [engines[i % 2] for i in range(8)]  # and each engine in two threads at a time
        together = list(
            threads.map(lambda engine: [e.features for e in engine.stream(files)], calls)
        )
    for i, features in enumerate(together):
        assert all(map(np.array_equal, features, alone[i % 2]))


Array = NDArray[np.float32]
Inputs = Iterator[tuple[Array, int]]


def images(widths: list[int]) -> list[tuple[Array, int]]:
    return [(np.full((3, 2, width), i, np.float32), i) for i, width in enumerate(widths)]


class Run:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def __call__(self, batch: Array) -> list[Array]:
        self.batches.append([int(image[0, 0, 0]) for image in batch])
        return [image.copy() for image in batch]


@given(st.lists(st.integers(1, 4), max_size=30), st.integers(1, 5), st.integers(1, 12))
def test_every_input_once_in_order(widths: list[int], size: int, window: int) -> None:
    run, given = Run(), images(widths)
    out = list(run_in_batches(iter(given), run, lambda _: size, window))
    assert [label for _, label in out] == list(range(len(widths)))
    for (result, _), (tensor, _) in zip(out, given, strict=True):
        np.testing.assert_array_equal(result, tensor)
    assert sorted(i for batch in run.batches for i in batch) == list(range(len(widths)))
    for batch in run.batches:
        assert len(batch) <= size
        assert len({widths[i] for i in batch}) == 1
        assert max(batch) - min(batch) < max(window, 1)


def test_one_shape_waits_for_its_own_batch_only() -> None:
    run, taken = Run(), []

    def inputs() -> Inputs:
        for item in images([4] * 9):
            taken.append(item[1])
            yield item

    for i, _ in enumerate(run_in_batches(inputs(), run, lambda _: 3, window=100)):
        assert len(taken) == i // 3 * 3 + 3
    assert run.batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_shapes_are_put_together_within_the_window() -> None:
    run = Run()
    list(run_in_batches(iter(images([1, 2] * 4)), run, lambda _: 4, window=8))
    assert run.batches == [[0, 2, 4, 6], [1, 3, 5, 7]]
    run = Run()
    list(run_in_batches(iter(images([1, 2] * 4)), run, lambda _: 4, window=3))
    assert run.batches == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_the_largest_batch_may_depend_on_the_shape() -> None:
    run = Run()
    most = lambda tensor: 6 // tensor.shape[2]  # noqa: E731
    list(run_in_batches(iter(images([3, 3, 3, 2, 2, 2])), run, most, window=20))
    assert run.batches == [[0, 1], [3, 4, 5], [2]] or run.batches == [[0, 1], [2], [3, 4, 5]]


def test_errors_of_the_inputs_come_after_the_good_ones_and_of_the_run_at_once() -> None:
    def broken() -> Inputs:
        yield from images([1, 2, 1])
        raise OSError("gone")

    results = run_in_batches(broken(), Run(), lambda _: 4, window=8)
    assert [next(results)[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(results)

    def fail(batch: Array) -> list[Array]:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        list(run_in_batches(iter(images([1])), fail, lambda _: 4, window=8))


def test_nothing() -> None:
    assert list(run_in_batches(iter(()), Run(), lambda _: 2, window=2)) == []
