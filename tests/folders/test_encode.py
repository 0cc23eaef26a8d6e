from __future__ import annotations

import errno

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tiny import make_tiny_vit, write_image
from tinyvit.errors import CheckpointError
from tinyvit.folders.encode import EncodeFolder, draw_features
from tinyvit.folders.images import list_images
from tinyvit.image_spec import ImageSpec
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.inference import Encoded, Engine


@pytest.fixture(scope="module")
def model():
    model = make_tiny_vit(head=False)
    model.image_spec = ImageSpec.sam(32)
    return model


@pytest.fixture
def make_work(model, tmp_path):
    def make(batch_size=2, workers=1, **changes):
        engine = Engine(model, batch_size=batch_size, workers=workers)
        facts = {
            **dict.fromkeys(("weights_sha256", "image_spec", "precision"), "x"),
            **{"strides": [2, 2, 1], "tinyvit_version": "0"},
        }
        return EncodeFolder(engine, tmp_path / "out", facts, **changes)

    return make


@pytest.fixture
def images(tmp_path):
    for number in range(5):
        write_image(tmp_path / "in" / f"{number}.png", 20 + number, 30, number)
    return list_images([tmp_path / "in"])


def test_the_features_are_the_engine_s_in_the_order_of_the_images(make_work, images):
    work = make_work(with_drawings=False)
    outcomes = list(work.run(images))
    assert [outcome.item for outcome in outcomes] == images
    assert {outcome.state for outcome in outcomes} == {"written"}
    for outcome in outcomes:
        expected = work.engine.embed(outcome.item.path)[0]
        with safe_open(outcome.told["features"], framework="pt") as file:
            got = file.get_tensor("features")
        assert got.dtype == torch.float32
        assert list(got.shape) == outcome.told["shape"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # another batch size


def test_features_that_are_not_finite_fail(make_work, images, monkeypatch):
    work = make_work(with_drawings=False)
    real = work.engine.encode

    def stream(inputs, stages):
        for number, encoded in enumerate(real(inputs, stages=stages)):
            infinite = encoded.features * np.inf
            yield Encoded(infinite, encoded.placement) if number == 0 else encoded

    monkeypatch.setattr(work.engine, "encode", stream)
    first, second = work.run(images[:2])
    assert (first.state, second.state) == ("failed", "written")
    assert "its features are not all finite numbers; try --precision fp32" in first.reason


def test_a_full_disk_stops_the_work_and_leaves_whole_files(make_work, images, monkeypatch):
    real = draw.save_png
    calls = []

    def save(path, pixels):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, pixels)

    monkeypatch.setattr(draw, "save_png", save)
    work = make_work()
    with pytest.raises(OSError, match="No space left"):
        list(work.run(images))
    monkeypatch.undo()
    again = [(outcome.state, outcome.reason) for outcome in work.run(images)]
    assert again[:2] == [("skipped", "")] * 2
    assert again[2] == ("written", "without an image of the features")
    assert again[3:] == [("written", "")] * 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_one_pass_of_the_model_for_each_image(make_work, images, monkeypatch, workers):
    work = make_work(workers=workers)
    calls = []
    real = work.engine.backend.with_stages

    def with_stages(batch):
        calls.append(len(batch))
        return real(batch)

    monkeypatch.setattr(work.engine.backend, "with_stages", with_stages)
    monkeypatch.setattr(type(work.engine.backend), "__call__", lambda self, batch: calls.append(99))
    assert [outcome.state for outcome in work.run(images)] == ["written"] * 5
    assert sum(calls) == 5


def test_a_disk_that_refuses_features_stops_the_work(make_work, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        list(make_work(with_drawings=False, overwrite=True).run(images))


def test_without_drawings_an_old_one_does_not_stay_beside_new_features(make_work, images, tmp_path):
    (first,) = make_work().run(images[:1])
    assert first.told["drawing"] == str(tmp_path / "out" / "0.png")
    (skipped,) = make_work(with_drawings=False).run(images[:1])
    assert (skipped.state, skipped.told["drawing"]) == ("skipped", first.told["drawing"])
    (again,) = make_work(with_drawings=False, overwrite=True).run(images[:1])
    assert again.told["drawing"] is None
    assert not (tmp_path / "out" / "0.png").exists()
    (tmp_path / "out" / "0.png").write_text("mine")
    list(make_work(with_drawings=False, overwrite=True).run(images[:1]))
    assert (tmp_path / "out" / "0.png").read_text() == "mine"


def test_the_drawing_shows_the_whole_image(make_work, tmp_path):
    path = write_image(tmp_path / "in" / "large.png", 500, 700)
    work = make_work()
    (outcome,) = work.run(list_images([path]))
    encoded = next(work.engine.stream(path, stages=True))
    drawn = decode(outcome.told["drawing"])
    np.testing.assert_array_equal(drawn, draw_features(decode(path), encoded))


@pytest.mark.parametrize("size", [(30, 20), (20, 90), (1, 1)])
@pytest.mark.parametrize("is_new", [True, False])
def test_the_drawing_has_rows_of_three_panels(size, is_new):
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((4, side, side), np.float32) for side in (8, 4, 2, 2)]
    features = rng.standard_normal((5, 2, 2), np.float32) if is_new else maps[-1].copy()
    image = np.full((*size, 3), 200, np.uint8)
    drawing = draw_features(image, Encoded(features, ImageSpec.sam(32).place(*size), tuple(maps)))
    assert drawing.dtype == np.uint8
    stride = (drawing.shape[1] - draw.GAP) // 3
    half = drawing.shape[0] // 2
    last = drawing[half:, 2 * stride :]
    assert (drawing[:half, draw.GAP : stride] != 255).any()  # the image
    assert bool((last != 255).any()) == is_new  # the sixth panel: features, or plain paper
    assert (drawing[: draw.GAP] == 255).all()
