import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyvit.evaluate.classify import calibration_error, confusions, hits_in_top, share_of_hits
from tinyvit.evaluate.metrics import bootstrap


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
