from __future__ import annotations

import errno
import json
import threading

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tinyvit.errors import CheckpointError
from tinyvit.factory import create_model
from tinyvit.folders.encode import Job, recipe
from tinyvit.folders.images import list_images
from tinyvit.image_spec import ImageSpec
from tinyvit.images import draw
from tinyvit.images.decode import decode
from tinyvit.inference import Engine


@pytest.fixture(scope="module")
def model(make_tiny_vit):
    model = make_tiny_vit(head=False)
    model.image_spec = ImageSpec.sam(32)
    return model


@pytest.fixture
def make_job(model, tmp_path):
    def make(batch_size=2, workers=1, **changes):
        engine = Engine(model, batch_size=batch_size, workers=workers)
        facts = {
            **dict.fromkeys(("weights_sha256", "image_spec", "precision"), "x"),
            **{"strides": [2, 2, 1], "tinyvit_version": "0"},
        }
        return Job(engine, tmp_path / "out", facts, **changes)

    return make


@pytest.fixture
def images(tmp_path, photo):
    for number in range(5):
        photo(tmp_path / "in" / f"{number}.png", 20 + number, 30, number)
    return list_images([tmp_path / "in"])


def features_of(path):
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("features")


def test_the_recipe_is_plain_data_that_tells_models_apart():
    model = create_model("tiny_vit_2m_sam")
    engine = Engine(model)
    facts = recipe(engine, model, "a name", "tiny_vit_2m_sam")
    assert facts == json.loads(json.dumps(facts))
    assert facts["weights_sha256"] == engine.weights_sha256()
    assert facts["strides"] == [2, 2, 1]
    assert ImageSpec.from_dict(facts["image_spec"]) == model.image_spec
    assert (facts["precision"], facts["device"]) == ("fp32", "cpu")


def test_a_backend_of_one_s_own_is_fp32(model):
    class Fake:
        name, device = "fake", "nowhere"

        def __call__(self, batch):
            return torch.full((len(batch), 3, 2, 2), torch.nan)

        def close(self):
            pass

    engine = Engine(model, backend=Fake())
    assert recipe(engine, model, "x", None)["precision"] == "fp32"


def test_the_features_are_the_engine_s_in_the_order_of_the_images(make_job, images):
    job = make_job(with_drawings=False)
    outcomes = list(job.run(images))
    assert [outcome.image for outcome in outcomes] == images
    assert {outcome.state for outcome in outcomes} == {"written"}
    for outcome in outcomes:
        expected = job.engine.embed(outcome.image.path)[0]
        got = features_of(outcome.features)
        assert got.dtype == torch.float32
        assert tuple(got.shape) == outcome.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)  # another batch size


def test_broken_images_are_outcomes_and_the_others_go_on(make_job, images, tmp_path):
    (tmp_path / "in" / "1.png").write_bytes(b"")
    (tmp_path / "in" / "3.png").unlink()
    outcomes = {o.image.name: o for o in make_job(with_drawings=False).run(images)}
    assert len(outcomes) == 5
    assert {name for name, o in outcomes.items() if o.state == "failed"} == {"1.png", "3.png"}
    assert "is empty" in outcomes["1.png"].reason
    assert f"{tmp_path / 'in' / '3.png'}: No such file" in outcomes["3.png"].reason


def test_features_that_are_no_numbers_fail(make_job, images, monkeypatch):
    job = make_job(with_drawings=False)
    infinite = torch.full((2, 1, 1), torch.inf)
    real = job.engine.stream_prepared

    def stream(inputs, stages):
        for number, encoded in enumerate(real(inputs, stages=stages)):
            if number == 0:
                encoded = type(encoded)(infinite, encoded.placement)
            yield encoded

    monkeypatch.setattr(job.engine, "stream_prepared", stream)
    states = [outcome.state for outcome in job.run(images[:2])]
    assert states == ["failed", "written"]


