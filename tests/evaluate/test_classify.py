import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tinyvit
from tinyvit.evaluate.classify import (
    calibration_error,
    confusions,
    evaluate_classifier,
    hits_in_top,
    share_of_hits,
)
from tinyvit.evaluate.metrics import bootstrap
from tinyvit.image_spec import ImageSpec


@dataclass
class Listed:
    sources: list
    labels: np.ndarray
    classes: tuple

    def __len__(self):
        return len(self.sources)

    def name(self, index):
        return f"image {index}"

    def source(self, index) -> Path | bytes:
        return self.sources[index]


@pytest.fixture
def engine(make_tiny_vit):
    model = make_tiny_vit(num_classes=7, img_size=16, neck_dim=None, strides=(2, 2, 2))
    model.image_spec = ImageSpec.timm(16)
    with tinyvit.Engine(model, batch_size=3) as made:
        yield made


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    paths = []
    for i in range(10):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(paths[-1])
    return Listed(paths, rng.integers(0, 7, 10), tuple("abcdefg"))


def test_the_report_is_what_the_logits_say(engine, images):
    told = []
    report = evaluate_classifier(engine, images, progress=lambda *now: told.append(now))
    logits = engine.classify(images.sources)
    labels = torch.from_numpy(images.labels)
    hits = logits.argmax(1) == labels
    assert report.images == report.top1.count == 10
    assert report.top1.value == float(hits.double().mean())
    assert report.top1.low <= report.top1.value <= report.top1.high
    in_five = [labels[i] in logits[i].topk(5).indices for i in range(10)]
    assert report.top5.value == np.mean(in_five)
    wanted = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert report.loss == pytest.approx(float(wanted), abs=1e-6)
    assert report.confidence == pytest.approx(float(logits.softmax(1).max(1).values.mean()))
    assert told == [(3, 10), (6, 10), (9, 10), (10, 10)]
    assert report.seconds > 0
    assert report.milliseconds == pytest.approx(100 * report.seconds)
    assert report.peak_memory is None or report.peak_memory > 1 << 20
    assert report.engine == engine.explain()


def test_the_worst_images_are_named(engine, images):
    report = evaluate_classifier(engine, images, most_wrong=4)
    chances = engine.classify(images.sources).softmax(1)
    sure = [row.probability for row in report.wrong]
    assert sure == sorted(sure, reverse=True)
    assert len(report.wrong) == 4
    for row in report.wrong:
        assert row.name == f"image {row.index}"
        assert row.label == images.classes[images.labels[row.index]] != row.predicted
        assert row.predicted == images.classes[int(chances[row.index].argmax())]
        assert row.probability == pytest.approx(float(chances[row.index].max()))


def test_broken_images_are_named_and_not_measured(engine, images):
    whole = evaluate_classifier(engine, images)
    images.sources.insert(3, b"nonsense")
    images.labels = np.insert(images.labels, 3, 0)
    report = evaluate_classifier(engine, images)
    assert list(report.broken) == ["image 3"]
    assert "is not an image" in report.broken["image 3"]
    assert (report.images, report.top1) == (10, whole.top1)
    assert report.loss == pytest.approx(whole.loss, abs=1e-5)  # other batches


def test_all_broken(engine):
    with pytest.raises(ValueError, match=r"no image of 1 could be read; image 0: .*0 bytes"):
        evaluate_classifier(engine, Listed([b""], np.array([0]), tuple("abcdefg")))


def test_another_number_of_classes(engine, images):
    images.classes = tuple("abcdefgh")
    with pytest.raises(ValueError, match="the model has 7 classes and the images have 8"):
        evaluate_classifier(engine, images)


def test_few_classes_have_no_top5(make_tiny_vit, images):
    model = make_tiny_vit(num_classes=3, img_size=16, neck_dim=None, strides=(2, 2, 2))
    model.image_spec = ImageSpec.timm(16)
    listed = Listed(images.sources, images.labels % 3, tuple("abc"))
    report = evaluate_classifier(tinyvit.Engine(model), listed)
    assert report.top5 is None
    assert "top-5" not in dict(report.rows())


def test_rows_and_json(engine, images):
    report = evaluate_classifier(engine, images)
    rows = dict(report.rows())
    assert rows["images"] == "10 in 7 classes"
    assert rows["top-1"].startswith(f"{report.top1.value:.1%} (")
    values = json.loads(json.dumps(report.to_json()))
    assert values["top1"]["value"] == report.top1.value
    assert values["confusions"][0]["accuracy"] == report.confusions[0].accuracy


def test_hits_in_top_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    labels = torch.tensor([1, 0])
    assert hits_in_top(logits, labels, 1).tolist() == [False, False]
    assert hits_in_top(logits, labels, 2).tolist() == [True, False]
    assert hits_in_top(logits, labels, 9).tolist() == [True, True]


@pytest.mark.parametrize("hits, count", [(0, 20), (20, 20), (31, 40), (300, 1000)])
def test_the_interval_is_that_of_drawing_images(hits, count):
    values = np.arange(count) < hits
    made = share_of_hits(values, resamples=4000)
    drawn = bootstrap(values.astype(float).tolist(), range(count), resamples=4000)
    assert made.value == hits / count
    assert made.count == count
    # two draws of 4000: the ends differ by little more than the step between two shares
    assert made.low == pytest.approx(drawn.low, abs=1.5 / count + 0.004)
    assert made.high == pytest.approx(drawn.high, abs=1.5 / count + 0.004)
    assert share_of_hits(values) == share_of_hits(values)


def test_no_images_have_no_share():
    with pytest.raises(ValueError, match="at least one image, got none"):
        share_of_hits(np.zeros(0, bool))


def test_calibration_by_hand():
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False, True, False])
    # |0.95 - 0.75| of four and |0.55 - 0.5| of two
    assert calibration_error(sure, right) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0
    assert calibration_error(np.zeros(0), np.zeros(0, bool)) == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_calibration_lies_between_the_total_difference_and_one(pairs):
    sure = np.array([p for p, _ in pairs])
    right = np.array([h for _, h in pairs])
    error = calibration_error(sure, right)
    assert abs(sure.mean() - right.mean()) - 1e-9 <= error <= 1 + 1e-9


def test_confusions_name_the_worst_first():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    answers = np.array([1, 1, 2, 0, 1, 1, 2, 2, 0])
    found = confusions(labels, answers, ("a", "b", "c"))
    assert [(row.name, row.images) for row in found] == [("a", 4), ("c", 3)]
    assert found[0].accuracy == 0.25
    assert found[0].taken_for == (("b", 2), ("c", 1))
    assert confusions(labels, answers, ("a", "b", "c"), most=1) == found[:1]
    assert confusions(labels, labels, ("a", "b", "c")) == ()