def test_a_full_disk_stops_the_work_and_leaves_whole_files(make_job, images, monkeypatch):
    real = draw.save_png
    calls = []

    def save(path, pixels):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, pixels)

    monkeypatch.setattr(draw, "save_png", save)
    job = make_job()
    with pytest.raises(OSError, match="No space left"):
        list(job.run(images))
    monkeypatch.undo()
    again = [(outcome.state, outcome.reason) for outcome in job.run(images)]
    assert again[:2] == [("skipped", "")] * 2
    assert again[2] == ("written", "without an image of the features")
    assert again[3:] == [("written", "")] * 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_one_pass_of_the_model_for_each_image(make_job, images, monkeypatch, workers):
    job = make_job(workers=workers)
    calls = []
    real = job.engine.backend.with_stages

    def with_stages(batch):
        calls.append(len(batch))
        return real(batch)

    monkeypatch.setattr(job.engine.backend, "with_stages", with_stages)
    monkeypatch.setattr(type(job.engine.backend), "__call__", lambda self, batch: calls.append(99))
    assert [outcome.state for outcome in job.run(images)] == ["written"] * 5
    assert sum(calls) == 5


def test_the_drawing_is_that_of_the_whole_photograph(make_job, tmp_path, photo):
    photo(tmp_path / "in" / "large.png", 500, 700)
    job = make_job()
    [outcome] = job.run(list_images([tmp_path / "in"]))
    encoded = next(job.engine.stream(outcome.image.path, stages=True))
    stages, features = encoded.stages, encoded.features
    captions = [
        "photograph",
        *(
            f"stage {n}: {' x '.join(str(side) for side in s.shape)}"
            for n, s in enumerate(stages, 1)
        ),
        f"features: {' x '.join(str(side) for side in features.shape)}",
    ]
    image = decode(outcome.image.path)
    row = draw.stage_grid(image, [*stages, features], encoded.placement, captions)
    drawn = decode(outcome.drawing)
    height, pitch = row.shape[0], (row.shape[1] - draw.GAP) // 6
    assert np.array_equal(drawn[:height], row[:, : 3 * pitch + draw.GAP])


def test_broken_images_at_the_end_and_alone(make_job, images, tmp_path):
    for name in ("3.png", "4.png"):
        (tmp_path / "in" / name).write_bytes(b"")
    states = [outcome.state for outcome in make_job().run(images)]
    assert states == ["written"] * 3 + ["failed"] * 2
    assert [outcome.state for outcome in make_job().run(images[3:])] == ["failed"] * 2
    assert [outcome.state for outcome in make_job().run(images)] == ["skipped"] * 3 + ["failed"] * 2


def test_an_image_that_vanishes_or_is_done_meanwhile(make_job, images, tmp_path):
    job = make_job(with_drawings=False)
    other = list(make_job(with_drawings=False).run(images[:1]))
    (tmp_path / "in" / "1.png").unlink()
    first, second = (job._read(image) for image in images[:2])
    assert (first.state, first.features) == ("skipped", other[0].features)
    assert second.state == "failed"


def test_threads_end_when_the_work_is_given_up(make_job, images, monkeypatch):
    before = threading.active_count()
    outcomes = make_job().run(images)
    next(outcomes)
    assert threading.active_count() > before
    outcomes.close()
    assert threading.active_count() == before
    job = make_job(overwrite=True)

    def fail(batch):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(job.engine.backend, "with_stages", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(job.run(images))
    assert threading.active_count() == before


def test_a_name_too_long_for_the_disk_is_one_failed_image(make_job, tmp_path, photo):
    photo(tmp_path / "in" / f"{'x' * 230}.png")
    photo(tmp_path / "in" / "y.png")
    outcomes = list(make_job(with_drawings=False).run(list_images([tmp_path / "in"])))
    assert [outcome.state for outcome in outcomes] == ["failed", "written"]
    assert "too long a name" in outcomes[0].reason


def test_a_disk_that_refuses_features_stops_the_work(make_job, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="could not be written"):
        list(make_job(with_drawings=False, overwrite=True).run(images))


def test_without_drawings_an_old_one_does_not_stay_beside_new_features(make_job, images, tmp_path):
    list(make_job().run(images[:1]))
    assert (tmp_path / "out" / "0.png").exists()
    list(make_job(with_drawings=False, overwrite=True).run(images[:1]))
    assert not (tmp_path / "out" / "0.png").exists()
